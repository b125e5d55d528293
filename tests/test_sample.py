"""sample.py run in-process: what it writes, how it resumes, what it refuses."""

import json
import shutil
import threading

import jax
import numpy as np
import pytest

import sample
from linvideo_jax import checkpoints, folders, video
from linvideo_jax.generate import even_batch_size
from linvideo_jax.pipeline import Pipeline, Settings, noise
from linvideo_jax.text import text_bucket

PROMPTS = (
    "a red 3 moves right",
    "the yellow nine goes slowly down",
    "a blue 7 moves up on a green background",
)


@pytest.fixture(scope="module")
def pipeline(tiny_pipeline):
    return Pipeline(checkpoints.load(tiny_pipeline.folder))


@pytest.fixture
def run(tiny_pipeline, tmp_path, capsys):
    """run("--flag=value", ...) -> (exit code, stdout, stderr), in a folder of its own."""
    (tmp_path / "prompts.txt").write_text("\n\n".join(PROMPTS) + "\n", encoding="utf-8")

    def run(*flags, prompts="prompts.txt"):
        argv = ["sample.py", f"--checkpoint={tiny_pipeline.folder}", f"--out={tmp_path / 'videos'}"]
        argv += [f"--prompts={tmp_path / prompts}"] if prompts else []
        code = sample.main([*argv, *flags])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def refused(run, tmp_path):
    """Runs, and gives the one line that was printed; nothing may have been written."""

    def refused(*flags, **options):
        before = sorted(tmp_path.rglob("*"))
        code, out, err = run(*flags, **options)
        assert (code, out) == (2, "")
        assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err
        assert sorted(tmp_path.rglob("*")) == before
        return err

    return refused


def contents(folder):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def clips(folder):
    return {path.name: video.read_mp4(path) for path in folder.glob("*.mp4")}


def test_videos_and_manifest(run, tmp_path, tiny_pipeline):
    code, out, err = run("--seed=7", "--batch_size=2")
    assert code == 0 and "3 videos" in out and "3/3" in err and "video/s" in err
    folder = tmp_path / "videos"
    names = [
        "0000-a-red-3-moves-right.mp4",
        "0001-the-yellow-nine-goes-slowly-down.mp4",
        "0002-a-blue-7-moves-up-on-a-green-background.mp4",
    ]
    assert sorted(path.name for path in folder.iterdir()) == [*names, "manifest.json"]
    clips = [video.read_mp4(folder / name) for name in names]
    assert [clip.shape for clip in clips] == [(5, 32, 48, 3)] * 3
    assert len({clip.tobytes() for clip in clips}) == 3
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["checkpoint"] == str(tiny_pipeline.folder)
    assert manifest["settings"] == {
        "height": 32,
        "width": 48,
        "num_frames": 5,
        "num_inference_steps": 3,
        "guidance_scale": 2.0,
        "flow_shift": 3.0,
        "sampler": "unipc",
        "negative_prompt": "",
        "time_grid": "diffusers",
        "denoising_steps": None,
    }
    assert manifest["videos"] == {
        name: {"prompt": prompt, "seed": 7 + i}
        for i, (name, prompt) in enumerate(zip(names, PROMPTS, strict=True))
    }


@pytest.fixture
def nearly_lossless(monkeypatch):
    """x264 does not make the same file twice, which noise videos show most."""
    monkeypatch.setitem(video._H264, "crf", "1")


@pytest.mark.usefixtures("nearly_lossless")
def test_interrupted_says_how_to_resume_and_resumes(run, tmp_path, monkeypatch):
    assert run("--batch_size=2")[0] == 0
    folder = tmp_path / "videos"
    whole = clips(folder)
    shutil.rmtree(folder)

    write = video.write_mp4

    def interrupt_at_the_second(path, clip):
        if path.name.startswith("0001"):
            raise KeyboardInterrupt
        write(path, clip)

    monkeypatch.setattr(video, "write_mp4", interrupt_at_the_second)
    code, _, err = run("--batch_size=2")
    assert code == 130 and "the same command" in err and "Traceback" not in err
    first = contents(folder)
    assert len(first) == 2, "one video and the manifest"

    monkeypatch.setattr(video, "write_mp4", write)
    code, _, err = run("--batch_size=2")
    assert code == 0 and "3/3" in err
    second = contents(folder)
    again = clips(folder)
    assert again.keys() == whole.keys()
    for name, clip in whole.items():  # the encoder, unlike the latents, is not bit for bit
        assert np.abs(again[name].astype(int) - clip).mean() < 1
    made = next(name for name in first if name.endswith(".mp4"))
    assert second[made] == first[made], "the finished video is not made again"


def test_more_prompts_join_the_folder_and_other_settings_do_not(run, tmp_path):
    (tmp_path / "one.txt").write_text(PROMPTS[0])
    assert run(prompts="one.txt")[0] == 0
    before = contents(tmp_path / "videos")
    code, _, err = run("--num_inference_steps=2", prompts="one.txt")
    assert code == 2 and "num_inference_steps 3 there, 2 now" in err
    code, _, err = run("--seed=1", prompts="one.txt")
    assert code == 2 and "has seed 0" in err
    assert contents(tmp_path / "videos") == before
    assert run("--batch_size=1")[0] == 0
    after = contents(tmp_path / "videos")
    assert len(after) == 4
    name = "0000-a-red-3-moves-right.mp4"
    assert after[name] == before[name]


@pytest.mark.usefixtures("nearly_lossless")
def test_rows_of_a_jsonl_file_in_any_order(run, tmp_path):
    """Sizes, seeds and guidance of their own; two samples each, under VBench's names."""
    rows = [
        {"prompt": "a red 3 moves right", "seed": 5},
        {"prompt": "a blue 7 / moves up", "height": 48, "width": 32, "negative_prompt": "black"},
        {"prompt": "the yellow nine", "guidance_scale": 3.5},
    ]
    folder = tmp_path / "videos"

    def made(rows):
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        shutil.rmtree(folder, ignore_errors=True)
        code, _, err = run("--num_samples=2", "--vbench_names", prompts="rows.jsonl")
        assert code == 0 and "6/6" in err
        return clips(folder)

    first = made(rows)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["videos"]["a red 3 moves right-1.mp4"] == {
        "prompt": "a red 3 moves right",
        "seed": 6,
    }
    slashed = next(name for name in first if name.startswith("a blue 7 _ moves up-"))
    assert manifest["videos"][slashed]["settings"] == {
        "height": 48,
        "negative_prompt": "black",
        "width": 32,
    }
    assert first[slashed].shape == (5, 48, 32, 3)
    assert first["the yellow nine-0.mp4"].shape == (5, 32, 48, 3)
    assert len({clip.tobytes() for clip in first.values()}) == 6

    seeds = [entry["seed"] for entry in manifest["videos"].values()][::2]
    turned = [{**row, "seed": seed} for row, seed in zip(rows, seeds, strict=True)][::-1]
    second = made(turned)
    assert second.keys() == first.keys()
    for name, clip in first.items():
        assert np.abs(second[name].astype(int) - clip).mean() < 1


def test_tiles_and_wans_own_grid(run, tmp_path):
    flags = ("--sampler=dpm++", "--time_grid=original", "--vae_tiling", "--prompt=a red 3")
    assert run(*flags, prompts=None)[0] == 0
    manifest = json.loads((tmp_path / "videos" / "manifest.json").read_text())
    assert manifest["settings"]["time_grid"] == "original" and manifest["vae_tiling"] is True


def test_another_checkpoint_does_not_join_the_folder(run, tmp_path, pipeline):
    assert run("--prompt=a red 3", prompts=None)[0] == 0
    checkpoint = pipeline.checkpoint
    trained = dict(checkpoint.transformer)
    trained["proj_out"] = {k: 2 * v for k, v in trained["proj_out"].items()}
    checkpoints.save(
        tmp_path / "other",
        config=checkpoint.config,
        transformer=trained,
        vae=checkpoint.vae,
        text_encoder=checkpoint.text_encoder,
        tokenizer=checkpoint.tokenizer_folder,
    )
    code, _, err = run("--prompt=a red 3", f"--checkpoint={tmp_path / 'other'}", prompts=None)
    assert code == 2 and "another run (made with the checkpoint" in err


def test_euler_and_no_guidance(run, tmp_path):
    flags = ("--sampler=euler", "--guidance_scale=1", "--num_inference_steps=1", "--prompt=a red 3")
    flags += ("--resident",)
    assert run(*flags, prompts=None)[0] == 0
    settings = json.loads((tmp_path / "videos" / "manifest.json").read_text())["settings"]
    assert settings["sampler"] == "euler" and settings["guidance_scale"] == 1.0


def test_unknown_words_are_a_warning_that_lists_the_known(run):
    code, _, err = run("--prompt=a red zebra moves RIGHT", prompts=None)
    assert code == 0
    warning = next(line for line in err.splitlines() if line.startswith("warning"))
    assert "does not know zebra; it knows the words 3, 7, a, and, background" in warning


def test_help_lists_the_flags(run):
    code, out, _ = run("--help")
    assert code == 0 and "--num_inference_steps" in out and "python sample.py" in out


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("flash", "SOFTMAX_ATTENTION=flash names no 'flash' that is known: choose from hopper"),
        ("cudnn,flash", "SOFTMAX_ATTENTION=cudnn,flash names no 'flash' that is known"),
        ("cudnn", "SOFTMAX_ATTENTION=cudnn does not serve (cudnn: "),
    ],
)
def test_attention_that_does_not_serve(run, monkeypatch, names, message):
    monkeypatch.setenv("SOFTMAX_ATTENTION", names)
    jax.clear_caches()  # of what was traced with another one
    code, _, err = run()
    assert code == 2 and err.splitlines()[-1].startswith(f"error: {message}")
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--height=40", "height is 40, but it must be divisible by 16: choose 32."),
        ("--width=30", "width is 30, but it must be divisible by 16: choose 32."),
        ("--num_frames=24", "num_frames is 24, but it must be 4k + 1: choose 21 or 25."),
        ("--num_frames=0", "num_frames is 0: choose a value from 1 to 8193."),
        (
            "--sampler=ddim",
            "the sampler 'ddim' is unknown: choose one of unipc, euler, dpm++, renoise.",
        ),
        ("--time_grid=even", "the time_grid 'even' is unknown: choose one of diffusers, original."),
        ("--num_samples=0", "num_samples is 0: choose 1 or more."),
        ("--guidance_scale=0.5", "guidance_scale is 0.5: choose a value from 1 to 30."),
        ("--guidance_scale=nan", "guidance_scale is nan: choose a value from 1 to 30."),
        ("--num_inference_steps=0", "num_inference_steps is 0: choose a value from 1 to 1000."),
        ("--flow_shift=0", "flow_shift is 0.0: choose a value from 0.01 to 100."),
        ("--seed=-1", "seed is -1: choose one from 0 to 4294967293."),
        ("--batch_size=0", "batch_size is 0: choose 1 or more."),
        ("--num_steps=4", "Unknown command line flag 'num_steps'"),
        ("--height=tall", "flag --height=tall"),
        ("--checkpoint=", "--checkpoint is missing"),
        ("stray", "'stray' is not a flag"),
        ("--prompt=a red 3", "give either --prompt with one sentence or --prompts"),
    ],
)
def test_bad_flags(refused, flag, message):
    assert message in refused(flag)


def test_bad_prompt_files(refused, tmp_path):
    (tmp_path / "empty.txt").write_text("\n  \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a red 3"}\n{"prompt": "a", "width": 40}\n')
    assert "row 2 of" in refused(prompts="rows.jsonl")
    assert "none.txt cannot be read (No such file" in refused(prompts="none.txt")
    assert "cannot be read (Is a directory)" in refused(prompts=".")
    assert "empty.txt is empty: write one prompt a line" in refused(prompts="empty.txt")
    assert "binary.txt is not UTF-8 text" in refused(prompts="binary.txt")
    assert "--prompt is empty" in refused("--prompt= ", prompts=None)
    assert "give either --prompt" in refused(prompts=None)


def test_bad_checkpoints(refused, tiny_pipeline, tmp_path):
    assert "does not exist" in refused(f"--checkpoint={tmp_path / 'nowhere'}")
    (tmp_path / "other").mkdir()
    assert "is no checkpoint" in refused(f"--checkpoint={tmp_path / 'other'}")
    shutil.copytree(tiny_pipeline.folder, tmp_path / "cut")
    weights = tmp_path / "cut" / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "truncated" in refused(f"--checkpoint={tmp_path / 'cut'}")


def test_output_that_cannot_be_written(refused, tmp_path):
    (tmp_path / "file").write_text("")
    for out in ("file", "file/below"):
        assert "cannot be written" in refused(f"--out={tmp_path / out}")


def test_a_full_disk_leaves_no_half_written_file(run, tmp_path, monkeypatch):
    replace = folders.os.replace

    def full(source, target):
        if target.suffix == ".mp4":
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(folders.os, "replace", full)
    code, _, err = run("--prompt=a red 3", prompts=None)
    assert code == 2 and "cannot be written: No space left on device" in err
    assert [path.name for path in (tmp_path / "videos").iterdir()] == ["manifest.json"]


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OSError(28, "No space left on device"), 2, "cannot be written: No space left on device"),
        (KeyboardInterrupt(), 130, "the same command makes the videos that are missing"),
    ],
)
def test_an_end_while_frames_are_handed_over(run, tmp_path, monkeypatch, error, code, message):
    """A disk that fills up stops the encoder in its thread, Ctrl-C the decoder in this one."""
    decode = Pipeline.decode_pieces

    class FullDisk:
        def reformat(self, *args, **kwargs):
            raise error

    def interrupted(*args):
        yield next(decode(*args))
        raise error

    if code == 2:
        monkeypatch.setattr(video, "VideoReformatter", FullDisk)
    else:
        monkeypatch.setattr(Pipeline, "decode_pieces", interrupted)
    threads = threading.active_count()
    ended, _, err = run("--prompt=a red 3", prompts=None)
    assert ended == code and message in err and "Traceback" not in err
    assert [path.name for path in (tmp_path / "videos").iterdir()] == ["manifest.json"]
    assert threading.active_count() == threads


def test_a_video_depends_on_its_own_seed_alone(pipeline):
    settings = Settings.of(pipeline.checkpoint)
    shape = pipeline.latent_shape(settings)
    np.testing.assert_array_equal(noise([5, 6, 7], shape)[1], noise([6], shape)[0])

    together = pipeline.latents(PROMPTS, [5, 6, 7], settings, 2)
    # The last batch is filled up; and the same video in another place, beside other neighbours.
    order = [2, 0, 1]
    moved = pipeline.latents([PROMPTS[i] for i in order], [5 + i for i in order], settings, 2)
    np.testing.assert_array_equal(moved, together[order])
    alone = pipeline.latents(PROMPTS[1:2], [6], settings, 2)
    np.testing.assert_array_equal(alone[0], together[1])

    single = pipeline.latents(PROMPTS[1:2], [6], settings, 1)
    assert np.abs(single[0] - together[1]).max() < 1e-4 * np.abs(together).max()
    assert np.abs(together[0] - together[1]).max() > 0.1


def test_prompts_of_any_length_share_a_run_without_touching_each_other(pipeline):
    """A long prompt is padded more; the short ones beside it give the same bits as without it."""
    settings = Settings.of(pipeline.checkpoint)
    long = "red " * 40
    mixed = pipeline.latents([PROMPTS[0], long, PROMPTS[1]], [5, 6, 7], settings, 2)
    short = pipeline.latents([PROMPTS[0], PROMPTS[1]], [5, 7], settings, 2)
    np.testing.assert_array_equal(mixed[[0, 2]], short)


def test_default_batches_are_even():
    assert [even_batch_size(n, 4) for n in (1, 3, 4, 5, 9, 50)] == [1, 3, 4, 3, 3, 4]


def test_every_text_has_room_for_a_pad_token():
    assert [text_bucket(n) for n in (1, 31, 32, 511, 512)] == [32, 32, 64, 512, 512]
