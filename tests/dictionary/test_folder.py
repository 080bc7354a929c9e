"""A dictionary's folder: what is written is read, and nothing else is."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from command_line import content
from looping import over
from refusals import fails, misused
from safetensors.torch import load_file, save_file
from small_dictionaries import SCORES, make_dictionary, make_info, said_of

from llm_wsae.artifact.files import json_line, sha256, write_json
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.explanations import keep_explanations, read_explanations
from llm_wsae.dictionary.folder import clear_up, is_dictionary, keep_measurements
from llm_wsae.dictionary.sparsity import JumpReLU, ReLU, TopK
from llm_wsae.errors import LlmWsaeError

D_IN, D_SAE = 12, 80
INFO = make_info("variance α=0.5")
SPARSITIES = [TopK(5), ReLU(), JumpReLU()]


def make(sparsity=TopK(5), seed=0) -> Dictionary:  # noqa: B008 - frozen
    made = make_dictionary(INFO.name, seed, D_IN, D_SAE, sparsity)
    made.extras["mean"] = torch.rand(D_IN, dtype=torch.float64)
    return made


@pytest.fixture
def folder(tmp_path):
    make().save(tmp_path / "plain")
    return tmp_path / "plain"


def edit(path, **changes):
    """Change values or tensors (None removes a tensor), with valid checksums."""
    info = path.parent / "wsae.json"
    about = json.loads(info.read_text())
    del about["own_sha256"]
    if path.suffix == ".safetensors":
        tensors = {**load_file(path), **changes}
        save_file({name: t for name, t in tensors.items() if t is not None}, path)
    elif path != info:
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    about["sha256"] = {name: sha256(path.parent / name) for name in about["sha256"]}
    write_json(info, about | changes if path == info else about)


@over(sparsity=SPARSITIES, dtype=[torch.float32, torch.bfloat16, torch.float16])
def test_round_trip_is_exact_but_for_matrices_in_half_precision(tmp_path, sparsity, dtype):
    folder, saved = tmp_path / "a" / "b", make(sparsity)
    saved.save(folder, dtype=dtype)
    loaded = Dictionary.load(folder)
    names = ["cfg.json", "sae_weights.safetensors", "wsae.json", "wsae.safetensors"]
    assert sorted(content(folder)) == names and [p.name for p in folder.parent.iterdir()] == ["b"]
    assert loaded.sparsity == sparsity and loaded.info == INFO
    assert loaded.extras.keys() == saved.extras.keys()
    for name, tensor in {**saved.state_dict(), **saved.extras}.items():
        found = {**loaded.state_dict(), **loaded.extras}[name]
        rounded = tensor.to(dtype) if name in ("W_enc", "W_dec") else tensor
        assert torch.equal(found, rounded.to(tensor.dtype)) and found.dtype == tensor.dtype
    size = sum(p.numel() * (dtype.itemsize if p.ndim == 2 else 4) for p in saved.parameters())
    assert 0 < (folder / "sae_weights.safetensors").stat().st_size - size < 600
    assert json.loads((folder / "cfg.json").read_text())["dtype"] == "float32"


def test_refused_dtypes_and_overflow(tmp_path):
    big = make()
    big.W_dec[3, 4] = 1e6
    fails("W_dec holds 1 NaN or infinite", big.save, tmp_path / "big", dtype=torch.float16)
    misused("choose float32, bfloat16 or float16", big.save, tmp_path / "big", dtype=torch.int8)
    assert list(tmp_path.iterdir()) == []


def test_a_dictionary_replaces_a_dictionary(folder):
    other = make(ReLU(), seed=9)
    other.extras["gamma"] = torch.rand(D_IN, D_IN)  # weights may be a full matrix
    (folder / ".wsae.json.77.partial").write_text("{")  # a measurement that was never finished
    other.save(folder)
    found = Dictionary.load(folder)
    assert torch.equal(found.W_enc, other.W_enc) and found.extras["gamma"].shape == (D_IN, D_IN)
    assert [p.name for p in folder.parent.iterdir()] == ["plain"]


def test_what_a_killed_writer_left_is_cleared_up(folder):
    """Killed between its two renames, or before."""
    before = content(folder)
    old, new = (folder.with_name(f".plain.{what}") for what in ("old", "new"))
    folder.rename(old)
    make(seed=3).save(new)
    assert torch.equal(Dictionary.load(folder).W_enc, make().W_enc) and not new.exists()
    folder.rename(old)
    other = make()
    other.W_dec[0] = torch.nan
    fails("NaN or infinite", other.save, folder)
    make(ReLU(), seed=9).save(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["plain"]
    assert content(folder) != before
    folder.rename(old)
    (old / "mine.txt").touch()  # whatever came to it is not lost
    fails(r"it holds mine\.txt", make().save, folder)
    assert (folder / "mine.txt").exists() and not old.exists()


def test_other_folders_are_left_alone_and_not_loaded(tmp_path, folder):
    foreign, file, empty = (tmp_path / name for name in ("foreign", "file", "empty"))
    foreign.mkdir()
    empty.mkdir()
    (folder / "notes.txt").write_text("mine")
    (foreign / "cfg.json").write_text("{}")
    file.write_text("x")
    before = content(tmp_path)
    for place, said in (
        (folder, r"it holds notes\.txt"),
        (foreign, "no sign that this package made it"),
        (file, "is not a folder"),
        (file / "below", "cannot write .*/below: "),
    ):
        fails(said, make().save, place)
    assert content(tmp_path) == before
    (folder / "wsae.json").unlink()
    for place, said in (
        (empty, "holds nothing and no dictionary"),
        (folder, r"lacks wsae\.json"),
    ):
        fails(said, Dictionary.load, place)
    make().save(empty)
    assert is_dictionary(empty) and not is_dictionary(foreign)


def test_nothing_is_kept_in_a_dictionary_that_was_replaced(folder):
    measured, other = Dictionary.load(folder), make()
    other.b_dec.data += 1
    other.save(folder)
    before = content(folder)
    for keep, found in (
        (keep_measurements, {"fidelity": {"fvu": 0.5}}),
        (keep_explanations, [said_of(1, "said")]),
    ):
        with pytest.raises(LlmWsaeError, match="was replaced by another one during the work"):
            keep(folder, found, measured.weights_sha256)
    assert content(folder) == before
    keep_measurements(folder, {"fidelity": {"fvu": 0.5}}, Dictionary.load(folder).weights_sha256)
    assert Dictionary.load(folder).info.metrics["fidelity"] == {"fvu": 0.5}


def test_threads_that_write_to_one_dictionary_wait_for_each_other(tmp_path):
    made, folder = [make(seed=seed) for seed in (0, 1)], tmp_path / "one"

    def work(number: int) -> None:
        for turn in range(5):
            made[number].save(folder)
            keep_measurements(folder, {f"{number} {turn}": {}})

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, (0, 1)))
    last = Dictionary.load(folder)
    assert any(torch.equal(last.W_enc, one.W_enc) for one in made)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: keep_measurements(folder, {name: {}}), map(str, range(20))))
    assert set(map(str, range(20))) <= set(Dictionary.load(folder).info.metrics)
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


NAN, INFINITE, NO_K = float("nan"), float("inf"), "needs a positive integer"
ODD = {
    "wsae.json": [
        ({"massive_threshold": 0.0}, r"wsae\.json: massive_threshold cannot be 0\.0"),
        ({"massive_threshold": -1.0}, r"wsae\.json: massive_threshold cannot be -1"),
        ({"massive_threshold": NAN}, r"wsae\.json: its massive_threshold is nan"),
        ({"training": 3}, r"wsae\.json: "),
        ({"site": "blocks.x"}, r"wsae\.json: .*not a site"),
        ({"format_version": 2, "new_field": 1}, "update llm-wsae"),
        ({"format": "something"}, "not the information file of a dictionary"),
        ({"sha256": None}, "changed since it was saved"),
    ],
    "cfg.json": [
        ({"architecture": "gated"}, "'gated' is not supported; known are 'topk', 'stan"),
        ({"architecture": "top_k"}, "did you mean 'topk'"),
        *(({"k": k}, f"k is {k!r}, but .*{NO_K}") for k in (None, 0, -1, 2.5, "3", True)),
        ({"k": 81}, "more than the dictionary's 80 latents"),
    ],
    "sae_weights.safetensors": [
        ({"W_enc": torch.zeros(D_SAE, D_IN)}, r"W_dec has the shape \[80, 12\], but W_enc is"),
        ({"b_enc": torch.zeros(D_SAE, dtype=torch.int32)}, "b_enc is stored as torch.int32"),
        ({"b_dec": torch.full((D_IN,), NAN)}, "b_dec holds 12 NaN or infinite"),
        ({"W_dec": torch.full((D_SAE, D_IN), INFINITE)}, "W_dec holds 960 NaN"),
        ({"b_dec": None}, "instead of"),
        ({"threshold": torch.zeros(D_SAE)}, "instead of"),
    ],
    "wsae.safetensors": [
        ({"gamma": torch.ones(D_IN + 1)}, r"gamma has the shape \[13\].*must be \[12\]"),
        ({"gamma": torch.full((D_IN,), NAN)}, "gamma holds 12 NaN"),
        ({"gamma": torch.ones(D_IN, dtype=torch.bool)}, "gamma is stored as"),
    ],
}


def test_odd_content_with_valid_checksums_is_named(folder):
    """It may come from the Hub."""
    good = content(folder)
    for name, cases in ODD.items():
        for changes, sentence in cases:
            edit(folder / name, **changes)
            fails(sentence, Dictionary.load, folder)
            for file, data in good.items():
                (folder / file).write_bytes(data)
    make(JumpReLU()).save(folder)
    edit(folder / "sae_weights.safetensors", threshold=None)
    fails(r"instead of \[.*'threshold'\]", Dictionary.load, folder)


def test_odd_explanations_with_valid_checksums_are_refused(folder):
    keep_explanations(folder, [said_of(1, "said", SCORES)])
    path = folder / "explanations.jsonl"
    head, line = path.read_text().splitlines()
    changes = {"1,": "-1,", "[0.5, 1.0]": "[0.5]", '"a model"': "7", "16": "null"}
    for old, new in (*changes.items(), ("1,", '"x",')):
        lines = line.replace(old, new, 1) + "\n"
        about = json.loads(head) | {"lines_sha256": hashlib.sha256(lines.encode()).hexdigest()}
        del about["sha256"]
        path.write_text(json_line(about) + lines)
        fails("is damaged and cannot be used", read_explanations, folder)


def test_configuration_has_the_keys_saelens_reads(folder):
    """That SAELens computes the same is checked by scripts/interop.py, in its own environment."""
    cfg = json.loads((folder / "cfg.json").read_text())
    metadata = cfg.pop("metadata")
    assert cfg == {
        "architecture": "topk", "d_in": D_IN, "d_sae": D_SAE, "k": 5, "dtype": "float32",
        "device": "cpu", "apply_b_dec_to_input": False, "normalize_activations": "none",
        "reshape_activations": "none", "rescale_acts_by_decoder_norm": False,
    }  # fmt: skip
    assert metadata["hook_name"] == INFO.site and metadata["model_name"] == "owner/tiny-lm"
    assert metadata["context_size"] == 64 and metadata["sae_lens_version"] == "6.0.0"


def test_the_lock_of_a_killed_writer_goes_where_the_folder_is_written(tmp_path):
    lock = tmp_path / ".d.writing"
    lock.touch()
    clear_up(tmp_path / "d")  # a reader, which waits for no writer
    assert lock.exists()
    clear_up(tmp_path / "d", lock=True)
    assert not lock.exists()
