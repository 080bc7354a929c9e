"""Damaged files of every format, and files made to do harm (code in a pickle, archives that unfold,
tensors larger than their file): an error of one sentence, or the dictionary that is there."""

import json
import os
import random
import re
import zipfile
from pathlib import Path

import pytest
import torch
from foreign_folders import WRITERS, learning, place
from fuzzing import OTHER_JSON, blind, config_changes, frozen, tensor_changes
from looping import over
from safetensors.torch import load_file, save_file
from torch import Tensor

from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.errors import LlmWsaeError

LAYOUTS = (  # our own: tests/fuzzing
    "saelens-checkpoint", "saelens-old-topk", "saelens-old-finetuned", "sparsify",
    "learning-BatchTopKSAE",
)  # fmt: skip
LONGEST = 400  # characters of an error, beside the path of the folder

# Other values that are a valid dictionary, but another one: the value stands for what it says.
MEANT = {
    "apply_b_dec_to_input": {True, False, "removed"},
    "rescale_acts_by_decoder_norm": {True, False, "removed"},
    "k": {1},
    "activation_fn_kwargs.k": {1},
    "scaling_factor": {1, 1.5, 2**31, 2**70},
}
# What dictionary_learning stores and does not use when it encodes.
UNUSED = ("k ", "group_sizes ")


def make(tmp_path: Path, layout: str) -> Path:
    folder = place(tmp_path, layout)
    WRITERS[layout](folder)
    return folder


def outcome(folder: Path) -> Dictionary | str:
    """What is read, or the error, which must be one sentence that names the folder."""
    try:
        return Dictionary.load(folder)
    except LlmWsaeError as error:
        said = str(error)
    assert "\n" not in said and str(folder) in said, said
    assert len(said.replace(str(folder), "")) < LONGEST, said
    return said


def refused(folder: Path, sentence: str = "") -> None:
    said = outcome(folder)
    assert isinstance(said, str) and re.search(sentence, said), said


def same(one: Dictionary, other: Dictionary) -> bool:
    return (one.sparsity, frozen(one)) == (other.sparsity, frozen(other))


def tensors_of(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, read by somebody else than us."""
    if path.suffix == ".safetensors":
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    return torch.load(path, weights_only=True)


def test_bytes_of_an_archive_that_are_cut_off_or_changed(tmp_path):
    folder = make(tmp_path, "learning-BatchTopKSAE")
    whole, path = Dictionary.load(folder), folder / "ae.pt"
    data = path.read_bytes()
    for nothing in (b"", data[:8], data[: len(data) // 2], bytes(len(data))):
        path.write_bytes(nothing)
        refused(folder)
    for number in range(100):
        done, changed = blind(data, random.Random(number), data[::-1])
        path.write_bytes(changed)
        found = outcome(folder)
        assert isinstance(found, str) or same(found, whole), f"{number} ({done})"
    path.unlink()
    path.mkdir()
    refused(folder)


@over(layout=LAYOUTS)
def test_values_of_the_configuration(tmp_path, layout):
    """Each exchanged for twenty others and removed: an error, or it has no part in encoding."""
    folder = make(tmp_path, layout)
    whole = Dictionary.load(folder)
    tried = failed = 0
    for path in sorted(folder.glob("*.json")):
        data = path.read_bytes()
        for key, value, changed in config_changes(json.loads(data)):
            path.write_text(json.dumps(changed))
            found = outcome(folder)
            tried, failed = tried + 1, failed + isinstance(found, str)
            if isinstance(found, Dictionary) and not same(found, whole):
                # nan is like nothing else, and 1 == True
                meant = [m for m in MEANT.get(key, ()) if type(m) is type(value) and m == value]
                assert meant, f"{key} = {value!r} changed the dictionary"
        for other in OTHER_JSON.values():
            path.write_bytes(other)
            refused(folder)
        path.write_bytes(data)
    assert tried > 100 and failed > 20


@over(layout=LAYOUTS)
def test_tensors_that_are_missing_or_of_another_kind(tmp_path, layout):
    folder = make(tmp_path, layout)
    whole = Dictionary.load(folder)
    (weights,) = (path for path in folder.iterdir() if path.suffix != ".json")
    save = save_file if weights.suffix == ".safetensors" else torch.save
    for what, changed in tensor_changes(tensors_of(weights)):
        save(changed, weights)
        found = outcome(folder)
        has_no_part = what.startswith(UNUSED) or what == "scaling_factor missing"
        if has_no_part and layout != "saelens-old-finetuned":
            assert isinstance(found, str) or same(found, whole)
        else:
            assert isinstance(found, str), what


# Files made to do harm


class Harm:
    """Whoever unpickles this makes a folder."""

    def __init__(self, where: Path):
        self.where = str(where)

    def __reduce__(self):
        return os.mkdir, (self.where,)


@pytest.fixture
def topk(tmp_path) -> Path:
    learning(tmp_path / "topk", "AutoEncoderTopK")
    return tmp_path / "topk"


def records(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {entry.filename: archive.read(entry) for entry in archive.infolist()}


def pack(path: Path, members: dict[str, bytes], kind: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def test_code_in_a_pickle_does_not_run(tmp_path, topk):
    tensors = torch.load(topk / "ae.pt", weights_only=True)
    harm = Harm(tmp_path / "harm")
    for harmful in (tensors | {"b_dec": harm}, harm, [harm]):
        torch.save(harmful, topk / "ae.pt")
        refused(topk, "holds something other than a dictionary's tensors")
        assert not (tmp_path / "harm").exists()
    torch.load(topk / "ae.pt", weights_only=False)  # it would have
    assert (tmp_path / "harm").exists()


def test_pickles_of_other_things(topk):
    for value in (
        torch.nn.Linear(2, 2),
        torch.nn.Linear(2, 2).state_dict,
        [torch.ones(2)],
        {1: torch.ones(2)},
        {"encoder": {"weight": torch.ones(2)}},
        torch.ones(3),
        {"b_dec": torch.ones(12).to_sparse()},
        {"b_dec": torch.empty(12, device="meta")},
        "x",
        None,
    ):
        torch.save(value, topk / "ae.pt")
        refused(topk, "holds something other than|instead of|is damaged")
    torch.save({"b_dec": torch.ones(12)}, topk / "ae.pt", _use_new_zipfile_serialization=False)
    refused(topk, "is not a complete file of torch.save")  # as torch once wrote them


def test_an_archive_that_two_readers_would_read_differently(topk):
    """Python finds a directory by its distance from the end, torch by its distance from the
    beginning. What torch would unfold is another archive, of a pickle of 64 MB; it gets ours."""
    expected = Dictionary.load(topk).W_dec
    (topk / "ae.pt").write_bytes(seen_twice(topk))
    assert torch.equal(Dictionary.load(topk).W_dec, expected)


def seen_twice(folder: Path) -> bytes:
    """An archive whose first directory is torch's and whose last is Python's."""
    path, members = folder / "ae.pt", records(folder / "ae.pt")
    (pickle,) = (name for name in members if name.endswith("data.pkl"))
    bomb = b"\x80\2X\0\0\0\4" + bytes(64 << 20) + b"."
    pack(path, members | {pickle: bomb}, zipfile.ZIP_DEFLATED)
    torchs = path.read_bytes()
    pack(path, members)
    pythons = bytearray(path.read_bytes())
    end, own_end = torchs.rindex(b"PK\5\6"), pythons.rindex(b"PK\5\6")
    at = pythons.find(b"PK\1\2")
    while at >= 0:  # Python adds the distance between the directory's place and the one it states
        place = int.from_bytes(pythons[at + 42 : at + 46], "little") + end - own_end
        pythons[at + 42 : at + 46] = place.to_bytes(4, "little")
        at = pythons.find(b"PK\1\2", at + 1)
    return torchs[:end] + pythons[:own_end] + torchs[end:]


def test_an_archive_larger_than_its_dictionary(topk):
    members = records(topk / "ae.pt")
    (prefix,) = {name.split("/")[0] for name in members}
    for kind in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # of a compressed one: once unpacked
        pack(topk / "ae.pt", members | {f"{prefix}/data/99": bytes(2 << 20)}, kind)
        refused(topk, "is larger than the dictionary that config.json describes")


def test_a_number_that_stands_for_many_allocates_nothing(topk):
    """The file has four bytes, its tensor claims 2⁴⁰ numbers."""
    size, one = 2**20, torch.ones(1)
    learning(topk, "AutoEncoderTopK", activation_dim=size, dict_size=size)
    shapes = {"encoder.weight": (size, size), "decoder.weight": (size, size),
              "encoder.bias": (size,), "b_dec": (size,)}  # fmt: skip
    torch.save({name: one.expand(shape) for name, shape in shapes.items()}, topk / "ae.pt")
    refused(topk, "is not stored in full")


def test_tensors_that_share_their_numbers_are_read_as_they_are(topk):
    """A state dict may hold views: the transpose of a tied encoder is one."""
    tensors = torch.load(topk / "ae.pt", weights_only=True)
    weight = tensors["encoder.weight"].clone()
    torch.save(tensors | {"encoder.weight": weight, "decoder.weight": weight.T}, topk / "ae.pt")
    dictionary = Dictionary.load(topk)
    assert torch.equal(dictionary.W_dec, weight) and torch.equal(dictionary.W_enc, weight.T)
