"""What counts as a loss that diverges."""

import math

import pytest

from linvideo_jax.loop import Guard


def feed(guard, values, first=0):
    """The first complaint and its step."""
    for step, value in enumerate(values, first):
        complaint = guard.complaint(step, {"loss": 1.0, "error": value})
        if complaint:
            return step, complaint
    return None


def test_a_value_that_is_not_finite_is_told_at_once():
    for value in (math.nan, math.inf):
        assert feed(Guard("error"), [1.0, value]) == (1, "error is not finite")
    assert Guard().complaint(0, {"loss": math.nan}) == "loss is not finite"


def test_growth_beyond_the_factor_for_some_steps_is_a_divergence():
    usual = [1.0, 1.2, 0.8] * 20
    found = feed(Guard("error", 10.0, 5), usual + [10.5, 40.0] * 10)
    assert found == (64, "error is 10.5, for 5 steps above 10 times its running median, 1")
    assert feed(Guard("error", 10.0, 5), usual + [50.0] * 4 + [9.0] + [50.0] * 4) is None, "spikes"
    assert feed(Guard("error", 10.0, 5), usual + [9.9] * 30) is None
    assert feed(Guard("error", 0.0, 5), usual + [1e9] * 30) is None, "switched off"
    assert feed(Guard("other", 10.0, 5), usual + [1e9] * 30) is None, "another metric"
    assert feed(Guard("error", 10.0, 5), [0.1] * 10 + [1e9] * 60) is None, "too early to judge"
    assert feed(Guard("error", 10.0, 5), [0.0] * 30 + [1.0] * 30) is None, "no scale yet"
    # Slow growth moves the median along.
    assert feed(Guard("error", 10.0, 5), [1.01**k for k in range(1000)]) is None


def test_another_quantity_begins_anew():
    values = [1.0] * 50 + [90.0] * 50
    assert feed(Guard("error", 10.0, 5), values)[0] == 54
    assert feed(Guard("error", 10.0, 5, fresh_at=(50,)), values) is None


@pytest.mark.parametrize("cut", [30, 62])
def test_a_resumed_guard_judges_alike(cut):
    values = [1.0, 1.2, 0.8] * 20 + [50.0] * 10
    whole, first, second = Guard("error", 10.0, 5), Guard("error", 10.0, 5), Guard("error", 10.0, 5)
    wanted = feed(whole, values)
    assert feed(first, values[:cut]) is None and first.good == (cut == 30)
    second.load(first.to_dict())
    assert feed(second, values[cut:], cut) == wanted
