"""Whatever a user gets wrong: one sentence that names it, the right exit code, and everything on
disk as it was. Each kind of mistake once, through the command line; details are tested where the
mistake is found."""

import contextlib
import resource
import shutil
import signal
from pathlib import Path

import huggingface_hub
import pytest
import tiny
import torch
from command_line import HARVEST, SITE, TRAIN, call, content, nobody, save_model, works
from huggingface_hub.utils import httpx
from safetensors.torch import load_file, save_file

from llm_wsae.artifact.files import folder_lock
from llm_wsae.cli import main
from llm_wsae.commands import parser
from llm_wsae.data.hub_dataset import HubDataset
from llm_wsae.data.manifest import Manifest, complete_shards
from llm_wsae.weights.loss_weights import LossWeights

SIZE = ("--context-size", 16)
OTHER_SITE = SITE.replace("post", "mid")


@pytest.fixture(scope="module")
def world(world):
    """What the other tests have, and more that is wrong with it."""
    folder = world
    save_model(folder / "other", seed=5)
    save_model(folder / "wide", width=32)
    save_model(folder / "broken", broken=True)
    (folder / "nothing").mkdir()
    (folder / "empty.txt").touch()
    (folder / "blank.txt").write_text("\n \n")
    (folder / "image.txt").write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00\x00\xff")
    (folder / "program.txt").write_bytes(b"ELF\x00\x01")
    (folder / "torn.jsonl").write_text('{"text": "w1"}\n{"text": "w2\n')
    works("harvest", "--model", folder / "model", "--corpus", folder / "text.jsonl", *HARVEST,
          "--tokens", 16, "--dtype", "float32", "--out", folder / "few")  # fmt: skip
    save_file({"gamma": torch.ones(16)}, folder / "own.safetensors")
    save_file({"gamma": torch.ones(9)}, folder / "short.safetensors")
    save_file({"gamma": torch.full((16,), torch.nan)}, folder / "nan.safetensors")
    (folder / "notes.safetensors").write_text("my notes")
    LossWeights(torch.ones(16)).save(folder / "theirs.safetensors", {"site": OTHER_SITE})
    shutil.copytree(folder / "trained/uniform-k4", folder / "torn")
    torn = folder / "torn/sae_weights.safetensors"
    torn.write_bytes(torn.read_bytes()[:-40])
    shutil.copytree(folder / "trained/uniform-k4", folder / "half")
    (folder / "half/cfg.json").unlink()
    (folder / "foreign").mkdir()
    (folder / "foreign/cfg.json").write_text('{"architecture": "gated"}')
    return folder


@pytest.fixture
def refused(world, monkeypatch):
    """Run a command that must fail: its one sentence."""

    def check(code: int, *words, said: tuple = ()) -> str:
        monkeypatch.chdir(world)
        before = content(world)
        result = call(*words)
        assert result.code == code, result.err
        assert result.out == "" and "Traceback" not in result.err
        sentence, *more = [line for line in result.err.splitlines() if line.startswith("llm-wsae:")]
        assert not more and result.err.endswith(f"{sentence}\n")
        for part in said:
            assert str(part) in sentence
        assert content(world) == before
        return sentence

    return check


HARVESTING = ("harvest", "--model", "model", "--corpus", "text.jsonl", *HARVEST)
TRAINING = ("train", "store", *TRAIN)
EVALUATING = ("--model", "model", "--corpus", "text.jsonl", "--tokens", 100)
RUNNING = ("run", "--model", "model", "--corpus", "text.jsonl", "--site", SITE,
           "--harvest.context-size", 16)  # fmt: skip
STUDYING = ("study", "store", "--model", "model", "--corpus", "text.jsonl", "--site", SITE)
WEIGHING = ("weigh", "store", "--site", SITE)

LONG = "x" * 300
# name: (exit code, the command without --out, what the sentence holds)
MISTAKES = {
    "command": (2, ("harvst",), ["no command 'harvst'", "did you mean 'harvest'?"]),
    "empty corpus": (2, (*HARVESTING, "--corpus", ""), ["--corpus is empty", "omit it"]),
    "empty model": (2, (*HARVESTING, "--model="), ["--model is empty"]),
    "empty part": (
        2,
        (*HARVESTING, "--corpus", "text.jsonl+"),
        ["'text.jsonl+' has an empty part"],
    ),
    "empty parts": (2, (*HARVESTING, "--corpus", "+"), ["'+' has an empty part"]),
    "corpus of nobody": (
        2,
        (*HARVESTING, "--corpus", "~nosuchuser/x"),
        ["home folder ~nosuchuser"],
    ),
    "model of nobody": (2, (*HARVESTING, "--model", "~nosuchuser/x"), ["home folder ~nosuchuser"]),
    "long corpus": (1, (*HARVESTING, "--corpus", LONG), ["file name too long", "a shorter name"]),
    "long model": (1, (*HARVESTING, "--model", f"./{LONG}"), ["file name too long"]),
    "long store": (1, ("train", LONG, *TRAIN), ["file name too long"]),
    "long dictionary": (1, ("evaluate", LONG, *EVALUATING), ["file name too long"]),
    "bytes that are no name": (2, (*HARVESTING, "--corpus", "a\udcff"), ["not UTF-8", "a\\udcff"]),
    "shard": (2, (*HARVESTING, "--shard-tokens", 10**15), ["a shard would need", "shard-tokens"]),
    "number of tokens": (2, (*HARVESTING, "--tokens", 10**30), ["at most 1,000,000,000,000,000"]),
    "disk": (2, (*HARVESTING, "--tokens", 10**15), ["but its disk has", "fewer tokens"]),
    "expansion": (2, (*TRAINING, "--k", 4, "--expansion", 10**9), ["GiB of memory", "expansion"]),
    "initial seed": (2, (*TRAINING, "--k", 4, "--init-seeds", 10**30), ["init-seeds", "at most"]),
    "dead after": (2, (*TRAINING, "--k", 4, "--dead-after", 10**30), ["dead-after", "at most"]),
    "no number": (2, (*TRAINING, "--checkpoint-seconds", "nan"), ["seconds is nan", "a number"]),
    "bootstraps": (
        2,
        ("evaluate", "trained/uniform-k4", *EVALUATING, "--bootstraps", 10**12),
        ["bootstraps is 1000000000000, but must be at most 100,000"],
    ),
    "model on the hub": (
        1,
        ("harvest", "--model", "nosuch/model", "--corpus", "text.jsonl", *HARVEST),
        ["'nosuch/model' is neither a local folder", "check the name and the network"],
    ),
    "model folder": (
        2,
        ("run", "--model", "./nowhere", "--corpus", "text.jsonl", "--site", SITE),
        ["there is no model at ./nowhere", "or a Hub id such as gpt2"],
    ),
    "folder without a model": (
        2,
        ("harvest", "--model", "nothing", "--corpus", "text.jsonl", *HARVEST),
        ["the folder nothing holds no config.json", "give one with config.json and weights"],
    ),
    "site out of range": (
        2,
        (*HARVESTING, "--site", "blocks.7.hook_resid_post"),
        ["no blocks.7.hook_resid_post", "the model has 3 blocks", "to blocks.2.hook_resid_post"],
    ),
    "site misspelt": (
        2,
        (*HARVESTING, "--site", "blocks.1.hook_resid_pots"),
        ["'blocks.1.hook_resid_pots' is not a site", "did you mean 'blocks.1.hook_resid_post'"],
    ),
    "site in run": (2, (*RUNNING, "--site", "block.1"), ["'block.1' is not a site"]),
    "no site": (2, (*HARVESTING, "--site"), ["at least one site, e.g. --site blocks.8."]),
    "site not in the store": (
        2,
        ("weigh", "store", "--site", "blocks.1.hook_resid_pre"),
        ["the store store has no blocks.1.hook_resid_pre", f"did you mean {SITE!r}?"],
    ),
    "corpus empty": (1, (*HARVESTING, "--corpus", "empty.txt"), ["corpus empty.txt is empty"]),
    "corpus blank": (1, (*HARVESTING, "--corpus", "blank.txt"), ["blank.txt holds no text"]),
    "corpus binary": (1, (*HARVESTING, "--corpus", "image.txt"), ["image.txt is not UTF-8 text"]),
    "corpus with NUL": (1, (*HARVESTING, "--corpus", "program.txt"), ["it holds NUL bytes"]),
    "corpus torn": (
        1,
        (*HARVESTING, "--corpus", "torn.jsonl"),
        ["line 2 is not readable JSON"],
    ),
    "corpus missing": (2, (*HARVESTING, "--corpus", "no.txt"), ["no file or folder no.txt"]),
    "corpus not on the hub": (
        2,
        (*HARVESTING, "--corpus", "no/such"),
        ["no file, text package or reachable Hub dataset 'no/such'"],
    ),
    "corpus too small": (
        1,
        (*HARVESTING, "--tokens", 90_000),
        ["train part of the corpus text.jsonl", "17,392 tokens", "90,000 requested"],
    ),
    "held-out text too short": (
        1,
        ("evaluate", "trained/uniform-k4", *EVALUATING, "--tokens", 90_000),
        ["holds 2,2", "90,000 tokens"],
    ),
    "context too long": (2, (*HARVESTING, "--context-size", 65), ["model, which reads at most 64"]),
    "tokens": (2, (*HARVESTING, "--tokens", 0), ["tokens is 0, but must be at least 1"]),
    "seed of the rows": (
        2,
        (*TRAINING, "--shuffle-seed", -1),
        ["shuffle-seed is -1, but must be at least 0"],
    ),
    "seed of an evaluation": (
        2,
        ("evaluate", "trained/uniform-k4", *EVALUATING, "--seed", -1),
        ["seed is -1, but must be at least 0"],
    ),
    "device": (2, (*TRAINING, "--device", "tpu"), ["no device 'tpu' on this machine; it has"]),
    "k": (
        2,
        (*TRAINING, "--k", 65),
        ["k = 65", "the dictionary's 64 latents", "smaller k or a larger expansion"],
    ),
    "k in run": (2, (*RUNNING, "--k", 200), ["k = 200", "the dictionary's 128 latents"]),
    "k twice": (2, (*TRAINING, "--k", 4, 4), ["uniform-k4 is listed twice"]),
    "nothing to train": (2, (*TRAINING, "--rule"), ["there is nothing to train"]),
    "l1": (2, (*TRAINING, "--k", 4, "--l1", -1), ["l1 is -1.0, but must be at least 0"]),
    "batch": (2, (*TRAINING, "--batch-size", 9999), ["rows are fewer than one batch of 9999"]),
    "rule": (2, (*WEIGHING, "--rule", "varianc"), ["rule 'varianc'; did you mean 'variance'"]),
    "rule in train": (2, (*TRAINING, "--rule", "kurtoses"), ["did you mean 'kurtosis'"]),
    "rule without its input": (
        2,
        (*WEIGHING, "--rule", "permuted:participation"),
        ["the rule 'permuted:participation' needs a first dictionary", "--dictionary DICT"],
    ),
    "rule without its input in train": (
        2,
        (*TRAINING, "--rule", "sensitivity"),
        ["the rule 'sensitivity' needs the model", "llm-wsae weigh", "--model M", "--weights"],
    ),
    "rule without its input in run": (
        2,
        (*RUNNING, "--rule", "participation"),
        ["needs a first dictionary"],
    ),
    "form": (
        2,
        (*WEIGHING, "--form", "matrix"),
        ["'variance' has no matrix form", "sensitivity, whitening"],
    ),
    "form in run": (2, (*RUNNING, "--form", "diagonal", "--rule", "whitening"), ["only a matrix"]),
    "clip": (2, (*WEIGHING, "--clip", 0.5), ["clip must be a factor of at least 1"]),
    "exponent": (
        2,
        (*WEIGHING, "--rule", "whitening", "--alpha", "nan"),
        ["alpha is nan, but must be a number"],
    ),
    "an exponent that only a run can choose": (
        2,
        (*WEIGHING, "--rule", "whitening", "--alpha", "auto"),
        ["--alpha auto is for `run` and `plan` alone; give a number"],
    ),
    "rows too few to whiten": (
        1,
        ("weigh", "few", "--site", SITE, "--rule", "whitening"),
        ["15 rows are too few for the covariance of 16 dimensions", "harvest at least 160 tokens"],
    ),
    "form of custom weights": (
        2,
        (*TRAINING, "--k", 4, "--weights", "own.safetensors", "--form", "matrix", "--rule"),
        ["custom weights have the form that they are given in, diagonal, not matrix"],
    ),
    "annealed space": (
        2,
        (*TRAINING, "--place", "space", "--anneal", 0.5),
        ["only weights in the loss can be annealed", "anneal to 0 or place to loss"],
    ),
    "rule in run": (2, (*RUNNING, "--rule", "varience"), ["did you mean 'variance'"]),
    "weights of another site": (
        2,
        (*TRAINING, "--k", 4, "--weights", "theirs.safetensors"),
        [f"holds the weights of '{OTHER_SITE}', not of {SITE}", f"llm-wsae weigh --site {SITE}"],
    ),
    "weights of one of two sites": (
        2,
        ("train", "store", "--site", OTHER_SITE, SITE, "--weights", "theirs.safetensors"),
        [f"holds the weights of '{OTHER_SITE}', not of {SITE}"],
    ),
    "weights of another width": (
        1,
        (*TRAINING, "--k", 4, "--weights", "short.safetensors"),
        ["for 9 dimensions, but the site has 16", "llm-wsae weigh"],
    ),
    "weights not finite": (
        1,
        (*TRAINING, "--k", 4, "--weights", "nan.safetensors"),
        ["the weights must be finite"],
    ),
    "weights unreadable": (
        1,
        (*TRAINING, "--weights", "notes.safetensors"),
        ["notes.safetensors is not a readable weights file"],
    ),
    "weights missing": (1, (*TRAINING, "--weights", "no.safetensors"), ["there is no no.safe"]),
    "store missing": (
        1,
        ("train", "nowhere", "--site", SITE),
        ["there is no activation store in nowhere"],
    ),
    "store foreign": (
        1,
        ("weigh", "nothing", "--site", SITE),
        ["there is no activation store in nothing: it has no manifest.json"],
    ),
    "no store": (2, ("weigh", "--site", SITE), ["name at least one activation store"]),
    "store twice": (2, ("weigh", "store", "./store", "--site", SITE), ["store is listed twice"]),
    "model for a rule without one": (
        2,
        (*WEIGHING, "--model", "model", "--revision", "main", "--sensitivity-tokens", 9),
        [
            "omit --model and --revision and --sensitivity-tokens, which the rule 'variance' does "
            "not use"
        ],
    ),
    "dictionary for a rule without one": (
        2,
        (*WEIGHING, "--rule", "sensitivity", "--dictionary", "trained/uniform-k4"),
        ["omit --dictionary, which the rule 'sensitivity' does not use"],
    ),
    "plants that are not asked for": (
        2,
        (*STUDYING, "--planted.per-cell", 4, "--planted.seed", 3),
        ["--planted.seed and --planted.per-cell: only with --plant; add that"],
    ),
    "a plant that would drown the stream": (
        2,
        (*STUDYING, "--plant", "--planted.strengths", 0.2, 3),
        ["--planted: a plant's strength must be at least 1e-06", "not 0.2, 3.0"],
    ),
    "dictionary torn": (
        1,
        ("evaluate", "torn", *EVALUATING),
        ["in torn, sae_weights.safetensors changed since it was saved", "restore the dictionary"],
    ),
    "dictionary incomplete": (1, ("evaluate", "half", *EVALUATING), ["half", "lacks cfg.json"]),
    "dictionary foreign": (
        1,
        ("evaluate", "trained/uniform-k4", "store", *EVALUATING),
        ["store holds .lock", "and no dictionary that can be read"],
    ),
    "dictionary missing": (
        1,
        ("evaluate", "nowhere", *EVALUATING),
        ["nowhere is not a folder"],
    ),
    "dictionary of another model": (
        2,
        ("evaluate", "trained/uniform-k4", *EVALUATING, "--model", "wide"),
        ["has 16 dimensions, but wide has 32", "the model it was trained on"],
    ),
}


def test_mistakes(refused, tmp_path, subtests):
    for name, (code, command, said) in MISTAKES.items():
        with subtests.test(name):
            out = tmp_path / f"{name}.safetensors"
            refused(code, *command, *([] if name == "command" else ["--out", out]), said=said)
            assert not out.exists()


IMPOSSIBLE = {
    "unknown option": (("verify", "store", "--depth", 3), ["no option --depth", "'--site'"]),
    "misspelt option": ((*TRAINING, "--out", "x", "--expantion", 3), ["expantion", "--expansion"]),
    "missing options": (("harvest",), ["missing", "--model", "--corpus", "--site", "--out"]),
    "option and missing ones": (("harvest", "--sight", SITE), ["no option --sight", "'--site'"]),
    "argument": (("verify", "store", "store"), ["'store' is one argument too many"]),
    "no value": ((*TRAINING, "--out", "x", "--batch-size"), ["--batch-size needs a value"]),
    "no place": (
        ("weigh", "--site", SITE, "--out", "x.safetensors"),
        ["name at least one activation store"],
    ),
    "not a number": ((*TRAINING, "--out", "x", "--k", "many"), ["--k", "'many'"]),
    "no folder": (("evaluate", *EVALUATING, "--out", "x"), ["dictionary folder"]),
    "architecture": (
        (*TRAINING, "--out", "x", "--architecture", "batchtopk"),
        ["--architecture cannot be 'batchtopk'", "did you mean 'batch-topk'?"],
    ),
    "choice": ((*HARVESTING, "--out", "x", "--dtype", "int8"), ["--dtype", "bfloat16"]),
}


def test_what_the_parser_refuses(refused, subtests):
    for name, (words, said) in IMPOSSIBLE.items():
        with subtests.test(name):
            refused(2, *words, "--json", said=said)


@pytest.mark.parametrize(
    "words, said",
    [
        ("harvest --site a --site b", "--site is given twice; give its values together: --site A"),
        ("study --rule a --rule=b", "--rule is given twice; give its values together: --rule A B"),
        ("inspect d --latent 1 --latent 2", "give its values together: --latent A B"),
        ("weigh s --rule variance --rule kurtosis", "--rule is given twice; give it once"),
        ("run --tokens 5 --harvest.tokens 6", "--tokens or --harvest.tokens is given twice"),
        ("train --batch_size 5 --batch-size 6", "--batch-size is given twice; give it once"),
        ("push d user/name --private --private", "--private is given twice; give it once"),
    ],
)
def test_an_option_is_given_once(capsys, words, said):
    assert main(words.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err.splitlines()[-1]


def test_what_the_parser_does_not_tell_is_shown_as_it_tells_it(world, monkeypatch):
    """Its hook for errors is private: a release may have none, or other events."""
    monkeypatch.setattr(parser, "_on_parse_error", contextlib.nullcontext)
    result = call("verify", world / "store", "--depth", 3)
    assert (result.code, result.out) == (2, "") and "Traceback" not in result.err
    assert "Unrecognized options: --depth" in result.err


def test_files_that_cannot_receive_the_result(refused):
    refused(2, *WEIGHING, "--out", "weights.json", said=["a .safetensors file", "weights.json"])
    refused(2, "evaluate", "trained/uniform-k4", *EVALUATING, "--out", "nothing",
            said=["nothing is a folder"])  # fmt: skip
    refused(2, "evaluate", "trained/uniform-k4", *EVALUATING, "--out", "empty.txt/report.json",
            said=["--out cannot be empty.txt/report.json", "is not a folder"])  # fmt: skip
    refused(2, *HARVESTING, "--out", "empty.txt", said=["name of a folder, but empty.txt is"])
    refused(1, *HARVESTING, "--out", "trained", said=["trained holds other files"])


def test_nothing_of_other_people_is_replaced(refused, world, tmp_path, subtests):
    (world / "notes.json").write_text('{"command": "mine"}')
    (world / "page.html").write_text("<p>mine")
    (world / "mine").mkdir()
    (world / "mine/log.jsonl").write_text("my log\n")
    (world / "mine/report.md").write_text("my report")
    left, page = "was not written by this command", ("dashboard", "trained/uniform-k4")
    for command, out, said in (
        (
            WEIGHING,
            "model/model.safetensors",
            f"model/model.safetensors already exists and {left}",
        ),
        (WEIGHING, "model/config.safetensors", f"model/config.json already exists and {left}"),
        (("evaluate", "trained/uniform-k4", *EVALUATING), "notes.json", left),
        ((*page, "--store", "store", "--model", "model"), "page.html", left),
        ((*TRAINING, "--k", 4), "store", "store holds other files (manifest.json)"),
        (
            (*TRAINING, "--k", 4),
            "trained/uniform-k4",
            "k4 holds other files (wsae.json)",
        ),
        ((*TRAINING, "--k", 4), "mine", "mine holds other files (log.jsonl)"),
        (STUDYING, "mine", "mine holds other files (report.md)"),
    ):
        with subtests.test(f"{command[0]} {out}"):
            refused(1, *command, "--out", out, said=[said])


def test_what_one_may_not_read_or_write(refused, world, tmp_path):
    """Before the work. (Modules are imported first: nobody might not read them either.)"""
    evaluating = ("evaluate", world / "trained/uniform-k4", *EVALUATING)
    works("verify", world / "trained/uniform-k4")
    assert call("evaluate", "nowhere", *EVALUATING, "--out", tmp_path / "x.json").code == 1
    with nobody(world, tmp_path):
        for command, said in (
            (("verify", world / "trained/uniform-k4"), f"{world}/trained/uniform-k4: permission"),
            ((*evaluating, "--out", tmp_path / "new.json"), f"cannot write {tmp_path}/new.json: P"),
        ):
            result = call(*command)
            assert (result.code, result.out) == (1, "") and result.err.count("\n") == 1
            assert said in result.err and "ask its owner for access" in result.err


def test_a_store_of_another_model_or_form(refused):
    harvest = (*HARVESTING, "--out", "store", "--dtype", "float32")
    sentence = refused(1, *harvest, "--model", "other",
                       said=["store has other settings (", 'model name: "model" in the saved',
                             "choose another folder"])  # fmt: skip
    assert len(sentence) < 400
    refused(1, *HARVESTING, "--out", "store", "--dtype", "bfloat16",
            said=['dtype: "float32" in the saved activation store, "bfloat16"'])  # fmt: skip
    refused(
        1,
        *harvest,
        "--context-size",
        8,
        said=["packing context_size: 16 in the saved"],
    )
    refused(1, *harvest, "--tokens", 100, said=["already holds 5,008 tokens", "112 requested"])


def test_a_training_with_other_settings(refused):
    sentence = refused(1, *TRAINING, "--k", 5, "--out", "trained", "--shuffle-seed", 3,
                       said=["the training in trained has other settings",
                             "the saved training has arms uniform-k4; this command does not",
                             "this command has arms uniform-k5; the saved training does not",
                             "seed: 0 in the saved training, 3 in this command"])  # fmt: skip
    assert sentence.endswith("or use the same settings to resume it")


def test_two_harvests_into_one_folder(refused, world, tmp_path):
    out = tmp_path / "store"
    shutil.copytree(world / "store", out)
    before = content(out)
    with folder_lock(out, "activation store"):
        refused(1, *HARVESTING, "--out", out, "--dtype", "float32",
                said=["another process is writing the activation store in", out])  # fmt: skip
    assert content(out) == before


def test_the_hub_out_of_reach(refused, monkeypatch, tmp_path):
    def unreachable(*_, **__):
        raise httpx.ConnectError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    refused(1, *HARVESTING, "--corpus", "owner/texts", "--out", tmp_path / "out",
            said=["'owner/texts'", "the Hub cannot be reached"])  # fmt: skip
    assert not (tmp_path / "out").exists()


class Rows:
    """A streamed dataset whose connection breaks behind so many rows."""

    features = None

    def __init__(self, rows: range):
        self.rows = rows

    def skip(self, count: int) -> "Rows":
        return Rows(self.rows[count:])

    def __iter__(self):
        for number in self.rows:
            yield {"text": tiny.words(number, 50)}
        if self.rows.stop < 900:
            raise ConnectionError("Server disconnected")


def test_a_connection_that_breaks(refused, monkeypatch, tmp_path):
    harvest = (*HARVESTING, "--corpus", "owner/texts", "--out", tmp_path / "store")
    harvest += ("--tokens", 35_000)  # more than the first 512 documents, which are read ahead
    monkeypatch.setattr(HubDataset, "_find_revision", lambda self: "0" * 40)
    monkeypatch.setattr(HubDataset, "_load", lambda self: Rows(range(650)))
    refused(1, *harvest, said=["dataset owner/texts broke off near document 649",
                               "Server disconnected", "same command again to resume"])  # fmt: skip
    assert complete_shards(tmp_path / "store", Manifest.load(tmp_path / "store"))
    monkeypatch.setattr(HubDataset, "_load", lambda self: Rows(range(900)))
    works(*harvest)
    whole = tmp_path / "whole"
    works(*harvest, "--out", whole)
    assert content(whole) == content(tmp_path / "store")


def test_activations_that_are_not_finite(refused, tmp_path):
    out = tmp_path / "store"
    refused(1, *HARVESTING, "--model", "broken", "--out", out,
            said=[f"{SITE}, shard 00000: 4"])  # fmt: skip
    assert complete_shards(out, Manifest.load(out)) == {} and not list(out.rglob("*.safetensors"))


def test_a_store_that_holds_nan(refused, world, tmp_path):
    store, out = tmp_path / "store", tmp_path / "trained"
    shutil.copytree(world / "store", store)
    shard = store / SITE / "00002.safetensors"
    rows = load_file(shard)["activations"]
    rows[5, 3], rows[6, 0], rows[6, 1] = torch.nan, torch.inf, torch.nan
    save_file({"activations": rows}, shard)
    before = content(store)
    refused(
        1,
        "train",
        store,
        *TRAIN,
        "--k",
        4,
        "--out",
        out,
        said=[f"{shard} is damaged: rows 0 to 127"],
    )
    assert content(store) == before and not (out / "uniform-k4").exists()


def test_a_full_disk(refused, world, tmp_path):
    """A limit on the size of files stands in for a full disk: too little for the second shard."""
    out = tmp_path / "store"
    harvest = ("harvest", "--model", world / "model", "--corpus", world / "text.jsonl", *HARVEST,
               "--dtype", "float32", "--out", out)  # fmt: skip
    works(*harvest, "--tokens", 1024)
    shard = {path: data for path, data in content(out).items() if "/00000." in path}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        refused(1, *harvest, said=["cannot write", out, "free some space or choose another folder"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    left = content(out)
    assert len(shard) == 3 and shard.items() <= left.items()
    assert not [path for path in left if path.endswith(".partial")]
    works(*harvest)
    left, unbroken = content(out), content(world / "store")
    assert left.pop("harvest.json") and unbroken.pop("harvest.json")  # where the text lay
    assert left == unbroken


def damaged(store: Path) -> dict[str, str]:
    """Damages three files of a store; what must be said about each."""
    flipped, short, gone = (store / SITE / f"0000{i}.safetensors" for i in range(3))
    byte = bytearray(flipped.read_bytes())
    byte[-9] ^= 4
    flipped.write_bytes(byte)
    short.write_bytes(short.read_bytes()[:-64])
    gone.unlink()
    return {
        str(flipped): "is damaged: its checksum does not match",
        str(short): "is truncated",
        str(gone): "is missing",
    }


def test_verify_names_every_damaged_file(refused, world, tmp_path):
    store = tmp_path / "store"
    shutil.copytree(world / "store", store)
    said = [f"{path} {problem}" for path, problem in damaged(store).items()]
    sentence = refused(1, "verify", store, said=said)
    assert sentence.count(";") == 3 and sentence.endswith(
        "run the same harvest again, which rewrites those missing"
    )
    refused(1, "verify", "torn", said=["in torn, sae_weights.safetensors changed since it was"])
    refused(1, "verify", "half", said=["half", "lacks cfg.json"])
    refused(1, "verify", "foreign", said=["foreign holds cfg.json and no dictionary"])
    refused(
        1,
        "verify",
        "nothing",
        said=["nothing holds nothing that verify knows: store (with a man", "training"],
    )
    refused(1, "verify", "nowhere", said=["there is no file or folder nowhere"])


def test_debug_shows_where_it_happened(world, monkeypatch):
    monkeypatch.chdir(world)
    for words, code in ((("weigh", "nowhere", "--site", SITE), 1), ((*TRAINING, "--k", 99), 2)):
        result = call(*words, "--out", "x.safetensors", "--debug")
        assert result.code == code and result.out == ""
        first, *_, last = result.err.splitlines()
        assert first == "Traceback (most recent call last):" and last.startswith("llm-wsae: ")


def test_verify_finds_a_flipped_bit_of_a_dictionary(refused, world, tmp_path):
    shutil.copytree(world / "trained/uniform-k4", tmp_path / "flipped")
    weights = tmp_path / "flipped/sae_weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-100] ^= 1  # a number that is as good as the old one
    weights.write_bytes(data)
    said = ["flipped, sae_weights.safetensors changed since it was saved"]
    refused(1, "verify", tmp_path / "flipped", said=said)
