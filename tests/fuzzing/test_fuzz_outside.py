"""Command lines, places and models that nobody should have: each ends in a sentence,
no code of theirs runs, and nothing of anybody's is changed."""

import contextlib
import importlib
import json
import os
import pickle
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from command_line import HARVEST, SITE, TRAIN, call, content, harvest_more, nobody
from fuzzing import Fuzz, begun, blind, change, frozen
from safetensors.torch import load_file

from llm_wsae.model.language_model import LanguageModel

MEMORY = 24 << 30  # bytes of addresses; torch alone takes several
EVALUATE = ("--model", "model", "--corpus", "text.jsonl", "--tokens", 60, "--bootstraps", 9)
WORKING = {
    "harvest": ("--model", "model", "--corpus", "text.jsonl", *HARVEST, "--tokens", 200),
    "weigh": ("store", "--site", SITE, "--rule", "variance"),
    "train": ("store", *TRAIN, "--k", 4, "--tokens", 512),
    "evaluate": ("trained/uniform-k4", *EVALUATE),
    "inspect": ("trained/uniform-k4", "--latent", 3),
    "dashboard": ("trained/uniform-k4", "--store", "store", "--model", "model", "--rows", 40),
    "export": ("trained/uniform-k4", "--to", "neuronpedia", "--store", "store", "--model", "model",
               "--contexts", 4),
    "run": ("--model", "model", "--corpus", "text.jsonl", "--site", SITE,
            "--harvest.context-size", 16, "--tokens", 512, "--k", 4, "--train.batch-size", 128,
            "--evaluate.tokens", 60),
    "study": ("store", "--model", "model", "--corpus", "text.jsonl", "--site", SITE, "--k", 4,
              "--seeds", 0, 1, "--train.tokens", 512, "--train.batch-size", 128),
    "theory": ("--sparsity", 0.99, "--seeds", 0, "--steps", 3),
    "explain": ("trained/uniform-k4", "--store", "store", "--model", "model",
                "--endpoint", "http://127.0.0.1:9/v1", "--explainer", "x"),
    "push": ("trained/uniform-k4", "user/saes"),
    "pull": ("user/saes",),
    "list": ("user/saes",),
    "verify": ("store",),
}  # fmt: skip
WRITES = ("harvest", "weigh", "train", "evaluate", "dashboard", "export", "run", "study",
          "theory", "explain", "pull")  # fmt: skip
FLAGS = Path(__file__).parents[1] / "commands/flags.txt"
OPTIONS = {
    name: re.findall(r"--(?!live)[\w.-]+", rest)  # it would serve without an end
    for name, rest in re.findall(r"^(\w+)\n(.*?)(?=^\w|\Z)", FLAGS.read_text(), re.M | re.S)
}
NUMBERS = ("0", "1", "7", "1000", "-1", "0.5", "1.5", "-0.25", "1e-9", "1e15", "4294967296",
           "10" * 9, "9" * 5000, "nan", "-inf", "1e400", "0x10", "1_000")  # fmt: skip
VALUES = (
    "", " ", "٣", "true", "null", "[1,2]", ".", "~nosuch/x", "/dev/null", "/dev/full", "/dev/zero",
    "/proc/self/mem", "x" * 300, "a\nb", "a\x1b[2Jb", "‮gnp", "a\0b", "\udcff", "$(id)", "model",
    "store", "trained", "trained/uniform-k4", "text.jsonl", "model/model.safetensors",
    "store/manifest.json", "loop", "fifo", "empty", "nothing", "link", "binary", "text.jsonl+",
    "user/saes", "gpt2", "blocks.9.hook_resid_post", "blocks.-1.hook_resid_post", "uniform",
    "whitening", "permuted:variance", "rotated:whitening", "cuda:99", "meta", "float8", "topk",
    "http://[", "http://u:p@x/v1", "file:///etc/passwd", "main",
)  # fmt: skip


@pytest.fixture(scope="module")
def places(world) -> Path:
    """The world of the commands, and things in it that are no files."""
    torch.set_num_threads(1)  # no pool of threads that a fork would lose
    harvest_more(world, world / "more")
    (world / "loop").symlink_to("loop")
    (world / "link").symlink_to("nowhere")
    os.mkfifo(world / "fifo")
    (world / "empty").touch()
    (world / "nothing").mkdir()
    world.chmod(0o777)  # so that nobody can read the rest and write beside it
    for above in world.parents:
        if above.stat().st_uid == os.geteuid() and "pytest" in str(above):
            above.chmod(0o755)
    (world / "binary").write_bytes(random.Random(0).randbytes(4000))
    return world


def working(name: str) -> list[str]:
    """A command that works; what it writes is ``new``."""
    suffix = {"weigh": ".safetensors", "dashboard": ".html", "evaluate": ".json"}.get(name, "")
    output = ["--out", f"new{suffix}"] if name in WRITES else []
    return [name, *map(str, WORKING[name]), *output]


def command_line(draw: random.Random) -> list[str]:
    """A command that works, one or two words of which are other ones."""
    name = draw.choice(list(WORKING))
    words = working(name)
    for _ in range(draw.choice((1, 1, 2))):
        how = draw.choice(("value", "value", "value", "option", "option", "word"))
        if how == "option":
            words += [draw.choice(OPTIONS[name]), draw.choice(draw.choice((NUMBERS, VALUES)))]
        elif how == "value":
            values = [at for at, word in enumerate(words) if not word.startswith("--")] or [0]
            at = draw.choice(values)
            words[at] = draw.choice(NUMBERS if words[at].isdecimal() else VALUES)
        else:
            _damage_words(words, draw)
    return words


def _damage_words(words: list[str], draw: random.Random) -> None:
    at = draw.randrange(len(words))
    letters = [chr(draw.randrange(1, 0x3000)) for _ in range(draw.randint(1, 12))]
    word = draw.choice((words[at], draw.choice(VALUES), "-x", "--", "--=", "".join(letters)))
    words[at : at + draw.randint(0, 1)] = [word] * draw.randint(0, 2)


def judge(fuzz: Fuzz, kind: str, case: object, words: list[str]) -> int:
    """One sentence and an exit code, or a result. The exit code."""
    try:
        result = begun(lambda: call(*words), MEMORY)()
        code, err = result.code, result.err
    except Exception as error:
        code, err = 99, f"Traceback {type(error).__name__}: {error}"
    said = [line for line in err.splitlines() if line.startswith("llm-wsae:")]
    fits = code == 0 or (code in (1, 2) and len(said) == 1)
    fine = fits and not any(sign in err for sign in ("Traceback", "<class '", "\x1b", "\0"))
    outcome = ("harmless" if code == 0 else "refused") if fine else "traceback"
    fuzz.count(kind, outcome, f"{case}: {words}"[:300], f"{code} {err[-300:]}" if not fine else "")
    return code


NAMES = {"model", "store", "more", "more.jsonl", "trained", "text.jsonl", "loop", "link", "fifo",
         "empty", "nothing", "binary", "closed"}  # fmt: skip


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()


def tidy(world: Path, before: dict[str, bytes], fuzz: Fuzz, kind: str, case: object) -> None:
    """Remove what is new; what was there before and differs is lost."""
    for new in set(os.listdir(world)) - NAMES:
        remove(world / new)
    after = content(world)
    for name in after.keys() - before.keys():  # in a folder that was named
        (world / name).unlink()
    if lost := [name for name, data in before.items() if after.get(name) != data]:
        fuzz.count(kind, "lost", case, lost)
        for name in lost:
            (world / name).write_bytes(before[name])


def test_command_lines(places, monkeypatch, fuzz):
    """Of every command; what works is repeated with other words."""
    monkeypatch.chdir(places)
    before = content(places)
    for number, draw in fuzz.cases("command line", 40):
        judge(fuzz, "command line", number, command_line(draw))
        tidy(places, before, fuzz, "command line", number)


@contextlib.contextmanager
def spoilt(path: Path, how: str) -> Iterator[None]:
    """What a command reads, gone, of another kind or not for reading."""
    aside = path.with_name("aside")
    if how == "forbidden":
        with nobody(path):
            yield
        return
    path.rename(aside)
    make = {"folder": path.mkdir, "empty": path.touch, "fifo": lambda: os.mkfifo(path),
            "loop": lambda: path.symlink_to(path.name), "gone": lambda: None}[how]  # fmt: skip
    try:
        make()
        yield
    finally:
        remove(path)
        aside.rename(path)


READS = ("text.jsonl", "model", "model/config.json", "model/model.safetensors",
         "model/tokenizer.json", "store", "store/manifest.json", f"store/{SITE}/00001.safetensors",
         f"store/{SITE}/statistics.safetensors", "store/tokens/00000.safetensors", "trained",
         "trained/uniform-k4", "trained/uniform-k4/cfg.json",
         "trained/uniform-k4/wsae.safetensors")  # fmt: skip
READ, WRITTEN = "place that is read", "place that is written"
WAYS = ("gone", "folder", "empty", "loop", "fifo", "forbidden")
OUTS = ("empty/x", "nothing", "store", "model", "trained", "trained/uniform-k4", "text.jsonl",
        "model/config.json", "/proc/x", "/dev/null", "/dev/full", "loop", "loop/x", "link", "fifo",
        "x" * 300, "closed/x", "closed", ".", "/")  # fmt: skip


def test_places(places, monkeypatch, fuzz):
    """What is read is gone, of another kind or forbidden; what is written cannot be."""
    monkeypatch.chdir(places)
    for name in WORKING:  # modules are imported first: nobody might not read them either
        call(name, "--help")
    importlib.import_module("matplotlib.font_manager")  # as the figures do, later
    before, closed = content(places), places / "closed"
    closed.mkdir()
    cases = [(name, READ, path, how) for name in WORKING for path in READS for how in WAYS]
    cases += [(name, WRITTEN, path, "") for name in WRITES for path in OUTS]
    cases = random.Random(0).sample(cases, min(len(cases), 40 * fuzz.times))
    for name, kind, path, how in cases:
        words = working(name)
        if kind == READ and not any(path.split("/")[0] == word.split("/")[0] for word in words):
            continue
        with spoilt(places / path, how) if kind == READ else nobody(closed):
            if kind == WRITTEN:
                words[-1] = path
            judge(fuzz, kind, f"{path} {how}", words)
        tidy(places, before, fuzz, kind, (path, how))
    closed.rmdir()


# --- Models


class Marked:
    """A pickle that would leave a mark if it were loaded as one."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def test_odd_model_folders(made_world, tmp_path, monkeypatch, fuzz):
    """Damaged, of impossible sizes, with code of their own: refused, or loaded as what they say."""
    monkeypatch.setattr("builtins.input", lambda *_: "yes")
    folder, mark = shutil.copytree(made_world / "model", tmp_path / "model"), tmp_path / "mark"
    (folder / "theirs.py").write_text(f"open({str(mark)!r}, 'w')\nclass T: pass\n")
    ids = torch.arange(48).view(3, 16)

    def read():
        found = LanguageModel.load(str(folder), dtype="float32")
        with torch.no_grad():
            return found.logits(ids)

    whole = frozen(read())
    code = {"auto_map": {name: "theirs.T" for name in
            ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")}}  # fmt: skip
    files = sorted(path for path in folder.iterdir() if path.suffix != ".py")
    for number, draw in fuzz.cases("model folder", 40):
        path = draw.choice(files)
        good = path.read_bytes()
        if path.suffix == ".json" and draw.random() < 0.7:
            value = json.loads(good)
            done = change(value, draw)
            if draw.random() < 0.3 and isinstance(value, dict):
                kinds = ({}, {"model_type": "theirs"}, {"tokenizer_class": "T"})
                value |= code | draw.choice(kinds)
            path.write_text(json.dumps(value))
        else:
            done, data = blind(good, draw, draw.choice(files).read_bytes())
            path.write_bytes(data)
        outcome = fuzz.reads("model folder", f"{path.name} {number} ({done})", read, None)
        if mark.exists():
            fuzz.count("model folder", "code", f"{path.name} {number} {outcome}")
            mark.unlink()
        path.write_bytes(good)
    assert frozen(read()) == whole
    pickles(folder, mark, fuzz, read)


def pickles(folder: Path, mark: Path, fuzz: Fuzz, read) -> None:
    """The same weights as a pickle, damaged, and pickles that do something."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch.save(weights, path)
    good, evil = path.read_bytes(), pickle.dumps(Marked(mark))
    torch.save({**weights, "x": Marked(mark)}, folder / "evil")
    packed = (folder / "evil").read_bytes()
    for number, draw in fuzz.cases("pickled model", 10):
        data = draw.choice((evil, packed, good))
        done, data = blind(data, draw, evil) if draw.random() < 0.7 else ("as it is", data)
        path.write_bytes(data)
        fuzz.reads("pickled model", f"{number} ({done})", read, None)
        if mark.exists():
            fuzz.count("pickled model", "code", f"{number} ({done})")
            mark.unlink()
