"""What the benchmarks are made of; they themselves run on any machine with --small."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import (
    adm_cost,
    check,
    contenders,
    full_size,
    hot_kernels,
    latency,
    latency_table,
    measure,
    online,
    plans,
    random_checkpoint,
    tables,
    trajectory_errors,
    tune_softmax,
    two_gpus,
    two_gpus_table,
    wan_step,
)
from kernels.gpu import target
from kernels.softmax_attention import softmax_attention, tokamax_configs, tokamax_mosaic
from linvideo_jax import video
from linvideo_jax.models import registry
from linvideo_jax.models.wan import WanConfig

TINY = WanConfig(
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=4,
    out_channels=4,
    text_dim=24,
    freq_dim=16,
    ffn_dim=48,
    num_layers=2,
)


@pytest.fixture
def run(capsys):
    """run(program, **flags) -> (exit code, stdout, stderr)."""

    def run(program, **flags):
        code = program.main(["program", *(f"--{name}={value}" for name, value in flags.items())])
        return code, *capsys.readouterr()

    return run


def test_programs_that_import_benchmarks_find_them():
    """`python benchmarks/NAME.py` puts the folder benchmarks, not the one above, on the path."""
    programs = {path: path.read_text() for path in Path(full_size.__file__).parent.glob("*.py")}
    lost = [
        path.name
        for path, text in programs.items()
        if "from benchmarks import" in text and '"__main__"' in text
        and "sys.path[0] = str(Path(__file__).resolve().parents[1])" not in text
    ]  # fmt: skip
    assert len(programs) > 20 and lost == []


@pytest.mark.parametrize(("layout", "dtype"), [("ours", "bfloat16"), ("diffusers", "float32")])
def test_random_checkpoints_hold_what_was_made(tmp_path, layout, dtype):
    sizes = replace(registry.wan_digits(), transformer=TINY)
    parts = ("transformer",)
    size = random_checkpoint.write(
        tmp_path / "made", sizes, layout=layout, parts=parts, dtype=dtype
    )
    flat = random_checkpoint.random_flat("transformer", TINY, dtype)
    assert size == sum(array.nbytes for array in flat.values())
    random_checkpoint.check(tmp_path / "made", sizes, parts, dtype)
    with pytest.raises(AssertionError):
        random_checkpoint.check(tmp_path / "made", sizes, parts, "float16")


def test_random_values_have_an_initial_models_scale():
    flat = random_checkpoint.random_flat("transformer", WanConfig(num_layers=1), "bfloat16")
    kernel = np.asarray(flat["blocks.0.ffn.linear_2.kernel"]).astype(np.float32)
    assert np.isfinite(kernel).all()
    assert 0.7 < kernel.std() * kernel.shape[0] ** 0.5 < 1.42  # a power of two near it
    other = np.asarray(flat["blocks.0.ffn.linear_1.kernel"]).astype(np.float32)
    assert abs(np.corrcoef(kernel.reshape(-1)[:1000], other.reshape(-1)[:1000])[0, 1]) < 0.2


def results(seconds, device="cpu", **parts):
    row = {"seconds": seconds, "low": seconds, "high": 9.0, "peak_bytes": 0, "tflop_per_second": 1}
    forward = {"size": "1.3B", "blocks": 30, "tokens": 9, "rows": {"dense": row, "LinVideo": row}}
    point = {"row": "dense", "tokens": 8, "seconds": seconds}
    points = [point, {**point, "tokens": 16, "seconds": 4 * seconds}]
    scaling = {"points": points, "exponents": latency_table.exponents(points)}
    where = {"device": device, "versions": {"jax": "1"}, "xla_flags": ""}
    parts = {"forward_1.3b": forward, "scaling": scaling, **parts}
    return {"environment": where, "small": False, "parts": parts}


def test_a_part_is_kept_with_its_flags(tmp_path, monkeypatch):
    """The table names them beside that part, not for all."""
    for part, flags in (("forward_1.3b", ""), ("forward_14b", "--xla_x=")):
        monkeypatch.setenv("XLA_FLAGS", flags)
        figures = results(1.0)["parts"]["forward_1.3b"] | {"rows": {}}
        measure.Results(tmp_path / "a.json", False).add(part, figures)
    lines = latency_table.markdown(measure.read(tmp_path / "a.json"))
    assert [line for line in lines if "XLA_FLAGS" in line] == ["forward_14b: XLA_FLAGS --xla_x="]


def test_check_compares_results_of_one_device(run, tmp_path):
    def write(name, content):
        (tmp_path / name).write_text(json.dumps(content))
        return tmp_path / name

    stored = write("stored.json", results(1.0))
    code, out, _ = run(check, new=write("a.json", results(1.05)), stored=stored)
    assert code == 0 and "  1.05  1 s  forward_1.3b / rows / dense" in out and "slower" not in out
    assert "  1.05  4 s  scaling / points / dense / 16" in out
    code, out, _ = run(check, new=tmp_path / "a.json", stored=stored, tolerance=0.01)
    assert code == 1 and out.count("slower") == 4
    failed = {"forward_1.3b": {"error": "out of memory"}}
    code, out, _ = run(check, new=write("b.json", results(1.0, **failed)), stored=stored)
    assert code == 1 and "forward_1.3b failed: out of memory" in out
    code, _, err = run(check, new=write("c.json", results(1.0, "H100")), stored=stored)
    assert code == 2 and "compare results of one device" in err
    code, _, err = run(check, new=write("d.json", {}), stored=stored)
    assert code == 2 and "is no result of these benchmarks" in err


@pytest.mark.parametrize(
    ("program", "flags", "message"),
    [
        (wan_step, {"batches": "x"}, "--batches=x is wrong: write whole numbers from 1 on"),
        (wan_step, {"steps": "0"}, "--help lists the flags"),
        (wan_step, {"out": "broken.json"}, "broken.json cannot be read as JSON"),
        (plans, {"out": "broken.json"}, "broken.json cannot be read as JSON"),
        (online, {"reuse": "1,x", "workdir": "."}, "--reuse=1,x is wrong: write numbers"),
        (tables, {"root": "none", "out": None}, "README.md does not exist: give the repository"),
        (latency, {"out": "foreign.json"}, "foreign.json is no result of these benchmarks"),
        (adm_cost, {"out": "foreign.json"}, "foreign.json is no result of this program"),
        (adm_cost, {"dtype": "foo"}, "--dtype=foo is unknown; choose from bfloat16, float32"),
        (check, {"out": None, "new": "none", "stored": "none"}, "none does not exist: give"),
    ],
)
def test_wrong_input_is_one_sentence(run, tmp_path, monkeypatch, program, flags, message):
    monkeypatch.chdir(tmp_path)
    Path("broken.json").write_text('{"b": ')
    Path("foreign.json").write_text('{"b": 1}')
    given = {"out": "out.json", **flags}
    code, out, err = run(program, **{name: text for name, text in given.items() if text})
    assert (code, out) == (2, "") and message in err
    assert err.startswith("error: ") and err.count("\n") == 1 and not Path("out.json").exists()


def test_table_and_pictures(tmp_path, capsys):
    assert results(1.0)["parts"]["scaling"]["exponents"] == {"dense": pytest.approx(2)}
    row = {"seconds": 12.0, "steps": 6}
    stages = {"text encoder": 0.5, "VAE decode, bfloat16, 1.3B": 2}
    stages["weights to the device, 1.3B"] = 0.25
    rows = {name: {"seconds": seconds} for name, seconds in stages.items()}
    more = {
        "steps_1.3b": {"size": "1.3B", "rows": {"dense, guided": row, "dense, 4 steps": row}},
        "stages": {"rows": rows},
        "mp4": {"rows": {"mp4, 1.3B": {"seconds": 1}}},
        "forward_14b": {"error": "no memory"},
    }
    latency_table.write(results(0.5, **more), tmp_path / "out.json")
    out = capsys.readouterr().out
    assert "| 1.3B, 30 layers, 9 tokens: LinVideo | 500 ms | 500 ms to 9.00 s | 1 | 0.0 |" in out
    assert "| 1.3B: dense, 50 steps with guidance | 100.00 s | 104.00 s | 104.25 s |" in out
    assert "| 1.3B: dense, 4 steps | 12.00 s | 15.50 s | 15.75 s |" in out
    more["mp4"]["rows"]["decode to mp4, 1.3B"] = {"seconds": 2.5}
    assert latency_table.prompt_to_mp4(more)[1]["resident"] == 15.0
    assert "Not measured: forward_14b (no memory)." in out
    assert (tmp_path / "out.md").read_text() == out
    for name in ("out.svg", "out-scaling.svg"):
        assert (tmp_path / name).read_text().startswith('<svg xmlns="http://www.w3.org/2000/svg"')


def test_decoding_to_mp4_writes_the_clip_as_pieces_come(monkeypatch):
    clip, written = latency._moving_picture(9, 32, 48), []
    noise = [np.zeros((1, frames, 32, 48, 3), np.uint8) for frames in (1, 4, 4)]
    decoder = SimpleNamespace(decode_pixels=lambda latents, dtype: iter(noise))
    monkeypatch.setattr(video, "write_mp4", lambda path, frames: written.extend(frames))
    latency._decode_to_mp4(decoder, None, None, clip)
    np.testing.assert_array_equal(written, clip)


def test_every_scope_of_the_transformer_is_found_in_its_program():
    ours = contenders.Ours(TINY, jnp.dtype(jnp.float32))
    run = ours.forward((1, 4, 4, 4), [0])
    assert np.isfinite(run.run()).all() and run.operations > 0 and run.peak_bytes() > 0
    found = set(hot_kernels.scopes_of(run.program).values())
    assert found >= {
        "queries_keys_values",
        "softmax",
        "linear",
        "cross_attention",
        "feed_forward",
        "patch_embedding",
        "head",
    }


def test_parts_that_sample_run(run, tmp_path):
    """They call the sampling loop as it is; what they measure needs a GPU."""
    given = {"small": "true", "out": tmp_path / "out.json"}
    code, _, err = run(latency, parts="steps_1.3b", rounds=1, steps=1, **given)
    assert code == 0, err
    code, _, err = run(latency, parts="pace_1.3b", **given)
    assert code == 0, err
    assert "forwards in a row" in (tmp_path / "out.md").read_text()
    given["out"] = tmp_path / "full.json"
    code, _, err = run(full_size, parts="large", folder=tmp_path / "folder", **given)
    assert code == 0, err


def test_errors_of_steps_and_what_they_move():
    """Linear flows u = c x: the end of a trajectory is a product over its steps."""
    grid, scale = (1.0, 0.6, 0.3, 0.0), 2.0

    class Linear:
        def __init__(self, cond, neg):
            self.cond, self.neg = cond, neg

        def at(self, problem, x, step):
            return self.cond * x, self.neg * x

    start = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2, 2)), jnp.float32)
    problem = trajectory_errors.Problem(start, None, None, grid, "euler", scale)
    teacher, student = Linear(0.5, 0.2), Linear(0.7, 0.1)
    found = trajectory_errors.measured(teacher, student, problem)
    # x shrinks by these factors a step; the student's guided velocity is 0.5 x away.
    factors, square = (0.68, 0.76, 0.76), float(jnp.mean(start**2))
    ends = [0.4 * 0.76 * 0.76, 0.3 * 0.68 * 0.76, 0.3 * 0.68 * 0.76]
    for step, row in enumerate(found["rows"]):
        size = square * np.prod(factors[:step]) ** 2
        assert row["step"] == step and row["t"] == grid[step]
        assert row["error_cond"] == pytest.approx(0.04 * size, rel=1e-4)
        assert row["error_neg"] == pytest.approx(0.01 * size, rel=1e-4)
        assert row["error_guided"] == pytest.approx(0.25 * size, rel=1e-4)
        moved = (0.5 * ends[step]) ** 2 * square
        assert row["displacement"] == pytest.approx(moved, rel=1e-4)
    own = np.prod([1 - 1.3 * width for width in (0.4, 0.3, 0.3)])
    assert found["distance"] == pytest.approx((own - np.prod(factors)) ** 2 * square, rel=1e-4)
    assert "| 0 | 1.000 |" in trajectory_errors.table(found)


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"teacher": "assets/wan_digits_linear"}, "has linear layers: name the teacher without"),
        ({"num_videos": "1000"}, "choose 1 to 256, the prompts in the file"),
        ({"seed": "x"}, "a number is needed"),
    ],
)
def test_trajectory_errors_refuse_what_cannot_be(run, tmp_path, changes, problem):
    given = {"checkpoint": "assets/wan_digits_linear", "teacher": "assets/wan_digits"}
    out = tmp_path / "out.json"
    code, _, err = run(trajectory_errors, **{**given, "out": out, **changes})
    assert code == 2 and problem in err and not out.exists()


def test_results_are_of_one_device_and_parts_are_not_measured_twice(tmp_path, capsys):
    path, calls = tmp_path / "runs" / "out.json", []
    known = {"one": lambda: calls.append(1) or {"rows": {}}, "two": lambda: 1 / 0}
    measure.run_parts(known, ["one"], measure.Results(path, True), [])
    measure.run_parts(known, ["one"], measure.Results(path, True), [])
    assert calls == [1] and "measured before" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        measure.run_parts(known, ["two"], measure.Results(path, True), [])
    again = measure.Results(path, True)
    assert again.parts["two"]["error"].startswith("ZeroDivisionError")
    assert "one" in again and "two" not in again
    with pytest.raises(Exception, match="choose another --out"):
        measure.Results(path, False)
    assert jax.devices()[0].device_kind == again.everything["environment"]["device"]


def test_collectives_of_a_profile(monkeypatch):
    """Two GPUs; on the first a collective overlaps with a product, by 2 of its 5 ms."""

    def event(name, start, end, **stats):
        stats = list(stats.items())
        return SimpleNamespace(
            name=name, start_ns=start * 1e6, duration_ns=(end - start) * 1e6, stats=stats
        )

    kernels = [
        event("gemm", 0, 4, hlo_op="dot.1"),
        event("gemm", 2, 3, hlo_op="dot.2"),
        event("ncclDevKernel_AllGather", 2, 7, hlo_op="all-gather-start.3"),
        event("a_copy", 8, 9, hlo_op="collective-permute.1"),
    ]
    names = ("/host:CPU", "/device:GPU:0", "/device:GPU:1")
    lines = (
        [],
        [("Stream #1(Compute)", kernels), ("XLA Ops", kernels)],
        [("Stream #2", kernels[:1])],
    )
    planes = [
        SimpleNamespace(
            name=name, lines=[SimpleNamespace(name=line, events=events) for line, events in own]
        )
        for name, own in zip(names, lines, strict=True)
    ]
    monkeypatch.setattr(hot_kernels, "_traced", lambda run: SimpleNamespace(planes=planes))
    first, second = hot_kernels.collectives(lambda: None)
    assert first == {
        "milliseconds": pytest.approx(6),
        "alone_milliseconds": pytest.approx(4),
        "busy_milliseconds": pytest.approx(8),
        "kernels": {"ncclDevKernel_AllGather": 5.0, "a_copy": 1.0},
    }
    assert second["milliseconds"] == 0 and second["busy_milliseconds"] == pytest.approx(4)


def test_gradients_are_compared_by_group():
    ours = {
        "params": {"feature_map": {"q": jnp.array([3.0, 4.0])}, "w": jnp.ones(4)},
        "r": jnp.ones(2),
    }
    theirs = {**ours, "params": {"feature_map": {"q": jnp.array([3.0, 5.0])}, "w": jnp.ones(4)}}
    theirs["r"] = 2 * theirs["r"]
    found = two_gpus.by_group(ours, theirs)
    assert found == pytest.approx({"weights": 0, "feature maps": 34**-0.5, "scores": 0.5})


def test_two_gpus_says_what_is_wrong(run, tmp_path, monkeypatch):
    out = tmp_path / "out.json"
    code, _, err = run(two_gpus, out=out, parts="speed_14b,speed_2b")
    assert code == 2 and "--parts=speed_2b is unknown; choose from equality, speed_14b" in err
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    code, _, err = run(two_gpus, out=out)
    assert code == 2 and "two devices are needed, and 1 cpu is here" in err and not out.exists()


def test_table_of_two_gpus(tmp_path, capsys):
    size = {"size": "1.3B, 480p", "blocks": 30, "tokens": 32760, "linear": 16}
    gpus = [{"milliseconds": time, "alone_milliseconds": 1.0} for time in (9.0, 5.0)]
    row = {"one": {"seconds": 0.5}, "two": {"seconds": 0.25}, "speed_up": 2.0, "collectives": gpus}
    errors = {"weights": 0.01, "feature maps": 0.02, "scores": 0.03}
    layer = {"tokens": 32760, "kinds": {"all-reduce": 9}, "measured": 1e6, "formula": 2e6}
    update = {
        "model": "wan", "tokens": 32760, "mesh": {"data": 1, "fsdp": 2}, "batch_size": 2,
        "seconds": [4.0, 5.0], "memory": 2**34, "mfu": 0.4,
    }  # fmt: skip
    exactly = {"one GPU": 0.01, "ring": 0.02}
    compared = {"to_one": {"fsdp:2": errors}, "to_float32": errors}
    parts = {
        "equality": size | {"to_float32": exactly, "to_one": {"ring": 0.003}},
        "gradients": {"blocks": 4, "tokens": 32760} | compared,
        "speed_1.3b": size | {"rows": {"dense": row, "LinVideo": {**row, "collectives": []}}},
        "bytes": {"layers": {"a, linear": layer}, "rest_of_a_forward": {"a": {"all-gather": 2e6}}},
        "train_fsdp": update,
        "train_one": {"error": "no memory"},
    }
    where = {"device": "H100", "versions": {"jax": "1"}, "xla_flags": "", "nccl": {"NCCL_X": "0"}}
    two_gpus_table.write({"environment": where, "parts": parts}, tmp_path / "out.json")
    out = capsys.readouterr().out
    assert (tmp_path / "out.md").read_text() == out and "2 x H100; jax 1." in out
    for line in (
        "| one GPU |  | 0.01 |",
        "| ring | 0.003 | 0.02 |",
        "| fsdp:2 to one GPU | 0.01 | 0.02 | 0.03 |",
        "| 1.3B, 480p, 32,760 tokens: dense | 0.5 s | 0.25 s | 2.00 | 5.0 | 1.0 |",
        "| a, linear, 32,760 tokens | 1.000 | 2.000 | all-reduce |",
        "The rest of a forward of a, above all weights: 2.0 MB by all-gather.",
        "| wan, 32,760 tokens, fsdp:2 | 2 | 4.5 | 2.25 | 16.0 | 40.0% |",
        "Not measured: train_one (no memory).",
        "no GPU in the profile",
    ):
        assert line in out
    assert "NCCL_X=0" in out


def test_only_right_configurations_of_softmax_are_stored(monkeypatch, tmp_path, capsys):
    """With a stand-in for tokamax's kernel: wrong values and what does not compile are left out."""
    own, right, wrong, large = (tune_softmax.HEURISTIC | {"num_stages": n} for n in (2, 3, 4, 5))

    def configured(q, k, v, config):
        if config == large:
            raise ValueError("too much shared memory")
        factor = 2.0 if config == wrong else 1.0
        return lambda q, k, v: factor * softmax_attention(q, k, v, implementation="reference")

    size = (2, 64, 3, 400)
    monkeypatch.setattr(tune_softmax, "LAYERS", {"small": size, "alike": (1, 64, 3, 400)})
    monkeypatch.setattr(tune_softmax, "LIKE", {"alike": "small"})
    monkeypatch.setattr(tune_softmax, "candidates", lambda: [own, right, wrong, large])
    monkeypatch.setattr(tune_softmax, "version", lambda package: "0")
    monkeypatch.setattr(tokamax_mosaic, "configured", configured)
    store = tmp_path / "configurations.json"
    argv = ["tune_softmax.py", f"--store={store}", "--layers=small,alike"]
    assert tune_softmax.main(argv) == 2 and "needs an NVIDIA GPU" in capsys.readouterr().err
    monkeypatch.setattr(tokamax_mosaic, "check", lambda q, bias: None)
    assert tune_softmax.main(argv) == 0
    out = capsys.readouterr().out
    assert f"{wrong}: its values are wrong" in out and "too much shared memory" in out
    assert "alike: 2 candidates" in out
    monkeypatch.setattr(tokamax_configs, "stored", lambda: json.loads(store.read_text()))
    assert len(tokamax_configs.stored()) == 2
    layer = tokamax_configs.Layer("bfloat16", tune_softmax.HEAD_DIM, 6, 64, 400)
    assert tokamax_configs.choose(target(), layer) in (own, right)
