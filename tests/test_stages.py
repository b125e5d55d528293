"""What the stages cannot run with is told before one runs and anything is written."""

import pytest

import train
from configs import digits
from linvideo_jax import config_files, pipeline, stages
from linvideo_jax.errors import UserError


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"transfer.objective": "foo"}, "transfer.objective is 'foo': choose one of adm"),
        ({"transfer.feature_map": "foo"}, "transfer.feature_map is 'foo'"),
        ({"transfer.target": 13}, "transfer.target is 13: choose 0 to 12"),
        ({"transfer.log_every": 0}, "transfer.log_every is 0: choose 1 or more"),
        ({"transfer.save_every": 0}, "transfer.save_every is 0: choose 1 or more"),
        ({"transfer.alpha": (20.0, 2.0, 0.0)}, "transfer.alpha is (20.0, 2.0, 0.0): give its"),
        ({"transfer.alpha": (20.0, 2.0, 0.5, 1.0)}, "transfer.alpha is"),
        ({"evaluate.num_prompts": 0}, "evaluate.num_prompts is 0: choose 1 or more"),
        ({"evaluate.num_prompts": 9999}, "choose evaluate.num_prompts up to that"),
        ({"evaluate.batch_size": 0}, "evaluate.batch_size is 0: choose 1 or more"),
        ({"evaluate.seeds": ()}, "evaluate.seeds is (): choose one or more from 0 to 42948"),
        ({"evaluate.seeds": (0, -1)}, "evaluate.seeds is (0, -1)"),
        ({"evaluate.seeds": (42949,)}, "evaluate.seeds is (42949,)"),
        ({"evaluate.reads": "words"}, "evaluate.reads is 'words': choose one of latents"),
        ({"collect.num_videos": 0}, "collect.num_videos is 0: choose 1 or more"),
        ({"collect.folder": "pyproject.toml"}, "choose another --config.collect.folder"),
        ({"stages": ("distill",)}, "the stage distill needs the group distill, which this"),
        ({"stages": ("smoke",)}, "the stage smoke needs the group smoke"),
        ({"stages": ("pretrain",)}, "the stage pretrain needs the group pretrain"),
        ({"checkpoint": "none"}, "none does not exist"),
    ],
)
def test_what_cannot_be_is_told_beforehand(tmp_path, changes, words):
    config = config_files.changed(digits.get_config(), changes)
    with pytest.raises(UserError) as refused:
        stages.run(config, tmp_path / "run")
    assert words in str(refused.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["generator_every", "log_every", "save_every", "batch_size"])
def test_distillation_needs_counts(tmp_path, name):
    config = config_files.load("configs/digits_dmd2.py")
    config.distill[name] = 0
    with pytest.raises(UserError, match=f"distill.{name} is 0: choose 1 or more"):
        stages.run(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config.dtype=bf16"], "dtype is 'bf16': choose one of float32, bfloat16, float16"),
        (["--workdir=gs://bucket/run"], "gs:/bucket/run is no folder of this machine"),
    ],
)
def test_the_command_line_is_looked_at_first(tmp_path, capsys, words, message):
    argv = ["train.py", "--config=configs/digits.py", f"--workdir={tmp_path / 'run'}", *words]
    assert train.main(argv) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_row_of_a_sweep_has_a_known_dtype():
    with pytest.raises(UserError, match="dtype is 'bf16': choose one of float32, bfloat16"):
        config_files.changed(digits.get_config(), {"dtype": "bf16"})


def test_sampling_has_known_settings_alone():
    with pytest.raises(UserError, match="'num_steps' is no setting of sampling: choose among heig"):
        pipeline.overridden({"height": 96}, {"num_steps": 8})
