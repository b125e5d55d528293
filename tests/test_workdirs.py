"""The folder of a run: one process at a time, one configuration."""

import json
import signal
import subprocess
import sys
import threading

import pytest
from ml_collections import ConfigDict

from configs import demo, digits
from linvideo_jax import stages, workdirs
from linvideo_jax.errors import UserError

HOLD = """
import fcntl, os, sys, time
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX)
file.write(f"{os.getpid()}\\n"); file.flush()
print("held", flush=True)
time.sleep(60)
"""


def claim(workdir, config):
    with workdirs.claimed(workdir, config):
        pass


def test_two_runs_at_once_are_refused_and_a_killed_one_leaves_the_folder_free(tmp_path, capsys):
    words = [sys.executable, "-c", HOLD, str(tmp_path / ".lock")]
    other = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"process {other.pid} is at work in {tmp_path}: wait"):
            claim(tmp_path, digits.get_config())
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
        threading.Timer(0.5, other.kill).start()
        with workdirs.claimed(tmp_path, digits.get_config(), wait=True):
            assert other.wait() == -signal.SIGKILL
        waiting = f"Waiting: process {other.pid} is at work in {tmp_path}.\n"
        assert capsys.readouterr().out == waiting
    finally:
        other.kill()
        other.wait()
    claim(tmp_path, digits.get_config())


def test_another_configuration_is_refused_by_its_field(tmp_path):
    config = digits.get_config()
    claim(tmp_path, config)
    before = (tmp_path / "config.json").read_text()
    claim(tmp_path, config)
    claim(tmp_path, digits.get_config().copy_and_resolve_references())

    other = digits.get_config()
    other.transfer.learning_rate = 5e-4
    with pytest.raises(UserError) as refused:
        claim(tmp_path, other)
    assert str(refused.value) == (
        f"{tmp_path} is of another configuration, transfer.learning_rate differs: 0.001 there, "
        "0.0005 now: choose another --workdir."
    )
    other.seed, other.transfer.alpha = 1, (20.0, 3.0, 0.6)
    with pytest.raises(UserError, match=r"seed differs: 0 there, 1 now, and so do transfer\.alpha"):
        claim(tmp_path, other)
    with pytest.raises(UserError, match="is of another configuration"):
        claim(tmp_path, demo.get_config())
    fewer = digits.get_config()
    del fewer.transfer.beta
    with pytest.raises(UserError, match=r"transfer\.beta differs: 1\.0 there, 'missing' now"):
        claim(tmp_path, fewer)
    assert (tmp_path / "config.json").read_text() == before


def test_what_changes_no_state_may_change(tmp_path):
    claim(tmp_path, digits.get_config())
    other = digits.get_config()
    other.stages = ("evaluate",)
    other.evaluate.num_shown = 3
    other.evaluate.others = ConfigDict({"shipped": "assets/wan_digits_linear"})
    other.transfer.update(save_every=7, log_every=3, sample_every=10, remat="full", keep=5)
    other.mesh = ConfigDict({"fsdp": 4})
    claim(tmp_path, other)
    names = [*workdirs.FIELDS]
    assert set(names) <= set(digits.get_config().transfer), "a field of that name is there"


def test_a_folder_of_before_takes_the_configuration_and_a_damaged_one_is_told(tmp_path):
    (tmp_path / "pairs").mkdir()
    claim(tmp_path, digits.get_config())
    assert json.loads((tmp_path / "config.json").read_text())["transfer"]["target"] == 6
    (tmp_path / "config.json").write_text('{"half')
    with pytest.raises(UserError, match="cannot be read as JSON"):
        claim(tmp_path, digits.get_config())


def test_stages_run_in_a_claimed_folder(tmp_path):
    config = digits.get_config()
    config.stages = ()
    stages.run(config, tmp_path / "new")
    config.transfer.target = 3
    with pytest.raises(UserError, match=r"transfer\.target differs: 6 there, 3 now"):
        stages.run(config, tmp_path / "new")
    config.stages = ("nothing",)
    with pytest.raises(UserError, match="stages names nothing"):
        stages.run(config, tmp_path / "other")
    assert not (tmp_path / "other").exists()
