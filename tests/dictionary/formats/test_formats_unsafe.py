"""Files made to do harm: code in a pickle, archives that unfold, tensors larger than their file."""

import json
import os
import zipfile
from pathlib import Path

import pytest
import torch
from foreign_folders import learning

from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.errors import LlmWsaeError


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


def refused(folder: Path, sentence: str) -> None:
    with pytest.raises(LlmWsaeError, match=sentence) as error:
        Dictionary.load(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def records(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {entry.filename: archive.read(entry) for entry in archive.infolist()}


def pack(path: Path, members: dict[str, bytes], kind: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def test_code_in_a_pickle_does_not_run(tmp_path, topk):
    tensors = torch.load(topk / "ae.pt", weights_only=True)
    for harmful in (
        tensors | {"b_dec": Harm(tmp_path / "harm")},
        Harm(tmp_path / "harm"),
        [Harm(tmp_path / "harm")],
    ):
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
        refused(topk, "holds something other than|should hold tensors by name|lacks the tensors")


def test_a_pickle_as_torch_once_wrote_it(topk):
    tensors = torch.load(topk / "ae.pt", weights_only=True)
    torch.save(tensors, topk / "ae.pt", _use_new_zipfile_serialization=False)
    refused(topk, "is not a complete file of torch.save")


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
    pack(
        path, members | {pickle: b"\x80\2X\0\0\0\4" + bytes(64 << 20) + b"."}, zipfile.ZIP_DEFLATED
    )
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


def test_records_of_one_name(topk):
    members = records(topk / "ae.pt")
    (prefix,) = {name.split("/")[0] for name in members}
    pack(topk / "ae.pt", members | {f"{prefix}/DATA.PKL": b"."})
    refused(topk, "two of its records have one name")


def test_an_archive_larger_than_its_dictionary(topk):
    members = records(topk / "ae.pt")
    (prefix,) = {name.split("/")[0] for name in members}
    for kind in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # of a compressed one: once unpacked
        pack(topk / "ae.pt", members | {f"{prefix}/data/99": bytes(2 << 20)}, kind)
        refused(topk, "is larger than the dictionary that config.json describes")


def test_a_number_that_stands_for_many_allocates_nothing(topk):
    """The file has four bytes, its tensor claims 2⁴⁰ numbers."""
    size = 2**20
    one = torch.ones(1)
    tensors = {
        "encoder.weight": one.expand(size, size),
        "decoder.weight": one.expand(size, size),
        "encoder.bias": one.expand(size),
        "b_dec": one.expand(size),
    }
    torch.save(tensors, topk / "ae.pt")
    config = json.loads((topk / "config.json").read_text())
    config["trainer"] |= {"activation_dim": size, "dict_size": size}
    (topk / "config.json").write_text(json.dumps(config))
    refused(topk, "is not stored in full")


def test_tensors_that_share_their_numbers_are_read_as_they_are(topk):
    """A state dict may hold views: the transpose of a tied encoder is one."""
    tensors = torch.load(topk / "ae.pt", weights_only=True)
    weight = tensors["encoder.weight"].clone()
    torch.save(tensors | {"encoder.weight": weight, "decoder.weight": weight.T}, topk / "ae.pt")
    dictionary = Dictionary.load(topk)
    assert torch.equal(dictionary.W_dec, weight) and torch.equal(dictionary.W_enc, weight.T)


def test_a_pickle_that_says_it_is_encrypted(topk):
    encrypt(topk / "ae.pt")
    refused(topk, "is not a complete file of torch.save: File .* is encrypted")


def encrypt(path):
    """Say so of every entry of an archive."""
    data = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        at = data.find(signature)
        while at >= 0:
            data[at + offset] |= 1
            at = data.find(signature, at + 1)
    path.write_bytes(data)
