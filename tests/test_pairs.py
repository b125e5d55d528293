"""Pairs on disk and their way into batches: exact, shuffled, resumable, and what damage does."""

import json
import os
import resource
import signal

import ml_dtypes
import numpy as np
import pytest
from etils import epath

from linvideo_jax.data import loader, online, records, trajectories
from linvideo_jax.data.texts import Texts
from linvideo_jax.errors import UserError

STEPS, VIDEOS, SHAPE = 3, 4, (2, 3, 5, 2)
PROMPTS = ((1.0, 2.0), (3.0, 4.0, 5.0, 6.0), (7.0, 8.0), (9.0, 10.0))  # the last is the negative


def made_of(first: int) -> trajectories.Trajectories:
    """Trajectories whose values say which they are, in whole numbers that bfloat16 holds."""
    videos = np.arange(first, first + 2).reshape(1, 2, 1, 1, 1, 1)
    steps = np.arange(STEPS).reshape(STEPS, 1, 1, 1, 1, 1)
    x = np.broadcast_to(10.0 * videos + steps, (STEPS, 2, *SHAPE)).astype(ml_dtypes.bfloat16)
    four = np.array(4, ml_dtypes.bfloat16)
    ids = [int(v) for v in videos.ravel()]
    return trajectories.Trajectories(
        x, x + four, x - four, [v % 3 for v in ids], [2**32 - 1 - v for v in ids]
    )


def index_of(store_velocity="both", num_videos=VIDEOS) -> trajectories.Index:
    made = {"batch_size": 2, "store_velocity": store_velocity, "dtype": "float32"}
    return trajectories.Index(made, (1.0, 0.6, 0.2, 0.0), SHAPE, num_videos, 3, (4, 2))


def collected(folder, store_velocity="both") -> epath.Path:
    folder, index = epath.Path(folder), index_of(store_velocity)
    folder.mkdir(exist_ok=True)
    trajectories.write_index(folder, index)
    texts = [np.array(text, np.float32).tobytes() for text in PROMPTS]
    records.write(trajectories.text_path(folder), texts)
    for number in range(index.num_shards):
        trajectories.write_shard(folder, number, index, made_of(2 * number), 1.0)
    return folder


@pytest.fixture
def folder(tmp_path):
    return collected(tmp_path / "pairs")


def test_every_pair_comes_back_bit_for_bit(folder):
    pairs = trajectories.open_folder(folder)
    assert len(pairs) == VIDEOS * STEPS and pairs.index == index_of()
    for row in (7, 0, 11, 5):  # at random
        video, step = divmod(row, STEPS)
        head, x = pairs.x(row)
        assert head == (2**32 - 1 - video, video % 3, step)
        assert x.dtype == ml_dtypes.bfloat16 and x.shape == SHAPE
        assert np.all(x == 10 * video + step)
        assert np.all(pairs.velocity(row, False) == 10 * video + step + 4)
        assert np.all(pairs.velocity(row, True) == 10 * video + step - 4)
    size = trajectories.shard_path(folder, 0).stat().length
    assert pairs.index.shard_bytes <= size  # of tiny records, the file's own is more than a percent
    part = pairs.part(range(2, 4))
    assert len(part) == 2 * STEPS and part.x(0)[0].seed == 2**32 - 3
    assert part.another(0, np.random.default_rng(0)) in range(2 * STEPS)
    texts = pairs.texts
    assert texts.negative == 3
    for prompt, words in enumerate(PROMPTS):
        values, length = texts[prompt]
        assert values.shape == (4, 2) and length == len(words) // 2
        assert values.ravel().tolist() == [*words, *[0.0] * (8 - len(words))]


@pytest.mark.parametrize("store_velocity", ["cond", "none"])
def test_what_is_not_stored_takes_no_room(tmp_path, store_velocity):
    folder = collected(tmp_path / "pairs", store_velocity)
    pairs = trajectories.open_folder(folder)
    assert np.all(pairs.x(4)[1] == 11)
    if store_velocity == "cond":
        assert np.all(pairs.velocity(4, False) == 15)
    with pytest.raises(ValueError, match="not in tuple"):
        pairs.velocity(4, True)
    whole = index_of().pair_bytes - 24
    assert pairs.index.pair_bytes - 24 == whole * (2 if store_velocity == "cond" else 1) / 3


def numbers(pairs, seed, count, **options):
    """What `count` batches of 6 hold, as one row number a sample, and the iterator."""

    def draw(row, rng):
        return {"row": np.int32(row), "noise": np.float32(rng.random())}

    dataset = loader.samples(pairs, draw, seed, 6)
    iterator = loader.batches(dataset, 6, **options)
    return [next(iterator) for _ in range(count)], iterator


def flat(batches, name="row"):
    return np.concatenate([batch[name] for batch in batches]).tolist()


def test_an_epoch_has_every_pair_once_in_an_order_of_the_seed(folder):
    pairs = trajectories.open_folder(folder)
    first, _ = numbers(pairs, 0, 4, num_threads=2)
    again, _ = numbers(pairs, 0, 4, num_threads=0)
    other, _ = numbers(pairs, 7, 4, num_threads=0)
    assert flat(first) == flat(again) and flat(first, "noise") == flat(again, "noise")
    epochs = [flat(first[:2]), flat(first[2:]), flat(other[:2])]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, range(12)]}) == 4
    assert len(set(flat(first, "noise"))) == 24


def test_an_iterator_goes_on_where_its_state_says(folder):
    pairs = trajectories.open_folder(folder)
    undisturbed, iterator = numbers(pairs, 3, 3, num_threads=2)
    state = json.loads(json.dumps(iterator.get_state()))
    undisturbed += [next(iterator) for _ in range(3)]
    _, resumed = numbers(trajectories.open_folder(folder), 3, 5, num_threads=2)
    resumed.set_state(state)
    rest = [next(resumed) for _ in range(3)]
    assert flat(rest) == flat(undisturbed[3:])
    assert flat(rest, "noise") == flat(undisturbed[3:], "noise")


def test_any_number_of_processes_makes_the_same_batches(folder):
    pairs = trajectories.open_folder(folder)
    alone, one = numbers(pairs, 1, 3, num_threads=0)
    rows = ([0, 3], [1, 2, 4], [5])
    parts = [numbers(pairs, 1, 3, num_threads=2, rows=own) for own in rows]
    for step, batch in enumerate(alone):
        for own, (batches, _) in zip(rows, parts, strict=True):
            for name in ("row", "noise"):
                assert batches[step][name].tolist() == batch[name][own].tolist()
    assert all(iterator.get_state() == one.get_state() for _, iterator in parts)


def damage(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(bytes(content))
    later = path.stat().mtime + 2
    os.utime(path, (later, later))


def test_damaged_and_missing_files_are_named(folder):
    paths = [trajectories.shard_path(folder, i) for i in range(2)]
    damage(paths[1], paths[1].stat().length // 2)
    assert trajectories.unfinished(folder, range(2)) == [1]
    with pytest.raises(UserError, match=r"lacks pairs-00001\.arrayrecord, or they are damaged"):
        trajectories.open_folder(folder)
    damage(paths[1], paths[1].stat().length // 2)  # as it was, if later
    stamps = [records.checksum_path(path).stat().mtime for path in paths]
    assert trajectories.unfinished(folder, range(2)) == []
    assert records.checksum_path(paths[1]).stat().mtime >= stamps[1]
    paths[0].write_bytes(paths[0].read_bytes()[:-1])
    records.checksum_path(paths[1]).unlink()  # killed before it was written
    trajectories.text_path(folder).unlink()
    with pytest.raises(UserError, match=r"lacks text\S*, pairs-00000\S*, pairs-00001\S*, or"):
        trajectories.open_folder(folder)


def test_damage_found_while_training_names_the_file_and_has_it_made_anew(folder):
    pairs = trajectories.open_folder(folder)
    path = trajectories.shard_path(folder, 0)
    stat = os.stat(path)
    content = bytearray(path.read_bytes())
    content[content.find(pairs.velocity(4, True).tobytes())] ^= 1  # rot, which no date shows
    path.write_bytes(bytes(content))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert trajectories.unfinished(folder, range(2)) == []
    with pytest.raises(UserError, match=r"pairs-00000\.arrayrecord is damaged or missing: run the"):
        trajectories.open_folder(folder).velocity(4, True)
    assert trajectories.unfinished(folder, range(2)) == [0]


def test_a_disk_that_is_full_in_the_middle_of_a_file_loses_nothing(folder, tmp_path):
    path = trajectories.shard_path(folder, 0)
    before = path.read_bytes()
    content = sorted(p.name for p in folder.iterdir())
    limits, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.SIG_IGN
    previous = signal.signal(signal.SIGXFSZ, ignored)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        with pytest.raises(UserError, match=r"00000\.arrayrecord cannot be written \(File too"):
            trajectories.write_shard(folder, 0, index_of(), made_of(0), 1.0)
        with pytest.raises(UserError, match=r"00007\.arrayrecord cannot be written"):
            trajectories.write_shard(folder, 7, index_of(), made_of(0), 1.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert sorted(p.name for p in folder.iterdir()) == content
    assert path.read_bytes() == before and len(trajectories.open_folder(folder)) == 12
    with pytest.raises(UserError, match="No such file or directory"):
        trajectories.write_shard(folder / "none", 0, index_of(), made_of(0), 1.0)


def test_an_index_that_is_not_ours_is_refused(folder):
    for content in ("{", "[]", '{"sigmas": [], "latent_shape": [], "text_shape": []}'):
        (folder / "index.json").write_text(content)
        with pytest.raises(UserError, match=r"index\.json cannot be read \("):
            trajectories.open_folder(folder)
    (folder / "index.json").unlink()
    with pytest.raises(UserError, match="holds no pairs; run the collect stage first"):
        trajectories.open_folder(folder)


def test_differences_are_told_by_name():
    there = {"sizes": {"num_layers": 12, "dim": 8}, "seed": 0, "text": "a" * 99, "extra": 1}
    there["steps"] = [1, 2]
    now = {"sizes": {"num_layers": 30, "dim": 8}, "seed": 0, "steps": (1, 2), "text": "b" * 99}
    told = trajectories.differences(there, now, ("sizes", "seed", "text"))
    assert told.startswith("sizes.num_layers 12 there, 30 now; text 'aaa") and len(told) < 140
    assert trajectories.differences(there, now, ("seed", "steps")) == ""


def online_pairs(log):
    def make(first):
        log.append(first)
        return made_of(first)

    texts = Texts([np.array(t, np.float32).tobytes() for t in PROMPTS], (4, 2), "float32")
    return online.Pairs(index_of(num_videos=0), texts, make, rounds=2, updates_per_round=3)


def drawn_online(count, state=None):
    log = []
    pairs = online_pairs(log)

    def draw(row, rng):
        head, x = pairs.x(row)
        other = pairs.another(row, rng)
        assert x[0, 0, 0, 0] == 10 * (2**32 - 1 - head.seed) + head.step
        assert pairs.velocity(row, True)[0, 0, 0, 0] == x[0, 0, 0, 0] - 4
        return {"row": np.int32(row), "x": x[0, 0, 0, 0], "other": pairs.x(other)[1][0, 0, 0, 0]}

    dataset = loader.samples(pairs, draw, 5, 40)
    iterator = loader.batches(dataset, 40, num_threads=pairs.num_threads)
    if state:
        iterator.set_state(state)
    return [next(iterator) for _ in range(count)], log, iterator.get_state()


def test_pairs_made_online_come_from_the_last_rounds_and_resume():
    batches, log, _ = drawn_online(8)
    assert log == [0, 2, 4, 6]  # videos; a round of two every three updates
    for update, batch in enumerate(batches):
        videos = set((batch["row"] // STEPS).tolist())
        assert videos == set(range(update // 3 * 2, update // 3 * 2 + 4))
        assert set(np.unique(batch["other"]) // 10) <= videos
    _, _, state = drawn_online(4)
    resumed, log, _ = drawn_online(4, state)
    assert log == [2, 4, 6]  # the buffer again, and no more
    for ours, theirs in zip(resumed, batches[4:], strict=True):
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
