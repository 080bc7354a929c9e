"""What comes from outside: read as what it is or refused in a sentence; where results go is looked
at first; and the process is quiet whatever it is given and whenever it is interrupted."""

import contextlib
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import pytest
from command_line import call
from looping import over
from refusals import fails, misused

from llm_wsae import outside
from llm_wsae.artifact.artifact import check_file, check_room, is_record_of
from llm_wsae.artifact.provenance import portable
from llm_wsae.cli import main
from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.outside import LARGEST_NUMBER, SHARE, check_numbers, typed


@over(text=["", "[" * 100_000, '{"a":' * 100_000, b'{"a": "\xff"}', "9" * 5000, "{}{}", "\x00"])
def test_what_is_not_json(text):
    fails(r"^the notes is not readable JSON: ", outside.parse_json, text, "the notes")


@dataclass
class Settings:
    count: int | None = 3
    share: float = 0.5
    rate: float = -2.5
    seeds: tuple[int, ...] = (0, 1)
    on: bool = True


def test_numbers_have_limits():
    for given, said in (
        ({"count": 0}, "count is 0, but must be at least 1"),
        ({"share": float("nan")}, "share is nan, but must be a number"),
        ({"share": float("inf")}, "share is inf, but must be at most 1"),
        ({"share": -1e300}, "share is -1e.300, but must be at least 0"),
        ({"seeds": (1, 2, -1)}, "seeds is -1, but must be at least 0"),
        ({"rate": -1e300}, "rate is -1e.300, but must be at least -1,000,000,000,000,000"),
    ):
        misused(said, check_numbers, Settings(**given), count=1, share=SHARE)
    check_numbers(Settings(None, share=1.0, seeds=(LARGEST_NUMBER,)), count=1, share=SHARE)


@dataclass
class Filled:
    count: int
    share: float | None
    place: Literal["loss", "space"]
    seeds: tuple[int, ...]
    by_name: dict[str, float]


def test_what_was_filled_from_json_has_the_declared_types():
    good = {"count": 3, "share": None, "place": "loss", "seeds": (0, 1), "by_name": {"a": 1}}
    assert typed(Filled(**good)).share is None and typed(Filled(**good | {"share": 2}))
    for name, value in (
        ("count", True), ("count", 3.0), ("count", 10**30), ("share", "x"), ("share", 1e999),
        ("place", 1), ("place", "none"), ("seeds", [0]), ("seeds", (0, "1")),
        ("by_name", {"a": ""}), ("by_name", []),
    ):  # fmt: skip
        made = Filled(**good)
        setattr(made, name, value)
        with pytest.raises(TypeError, match=f"its {name} is"):
            typed(made)


def test_whatever_a_library_raises():
    class PanicException(BaseException):
        """Of libraries written in Rust, which tokenizers is."""

    for error, said in (
        (KeyError("model"), "KeyError 'model'"),
        (ZeroDivisionError(), "ZeroDivisionError"),
        (PanicException("index out\nof range. More."), "index out of range"),
        (OSError(13, "Permission denied", "x/y"), "x/y: Permission denied"),
    ):
        with pytest.raises(LlmWsaeError) as caught, outside.parsing("the file cannot be read"):
            raise error
        assert str(caught.value) == f"the file cannot be read: {said}"
    for passed in (KeyboardInterrupt(), SystemExit(3), UsageError("ours")):
        with pytest.raises(type(passed)), outside.parsing("the file cannot be read"):
            raise passed


def test_a_line_without_an_end(tmp_path):
    (tmp_path / "t").write_text("1234567\n\nab")
    with open(tmp_path / "t") as file:
        assert list(outside.lines(file, "t")) == ["1234567\n", "\n", "ab"]
    with open("/dev/zero") as file, pytest.raises(LlmWsaeError, match="t, line 1: longer than 67"):
        list(outside.lines(file, "t"))


def test_names_of_files(tmp_path):
    misused("the name of the corpus is empty", outside.local_path, "", "corpus")
    misused("there is no home folder ~nosuchuser", outside.local_path, "~nosuchuser/x", "corpus")
    misused("cannot be the name of a corpus", outside.local_path, "a\0b", "corpus")
    assert outside.local_path("~/x", "corpus") == Path.home() / "x"


def test_revisions():
    """Those of a dictionary's model come with the dictionary."""
    for name in (None, "main", "v1.0", "refs/pr/1", "c0ffee" * 6, "user/branch-2"):
        outside.check_revision(name)
    for name in ("/dev/zero", "../../x", "a/../../b", "", "-x", "a b", "x" * 300, "a\0"):
        misused("cannot be a branch, tag or commit", outside.check_revision, name)


def test_nothing_of_other_people_is_written_over(tmp_path):
    record, mine = tmp_path / "record.json", is_record_of("evaluate")
    for content in ('{"command": "evaluate"}', ""):
        record.write_text(content)
        check_file(record, mine)
    for content in ('{"command": "weigh"}', '["evaluate"]', "my notes", "[" * 100_000):
        record.write_text(content)
        fails(r"record\.json already exists", check_file, record, mine)
    fails("/dev/null already exists", check_file, Path("/dev/null"), lambda path: True)
    check_file(tmp_path / "new/folders/x.json", mine)
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


def test_a_place_that_cannot_be_written(tmp_path):
    too_long, mine = tmp_path / ("x" * 300), lambda path: True
    fails("File name too long; choose a shorter name", check_file, too_long, mine)
    fails("cannot write /proc/x.json", check_file, Path("/proc/x.json"), mine)
    with pytest.raises(UsageError, match=r"would need 9,313,226 GiB, but its disk has .* in all"):
        check_room(tmp_path / "a/b", 10**16, "ask for less")


def test_a_command_leaves_its_machine_without_its_folders():
    for words, shown in (
        ("train /home/me/store --out=/data/x/", "train store --out=x"),
        ("run --corpus ~/a.txt+../b.txt+own/er", "run --corpus a.txt+b.txt+own/er"),
        ("train ./../../home/alice/x --out=runs/../../home/s", "train x --out=s"),
        ("run --corpus b.txt+./../al/a.txt", "run --corpus b.txt+a.txt"),
        ("train runs/store --model ./m", "train runs/store --model ./m"),
        ("train 'runs/my store' --k 4", "train 'runs/my store' --k 4"),
    ):
        assert portable(f"llm-wsae {words}") == f"llm-wsae {shown}"


def test_variables_of_a_launcher(monkeypatch):
    launched = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    for name, value in (("WORLD_SIZE", "x"), ("WORLD_SIZE", "-1"), ("WORLD_SIZE", "9" * 5000),
                        ("MASTER_PORT", "70000")):  # fmt: skip
        for variable, given in (launched | {name: value}).items():
            monkeypatch.setenv(variable, given)
        result = call("verify", "x")
        assert (result.code, result.out) == (2, "") and "Traceback" not in result.err
        assert f"llm-wsae: the environment variable {name} is" in result.err
        assert len(result.err) < 300


# The process


@contextlib.contextmanager
def output(stream):
    with contextlib.redirect_stdout(stream):
        yield
    with contextlib.suppress(OSError):
        stream.close()


def test_an_output_that_takes_nothing(capsys):
    for words in (["--version"], ["--help"], ["verify", "--help"]):
        with output(open("/dev/full", "w")):
            assert main(words) == 1
        assert "llm-wsae: the result cannot be printed (No space left" in capsys.readouterr().err
        reading, writing = os.pipe()
        os.close(reading)
        with output(open(writing, "w")):
            assert main(words) == 128 + signal.SIGPIPE
        assert capsys.readouterr().err == ""


INTERRUPTED = "import os, signal; os.kill(os.getpid(), signal.SIGINT)\n"
ASKS = """
import dataclasses, sys
import llm_wsae.cli
def asking(request: dataclasses.make_dataclass("Nothing", [])):
    input("run it? ")
llm_wsae.cli.COMMANDS["verify"] = asking
from llm_wsae.__main__ import main
sys.argv = ["llm-wsae", "verify"]
try:
    main()
except EOFError:
    print("γ")
"""


def process(*words, stdout=subprocess.PIPE, **environment):
    return subprocess.run(
        [sys.executable, *words],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        input="yes\nyes\n",
        env=os.environ | environment,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # also under nohup
    )


def test_ctrl_c_while_modules_are_imported(tmp_path):
    """The parser is the first that the command line imports of others."""
    (tmp_path / "tyro.py").write_text(f"try:\n    {INTERRUPTED}finally:\n    1 / 0\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = process("-m", "llm_wsae", "--version", PYTHONPATH=path)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_a_process_whose_output_takes_nothing():
    """Python, too, writes what is left when it ends."""
    with open("/dev/full", "w") as full:
        done = process("-m", "llm_wsae", "--version", stdout=full, PYTHONUNBUFFERED="")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "the result cannot be printed (No space left" in done.stderr


def test_nothing_is_asked_and_every_character_is_shown():
    """On a terminal that knows ASCII only."""
    done = process("-c", ASKS, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout.strip()) == (0, "run it? \\u03b3"), done.stderr
