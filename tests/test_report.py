"""report.html from made-up figures: every section is there, and nothing outside is asked for."""

import base64
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from benchmarks import picture
from linvideo_jax import loop, report, video
from linvideo_jax.errors import UserError
from linvideo_jax.evaluation import store
from linvideo_jax.report import charts
from linvideo_jax.stages import monitoring

NAMES = ("teacher", "student", "student_before", "shipped", "shipped_before")
ROLES = ("teacher", "after", "before", "after", "before")
LINEAR = ((), (2, 5, 9), (2, 5, 9), (0, 2, 4, 5, 9, 11), (0, 2, 4, 5, 9, 11))
RATES = (0.906, 0.875, 0.516, 0.89, 0.0)
ATTRIBUTES = ("digit", "colour", "direction", "speed", "bounce", "background", "all")
SECTIONS = (
    "videos", "agreement", "figures", "layers", "training", "flops", "origins", "commands",
)  # fmt: skip
FACTS = {
    "num_steps": 180, "target": 3, "num_layers": 12,
    "marks": [[20, "maps fitted"], [120, "rounded"]],
    "flops_saved_a_layer": 0.011, "attention_saved_a_layer": 0.08,
}  # fmt: skip
VOID = {"meta", "img"}


def made_up_metrics(prompts, names=NAMES):
    """A metrics.json with the figures above."""
    contenders = {}
    for name, role, layers, rate in zip(NAMES, ROLES, LINEAR, RATES, strict=True):
        share = {"rate": rate, "interval": [max(0.0, rate - 0.08), min(1.0, rate + 0.06)]}
        contenders[name] = {
            "role": role,
            "source": {"after": f"assets/{name}"}.get(role, "assets/wan_digits"),
            "trained_here": name == "student",
            "linear_layers": list(layers),
            "num_layers": 12,
            "num_videos": 64,
            "agreement": dict.fromkeys(ATTRIBUTES, share),
            "per_seed": {"0": dict.fromkeys(ATTRIBUTES, rate)},
            "distance_latents": 0.4 if layers else 0.0,
            "tokens": 252,
            "flops_per_forward": 2_800_000_000 - 30_000_000 * len(layers),
            "flops_saved": len(layers) * 0.011,
            "seconds": 60.0,
            "seconds_per_video": 0.94,
        }
    closed = {"teacher": 0.906, "before": 0.516, "after": 0.875, "gap_closed": 0.92}
    closed |= {"interval": [0.74, 1.08], "per_seed": {"0": 0.92}}
    config = {
        "evaluate": {
            "prompts": "assets/prompts_digits_test.txt", "num_prompts": 64, "seeds": [0],
            "reads": "latents", "classifier": "assets/digits_classifier",
        },
        "transfer": {"target": 3, "warmup_steps": 20, "round_at": 120},
    }  # fmt: skip
    settings = {
        "height": 96, "width": 96, "num_frames": 25, "num_inference_steps": 10,
        "guidance_scale": 2.0, "flow_shift": 3.0, "sampler": "unipc", "negative_prompt": "",
    }  # fmt: skip
    return {
        "made": {
            "command": "python train.py --config=configs/demo.py --workdir=runs/demo",
            "time": "2026-01-02 03:04", "device": "cpu", "cores": 2, "python": "3.11.9",
            "jax": "0.10.2", "dtype": "float32", "settings": settings, "config": config,
        },
        "ceiling": dict.fromkeys(ATTRIBUTES, 0.985),
        "contenders": {name: contenders[name] for name in names},
        "students": {one: closed for one in ("student", "shipped") if f"{one}_before" in names},
        "shown": [
            {
                "prompt": prompt,
                "videos": {
                    name: {
                        "file": f"videos/{i:02d}-{name}.mp4",
                        "read": [["red 3", True], ["right <", "before" not in name]],
                    }
                    for name in names
                },
            }
            for i, prompt in enumerate(prompts)
        ],
    }  # fmt: skip


def made_up_log(steps=180):
    """Lines of a transfer's metrics.jsonl: warm-up, then selection, then the rounded model."""
    rng = np.random.default_rng(0)
    lines = []
    for step in range(1, steps + 1):
        line = {"step": step, "loss": float(np.exp(-step / 60) + 0.05 * rng.random())}
        if step > 20:
            progress = min(1.0, (step - 20) / 100)
            ends = [0.0 if layer in LINEAR[1] else 1.0 for layer in range(12)]
            r = [0.9 + (end - 0.9) * progress for end in ends]
            line |= {
                "adm": 0.1 * float(rng.random()), "anchor": line["loss"] * 0.8,
                "constraint": 9 * (1 - progress), "regulariser": 2.0, "alpha": 20 - 18 * progress,
                "gradient_norm": float(rng.random()), "r": r,
            }  # fmt: skip
        else:
            line["attention_errors"] = [0.5 / step + 0.01 * k for k in range(12)]
            line["r"] = [0.9] * 12
        lines.append(line | {"time": 1000.0 + step})
    return lines


@pytest.fixture
def workdir(tmp_path):
    """make(prompts, log, names) -> the folder of a finished run."""

    def make(prompts=("a red 3 moves <right>", "a blue 7"), log=(), names=NAMES):
        folder = tmp_path / "runs" / "it's a demo" / "evaluate"
        (folder / "videos").mkdir(parents=True)
        loop.write_json(folder / "metrics.json", made_up_metrics(prompts, names))
        rng = np.random.default_rng(0)
        for name in names:
            frames = rng.integers(0, 255, (len(prompts), 3, 32, 32, 3), np.uint8)
            store(folder / f"{name}-shown.safetensors", "any", {"frames": frames})
            for i, clip in enumerate(frames):
                video.write_mp4(folder / "videos" / f"{i:02d}-{name}.mp4", clip)
        if log:
            (folder.parent / "state" / "transfer").mkdir(parents=True)
            text = "".join(json.dumps(line) + "\n" for line in log)
            (folder.parent / "state" / "transfer" / "metrics.jsonl").write_text(text)
            loop.write_json(folder.parent / "state" / "transfer" / "facts.json", FACTS)
        return folder.parent

    return make


class Page(HTMLParser):
    """Tags with their attributes, the text, and a complaint where tags do not nest."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.words = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def of(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def test_the_page_is_whole_and_opens_offline(workdir):
    folder = workdir(log=made_up_log())
    path = report.write(folder)
    text = path.read_text()
    page = Page(text)
    assert [section["id"] for section in page.of("section")] == list(SECTIONS)
    words = re.sub(r"base64,[^\"]+", "", text)
    assert not re.search(r"https?:|//[a-z]", words), "it asks for something outside"
    assert not page.of("script") and not page.of("link")
    for _, attributes in page.tags:
        for key in ("src", "href", "data", "poster"):
            assert attributes.get(key, "data:").startswith("data:")
    assert "url(" not in text and "@import" not in text
    assert page.of("meta")[1]["content"].startswith("width=device-width")


def test_videos_play_by_themselves_and_are_the_files(workdir):
    folder = workdir()
    page = Page(report.write(folder).read_text())
    videos = page.of("video")
    assert len(videos) == 2 * len(NAMES)
    assert all({"autoplay", "loop", "muted", "playsinline"} <= set(one) for one in videos)
    kind, data = videos[1]["src"].split(",")
    assert kind == "data:video/mp4;base64"
    file = folder / "evaluate" / "videos" / "00-student.mp4"
    assert base64.b64decode(data) == file.read_bytes()
    assert "a red 3 moves <right>" in page.text
    wrong = [attributes for attributes in page.of("span") if attributes.get("class") == "wrong"]
    assert len(wrong) == 1 + 2 * 2  # in the explanation, and of each video before training


def test_figures_origins_and_commands_are_said(workdir):
    page = Page(report.write(workdir(log=made_up_log())).read_text())
    for words in (
        "3 of 12 attention layers made linear",
        "gap closed 0.92 (95%: 0.74 to 1.08)",
        "90.6",
        "98.5",
        "Made by this run",
        "Not made by this run",
        "converted on a GPU: docs/results.md",
        "180 updates",
        "python train.py --config=configs/demo.py --workdir=runs/demo",
        "s a demo/final' --prompt='a red 3 moves <right>'",
        "transfer.round_at = 120",
        "32,760 tokens, 15 of 30 layers",
    ):
        assert words in page.text, words
    here, elsewhere = page.text.split("Not made by this run")
    assert "Student (assets/student)" in here and "Shipped (assets/shipped)" in elsewhere
    squares = [one for one in page.of("i") if "class" in one]
    assert sum(one["class"] == "on" for one in squares) == 3 + 6


def test_curves_of_every_figure_in_the_log(workdir):
    page = Page(report.write(workdir(log=made_up_log())).read_text())
    labels = [svg["aria-label"] for svg in page.of("svg")]
    assert sum(label.startswith("r of each layer") for label in labels) == 2  # wide and narrow
    for key in ("loss", "adm", "anchor", "constraint", "regulariser", "alpha", "gradient_norm"):
        assert f"{key} over the steps" in labels
    assert "attention_errors of each layer over the steps" in labels


@pytest.mark.parametrize("steps", [1, 20, 90])
def test_a_run_that_trains_can_be_looked_at(tmp_path, steps):
    """No evaluation is there: the page shows how far it is, and asks to be loaded again."""
    state = tmp_path / "state" / "transfer"
    (state / "samples").mkdir(parents=True)
    log = [line | {"seconds_per_step": 2.5, "mixed_layers": 5, "forwards": 5.0} for line in
           made_up_log(steps)]  # fmt: skip
    (state / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    loop.write_json(state / "facts.json", FACTS | {"num_steps": 3000})
    loop.write_json(tmp_path / "config.json", {"transfer": {"target": 3, "best": "<b>"}})
    for step in (40, 80):
        sheet = monitoring.contact_sheet([np.full((2, 4, 30, 50, 3), 99, np.uint8)] * 2)
        assert sheet.shape == (2 * 2 * 30 + 6, 4 * 50, 3)
        picture.Image.fromarray(sheet).save(state / "samples" / f"{step:07d}.webp")
    text = report.write(tmp_path).read_text()
    page = Page(text)
    assert "http-equiv" in page.of("meta")[2]
    for words in (f"step {steps} of 3,000", f"{round((3000 - steps) * 2.5 / 3600)} h", "5 forwards",
                  "transfer.best = '<b>'", "step 80", "layers still mixed"):  # fmt: skip
        assert words in page.text, words
    assert [section["id"] for section in page.of("section")] == ["training", "samples", "commands"]
    assert len(page.of("img")) == 2 and len(page.of("image")) == 1
    if steps == 90:  # three of the scores are below a half
        assert "3 of 12 layers linear" in page.text and "24% of self-attention's" in page.text

    loop.write_json(state / "facts.json", FACTS | {"num_steps": steps})
    assert "of training left" not in Page(report.write(tmp_path).read_text()).text


def test_teacher_alone(workdir):
    page = Page(report.write(workdir(names=("teacher",))).read_text())
    assert [section["id"] for section in page.of("section")] == [
        name for name in SECTIONS if name != "training"
    ]
    assert "made linear" not in page.text and "there is no student here" in page.text


def test_a_student_without_what_it_was_before(workdir):
    page = Page(report.write(workdir(names=("teacher", "shipped"))).read_text())
    assert "6 of 12 attention layers made linear" in page.text
    assert "gap closed" not in page.text and "gap to the teacher" not in page.text


def test_text_for_a_terminal():
    text = report.text(made_up_metrics(()))
    assert "gap closed 0.92 (95%: 0.74 to 1.08)" in text
    assert [line.split()[0] for line in text.splitlines()[1:4]] == ["Teacher", "Student", "Student"]
    assert "ceiling of the classifier" in text and "98.5" in text


def test_without_an_evaluation(tmp_path):
    with pytest.raises(UserError, match=r"metrics\.json"):
        report.write(tmp_path)


def test_a_chart_stays_inside_its_box():
    x = list(range(1, 1001))
    y = [10.0 ** (-k / 200) for k in x]
    thin = charts.thinned(x, y)
    assert len(thin[0]) <= 240
    svg = charts.lines([charts.Line(*thin, "", "a <b>")], "falling", (340, 190))
    path = re.search(r'class="curve " d="M([^"]+)"', svg).group(1)
    points = np.array([[float(v) for v in point.split()] for point in path.split("L")])
    assert points[:, 0].min() >= 0 and points[:, 0].max() <= 340
    assert points[:, 1].min() >= 0 and points[:, 1].max() <= 190
    assert np.all(np.diff(points[:, 1]) >= 0)  # falling, and SVG counts downwards
    assert np.ptp(np.diff(points[:, 1])) < 0.25  # a straight line, for the axis is logarithmic
    assert "a &lt;b&gt;" in svg


@pytest.mark.parametrize("values", [[0.0, 0.0], [3.0], [-1.0, 2.0], [1e-7, 5e-7]])
def test_a_chart_of_any_values(values):
    svg = charts.lines([charts.Line(list(range(len(values))), values, "", "x")], "x")
    assert "nan" not in svg and "inf" not in svg.replace("infinite", "")


def test_moving_picture(workdir, tmp_path):
    folder, out = workdir(), tmp_path / "picture.webp"
    assert picture.main(["picture.py", f"--workdir={folder}", f"--out={out}", "--count=2"]) == 0
    with picture.Image.open(out) as image:
        assert image.n_frames == 3 and image.width > 2 * 32


def test_moving_picture_of_a_run_without_it(workdir, tmp_path, capsys):
    folder, out = workdir(names=("teacher",)), tmp_path / "picture.webp"
    assert picture.main(["picture.py", f"--workdir={folder}", f"--out={out}"]) == 2
    assert "has no student" in capsys.readouterr().err and not out.exists()
