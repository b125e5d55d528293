"""Several hosts: how they find and compare each other, and two real processes that train."""

import importlib.metadata
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from linvideo_jax import loop
from linvideo_jax.errors import UserError
from linvideo_jax.parallel import hosts, rendezvous
from linvideo_jax.parallel.hosts import Place
from linvideo_jax.stages import collect, transfer

ROOT = Path(__file__).parents[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def card(**changed):
    own = hosts.card({"seed": 1, "transfer": {"alpha": (20.0, 2.0)}})
    return own | {group: own[group] | more for group, more in changed.items()}


def meet(cards, num_processes=None, seconds=20.0):
    """What each of the hosts with these cards is told: a sentence, or None."""
    address, told = f"127.0.0.1:{free_port()}", {}

    def one(process):
        try:
            count = num_processes or len(cards)
            told[process] = rendezvous.meet(cards[process], address, process, count, seconds)
        except UserError as error:
            told[process] = str(error)

    threads = [threading.Thread(target=one, args=(process,)) for process in cards]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [told[process] for process in cards]


def test_hosts_that_are_alike_meet():
    assert meet({0: card(), 1: card(), 2: card()}) == [None] * 3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"setting": {"seed": 2}}, r"host 2 \(.*\) has setting seed 2, host 0 \(.*\) 1"),
        ({"setting": {"transfer.alpha": "{}"}}, 'setting transfer.alpha "{}", host 0'),
        ({"package": {"jax": "0.1"}}, r'host 2 \(.*\) has package jax "0\.1", host 0'),
    ],
)
def test_every_host_is_told_which_one_differs_and_in_what(changed, message):
    told = meet({0: card(), 1: card(), 2: card(**changed)})
    assert len(set(told)) == 1
    with pytest.raises(UserError, match=message):
        raise UserError(told[0])


def test_the_odd_one_is_named_even_if_it_is_host_0():
    cards = {0: card(setting={"seed": 2}), 1: card(), 2: card()}
    assert rendezvous.differences(cards).startswith("host 0 (")
    assert importlib.metadata.version("jax") == cards[0]["package"]["jax"]


def test_a_host_that_does_not_come_is_named_after_the_time():
    start = time.monotonic()
    told = meet({0: card(), 2: card()}, num_processes=4, seconds=1.0)
    assert time.monotonic() - start < 10
    assert told[0] == told[1]
    assert told[0].startswith("hosts 1, 3 of 4 (counted from 0) have not come within 1 s")
    (told,) = meet({1: card()}, num_processes=2, seconds=1.0)
    assert "host 0, 127.0.0.1:" in told and "cannot be reached within 0 s" in told.replace(
        "1 s", "0 s"
    )


def test_a_stranger_at_the_port_does_no_harm():
    address = f"127.0.0.1:{free_port()}"
    told = []

    def first():
        told.append(rendezvous.meet(card(), address, 0, 2, 20.0))

    thread = threading.Thread(target=first)
    thread.start()
    for _ in rendezvous._attempts(time.monotonic() + 10):
        try:
            with socket.create_connection(("127.0.0.1", int(address.split(":")[1]))) as stranger:
                stranger.sendall(b"GET / HTTP/1.0\r\n\r\n")
                break
        except OSError:
            continue
    rendezvous.meet(card(), address, 1, 2, 20.0)
    thread.join()
    assert told == [None]


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, None),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, None),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:99", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"},
            Place("a:99", 4, 3),
        ),
        (
            {"MASTER_ADDR": "b", "MASTER_PORT": "29500", "WORLD_SIZE": "16", "RANK": "9",
             "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"},
            Place("b:29500", 16, 9, [1]),
        ),
        (
            {"MASTER_ADDR": "b", "MASTER_PORT": "29500", "WORLD_SIZE": "2", "RANK": "1",
             "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
            Place("b:29500", 2, 1),
        ),
    ],
)  # fmt: skip
def test_the_environment_says_who_this_is(variables, place):
    assert hosts.find({"JAX_PLATFORMS": "cpu"} | variables) == place


def slurm(tasks: int, nodes: int) -> dict[str, str]:
    return {
        "SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "node[004-007]", "SLURM_NTASKS": str(tasks),
        "SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_NODES": str(nodes),
        "SLURM_GPUS_ON_NODE": "8", "JAX_PLATFORMS": "cpu",
    }  # fmt: skip


@pytest.mark.parametrize(("tasks", "devices"), [(4, list(range(8))), (32, [0])])
def test_slurm_gives_a_lone_task_all_gpus_of_its_node(tasks, devices, monkeypatch):
    for name, value in slurm(tasks, 4).items():
        monkeypatch.setenv(name, value)
    place = hosts.find()
    assert place.address.startswith("node004:") and place.process == 2
    assert place.num_processes == tasks and list(place.devices) == devices


@pytest.mark.parametrize(
    "changed", [{"RANK": "2"}, {"RANK": "x"}, {"MASTER_PORT": ""}, {"WORLD_SIZE": "two"}]
)
def test_variables_that_make_no_sense_are_refused(changed):
    right = {"MASTER_ADDR": "b", "MASTER_PORT": "1", "WORLD_SIZE": "2", "RANK": "1"}
    with pytest.raises(UserError, match="do not make sense: give host:port"):
        hosts.find(right | changed)


NUM_STEPS = 400
CONFIG = """
from pathlib import Path
from configs import digits

def get_config():
    config = digits.get_config()
    config.stages = ("transfer",)
    config.checkpoint, config.prompts, config.dtype = {checkpoint!r}, {prompts!r}, "float32"
    config.collect.update(num_videos=6, batch_size=2, folder={pairs!r})
    config.mesh.update(silent_seconds=6.0, start_seconds=120.0, fsdp=2)
    config.transfer.update(
        target=2, num_steps={num_steps}, batch_size=4, warmup_steps=0, round_at=300,
        lr_warmup_steps=2, save_every=3, log_every=1, objective="mse", optimizer="adamw",
        remat="none", keep=3, report_every=1000.0, sample_every=0,
    )
    return config
"""


class Enough(Exception):
    """A run in this process has made as many steps as are compared."""


def run_alone(config, workdir, until, monkeypatch):
    """Steps of stage transfer in this process, on its one device, up to step `until`."""
    write = loop.MetricsFile.write

    def counted(self, step, values):
        write(self, step, values)
        if step >= until:
            raise Enough

    with monkeypatch.context() as patch:
        patch.setattr(loop.MetricsFile, "write", counted)
        with pytest.raises(Enough):
            transfer.run(config, workdir)
    return losses(workdir)


def losses(workdir: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in loop.read_metrics(workdir / "state/transfer")}


class Two:
    """Two processes of train.py with two devices each, on the loopback."""

    def __init__(self, config: Path, workdir: Path, cache: Path):
        self._log = [workdir.parent / f"{workdir.name}-{i}-{time.time()}.txt" for i in range(2)]
        environment = os.environ | {
            "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "NPROC": "16",
            "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")
                         + " --xla_force_host_platform_device_count=2",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2",
        }  # fmt: skip
        words = [sys.executable, "train.py", f"--config={config}", f"--workdir={workdir}"]
        self.workdir = workdir
        self.processes = [
            subprocess.Popen(
                words, env=environment | {"RANK": str(i)}, cwd=ROOT,
                stdout=log.open("w"), stderr=subprocess.STDOUT,
            )
            for i, log in enumerate(self._log)
        ]  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for process in self.processes:
            process.kill()
            process.wait()

    def until(self, step: int) -> None:
        """Waits for a line of that step in the metrics."""
        deadline = time.monotonic() + 400
        while max(losses(self.workdir), default=0) < step:
            assert all(process.poll() is None for process in self.processes), self.said(0)
            assert time.monotonic() < deadline, self.said(0) + self.said(1)
            time.sleep(0.05)

    def ends(self, process: int) -> int:
        return self.processes[process].wait(120)

    def said(self, process: int) -> str:
        return self._log[process].read_text()


def test_two_hosts_train_as_one_lose_one_and_go_on(
    tiny_config, tmp_path, monkeypatch, tmp_path_factory
):
    config = tiny_config.copy_and_resolve_references()
    config.collect.folder = str(tmp_path / "pairs")
    collect.run(config, tmp_path)
    path = tmp_path / "config.py"
    text = CONFIG.format(
        checkpoint=config.checkpoint, prompts=config.prompts, pairs=config.collect.folder,
        num_steps=NUM_STEPS,
    )  # fmt: skip
    path.write_text(text)
    names = {}
    exec(text, names)
    own = names["get_config"]()
    own.mesh.fsdp = 1
    wanted = run_alone(own, tmp_path / "alone", 60, monkeypatch)

    workdir, cache = tmp_path / "two", tmp_path / "cache"
    with Two(path, workdir, cache) as two:
        two.until(8)
        two.processes[1].kill()
        assert two.ends(0) == hosts.LOST
        last = two.said(0).strip().splitlines()[-1]
        assert last.startswith("error: host 1 (") and "has not answered for 6 s" in last
        assert "error: this host lost the others, or was killed" in two.said(1)
    killed = losses(workdir)

    with Two(path, workdir, cache) as two:
        two.until(max(killed) + 4)
        two.processes[1].send_signal(signal.SIGTERM)
        assert [two.ends(0), two.ends(1)] == [130, 130], two.said(0) + two.said(1)
        assert "Traceback" not in two.said(0) + two.said(1)
    stopped = losses(workdir)
    assert list(stopped) == list(range(1, len(stopped) + 1))
    states = sorted(int(p.name) for p in (workdir / "state/transfer/checkpoints").iterdir())
    assert states[-1] == len(stopped)  # one state of all, after the last step

    shutil.copytree(workdir, tmp_path / "one")
    until = len(stopped) + 3
    resumed = run_alone(own, tmp_path / "one", until, monkeypatch)
    assert until < 60
    for step in range(1, until + 1):
        assert resumed[step] == pytest.approx(wanted[step], rel=1e-4)
    assert {step: resumed[step] for step in stopped} == stopped


def test_two_hosts_with_other_settings_end_before_anything_is_written(tmp_path, capfd):
    made = [
        subprocess.Popen(
            [sys.executable, "train.py", "--config=configs/demo.py", f"--config.seed={i}",
             f"--workdir={tmp_path / 'run'}"],
            env=os.environ | {"RANK": str(i), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                              "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT)},
            cwd=ROOT, stderr=subprocess.PIPE, text=True,
        )
        for port in [free_port()] for i in range(2)
    ]  # fmt: skip
    for process in made:
        assert "has setting config.seed 1, host 0" in process.communicate(timeout=120)[1]
        assert process.returncode == 2
    assert not (tmp_path / "run").exists()
