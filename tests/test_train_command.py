"""train.py run in-process: its flags, and what it refuses in one sentence."""

import signal

import pytest

import train
from linvideo_jax import loop, stages

CONFIG = """
from ml_collections import ConfigDict

def get_config():
    transfer = {"target": 2, "rate": 0.1, "frozen": False, "alpha": (20.0, 2.0), "name": "a"}
    return ConfigDict({"seed": 0, "stages": ("transfer",), "transfer": transfer})
"""


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """run("--flag=value", ...) -> (exit code, stdout, stderr); stages only note their config."""
    (tmp_path / "config.py").write_text(CONFIG)

    def run(*flags, config="config.py", workdir="work"):
        argv = ["train.py"]
        argv += [f"--config={tmp_path / config}"] if config else []
        argv += [f"--workdir={tmp_path / workdir}"] if workdir else []
        return train.main([*argv, *flags]), *capsys.readouterr()

    run.calls = []
    monkeypatch.setattr(stages, "run", lambda *given: run.calls.append(given))
    return run


@pytest.fixture
def refused(run, tmp_path):
    """Runs, and gives the one line that was printed; no stage ran and nothing was written."""

    def refused(*flags, **options):
        before = sorted(tmp_path.rglob("*"))
        code, out, err = run(*flags, **options)
        assert (code, out, run.calls) == (2, "", [])
        assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err
        after = [path for path in tmp_path.rglob("*") if "__pycache__" not in path.parts]
        assert sorted(after) == before
        return err

    return refused


def test_fields_are_set_on_the_command_line(run, tmp_path):
    flags = ("--config.transfer.target=4", "--config.transfer.rate=1", "--config.transfer.frozen")
    flags += ("--config.transfer.alpha=(10, 3.0)", "--config.stages=('collect', 'transfer')")
    assert run(*flags) == (0, "", "")
    ((config, workdir),) = run.calls
    assert config.transfer.to_dict() == {
        "target": 4,
        "rate": 1.0,
        "frozen": True,
        "alpha": (10, 3.0),
        "name": "a",
    }
    assert config.stages == ("collect", "transfer") and config.seed == 0
    assert workdir == tmp_path / "work"
    with pytest.raises(AttributeError):
        config.transfer.taget = 3


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("collect,transfer", ("collect", "transfer")),
        ("collect", ("collect",)),
        ("rate_0.1, rate_1e-3", ("rate_0.1", "rate_1e-3")),  # names of rows, some no Python words
    ],
)
def test_words_of_a_tuple_need_no_quotes(run, value, words):
    assert run(f"--config.stages={value}") == (0, "", "")
    assert run.calls[0][0].stages == words


def test_help_lists_the_flags(run):
    code, out, _ = run("--help", config=None, workdir=None)
    assert code == 0 and "--workdir" in out and "python train.py" in out and run.calls == []


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.transfer.targt=4", "no field transfer.targt; the nearest that it has is "
         "transfer.target."),
        ("--config.target=4", "no field target; the nearest that it has is transfer.target."),
        ("--config.sed=4", "no field sed; the nearest that it has is seed."),
        ("--config.seed.x=4", "no field seed.x; the nearest"),
        ("--config.=4", "no field ; the nearest"),
        ("--config.transfer.target=half", "config.transfer.target cannot be half: its type is int, "
         "such as 2."),
        ("--config.transfer.target=1.5", "config.transfer.target cannot be 1.5"),
        ("--config.transfer.rate=fast", "config.transfer.rate cannot be fast: its type is float"),
        ("--config.transfer.frozen=maybe", "config.transfer.frozen cannot be maybe"),
        ("--config.transfer.alpha=high", "config.transfer.alpha cannot be ('high',): its type is "
         "tuple, such as (20.0, 2.0)."),
        ("--config.transfer.alpha=(1,", "config.transfer.alpha cannot be (1,"),
        ("--config.transfer=1", "config.transfer cannot be 1: its type is group."),
        ("--config.transfer.target", "Missing value for flag --config.transfer.target"),
        ("--wrkdir=x", "Unknown command line flag 'wrkdir'. Did you mean: workdir ?"),
        ("stray", "'stray' is not a flag"),
    ],
)  # fmt: skip
def test_bad_flags(refused, flag, message):
    assert message in refused(flag)


def test_missing_flags(refused):
    assert "--config is missing" in refused(config=None)
    assert "--workdir is missing" in refused(workdir=None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nothing_of_that_name", "ModuleNotFoundError: No module named 'nothing_of_that"),
        ("def (", "SyntaxError"),
        ("x = 1", "has no attribute 'get_config'"),
        ("def get_config():\n    return 1 / 0", "ZeroDivisionError: division by zero"),
        ("def get_config():\n    return {'stages': ()}", "must return a ConfigDict with a field"),
    ],
)
def test_configurations_that_do_not_load(refused, tmp_path, text, message):
    (tmp_path / "wrong.py").write_text(text)
    err = refused(config="wrong.py")
    assert message in err and "wrong.py" in err


def test_configurations_that_are_no_python_files(refused, tmp_path):
    (tmp_path / "notes.txt").write_text("")
    assert "none.py does not exist" in refused(config="none.py")
    assert "does not exist" in refused(config=".")
    assert "notes.txt is no Python file" in refused(config="notes.txt")


def test_workdir_that_cannot_be_written(refused):
    assert "cannot be written: choose another --workdir" in refused(workdir="config.py/below")


def test_unknown_stage(refused, monkeypatch):
    monkeypatch.undo()  # the real stages.run
    assert "stages names transfr" in refused("--config.stages=('transfr',)")


@pytest.mark.parametrize(
    ("stop", "words"),
    [
        (lambda: signal.raise_signal(signal.SIGINT), ""),
        (lambda: signal.raise_signal(signal.SIGTERM), ""),
        (None, "transfer stopped after step 3 of 9; "),
    ],
)
def test_interrupted_says_how_to_go_on(run, monkeypatch, stop, words):
    def interrupted(config, workdir):
        if stop:
            stop()
        raise loop.Interrupted("transfer stopped after step 3 of 9")

    monkeypatch.setattr(stages, "run", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    # A shell starts its background jobs, as these tests may be, with SIGINT ignored.
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)
    code, _, err = run()
    signal.signal(signal.SIGINT, ours)
    assert code == 130 and err == f"interrupted: {words}the same command goes on from there\n"
    assert signal.getsignal(signal.SIGTERM) is before
