"""From prompts and jsonl rows to requests: seeds, settings, file names, and what is refused."""

import json
from dataclasses import replace

import pytest

from linvideo_jax.errors import UserError
from linvideo_jax.folders import replacing
from linvideo_jax.pipeline import Settings
from linvideo_jax.requests import MAX_SEED, file_name, make_requests, read_rows, vbench_name

SETTINGS = Settings(480, 832, 81, 50, 5.0, 3.0, "unipc")


def rows_of(tmp_path, *lines):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return read_rows(None, str(path))


def test_rows_bring_their_own_settings(tmp_path):
    rows = rows_of(
        tmp_path,
        {"prompt": " a cat "},
        "",
        {"prompt": "a\u2028dog", "seed": 9, "height": 832, "width": 480, "guidance_scale": 6},
        {"prompt": "a fox", "negative_prompt": "blurred", "sampler": "dpm++"},
    )
    requests = make_requests(rows, SETTINGS, 100, num_samples=2)
    assert [r.seed for r in requests] == [100, 101, 9, 10, 104, 105]
    assert [r.name for r in requests[:3]] == [
        "0000-a-cat-0.mp4",
        "0000-a-cat-1.mp4",
        "0001-a-dog-0.mp4",
    ]
    assert requests[0].settings == SETTINGS and requests[0].prompt == "a cat"
    assert requests[2].settings == Settings(832, 480, 81, 50, 6, 3.0, "unipc")
    assert requests[4].settings.negative_prompt == "blurred"
    assert requests[4].settings.sampler == "dpm++"


FEW = replace(
    SETTINGS,
    num_inference_steps=4,
    sampler="renoise",
    guidance_scale=1.0,
    denoising_steps=(1000, 750, 500, 250),
)


@pytest.mark.parametrize(
    ("given", "steps", "count"),
    [
        ({}, (1000, 750, 500, 250), 4),
        ({"sampler": "euler", "flow_shift": 8.0}, (1000, 750, 500, 250), 4),
        ({"num_inference_steps": 2}, None, 2),
        ({"sampler": "unipc", "num_inference_steps": 50}, None, 50),
        ({"sampler": "unipc"}, None, 4),
        ({"denoising_steps": [1000, 757, 522]}, (1000, 757, 522), 3),
    ],
)
def test_a_distilled_models_list_and_what_takes_its_place(tmp_path, given, steps, count):
    (row,) = rows_of(tmp_path, {"prompt": "a cat", **given})
    (request,) = make_requests([row], FEW, 0)
    assert (request.settings.denoising_steps, request.settings.num_inference_steps) == (
        steps,
        count,
    )
    assert len(request.settings.sigmas()) == count + 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a cat"', "row 3 of .*rows.jsonl is not JSON"),
        ("[" * 100_000, "row 3 of .* is not JSON"),
        ('["a cat"]', "row 3 of .* has no prompt"),
        ({"seed": 1}, "row 3 of .* has no prompt"),
        ({"prompt": 7}, "row 3 of .* has no prompt"),
        ({"prompt": " "}, "row 3 of .* has an empty prompt"),
        ({"prompt": "a", "hight": 480}, "row 3 of .* has the unknown key 'hight'"),
        ({"prompt": "a", "height": "480"}, "row 3 of .*: height is '480', .* a whole number"),
        ({"prompt": "a", "seed": True}, "row 3 of .*: seed is True, .* a whole number"),
        ({"prompt": "a", "seed": -1}, "row 3 of .*: seed is -1: choose one from 0"),
        ({"prompt": "a", "seed": 2**40}, "row 3 of .*: seed is 1099511627776"),
        ({"prompt": "a", "guidance_scale": 0.5}, "row 3 of .*: guidance_scale is 0.5: choose"),
        ('{"prompt": "a", "flow_shift": NaN}', "row 3 of .*: flow_shift is nan: choose"),
        ({"prompt": "a", "denoising_steps": 4}, "row 3 of .*: denoising_steps is 4, .* a list of"),
        ({"prompt": "a", "denoising_steps": [9, "8"]}, "row 3 of .*: denoising_steps is .* a list"),
        (
            {"prompt": "a", "denoising_steps": [500, 750]},
            "row 3 of .*: denoising_steps is 500, 750: give timesteps that fall",
        ),
        ({"prompt": "a", "sampler": "ddim"}, "row 3 of .*: the sampler 'ddim' is unknown"),
        (r'{"prompt": "\ud800"}', "row 3 of .* no Unicode"),
    ],
)
def test_a_broken_row_is_named(tmp_path, line, message):
    with pytest.raises(UserError, match=message):
        rows_of(tmp_path, {"prompt": "good"}, "", line)


def test_a_size_that_the_model_cannot_make_names_its_row(tmp_path):
    def check(settings):
        if settings.height % 16:
            raise UserError("height must be divisible by 16.")

    rows = rows_of(tmp_path, {"prompt": "a"}, {"prompt": "b", "height": 40})
    with pytest.raises(UserError, match=r"row 2 of .*: height must be divisible by 16\."):
        make_requests(rows, SETTINGS, 0, check=check)


def test_the_last_sample_needs_a_seed_too(tmp_path):
    rows = rows_of(tmp_path, {"prompt": "a", "seed": MAX_SEED})
    assert make_requests(rows, SETTINGS, 0)[0].seed == MAX_SEED
    with pytest.raises(UserError, match="too large for 2 samples: choose 4294967294 or less"):
        make_requests(rows, SETTINGS, 0, num_samples=2)


def test_vbench_names_are_the_prompts():
    """Pitfall 17: VBench finds a video by its prompt, letter for letter."""
    rows = read_rows("A cat, in the Snow.", None)
    requests = make_requests(rows, SETTINGS, 0, num_samples=5, vbench_names=True)
    assert [r.name for r in requests] == [f"A cat, in the Snow.-{k}.mp4" for k in range(5)]
    assert vbench_name("雪中的猫", 0) == "雪中的猫-0.mp4"


def test_one_name_for_two_videos_is_refused(tmp_path):
    rows = rows_of(tmp_path, {"prompt": "a cat"}, {"prompt": "a cat", "seed": 5})
    assert len(make_requests(rows, SETTINGS, 0)) == 2
    with pytest.raises(UserError, match=r"row 1 of .* and row 2 of .* are the same prompt"):
        make_requests(rows, SETTINGS, 0, vbench_names=True)


@pytest.mark.parametrize("name", [file_name, vbench_name])
def test_any_prompt_gives_a_file_inside_the_folder(tmp_path, name):
    prompts = [
        *("../../etc/passwd", "/root", "..", ".", ".hidden", "a/b\\c", "con\x00trol\x1b[2J\n\x7f"),
        *("x" * 5_000, "x" * 4_999 + "y", "猫" * 5_000, "🐈" * 300, "a" * 225, "a" * 240, "\u2028"),
    ]
    makers = (lambda i, p: file_name(i, p, 3)) if name is file_name else (lambda i, p: name(p, 3))
    names = [makers(i, prompt) for i, prompt in enumerate(prompts)]
    assert len(set(names)) == len(prompts)
    for each in names:
        with replacing(tmp_path / each) as temporary:
            temporary.write_text("video")
        assert each.endswith("3.mp4") and each.isprintable() and not each.startswith(".")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
