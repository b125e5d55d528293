"""The training loop with a toy update: resuming, signals, divergence, and the metrics file."""

import errno
import itertools
import json
import os
import resource
import shutil
import signal
import threading
from functools import partial

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint._src.serialization import serialization

from linvideo_jax import loop
from linvideo_jax.errors import UserError
from linvideo_jax.loop.states import States


@partial(jax.jit, donate_argnames="state")
def toy(state, step):
    key = jax.random.fold_in(jax.random.key(0), step)
    momentum = 0.9 * state["momentum"] + jax.random.normal(key, (5,))
    weights = state["nested"]["weights"] + 0.1 * momentum
    new = {"nested": {"weights": weights}, "momentum": momentum, "mode": state["mode"] + 1}
    return new, {"loss": jnp.sum(weights**2), "r": weights[:2]}


def start():
    return {
        "nested": {"weights": jnp.arange(5.0)},
        "momentum": jnp.zeros(5),
        "mode": jnp.zeros(2, jnp.int32),
    }


def run(folder, update=toy, state=None, num_steps=10, save_every=4, log_every=2, **options):
    return loop.run(
        "toy",
        update,
        start() if state is None else state,
        num_steps=num_steps,
        folder=folder,
        save_every=save_every,
        log_every=log_every,
        **options,
    )


TIMES = ("time", "seconds_per_step")


def untimed(folder):
    return [
        {name: value for name, value in line.items() if name not in TIMES}
        for line in loop.read_metrics(folder)
    ]


def saved_steps(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir())


def assert_bits(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def stopping_at(step, number=signal.SIGINT, error=None):
    def update(state, at):
        if at == step:
            if error:
                toy(state, at)  # whose result is lost, and with it the state
                raise error
            signal.raise_signal(number)
        return toy(state, at)

    return update


@pytest.fixture
def whole(tmp_path):
    return run(tmp_path / "whole"), tmp_path / "whole"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_same_call_goes_on_bit_for_bit(whole, tmp_path, capsys, number):
    before = signal.getsignal(number)
    with pytest.raises(loop.Interrupted, match="toy stopped after step 6 of 10"):
        run(tmp_path / "cut", stopping_at(5, number))
    assert "stopping after this step" in capsys.readouterr().err
    assert signal.getsignal(number) is before
    assert saved_steps(tmp_path / "cut") == [4, 6]
    assert_bits(run(tmp_path / "cut"), whole[0])
    assert untimed(tmp_path / "cut") == untimed(whole[1])


def test_a_crash_goes_on_from_the_last_save_bit_for_bit(whole, tmp_path):
    with pytest.raises(RuntimeError):
        run(tmp_path / "cut", stopping_at(7, error=RuntimeError("killed")))
    assert [line["step"] for line in untimed(tmp_path / "cut")] == [2, 4, 6]
    steps = []

    def counted(state, step):
        steps.append(step)
        return toy(state, step)

    assert_bits(run(tmp_path / "cut", counted), whole[0])
    assert steps == [4, 5, 6, 7, 8, 9]
    assert untimed(tmp_path / "cut") == untimed(whole[1]), "the line of step 6 is there once"


def rows():
    """A grain iterator, shuffled anew each epoch, 3 numbers a batch."""
    data = grain.MapDataset.range(20).shuffle(seed=1).repeat()
    return iter(data.to_iter_dataset().batch(3))


def test_the_data_iterator_goes_on_where_it_was(tmp_path):
    seen = []

    def update(state, step, batch):
        seen.append(batch.tolist())
        if step == 6 and stop:
            raise RuntimeError
        state, metrics = toy(state, step)
        return state | {"momentum": state["momentum"] + batch.sum()}, metrics

    def go(name, data):
        options = {"num_steps": 10, "save_every": 4, "log_every": 2}
        return loop.run("toy", update, start(), folder=tmp_path / name, data=data, **options)

    stop = False
    whole, wanted = go("whole", rows()), list(seen)
    assert wanted == [batch.tolist() for batch in itertools.islice(rows(), 10)]
    stop = True
    with pytest.raises(RuntimeError):
        go("cut", rows())
    stop = False
    seen.clear()
    assert_bits(go("cut", rows()), whole)
    assert seen == wanted[4:]


def test_a_second_signal_stops_at_once(tmp_path):
    def impatient(state, step):
        new = toy(state, step)
        if step == 5:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return new

    with pytest.raises(KeyboardInterrupt) as stop:
        run(tmp_path, impatient)
    assert not isinstance(stop.value, loop.Interrupted) and saved_steps(tmp_path) == [4]


def test_a_finished_run_does_nothing_and_more_steps_go_on(whole):
    def never(state, step):
        raise AssertionError

    assert_bits(run(whole[1], never), whole[0])
    longer = run(whole[1], num_steps=12)
    assert_bits(longer, run(whole[1].with_name("longer"), num_steps=12))
    assert [line["step"] for line in untimed(whole[1])] == [2, 4, 6, 8, 10, 12]


@pytest.mark.parametrize(
    ("bad_step", "log_every", "said", "kept"), [(7, 2, 8, [4]), (3, 100, 4, []), (4, 2, 5, [4])]
)
def test_a_loss_that_is_not_finite_stops_and_is_not_saved(
    tmp_path, bad_step, log_every, said, kept
):
    def diverging(state, step):
        state, metrics = toy(state, step)
        worse = jnp.where(step >= bad_step, jnp.nan, 1.0)
        return state, metrics | {"loss": metrics["loss"] * worse}

    last = rf"its last good state is {tmp_path}/checkpoints/{kept[0]}" if kept else "none is kept"
    with pytest.raises(UserError, match=rf"at step {said} \(loss is not finite\): .*; {last}\.$"):
        run(tmp_path, diverging, log_every=log_every)
    assert saved_steps(tmp_path) == kept
    assert all(np.isfinite(line["loss"]) for line in loop.read_metrics(tmp_path))


def test_a_state_that_is_still_being_written_is_restored_as_it_was(tmp_path, monkeypatch):
    """Later updates write over its buffers, once Orbax has taken them to the host."""
    write, updated = serialization.async_serialize_from_host, threading.Event()

    async def late(*args, **named):
        assert updated.wait(60), "it is written beside the next updates"
        return await write(*args, **named)

    monkeypatch.setattr(serialization, "async_serialize_from_host", late)
    state = {"weights": jnp.zeros(100_000)}
    add = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    with States(tmp_path, state, None, 1) as states:
        state = add(state)
        states.save(1, state, {}, {})
        for _ in range(3):
            state = add(state)
        jax.block_until_ready(state)
        assert not (tmp_path / "1").exists(), "it has another name until it is whole"
        updated.set()
        states.wait()
        restored, _ = states.restore(1)
    assert np.all(restored["weights"] == 1) and np.all(state["weights"] == 4)


def growing(state, step):
    """The loss of `toy`, and an error that is 1 until step 40 and then above 100."""
    state, metrics = toy(state, step)
    return state, metrics | {"error": jnp.where(step < 40, 1.0, 200.0)}


def test_a_divergence_names_the_last_good_state_which_stays(tmp_path):
    def go(steps):
        guard = loop.Guard("error", 100.0, steps)
        return run(tmp_path, growing, None, 100, 3, 5, guard=guard, keep=2)

    message = r"at step 55 \(error is 200, for 15 steps above 100 times its running median, 1\)"
    with pytest.raises(UserError, match=message) as refused:
        go(15)
    # Saved after it began: 42 to 54. Of these the newest stay, and the last before they began.
    assert saved_steps(tmp_path) == [39, 51, 54]
    assert f"last good state is {tmp_path}/checkpoints/39." in str(refused.value)
    with pytest.raises(UserError, match="at step 55 "):
        go(15)
    assert saved_steps(tmp_path) == [39, 51, 54]


def test_the_best_state_is_kept_by_its_mean_since_the_save_before(tmp_path):
    errors = [5, 5, 1, 1.2, 0.1, 9, 4, 4, 3, 3]

    def update(state, step):
        state, metrics = toy(state, step)
        return state, metrics | {"error": jnp.float32(errors[step])}

    run(tmp_path, update, save_every=2, log_every=5, best="error", keep=2)
    assert saved_steps(tmp_path) == [4, 8, 10]


def test_events_come_after_their_steps_and_where_a_run_goes_on(tmp_path):
    seen = []
    events = [(3, lambda step, state: seen.append((step, float(state["mode"][0]))))]
    events.append((0, lambda step, state: seen.append("never")))
    with pytest.raises(loop.Interrupted):
        run(tmp_path, stopping_at(5), events=events)
    assert seen == [(3, 3)], "a signal is not kept waiting"
    run(tmp_path, events=events)
    assert seen[1:] == [(6, 6), (9, 9), (10, 10)]


def test_a_signal_cuts_an_event_short(tmp_path):
    seen = []

    def sampling(step, state):
        seen.append(step)
        signal.raise_signal(signal.SIGTERM)
        seen.append("done")

    with pytest.raises(loop.Interrupted, match="stopped after step 4 of 10"):
        run(tmp_path, events=[(3, sampling)])
    assert seen == [3] and saved_steps(tmp_path) == [4]


def test_a_full_disk_loses_nothing_good(whole, tmp_path):
    big = {"weights": jnp.zeros(100_000)}

    def update(state, step):
        noise = jax.random.normal(jax.random.key(step), (100_000,))
        return {"weights": state["weights"] + noise}, {"loss": noise[0] ** 2}

    def go(name):
        return run(tmp_path / name, update, big, 10, 2, 2)

    wanted = go("undisturbed")
    run(tmp_path / "cut", update, big, 4, 2, 2)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))  # as if no more had room
    try:
        with pytest.raises(UserError, match=r"could not be saved .* make room .* from step 4"):
            go("cut")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert_bits(go("cut"), wanted)
    assert saved_steps(tmp_path / "cut") == [8, 10], "nothing half-written is left"


def test_a_disk_that_has_too_little_room_is_told_before_writing(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(UserError, match=r"its disk has 0\.0 GB free: make room"):
        run(tmp_path)
    monkeypatch.undo()

    def full(self, step, values):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(loop.MetricsFile, "write", full)
    with pytest.raises(UserError, match=r"toy cannot write to .*No space left on device\): make"):
        run(tmp_path)


def test_a_profile_of_three_steps(tmp_path):
    run(tmp_path, profile_at=5)
    assert list((tmp_path / "profile-trace").rglob("*.xplane.pb"))
    run(tmp_path, num_steps=12, profile_at=10)  # the first trace stays


def test_state_of_another_model_is_refused(whole):
    other = start() | {"momentum": jnp.zeros(7)}
    with pytest.raises(UserError, match="damaged or of another model"):
        run(whole[1], state=other, num_steps=12)
    with pytest.raises(UserError, match="damaged or of another model"):
        run(whole[1], state={"weights": jnp.zeros(5)}, num_steps=12)


def test_metrics_have_every_step_once_with_vectors_and_time(whole):
    lines = loop.read_metrics(whole[1])
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10]
    assert all(len(line["r"]) == 2 and line["time"] > 0 for line in lines)
    assert any(name.startswith("events.") for name in os.listdir(whole[1]))


def test_a_half_written_last_line_is_dropped(whole, tmp_path):
    path = whole[1] / "metrics.jsonl"
    text = path.read_text()
    path.write_text(text + '{"step": 11, "lo')
    assert [line["step"] for line in loop.read_metrics(whole[1])] == [2, 4, 6, 8, 10]
    with loop.MetricsFile(whole[1], 8) as metrics:
        metrics.write(9, {"loss": np.float32(1.5), "r": np.zeros(2)})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 9]
    assert lines[-1] == {"step": 9, "loss": 1.5, "r": [0, 0]}
    assert loop.read_metrics(tmp_path / "nothing") == []


def test_json_files(tmp_path):
    loop.write_json(tmp_path / "new" / "a.json", {"b": [1, 2]})
    assert loop.read_json(tmp_path / "new" / "a.json") == {"b": [1, 2]}
    assert os.listdir(tmp_path / "new") == ["a.json"]
    (tmp_path / "bad.json").write_text('{"b": ')
    (tmp_path / "bytes.json").write_bytes(b"\xff{")
    wrong = "cannot be read as JSON .*: delete it and run again"
    for name, message in (("bad", wrong), ("bytes", wrong), ("none", "does not exist: give")):
        with pytest.raises(UserError, match=message):
            loop.read_json(tmp_path / f"{name}.json")
