"""benchmarks/scaling.py and the smoke stage: what needs no machine."""

import pytest

from benchmarks import scaling
from linvideo_jax.models.registry import sizes

WAN_14B = sizes("wan2_1_t2v_14b").transformer


def test_bytes_of_the_exchanges():
    """By hand for 8 chips: bfloat16 tokens of 5,120, float32 states of 40 heads."""
    own = 2 * 75_600 * 5120 / 8
    assert scaling.sent("Ulysses", WAN_14B, 75_600, 8) == 4 * own * 7 / 8
    assert scaling.sent("ring", WAN_14B, 75_600, 8) == 7 * 2 * own
    assert scaling.sent("linear", WAN_14B, 75_600, 8) == 2 * 7 / 8 * 4 * 40 * 128 * 129
    assert scaling.sent("Ulysses", WAN_14B, 75_600, 64) is None  # 40 heads


@pytest.mark.parametrize("num_chips", [8, 4096])
def test_a_linear_layer_sends_the_same_at_any_length(num_chips):
    short, long = (scaling.sent("linear", WAN_14B, n, num_chips) for n in scaling.TOKENS)
    assert short == long < scaling.sent("ring", WAN_14B, scaling.TOKENS[0], num_chips) / 100


def test_the_table_has_a_row_for_every_number_of_chips(capsys):
    assert scaling.main(["scaling.py"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 10 and lines[-1].startswith("| 4,096 | - | 1,548 | 5.28 |")
    assert scaling.main(["scaling.py", "--chip=v9"]) == 2
