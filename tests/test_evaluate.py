"""The evaluate stage on a tiny random model: what it measures, how it resumes, what it refuses."""

import json
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from linvideo_jax import checkpoints, evaluation, report, video
from linvideo_jax.data import captions
from linvideo_jax.errors import UserError
from linvideo_jax.metrics import agreement, classifier, flops
from linvideo_jax.models.module import shapes
from linvideo_jax.models.tokenizer_training import build
from linvideo_jax.models.umt5 import UMT5Config, UMT5Encoder
from linvideo_jax.models.vae import VAEConfig, WanVAE
from linvideo_jax.models.wan import WanConfig, WanTransformer
from linvideo_jax.pipeline import Pipeline, Settings
from linvideo_jax.stages import evaluate

PROMPTS = (
    "a red 3 moves slowly straight right on a black background",
    "a blue 7 moves quickly up and bounces on a green background",
    "the yellow nine goes slowly straight down on a gray background",
)
LAYERS = 3


def draw(cls, config, seed=0):
    """Parameters of a module, drawn in numpy: no initialiser is compiled."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: rng.normal(scale=0.2, size=leaf.shape).astype(leaf.dtype), shapes(cls, config)
    )


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A folder of a checkpoint with digits' 16 latent channels and 96 px, all else tiny."""
    folder = tmp_path_factory.mktemp("teacher")
    vocabulary = build(captions.vocabulary(), folder / "words")
    models = {
        "transformer": WanConfig(
            num_layers=LAYERS, num_attention_heads=2, attention_head_dim=12, ffn_dim=24,
            text_dim=16, freq_dim=16,
        ),
        "vae": VAEConfig(base_dim=4, num_res_blocks=1),
        "text_encoder": UMT5Config(
            vocab_size=vocabulary, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2
        ),
    }  # fmt: skip
    classes = {"transformer": WanTransformer, "vae": WanVAE, "text_encoder": UMT5Encoder}
    sampling = {
        "num_inference_steps": 2,
        "guidance_scale": 2.0,
        "height": 96,
        "width": 96,
        "num_frames": 13,
    }
    checkpoints.save(
        folder / "teacher",
        config=checkpoints.make_config(**models, sampling=sampling),
        **{part: draw(classes[part], config) for part, config in models.items()},
        tokenizer=folder / "words",
    )
    return folder / "teacher"


def save_student(teacher, folder, layers):
    """A "trained" student: the teacher with linear layers, its weights moved a little."""
    whole = checkpoints.load(teacher)
    student = evaluation.untrained(whole, layers)
    moved = jax.tree.map(lambda leaf: leaf * 1.02, student.transformer)
    checkpoints.save(
        folder,
        config=student.config,
        transformer=moved,
        vae=whole.vae,
        text_encoder=whole.text_encoder,
        tokenizer=whole.tokenizer_folder,
        scheduler=whole.scheduler,
    )


@pytest.fixture(scope="module")
def run_folder(teacher, tmp_path_factory):
    """A workdir with a student in it, another student beside it, prompts, and both classifiers."""
    root = tmp_path_factory.mktemp("run")
    save_student(teacher, root / "workdir" / "final", (0, 2))
    save_student(teacher, root / "shipped", (1,))
    (root / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    small = {"width": 8, "depth": 1, "slot_width": 8, "feature_width": 4, "glimpse_channels": 2}
    for kind, sizes in (("pixels", classifier.PIXELS), ("latents", classifier.LATENTS)):
        config = replace(sizes, **small)
        params = draw(classifier.DigitsClassifier, config)
        view = "round_trip" if kind == "pixels" else "clean"
        ceiling = dict.fromkeys(
            ("digit", "colour", "direction", "speed", "bounce", "background", "all"), 0.99
        )
        classifier.save(root / "classifier", kind, params, config, {f"{view}_13_frames": ceiling})
    return root


@pytest.fixture(scope="module")
def config(teacher, run_folder):
    config = ConfigDict({"checkpoint": str(teacher), "model": "wan_digits"})
    config.evaluate = ConfigDict(
        {
            "prompts": str(run_folder / "prompts.txt"),
            "num_prompts": 3,
            "seeds": (0, 1),
            "height": 96,
            "width": 96,
            "num_frames": 13,
            "sampling": {"num_inference_steps": 1},
            "batch_size": 2,
            "reads": "latents",
            "classifier": str(run_folder / "classifier"),
            "num_shown": 2,
            "others": {"made before, shipped": str(run_folder / "shipped")},
            "others_before": True,
        }
    )
    return config


def read(workdir):
    return json.loads((workdir / "evaluate" / "metrics.json").read_text())


@pytest.fixture(scope="module")
def latents_run(config, run_folder, tmp_path_factory):
    """The stage's folder and metrics, read from latents."""
    evaluate.run(config, run_folder / "workdir")
    return SimpleNamespace(
        workdir=run_folder / "workdir", metrics=read(run_folder / "workdir"), config=config
    )


def test_contenders_and_their_figures(latents_run):
    metrics = latents_run.metrics
    entries = metrics["contenders"]
    assert list(entries) == [
        "teacher",
        "student",
        "student_before",
        "made before, shipped",
        "made before, shipped_before",
    ]
    layers = {name: entry["linear_layers"] for name, entry in entries.items()}
    assert layers == {
        "teacher": [],
        "student": [0, 2],
        "student_before": [0, 2],
        "made before, shipped": [1],
        "made before, shipped_before": [1],
    }
    assert [name for name, entry in entries.items() if entry["trained_here"]] == ["student"]
    for name, entry in entries.items():
        assert entry["num_videos"] == 6 and set(entry["per_seed"]) == {"0", "1"}
        for figure in entry["agreement"].values():
            low, high = figure["interval"]
            assert 0 <= low <= figure["rate"] <= high <= 1
        assert (entry["distance_latents"] == 0) == (name == "teacher")
        assert (entry["flops_saved"] == 0) == (name == "teacher")
    assert metrics["ceiling"]["all"] == 0.99
    assert set(metrics["students"]) == {"student", "made before, shipped"}
    assert metrics["made"]["settings"]["num_inference_steps"] == 1
    assert metrics["made"]["settings"]["guidance_scale"] == 2.0


def test_videos_of_the_first_prompts_are_shown(latents_run):
    shown = latents_run.metrics["shown"]
    assert [entry["prompt"] for entry in shown] == list(PROMPTS[:2])
    clips = {
        name: video.read_mp4(latents_run.workdir / "evaluate" / entry["file"])
        for name, entry in shown[0]["videos"].items()
    }
    assert set(clips) == set(latents_run.metrics["contenders"])
    assert {clip.shape for clip in clips.values()} == {(13, 96, 96, 3)}
    for word, right in shown[0]["videos"]["teacher"]["read"]:
        assert isinstance(word, str) and isinstance(right, bool)


def test_every_model_starts_from_the_noise_of_its_seed(latents_run, teacher):
    name = "teacher-seed1-latents.safetensors"
    path = latents_run.workdir / "evaluate" / name
    with evaluation.safe_open(path, "numpy") as file:
        found = file.get_tensor("latents")
    whole = checkpoints.load(teacher)
    settings = Settings.of(whole, num_inference_steps=1)
    wanted = Pipeline(whole).latents(PROMPTS, [100_003, 100_004, 100_005], settings, 2)
    np.testing.assert_array_equal(found, wanted)


def test_an_interrupted_run_goes_on_and_ends_the_same(latents_run, config, monkeypatch):
    folder = latents_run.workdir / "evaluate"
    kept = (folder / "teacher-seed0-latents.safetensors").stat().st_mtime_ns
    lost = folder / "student-seed1-latents.safetensors"
    whole = evaluation.safe_open(lost, "numpy").get_tensor("latents")
    lost.unlink()

    batches = Pipeline.batches

    def stop_after_the_first(*args):
        made = batches(*args)
        yield next(made)
        raise KeyboardInterrupt

    monkeypatch.setattr(Pipeline, "batches", stop_after_the_first)
    monkeypatch.setattr(evaluation, "SAVE_EVERY", 0.0)
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(config, latents_run.workdir)
    half = evaluation.safe_open(lost, "numpy")
    assert half.get_tensor("done").tolist() == [True, True, False]
    monkeypatch.setattr(Pipeline, "batches", batches)
    evaluate.run(config, latents_run.workdir)
    np.testing.assert_array_equal(evaluation.safe_open(lost, "numpy").get_tensor("latents"), whole)
    assert (folder / "teacher-seed0-latents.safetensors").stat().st_mtime_ns == kept
    again = read(latents_run.workdir)
    for key in ("ceiling", "students", "shown"):
        assert again[key] == latents_run.metrics[key]


def test_pixels_of_the_teacher_alone_and_for_a_row_of_a_sweep(config, tmp_path, monkeypatch):
    """Without a student in the workdir; reading pixels adds the figures of motion and quality.

    What is the teacher's lies in a folder that another run takes it from.
    """
    config = ConfigDict(config.to_dict())
    config.evaluate.unlock()
    config.evaluate.update({"shared": str(tmp_path / "shared"), "own_before": False})
    config.evaluate.update({"reads": "pixels", "seeds": (0,), "num_prompts": 2, "num_shown": 1})
    config.evaluate.others = ConfigDict()
    evaluate.run(config, tmp_path)
    metrics = read(tmp_path)
    assert list(metrics["contenders"]) == ["teacher"] and metrics["students"] == {}
    entry = metrics["contenders"]["teacher"]
    assert entry["distance_video"] == 0
    assert 0 <= entry["quality.sharpness"] <= 1 and "motion.shape_correlation" in entry
    assert entry["frechet"] is None, "two videos have no covariance of full rank"

    def made():
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "shared").glob("[!.]*")}

    theirs = made()
    assert len(theirs) == 4
    save_student(config.checkpoint, tmp_path / "row" / "final", (0, 2))
    decoded, decode = [], evaluation.decode

    def counted(teacher, latents, batch_size):
        decoded.append(len(latents))
        return decode(teacher, latents, batch_size)

    monkeypatch.setattr(evaluation, "decode", counted)
    evaluate.run(config, tmp_path / "row")
    assert decoded == [2, 1, 1]  # the student's; then of both the one that is shown
    metrics = read(tmp_path / "row")
    assert list(metrics["contenders"]) == ["teacher", "student"] and metrics["students"] == {}
    assert metrics["contenders"]["teacher"] == entry
    assert metrics["contenders"]["student"]["distance_video"] > 0
    assert made() == theirs


def test_without_a_classifier_videos_are_compared_with_the_teachers(config, run_folder, tmp_path):
    """As for real Wan: any prompt, figures that need no network, and videos named as VBench wants.

    Interrupted and resumed, each video is measured once.
    """
    prompts = ("a cat on a sofa", "rain, at night: 5 streets")
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n")
    own = ConfigDict(config.to_dict())
    own.evaluate.unlock()
    changes = {"prompts": str(tmp_path / "prompts.txt"), "num_prompts": 2, "classifier": ""}
    own.evaluate.update(changes | {"reads": "pixels", "num_shown": 1, "others_before": False})
    workdir = tmp_path / "work"
    save_student(own.checkpoint, workdir / "final", (0, 2))
    own.evaluate.others = ConfigDict()
    decoded, decode = [], evaluation.decode

    def counted(teacher, latents, batch_size):
        decoded.append(len(latents))
        if len(decoded) == 8:
            raise KeyboardInterrupt
        return decode(teacher, latents, batch_size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "decode", counted)
        with pytest.raises(KeyboardInterrupt):
            evaluate.run(own, workdir)
        evaluate.run(own, workdir)
    # Of 2 prompts and 2 seeds: 4 of the teacher's once; the students' 8 with the teacher's beside
    # them, one of the two broken off; and what is shown, of 3 models.
    assert decoded == [1] * (4 + 2 * 8 + 2 + 3)

    metrics = read(workdir)
    assert metrics["ceiling"] is None and metrics["students"] == {}
    entries = metrics["contenders"]
    assert list(entries) == ["teacher", "student", "student_before"]
    for name, entry in entries.items():
        assert entry["agreement"] == {} and entry["num_videos"] == 4
        assert 0 < entry["motion.smoothness"] <= 1 and 0 <= entry["motion.dynamic_degree"] <= 1
        assert (entry["psnr"] is None) == (name == "teacher")
        made = sorted(path.name for path in (workdir / "evaluate" / "vbench" / name).iterdir())
        assert made == sorted(f"{prompt}-{i}.mp4" for prompt in prompts for i in (0, 1))
        clip = video.read_mp4(workdir / "evaluate" / "vbench" / name / f"{prompts[0]}-1.mp4")
        assert clip.shape == (13, 96, 96, 3)
    student = entries["student"]
    assert 5 < student["psnr"] < 60 and 0 < student["ssim"] < 1 and student["distance_video"] > 0
    page = (workdir / "report.html").read_text()
    assert "PSNR to the teacher" in page and "classifier of moving digits" not in page
    assert "struck" not in page and "evaluate/vbench" in page
    assert "psnr" in report.text(metrics)

    own.evaluate.reads = "latents"
    with pytest.raises(UserError, match=r"without evaluate\.classifier .* choose pixels"):
        evaluate.run(own, workdir)
    own.evaluate.reads = "pixels"
    (tmp_path / "prompts.txt").write_text("one\none\n")
    with pytest.raises(UserError, match="'one' is there twice"):
        evaluate.run(own, workdir)


def test_a_distilled_model_is_sampled_as_it_says(teacher, config, tmp_path):
    """Beside its teacher, its start cut to as many steps, and the teacher at other counts."""
    few = {
        "sampler": "renoise",
        "num_inference_steps": 2,
        "guidance_scale": 1.0,
        "denoising_steps": [1000, 500],
    }
    whole = checkpoints.load(teacher)
    save_student(teacher, tmp_path / "start", (1,))
    start = checkpoints.load(tmp_path / "start")
    checkpoints.save(
        tmp_path / "workdir" / "final",
        config={**start.config, **few},
        transformer=start.transformer,
        vae=whole.vae,
        text_encoder=whole.text_encoder,
        tokenizer=whole.tokenizer_folder,
    )
    own = ConfigDict(config.to_dict())
    own.teacher, own.checkpoint = str(teacher), str(tmp_path / "start")
    own.evaluate.update({"num_prompts": 2, "num_shown": 1, "others_before": False})
    own.evaluate.others = ConfigDict({"teacher, 2 steps": str(teacher)})
    own.evaluate.others_sampling = {"teacher, 2 steps": {"num_inference_steps": 2}}
    evaluate.run(own, tmp_path / "workdir")
    entries = read(tmp_path / "workdir")["contenders"]
    assert {
        name: (entry["sampling"]["num_inference_steps"], entry["sampling"]["sampler"])
        for name, entry in entries.items()
    } == {
        "teacher": (1, "unipc"),
        "student": (2, "renoise"),
        "student_before": (2, "unipc"),
        "teacher, 2 steps": (2, "unipc"),
    }
    assert entries["student"]["sampling"]["guidance_scale"] == 1.0
    assert entries["student_before"]["source"] == str(tmp_path / "start")
    assert entries["student_before"]["linear_layers"] == [1]
    assert entries["teacher"]["diversity"] == 1.0
    low, high = entries["student"]["diversity_interval"]
    assert low <= entries["student"]["diversity"] <= high
    folder = tmp_path / "workdir" / "evaluate"
    table = (folder / "table.md").read_text().splitlines()
    assert table[0].startswith("|  | linear | steps | guidance | all | digit |")
    assert table[3].startswith("| Student | 1 of 3 | 2 renoise | 1 |") and len(table) == 6
    assert Image.open(folder / "contact_sheet.png").size == (190 + 6 * 96 + 32, 16 + 4 * 102 + 32)
    own.evaluate.others_sampling = {"nobody": {}}
    with pytest.raises(UserError, match="names 'nobody', which is none of"):
        evaluate.run(own, tmp_path / "workdir")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reads": "thoughts"}, "latents, pixels"),
        ({"num_prompts": 9}, "has 3 prompts"),
        ({"prompts": "nowhere.txt"}, "nowhere.txt"),
        ({"classifier": "nowhere"}, "no readable digits classifier"),
        ({"others": {"student": "assets"}}, "taken"),
        ({"others": {"shipped": "nowhere"}}, "nowhere"),
        ({"num_frames": 12}, "num_frames"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_made(config, tmp_path, changes, words):
    config = ConfigDict(config.to_dict())
    config.evaluate.unlock()
    config.evaluate.update(changes)
    with pytest.raises(UserError, match=words):
        evaluate.run(config, tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_prompt_that_cannot_be_judged_is_refused(config, run_folder, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a cat on a sofa\n")
    config = ConfigDict(config.to_dict())
    config.evaluate.update({"prompts": str(path), "num_prompts": 1})
    with pytest.raises(UserError, match="a cat on a sofa"):
        evaluate.run(config, tmp_path / "workdir")


def test_untrained_student_is_the_teacher_where_no_layer_is_linear(teacher):
    whole = checkpoints.load(teacher)
    settings = Settings.of(whole, num_inference_steps=1)
    same = Pipeline(evaluation.untrained(whole, ())).latents(PROMPTS[:1], [5], settings, 2)
    np.testing.assert_allclose(
        same, Pipeline(whole).latents(PROMPTS[:1], [5], settings, 2), atol=1e-6
    )


def test_others_without_what_they_were_before(teacher, run_folder):
    others = {"made before, shipped": str(run_folder / "shipped")}
    field = evaluation.contenders(
        checkpoints.load(teacher), run_folder / "workdir", others, others_before=False
    )
    assert [one.name for one in field] == [
        "teacher",
        "student",
        "student_before",
        "made before, shipped",
    ]


def test_reading_in_words():
    said = evaluation.said_by([PROMPTS[1]])
    seen = said._replace(direction=said.direction.copy(), digit=said.digit.copy())
    assert evaluation.describe(said, seen, 0) == [
        ("blue 7", True), ("up", True), ("quickly", True), ("bounces", True), ("on green", True),
    ]  # fmt: skip
    blue, red = 3, 0
    seen.direction[0, blue] = classifier.NO_DIRECTION
    seen.digit[0, red] = 4
    assert evaluation.describe(said, seen, 0)[:3] == [
        ("red 4", False), ("blue 7", True), ("no clear way", False),
    ]  # fmt: skip
    assert not agreement.agree(said, seen)["all"][0]


WAN_1_3B = WanConfig()
WAN_14B = WanConfig(num_attention_heads=40, ffn_dim=13_824, num_layers=40)


@pytest.mark.parametrize(
    ("config", "tokens", "linear", "tera"),
    [
        (WAN_1_3B, 32_760, 0, 283),
        (WAN_1_3B, 75_600, 0, 1_250),
        (WAN_14B, 32_760, 0, 1_678),
        (WAN_14B, 75_600, 0, 6_523),
        (WAN_1_3B, 32_760, 16, 178),
        (WAN_14B, 75_600, 22, 3_954),
    ],
)
def test_flops_of_wan(config, tokens, linear, tera):
    """Published totals of Wan2.1's two sizes, whole and with the paper's linear layers."""
    assert flops.forward(config, tokens, range(linear)) / 1e12 == pytest.approx(tera, rel=2e-3)


def test_flops_of_one_layer():
    assert flops.softmax_attention(WAN_1_3B, 32_760) / 1e12 == pytest.approx(6.59, rel=1e-3)
    assert flops.linear_attention(WAN_1_3B, 32_760) / 1e12 == pytest.approx(0.039, rel=1e-2)
    assert flops.softmax_attention(WAN_14B, 75_600) / 1e12 == pytest.approx(117, rel=1e-3)
    assert flops.linear_attention(WAN_14B, 75_600) / 1e12 == pytest.approx(0.30, rel=1e-2)
    share = 30 * flops.softmax_attention(WAN_1_3B, 32_760) / flops.forward(WAN_1_3B, 32_760)
    assert share == pytest.approx(0.699, abs=1e-3)


def test_flops_saved_and_tokens():
    tokens = flops.video_tokens(WAN_1_3B, (21, 60, 104, 16))
    assert tokens == 32_760
    assert flops.saved(WAN_1_3B, tokens, ()) == 0
    assert flops.saved(WAN_1_3B, tokens, range(16)) == pytest.approx(1 - 178 / 283, abs=2e-3)
