"""Several hosts as one program: who they are, that all are alive, and that they stop together.

Of one process nothing happens here. JAX finds the others by itself on TPU pods (GCE and GKE), under
SLURM, Open MPI and in an indexed Kubernetes job; what torchrun sets is read here, and
JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID for all else.
"""

import atexit
import contextlib
import glob
import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax._src import clusters, distributed  # no public way to the detection and to the store
from jax.experimental import multihost_utils

import linvideo_jax
from linvideo_jax.errors import UserError
from linvideo_jax.parallel import rendezvous

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
START_SECONDS, SILENT_SECONDS = 300.0, 60.0
LOST = 3  # exit code when another host is gone
_DAY = 24 * 60 * 60 * 1000  # ms; a host that is slow, not silent, is waited for
_ALIVE, _LEFT = "linvideo/alive", "linvideo/left"


class Place(NamedTuple):
    """Where this process is among the others; devices: which of the host's are its own."""

    address: str
    num_processes: int
    process: int
    devices: Sequence[int] | None = None


def find(environment: Mapping[str, str] = os.environ) -> Place | None:
    """This process's place by the environment; None if it is the only one.

    UserError for variables that do not make sense.
    """
    for names in (
        ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"),
        ("MASTER_ADDR", "WORLD_SIZE", "RANK"),
    ):
        if all(name in environment for name in names[1:]):
            return _given(names, environment)
    several = {
        "SLURM_NTASKS": environment.get("SLURM_NTASKS", "1") != "1",
        "OMPI_COMM_WORLD_SIZE": environment.get("OMPI_COMM_WORLD_SIZE", "1") != "1",
        "JOB_COMPLETION_INDEX": "KUBERNETES_SERVICE_HOST" in environment,
    }
    if any(name in environment and sure for name, sure in several.items()) or _on_tpu(environment):
        return _detected(environment)
    return None


def _given(names: Sequence[str], environment: Mapping[str, str]) -> Place | None:
    address, count, process = (environment.get(name, "") for name in names)
    if names[0] == "MASTER_ADDR":
        address += f":{environment.get('MASTER_PORT', '')}"
    try:
        count, process = int(count), int(process)
        if count == 1:
            return None
        if not 0 <= process < count or not int(address.rsplit(":", 1)[1]):
            raise ValueError
    except (ValueError, IndexError):
        raise UserError(
            f"{', '.join(f'{name}={environment.get(name)}' for name in names)} do not make sense: "
            "give host:port of process 0, the number of processes, and this one's, from 0."
        ) from None
    local = environment.get("LOCAL_RANK")
    alone = environment.get("LOCAL_WORLD_SIZE", "1") == "1"
    return Place(address, count, process, None if local is None or alone else [int(local)])


def _detected(environment: Mapping[str, str]) -> Place | None:
    found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
        None, None, None, None, None, 300
    )
    address, count, process, devices = found
    if address is None or count in (None, 1):
        return None
    nodes = environment.get("SLURM_STEP_NUM_NODES") or environment.get("SLURM_NNODES")
    if nodes == str(count):
        # JAX gives each task of SLURM one GPU; a task that is alone on its node has all of them.
        visible = environment.get("CUDA_VISIBLE_DEVICES", "")
        gpus = environment.get("SLURM_GPUS_ON_NODE") or str(len(visible.split(",")))
        devices = range(int(gpus)) if gpus.isdigit() else None
    return Place(address, count, process, devices and list(devices))


def _on_tpu(environment: Mapping[str, str]) -> bool:
    if "tpu" not in (environment.get("JAX_PLATFORMS") or "tpu"):
        return False
    return bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))


def card(settings: Mapping[str, Any]) -> rendezvous.Card:
    """What all hosts must have alike: settings, nested ones too, and versions of packages."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    versions |= {"linvideo_jax": linvideo_jax.__version__, "python": platform.python_version()}
    return {"host": socket.gethostname(), "package": versions, "setting": dict(_flat(settings))}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping) or hasattr(value, "items"):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value if isinstance(value, bool | int | float) else str(value)


def start(own: rendezvous.Card, settings: Mapping[str, Any]) -> bool:
    """Connects the hosts, if there are several; call it before JAX is asked for anything.

    own: this host's `card`. settings: `config.mesh`, of which `start_seconds` (300) is how long all
    may take to come, and `silent_seconds` (60) how long a host may be silent before the others end
    with a sentence. Returns whether there are several.

    UserError, the same on every host, if one does not come or differs.
    """
    place = find()
    if place is None:
        return False
    seconds = float(settings.get("start_seconds", START_SECONDS))
    silence = float(settings.get("silent_seconds", SILENT_SECONDS))
    rendezvous.meet(own, place.address, place.process, place.num_processes, seconds)
    _end_with_a_sentence()
    jax.distributed.initialize(
        place.address,
        place.num_processes,
        place.process,
        local_device_ids=place.devices,
        cluster_detection_method="deactivate",
        initialization_timeout=int(seconds),
        # The watch below is to be the first to notice.
        heartbeat_timeout_seconds=int(2 * silence) + 10,
        shutdown_timeout_seconds=int(silence),
    )
    _Watch(place, own["host"], silence).start()
    return True


def several() -> bool:
    """Whether there are other hosts."""
    return jax.process_count() > 1


def is_first() -> bool:
    """Whether this host is the one that writes reports and metrics."""
    return jax.process_index() == 0


def wait(name: str) -> None:
    """Returns when all hosts are here; the watch ends this one if another is gone."""
    if several():
        _client().wait_at_barrier(f"linvideo/{name}", _DAY)


def stop_now(step: int, requested: bool) -> bool:
    """Whether all hosts stop after this step, because one of them was told to.

    Every host must ask after every step. requested: of a single host, whether it was told to; of
    several, JAX hears SIGTERM itself and agrees with the other hosts on a step.
    """
    if not several():
        return requested
    return multihost_utils.reached_preemption_sync_point(step)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Ends all hosts when one ends by an exception; of one host, nothing.

    The reason is told to the others. An exception of JAX's is mostly that another host is gone:
    then the watch has the time to say which.
    """
    if not several():
        yield
        return
    try:
        yield
        wait("end")
    except KeyboardInterrupt:  # of all hosts, after the same step
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            _client().wait_at_barrier("linvideo/stopped", 1000 * int(_Watch.running.silence))
        _leave("interrupted", 130)
        raise
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            time.sleep(_Watch.running.silence + 2 * _Watch.running.period)
        _leave(f"{type(error).__name__}: {error}", 1)
        raise
    except Exception as error:
        _leave(str(error) or type(error).__name__, 2 if isinstance(error, UserError) else 1)
        raise
    _Watch.running.done.set()
    _finished()
    jax.distributed.shutdown()


def _client():
    return distributed.global_state.client


class _Watch(threading.Thread):
    """Tells the others that this host is alive, and ends it when one of them is gone."""

    running: "_Watch"

    def __init__(self, place: Place, host: str, silence: float):
        super().__init__(daemon=True)
        self.place, self.silence, self.period = place, silence, silence / 12
        self.done = threading.Event()
        _Watch.running = self
        _client().key_value_set(f"linvideo/host/{place.process}", host, allow_overwrite=True)

    def run(self) -> None:
        seen: dict[str, tuple[str, float]] = {}
        count = 0
        while not self.done.wait(self.period):
            count += 1
            try:
                self._look(seen, str(count))
            except jax.errors.JaxRuntimeError:
                return  # host 0 is gone: JAX ends this process

    def _look(self, seen: dict[str, tuple[str, float]], count: str) -> None:
        client, own = _client(), f"{_ALIVE}/{self.place.process}"
        client.key_value_set(own, count, allow_overwrite=True)
        for key, reason in client.key_value_dir_get(_LEFT):
            if key.rsplit("/", 1)[1] != str(self.place.process):
                self._end(key, f"stopped ({reason})")
        now = time.monotonic()
        for key, value in client.key_value_dir_get(_ALIVE):
            if value != seen.get(key, ("", 0.0))[0]:
                seen[key] = value, now
            elif now - seen[key][1] > self.silence:
                self._end(key, f"has not answered for {self.silence:.0f} s")

    def _end(self, key: str, what: str) -> None:
        process = key.rsplit("/", 1)[1]
        name = _client().key_value_try_get(f"linvideo/host/{process}")
        _say(f"host {process} ({name}) {what}: {_AGAIN}")
        _finished()
        os._exit(LOST)


_AGAIN = "start all hosts again with the same command, which goes on from the last saved step."


def _say(sentence: str) -> None:
    print(f"error: {' '.join(sentence.split())}", file=sys.stderr, flush=True)


def _leave(reason: str, code: int) -> None:
    """Tells the others why this host ends; host 0, which keeps the store, waits till they know.

    JAX would wait for the others when the interpreter ends: the process ends with `code` instead.
    """
    watch = _Watch.running
    watch.done.set()
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        client = _client()
        client.key_value_set(f"{_LEFT}/{watch.place.process}", reason[:500], allow_overwrite=True)
        if watch.place.process == 0:
            time.sleep(2 * watch.period)
    _finished()
    atexit.register(_exit, code)


def _exit(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


_LAST_WORDS = f"""
import signal, sys
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
if not sys.stdin.read():
    print("error: this host lost the others, or was killed: {_AGAIN}", file=sys.stderr)
"""
_last_words: subprocess.Popen | None = None


def _end_with_a_sentence() -> None:
    """Starts a small process that says why, if this one is ended from below Python.

    JAX aborts a process that loses host 0, in C++, and prints a stack.
    """
    global _last_words
    _last_words = subprocess.Popen(
        [sys.executable, "-I", "-c", _LAST_WORDS], stdin=subprocess.PIPE, start_new_session=True
    )


def _finished() -> None:
    if _last_words is not None and not _last_words.stdin.closed:
        with contextlib.suppress(OSError):
            _last_words.stdin.write(b"ended in order")
            _last_words.stdin.close()
            _last_words.wait(5)
