"""A real run, killed at random moments, ends as an undisturbed run does, bit for bit."""

import json

import numpy as np
import orbax.checkpoint as ocp
from PIL import Image

from benchmarks import faults
from linvideo_jax import checkpoints, loop
from linvideo_jax.parts import flatten

FIELDS = faults.FIELDS | {
    "stages": ("collect", "transfer"),
    "collect.num_videos": 4,
    "transfer.num_steps": 24,
    "transfer.round_at": 10,
    "transfer.sample_every": 12,
    "transfer.final_weights": "ema",
    "transfer.save_every": 3,
}


def test_a_killed_run_loses_nothing(tmp_path):
    counts = faults.run(tmp_path, kills=2, seed=3, fields=FIELDS)
    assert (counts["kills"], counts["lost"], counts["problems"]) == (2, 0, [])
    assert counts["finished"] >= 1
    assert json.loads((tmp_path / "faults.json").read_text()) == counts

    check_what_a_run_leaves(tmp_path / "undisturbed")

    # What it would have found: other parameters, lost lines.
    bench = faults.Bench(tmp_path, FIELDS)
    assert not bench.workdir.exists()
    bench.workdir.symlink_to(bench.wanted)
    assert bench.differences() == []
    bench.workdir.unlink()
    whole = checkpoints.load(bench.wanted / "final")
    params = {**whole.transformer, "proj_out": dict(whole.transformer["proj_out"])}
    params["proj_out"]["bias"] = np.nextafter(np.asarray(params["proj_out"]["bias"]), 9.0)
    checkpoints.save(
        bench.workdir / "final",
        config=whole.config,
        transformer=params,
        vae=whole.vae,
        text_encoder=whole.text_encoder,
        tokenizer=whole.tokenizer_folder,
    )
    assert bench.differences() == [
        "proj_out.bias", "metrics.jsonl", "selection.json is missing",
        "report.html is missing",
    ]  # fmt: skip


def check_what_a_run_leaves(workdir):
    """The student is the moving average; samples were made on the way; the report shows them."""
    state = workdir / "state" / "transfer"
    with ocp.CheckpointManager(state / "checkpoints") as manager:
        assert sorted(manager.all_steps()) == [21, 24]
        kept = manager.restore(24, args=ocp.args.Composite(state=ocp.args.StandardRestore()))
    final = checkpoints.load(workdir / "final", ("transformer",))
    ours, average, raw = (
        flatten(tree) for tree in (final.transformer, kept["state"]["ema"], kept["state"]["params"])
    )
    # A checkpoint holds the feature maps of linear layers alone.
    names = [name for name in ours if "feature_map" not in name]
    assert len(names) > 50
    for name in names:
        np.testing.assert_array_equal(ours[name], average[name], err_msg=name)
    assert any(not np.array_equal(ours[name], raw[name]) for name in names)

    assert len(loop.read_metrics(state)) == 24
    assert sorted(path.name for path in (state / "samples").glob("*.webp")) == [
        "0000012.webp", "0000024.webp",
    ]  # fmt: skip
    with Image.open(state / "samples" / "0000012.webp") as sheet:
        assert sheet.size == (4 * 16, 2 * 16)  # 4 frames of one prompt, teacher above student
        assert np.ptp(np.asarray(sheet)) > 20
    page = (workdir / "report.html").read_text()
    assert page.count("data:image/webp;base64,") == 2 and "step 24 of 24" in page
    assert json.loads((workdir / "config.json").read_text())["transfer"]["num_steps"] == 24
