"""Whatever a user gets wrong: one sentence that names it, the right exit code, and everything on
disk as it was. Each kind of mistake once, through the command line; details are tested where the
mistake is found."""

import resource
import shutil
import signal
import subprocess
import sys

import command_line
import pytest
import tiny
import torch
from command_line import HARVEST, SITE, STREAM, TRAIN, asked, call, cases, content, nobody, works
from safetensors.torch import save_file
from small_dictionaries import make_dictionary

from llm_wsae.cli import main
from llm_wsae.data import corpus as corpus_module
from llm_wsae.data.store import Manifest, complete_shards
from llm_wsae.weights.loss_weights import LossWeights

OTHER_SITE = SITE.replace("post", "mid")


@pytest.fixture(scope="module")
def world(world):
    """What the other tests have, and more that is wrong with it."""
    folder = world
    command_line.save_model(folder / "other", seed=5)
    command_line.save_model(folder / "wide", width=32)
    works("harvest", "--model", folder / "model", "--corpus", folder / "text.jsonl", *HARVEST,
          "--tokens", 16, "--dtype", "float32", "--out", folder / "few")  # fmt: skip
    save_file({"gamma": torch.ones(16)}, folder / "own.safetensors")
    make_dictionary().save(folder / "narrow")
    tiny.write_jsonl(folder / "tiny.jsonl", [3])
    (folder / "nothing").mkdir()
    (folder / "empty.txt").touch()
    (folder / "image.txt").write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00\x00\xff")
    LossWeights(torch.ones(16)).save(folder / "theirs.safetensors", {"site": OTHER_SITE})
    shutil.copytree(folder / "trained/uniform-k4", folder / "torn")
    torn = folder / "torn/sae_weights.safetensors"
    torn.write_bytes(torn.read_bytes()[:-40])
    shutil.copytree(folder / "trained/uniform-k4", folder / "half")
    (folder / "half/cfg.json").unlink()
    for name, text in (
        ("foreign/cfg.json", '{"architecture": "gated"}'),
        ("mine/log.jsonl", "my log\n"),
        ("mine/report.html", "my report"),
        ("notes.safetensors", "my notes"),
        ("notes.json", '{"command": "mine"}'),
        ("page.html", "<p>mine"),
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def refused(world, monkeypatch):
    """Run a command that must fail: its one sentence."""

    def check(code: int, *words, said: tuple = ()) -> str:
        monkeypatch.chdir(world)
        before = content(world), sorted(world.rglob("*"))
        result = call(*words)
        assert result.code == code, result.err
        assert result.out == "" and "Traceback" not in result.err
        sentence, *more = [line for line in result.err.splitlines() if line.startswith("llm-wsae:")]
        assert not more and result.err.endswith(f"{sentence}\n")
        for part in said:
            assert str(part) in sentence
        assert (content(world), sorted(world.rglob("*"))) == before
        return sentence

    return check


HARVESTING = ("harvest", "--model", "model", "--corpus", "text.jsonl", *HARVEST)
TRAINING = ("train", "store", *TRAIN)
EVALUATING = ("--model", "model", "--corpus", "text.jsonl", "--tokens", 100)
MEASURING = ("evaluate", "trained/uniform-k4", *EVALUATING)
TEXT = ("--model", "model", "--corpus", "text.jsonl", "--site", SITE)
STREAMING = ("train", *TEXT, *STREAM)
STUDYING = ("study", "store", *TEXT)
WEIGHING = ("weigh", "store", "--site", SITE)

# what stands for several words, or for what cannot be typed here
WORDS = {name: own for name, own in globals().items() if name.isupper() and isinstance(own, tuple)}
WORDS |= {"SITE": [SITE], "LONG": [300 * "x"], "BYTES": ["a\udcff"], "NUL": ["a\0b"],
          "HUNDRED": ["w1 " * 99], "RUNNING": ["run", "--corpus", "text.jsonl", "--site", SITE],
          "INSPECTING": ["inspect", "trained/uniform-k4"]}  # fmt: skip
# Exit code and command, those of mistakes without --out; below it, what the sentence holds.
MISTAKES = """\
2 harvst
    no command 'harvst' … did you mean 'harvest'?
2 HARVESTING --corpus ''
    --corpus is empty … omit it
2 HARVESTING --model=
    --model is empty
1 HARVESTING --corpus LONG
    file name too long … a shorter name
2 HARVESTING --corpus BYTES
    not UTF-8 … a\\udcff
2 HARVESTING --tokens 1000000000000000
    but its disk has … fewer tokens
2 TRAINING --k 4 --expansion 1000000000
    GiB of memory … expansion
2 TRAINING --checkpoint-seconds nan
    seconds is nan … a number
1 harvest --model nosuch/model --corpus text.jsonl HARVEST
    'nosuch/model' is neither a local folder … check the name and the network
2 HARVESTING --site blocks.1.hook_resid_pots
    'blocks.1.hook_resid_pots' is not a site … did you mean 'blocks.1.hook_resid_post'
2 HARVESTING --site
    at least one site, e.g. --site blocks.8.
2 weigh store --site blocks.1.hook_resid_pre
    the store store has no blocks.1.hook_resid_pre … did you mean 'blocks.1.hook_resid_post'?
1 HARVESTING --corpus image.txt
    image.txt cannot be read as text: 'utf-8' codec
2 HARVESTING --corpus no.txt
    no file or folder no.txt
1 HARVESTING --tokens 90000
    train part of the corpus text.jsonl … 17,392 tokens … 90,000 requested
2 HARVESTING --context-size 65
    model, which reads at most 64
2 RUNNING --model NUL
    'a\\x00b' cannot be the name of a model
2 HARVESTING --corpus no/such
    'no/such' is no file or text package, and cannot be opened as a Hub dataset
1 MEASURING --tokens 90000
    holds 2,2 … 90,000 tokens
2 TRAINING --device tpu
    no device 'tpu' on this machine; it has
2 TRAINING --k 4 --l1 -1
    l1 is -1.0, but must be at least 0
2 TRAINING --batch-size 9999
    rows are fewer than one batch of 9999
2 train --site SITE
    give a STORE to train on, or --model and --corpus
2 train --site SITE --model m
    --model and --corpus
2 TRAINING TEXT
    --model is for training without a store; drop it, or drop
2 TRAINING --buffer-tokens 9
    --buffer-tokens is
2 TRAINING --device spread
    --device spread is for training without a store
2 train TEXT
    a stream has no end: set --tokens
2 STREAMING --site SITE blocks.7.hook_resid_post
    the model has 3 blocks
2 STREAMING --rule participation
    needs a first dictionary
2 STREAMING --rule uniform --lengths free --architecture jumprelu
    jumprelu has no free lengths
1 STREAMING --corpus tiny.jsonl
    corpus tiny.jsonl fills contexts of 16 with 0 tokens
2 run TEXT --buffer-tokens 9
    are for --stream
2 WEIGHING --rule varianc
    rule 'varianc'; did you mean 'variance'
2 WEIGHING --rule permuted:participation
    the rule 'permuted:participation' needs a first dictionary … --dictionary DICT
2 TRAINING --rule sensitivity
    the rule 'sensitivity' needs the model … llm-wsae weigh … --model M … --weights
2 WEIGHING --form matrix
    'variance' has no matrix form … sensitivity, whitening
2 WEIGHING --rule whitening --alpha auto
    --alpha auto is for `run` and `plan` alone; give a number
1 weigh few --site SITE --rule whitening
    15 rows are too few for the covariance of 16 dimensions … at least 160: harvest as many tokens
2 TRAINING --k 4 4
    uniform-k4 is listed twice
2 TRAINING --k 4 --weights own.safetensors --form matrix --rule
    custom weights have the form that they are given in, diagonal, not matrix
1 TRAINING --weights notes.safetensors
    notes.safetensors is not a readable weights file
1 train nowhere --site SITE
    there is no activation store in nowhere
2 weigh --site SITE
    name at least one activation store
1 weigh store ./store --site SITE
    hold the same text
2 TRAINING --k 4 --weights theirs.safetensors
    holds the weights of 'blocks.1.hook_resid_mid', not of blocks.1.hook_resid_post … llm-wsae weigh
2 WEIGHING --model model --revision main --sensitivity-tokens 9
    omit --model and --revision and --sensitivity-tokens, which the rule 'variance' does not use
2 WEIGHING --rule sensitivity --dictionary trained/uniform-k4
    omit --dictionary, which the rule 'sensitivity' does not use
2 STUDYING --planted.per-cell 4 --planted.seed 3
    --planted.seed and --planted.per-cell: only with --plant; add that
2 STUDYING --plant --planted.strengths 0.2 3
    --planted: strengths must be at least 1e-06 … not 0.2, 3.0
1 evaluate torn EVALUATING
    in torn, sae_weights.safetensors changed since it was saved … restore the dictionary
1 evaluate trained/uniform-k4 store EVALUATING
    store holds .lock … and no dictionary that can be read
2 evaluate nowhere EVALUATING
    'nowhere' is no folder and no pretrained dictionary; … user/name
2 evaluate trained/uniform-k4 trained/log.jsonl EVALUATING
    trained/log.jsonl is a file, not a dictionary; name the folder … : trained
2 MEASURING --model wide
    has 16 dimensions, but wide has 32 … the model it was trained on
"""
PARSED = """\
2 INSPECTING --latent three
    --latent
2 verify store --depth 3
    no option --depth … '--site'
2 TRAINING --out x --expantion 3
    expantion … --expansion
2 harvest
    missing … --model … --corpus … --site … --out
2 harvest --sight SITE
    no option --sight … '--site'
2 verify store store
    'store' is one argument too many
2 TRAINING --out x --batch-size
    --batch-size needs a value
2 TRAINING --out x --k many
    --k … 'many'
2 TRAINING --out x --architecture batchtopk
    --architecture cannot be 'batchtopk' … did you mean 'batch-topk'?
2 HARVESTING --out x --dtype int8
    --dtype … bfloat16
2 run --lr 0.1
    no option --lr (did you mean '--train.learning-rate'?)
2 train --hook_point 9
    no option --hook_point (did you mean '--site'?)
2 run --dtype bfloat16
    (did you mean '--harvest.dtype' or '--train.dtype'?)
2 run --seed 1
    '--init-seeds'
2 study --seed 1
    '--seeds'
2 train --train.steps 9
    '--tokens'
2 run -k 4
    no option -k (did you mean '--k'?)
2 run TEXT --alpha auto half
    --alpha takes numbers or auto, not 'half'
2 run TEXT --tokens 1e6
    --tokens takes a whole number, not '1e6'; write 1000000
2 TRAINING --out x --k=4.5
    --k takes whole numbers, not '4.5'
2 TRAINING --out x --learning_rate fast
    --learning-rate takes a number, not 'fast'
2 explain d --store s --endpoint e --explainer x --out o --model m --latents some
    --latents takes a whole number or all, not 'some'
2 run TEXT --device gpu
    --device cannot be 'gpu' (did you mean 'cuda'?)
2 run TEXT --stream yes
    'yes' is one argument too many after --stream
2 evaluate EVALUATING --out x
    name at least one dictionary folder
2 dashboard --store s --model m --out x.html
    name at least one dictionary folder
2 weigh --site SITE --out x.safetensors
    name at least one activation store
2 study TEXT --out x
    name at least one activation store
2 run --config --out x
    --config needs a record
2 run TEXT --rule nonsense
    no weight rule 'nonsense'
2 plan TEXT --alpha auto --rule variance
    whitening, which is not among the rules
2 TRAINING --out x --rule participation
    needs a first dictionary
2 TRAINING --out x --site blocks.1.attn.hook_z
    'blocks.1.attn.hook_z' is not supported
2 HARVESTING --out x --site h.1
    did you mean 'blocks.1.hook_resid_post'?
2 weigh store --out x.safetensors --site 1
    did you mean 'blocks.1.hook_resid_post'?
2 WEIGHING --out x.safetensors --rule varianc
    did you mean 'variance'
2 STUDYING --out x --rule participation
    name its folder with --dictionary
2 STUDYING --out x --site 1
    did you mean 'blocks.1.hook_resid_post'?
2 theory --out x --rule sensitivity
    the toy experiment cannot measure
2 dashboard d --store s --model m --out page.txt
    an HTML file, so --out cannot be page.txt
2 push d
    dictionary folders and then the repository
2 pull
    missing REPO_ID
2 export d --to neuron
    --to cannot be 'neuron' (did you mean 'neuronpedia'?)
"""


LOOKING = """\
2 run --config store/harvest.json
    store/harvest.json is not a record of run, but of 'harvest'
2 harvest --config store/harvest.json
    missing --out
1 harvest --config notes.json
    notes.json is damaged
1 run --config nowhere.json
    there is no nowhere.json
2 INSPECTING --text BYTES --model model
    not UTF-8
2 INSPECTING --text w1 --model model --store store
    a store shows where latents fire, so name some with --latent
2 INSPECTING
    name latents (--latent) or give a --text
2 INSPECTING --latent 64
    no latent 64; uniform-k4 has latents 0 to 63
2 INSPECTING --latent -1
    no latent -1
2 INSPECTING --latent 1 --top 0
    top is 0, but must be at least 1
1 inspect traind/uniform-k4 --latent 1
    'traind/uniform-k4' is no folder and … (did you mean 'trained'?) … HF_HUB_OFFLINE is set
2 inspect trained --latent 1
    trained holds 2 dictionaries; name one: … 'trained/uniform-k4'
1 INSPECTING --latent 1 --store model
    no activation store in model
2 INSPECTING --text HUNDRED --model model
    100 tokens are too long
2 INSPECTING --latent 1 --model ./no
    there is no model at ./no
2 inspect narrow --latent 1 --model model
    reads 12 dimensions, but model
1 inspect narrow --latent 1 --store store
    rows of 16 dimensions
2 steer trained/uniform-k4 --latent 1 --text w1 --model model
    give one of --store and --corpus
2 steer trained/uniform-k4 --latent 64 --text w1 --model model --store store
    no latent 64; uniform-k4 has latents 0 to 63
2 steer trained/uniform-k4 --latent 1 --text w1 --model model --store store --how ablate --sweep
    --strength, --sweep and --how ablate exclude each other
1 verify torn
    in torn, sae_weights.safetensors changed since it was
1 verify half
    half is not a complete dictionary folder of this package: it lacks cfg.json
2 INSPECTING --text w1
    reading a text needs the model, but
1 verify foreign
    foreign holds cfg.json and no dictionary
1 verify nothing
    there is nothing in nothing that verify knows
1 verify nowhere
    there is no file or folder nowhere
"""


# The result cannot go there, or what is there is of another command or settings.
PLACES = """\
2 WEIGHING --out weights.json
    a .safetensors file … weights.json
2 MEASURING --out nothing
    nothing is a folder
2 MEASURING --out empty.txt/report.json
    --out cannot be empty.txt/report.json … is not a folder
1 MEASURING --out notes.json
    was not written by this command
2 HARVESTING --out empty.txt
    name of a folder, but empty.txt is
1 HARVESTING --out trained
    trained holds other files
1 WEIGHING --out model/model.safetensors
    model/model.safetensors already exists and was not written by this command
1 dashboard trained/uniform-k4 --store store --model model --out page.html
    was not written by this command
1 TRAINING --k 4 --out store
    store holds other files (manifest.json)
1 TRAINING --k 4 --out mine
    mine holds other files (log.jsonl)
1 STUDYING --out mine
    mine holds other files (report.html)
1 HARVESTING --out store --dtype float32 --model other
    store has other settings ( … model name: "model" in the saved … choose another folder
1 HARVESTING --out store --dtype float32 --tokens 100
    already holds 5,008 tokens … 112 requested
1 STREAMING --out store
    store holds other files
1 STREAMING --out trained/uniform-k4
    uniform-k4 holds other files
1 TRAINING --k 5 --out trained --shuffle-seed 3
    training in trained has other settings … arms uniform-k4 … seed: 0 in … to resume it
"""


@pytest.mark.parametrize(
    ("table", "more"),
    [(MISTAKES, ("--out", "out.safetensors")), (PARSED, ("--json",)), (LOOKING, ()), (PLACES, ())],
    ids=("mistakes", "parser", "looking", "places"),
)
def test_mistakes(refused, subtests, table, more):
    for (code, *command), said in cases(table, **WORDS):
        with subtests.test(ascii(command)):
            assert len(refused(int(code), *command, *more, said=said)) < 700


def test_mistakes_in_the_words_alone_are_found_without_torch():
    """Torch takes seconds to import."""
    words = [asked([*command, "--json"]) for (_, *command), _ in cases(PARSED, **WORDS)]
    script = "import sys; from llm_wsae.cli import main; "
    script += f"print({{main(words) for words in {words!r}}}, 'torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", script]) == b"{2} False\n"


TWICE = """\
harvest --site a --site b
    --site is given twice; give it once, several values together: --site A B
study --rule a --rule=b
    --rule is given twice
run --tokens 5 --harvest.tokens 6
    --tokens or --harvest.tokens is given twice
train --batch_size 5 --batch-size 6
    --batch_size or --batch-size is given twice
push d user/name --private --private
    --private is given twice
"""


def test_an_option_is_given_once(capsys):
    for words, (said,) in cases(TWICE):
        assert main(words) == 2
        out, err = capsys.readouterr()
        assert out == "" and said in err.splitlines()[-1]


def test_what_one_may_not_read_or_write(world, tmp_path):
    """Before the work. (Modules are imported first: nobody might not read them either.)"""
    dictionary, out = world / "trained/uniform-k4", tmp_path / "new.json"
    works("verify", dictionary)
    evaluating = ("evaluate", dictionary, *EVALUATING, "--out", out)
    assert call(*evaluating).code == 2
    with nobody(world, tmp_path):
        for command, said in (
            (("verify", dictionary), f"{dictionary}: permission"),
            (evaluating, f"cannot write {out}: P"),
        ):
            result = call(*command)
            assert (result.code, result.out) == (1, "") and result.err.count("\n") == 1
            assert said in result.err and "ask its owner for access" in result.err


class Rows:
    """A streamed dataset whose connection breaks behind so many rows."""

    def __init__(self, rows: range):
        self.rows = rows

    def skip(self, count: int) -> "Rows":
        return Rows(self.rows[count:])

    def __iter__(self):
        for number in self.rows:
            yield {"text": tiny.words(number, 20)}
        if self.rows.stop < 900:
            raise ConnectionError("Server disconnected")


def test_a_connection_that_breaks(refused, monkeypatch, tmp_path):
    harvest = (*HARVESTING, "--corpus", "owner/texts", "--out", tmp_path / "store")
    harvest += ("--tokens", 14_000)  # more than the first 512 documents, which are read ahead
    monkeypatch.setattr(corpus_module, "_open_dataset", lambda *_: ("0" * 40, Rows(range(650))))
    refused(1, *harvest, said=["dataset owner/texts broke off near document 649",
                               "Server disconnected", "same command again to resume"])  # fmt: skip
    assert complete_shards(tmp_path / "store", Manifest.load(tmp_path / "store"))
    monkeypatch.setattr(corpus_module, "_open_dataset", lambda *_: ("0" * 40, Rows(range(900))))
    works(*harvest)
    whole = tmp_path / "whole"
    works(*harvest, "--out", whole)
    assert content(whole) == content(tmp_path / "store")


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
    left, unbroken = (  # other tests measured more of the store
        {path: data for path, data in content(store).items() if "evidence/" not in path}
        for store in (out, world / "store")
    )
    assert left.pop("harvest.json") and unbroken.pop("harvest.json")  # where the text lay
    assert left == unbroken


def test_verify_names_every_damaged_file(refused, world, tmp_path):
    store = shutil.copytree(world / "store", tmp_path / "store")
    flipped, short, gone = (store / SITE / f"0000{i}.safetensors" for i in range(3))
    byte = bytearray(flipped.read_bytes())
    byte[-9] ^= 4
    flipped.write_bytes(byte)
    short.write_bytes(short.read_bytes()[:-64])
    gone.unlink()
    said = [f"{flipped} is damaged: its checksum", f"{short} is truncated", f"{gone} is missing"]
    sentence = refused(1, "verify", store, said=said)
    assert sentence.count(";") == 3 and sentence.endswith(
        "run the same harvest again, which rewrites those missing"
    )


def test_debug_shows_where_it_happened(world, monkeypatch):
    monkeypatch.chdir(world)
    for words, code in ((("weigh", "nowhere", "--site", SITE), 1), ((*TRAINING, "--k", 99), 2)):
        result = call(*words, "--out", "x.safetensors", "--debug")
        assert result.code == code and result.out == ""
        first, *_, last = result.err.splitlines()
        assert first == "Traceback (most recent call last):" and last.startswith("llm-wsae: ")
