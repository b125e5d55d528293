"""What one attention layer sends between chips when a video's tokens are shared: a model.

python benchmarks/scaling.py --out=docs/scaling.svg

Prints the table of docs/pods.md; the picture needs `pip install -e ".[plots]"`. Nothing is run or
compiled: bytes follow from the shapes, times from the published peaks of
linvideo_jax/plan/chips.py.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from linvideo_jax import command_line
from linvideo_jax.errors import UserError
from linvideo_jax.folders import replacing
from linvideo_jax.metrics import flops
from linvideo_jax.models.registry import sizes
from linvideo_jax.plan.chips import CHIPS

FLAGS = {
    "out": (None, "SVG file of the picture; none is drawn without"),
    "model": ("wan2_1_t2v_14b", "name of the model"),
    "chip": ("v5p", "kind of chip, for the times"),
}
TOKENS = (75_600, 1_000_000)
NUM_CHIPS = tuple(8 * 2**power for power in range(10))  # 8 to 4,096
BFLOAT16, FLOAT32 = 2, 4
WAYS = ("Ulysses", "ring", "linear")


def sent(way: str, config, tokens: int, num_chips: int) -> float | None:
    """Bytes that a chip sends in one layer's forward pass, a batch of one; None: not possible.

    Ulysses: all-to-alls of q, k, v and the output, each chip's own share of tokens; as many chips
    as heads at most. ring: k and v of every other chip pass through. linear: the ring's all-reduce
    of a state of head_dim features, whatever the number of tokens.
    """
    others = (num_chips - 1) / num_chips
    own = BFLOAT16 * tokens * config.dim / num_chips
    heads, head_dim = config.num_attention_heads, config.attention_head_dim
    match way:
        case "Ulysses":
            return None if heads % num_chips else 4 * own * others
        case "ring":
            return 2 * own * (num_chips - 1)
        case "linear":
            return 2 * others * FLOAT32 * heads * head_dim * (head_dim + 1)


def seconds(way: str, config, tokens: int, num_chips: int, chip) -> float:
    """One whole layer's forward, arithmetic at the low efficiency of `chip` and then, not
    overlapped, what it sends over its slowest link."""
    count = flops.linear_attention if way == "linear" else flops.softmax_attention
    layer = flops.weight_products(config, tokens) + flops.cross_attention(config, tokens)
    arithmetic = (layer + count(config, tokens)) / (chip.flops * chip.efficiency[0])
    return arithmetic / num_chips + sent(way, config, tokens, num_chips) / chip.one_way[0]


def table(config) -> str:
    """Markdown: MB that a chip sends a layer and forward."""
    head = [f"{way}, {tokens:,}" for tokens in TOKENS for way in WAYS]
    lines = ["| chips | " + " | ".join(head) + " |", "|---" * (1 + len(head)) + "|"]
    for num_chips in NUM_CHIPS:
        cells = [_megabytes(sent(way, config, n, num_chips)) for n in TOKENS for way in WAYS]
        lines.append(f"| {num_chips:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _megabytes(count: float | None) -> str:
    return "-" if count is None else f"{count / 1e6:,.2f}" if count < 1e7 else f"{count / 1e6:,.0f}"


def draw(config, chip, path: Path) -> None:
    """Bytes on the left, times on the right."""
    try:
        import matplotlib
    except ImportError:
        raise UserError('--out needs matplotlib: pip install -e ".[plots]".') from None
    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.hashsalt": "scaling", "svg.fonttype": "none"}
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    colours = dict(zip(WAYS, ("#4c72b0", "#c44e52", "#2f8f5b"), strict=True))
    for tokens, line in zip(TOKENS, ("-", "--"), strict=True):
        for way in WAYS:
            counts = [(c, sent(way, config, tokens, c)) for c in NUM_CHIPS]
            points = [(c, count / 1e6) for c, count in counts if count is not None]
            label = f"{way}, {tokens:,} tokens"
            if way == "linear":
                label = "linear, any number of tokens"
            if way != "linear" or tokens == TOKENS[0]:
                left.plot(*zip(*points, strict=True), line, marker="o", markersize=4,
                          color=colours[way], label=label)  # fmt: skip
        for way in ("ring", "linear"):
            times = [1e3 * seconds(way, config, tokens, c, chip) for c in NUM_CHIPS]
            right.plot(NUM_CHIPS, times, line, marker="o", markersize=4, color=colours[way],
                       label=f"{way}, {tokens:,} tokens")  # fmt: skip
    left.set(title="Sent by a chip in one layer, forward", ylabel="MB")
    right.set(title=f"One layer, forward, nothing overlapped, {chip.name}", ylabel="ms")
    for axes in (left, right):
        axes.set(xscale="log", yscale="log", xlabel="chips that share one video")
        axes.set_xticks(NUM_CHIPS, [f"{c:,}" for c in NUM_CHIPS], rotation=45)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle("A model from shapes and data sheets; nothing was run")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})
    pyplot.close(figure)


def scaling(argv: Sequence[str]) -> None:
    """The program; UserError for wrong input."""
    given = command_line.parse(command_line.define(FLAGS), argv, __doc__)
    command_line.choice("chip", given["chip"], tuple(CHIPS))
    config, chip = sizes(given["model"]).transformer, CHIPS[given["chip"]]
    print(table(config))
    if given["out"]:
        draw(config, chip, Path(given["out"]))


def main(argv: Sequence[str]) -> int:
    """Runs `argv` (program name first) and returns its exit code."""
    return command_line.run(scaling, argv, "the same command does it again")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
