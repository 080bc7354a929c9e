"""Damaged files of every format: an error of one sentence, or the dictionary that is there."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from foreign_folders import WRITERS, place
from mutations import BYTES, CUT, OTHER_JSON, config_changes, tensor_changes, write
from safetensors.torch import load_file, save_file
from torch import Tensor

from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.errors import LlmWsaeError

LAYOUTS = (  # our own: tests/fuzzing
    "saelens-topk", "saelens-gated", "saelens-checkpoint", "saelens-old-topk",
    "saelens-old-finetuned", "sparsify", "learning-GatedAutoEncoder", "learning-BatchTopKSAE",
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


@contextmanager
def failing_case(*case: str) -> Iterator[None]:
    """A failure inside the block names its case."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"case: {', '.join(case)}")
        raise


def make(tmp_path: Path, layout: str) -> Path:
    folder = place(tmp_path, layout)
    WRITERS[layout](folder)
    return folder


def outcome(folder: Path) -> Dictionary | None:
    """What is read; None after an error, which must be one sentence that names the folder."""
    try:
        return Dictionary.load(folder)
    except LlmWsaeError as error:
        said = str(error)
        assert "\n" not in said and str(folder) in said, said
        assert len(said.replace(str(folder), "")) < LONGEST, said
        return None


def same(one: Dictionary, other: Dictionary) -> bool:
    a, b = dict(one.named_parameters()), dict(other.named_parameters())
    return (
        one.sparsity == other.sparsity
        and a.keys() == b.keys()
        and all(torch.equal(a[name], b[name]) for name in a)
    )


def tensors_of(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, read by somebody else than us."""
    if path.suffix == ".safetensors":
        found = load_file(path)
    else:
        found = torch.load(path, weights_only=True)
    return {name: tensor.clone() for name, tensor in found.items()}


def save(path: Path, tensors: dict[str, Tensor]) -> None:
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)


def check(folder: Path, whole: Dictionary, tmp_path: Path) -> bool:
    """An error, the same dictionary, or, where a format has no checksum, what its files now say.

    Returns whether something was read.
    """
    found = outcome(folder)
    if found is None or same(found, whole):
        return found is not None
    again = tmp_path / "again" / folder.relative_to(tmp_path)
    shutil.rmtree(again, ignore_errors=True)
    again.mkdir(parents=True)
    for path in folder.iterdir():
        assert path.suffix in (".json", ".safetensors"), "the checksums of an archive must be seen"
        if path.suffix == ".json":
            write(again / path.name, json.loads(path.read_text()))
        else:
            save(again / path.name, load_file(path))
    assert same(found, Dictionary.load(again))
    return True


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_that_are_cut_off_changed_or_another_files(tmp_path, layout):
    folder = make(tmp_path, layout)
    whole = Dictionary.load(folder)
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        for name, mutation in BYTES.items():
            path.write_bytes(mutation(data))
            with failing_case(path.name, name):
                read = check(folder, whole, tmp_path)
                assert not (read and name in CUT)
        path.write_bytes(data)
    assert same(Dictionary.load(folder), whole)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_that_are_missing_folders_or_links_to_nowhere(tmp_path, layout):
    folder = make(tmp_path, layout)
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        path.unlink()
        assert outcome(folder) is None
        path.mkdir()
        assert outcome(folder) is None
        path.rmdir()
        path.symlink_to(tmp_path / "nowhere")
        assert outcome(folder) is None
        path.unlink()
        path.write_bytes(data)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_of_the_configuration(tmp_path, layout):
    """Each exchanged for twenty others and removed: an error, or it has no part in encoding."""
    folder = make(tmp_path, layout)
    whole = Dictionary.load(folder)
    tried = failed = 0
    for path in sorted(folder.glob("*.json")):
        data = path.read_bytes()
        for key, value, changed in config_changes(json.loads(data)):
            write(path, changed)
            found = outcome(folder)
            tried, failed = tried + 1, failed + (found is None)
            if found is not None and not same(found, whole):
                # nan is like nothing else, and 1 == True
                meant = [m for m in MEANT.get(key, ()) if type(m) is type(value) and m == value]
                assert meant, f"{key} = {value!r} changed the dictionary"
        for what, other in OTHER_JSON.items():
            path.write_bytes(other)
            assert outcome(folder) is None, what
        path.write_bytes(data)
    assert tried > 100 and failed > 20


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_that_are_missing_or_of_another_kind(tmp_path, layout):
    folder = make(tmp_path, layout)
    whole = Dictionary.load(folder)
    (weights,) = (path for path in folder.iterdir() if path.suffix != ".json")
    data = weights.read_bytes()
    for what, changed in tensor_changes(tensors_of(weights)):
        save(weights, changed)
        found = outcome(folder)
        if what.startswith(UNUSED) or (layout, what) == (
            "saelens-old-topk",
            "scaling_factor missing",
        ):
            assert found is None or same(found, whole)
        else:
            assert found is None, what
    weights.write_bytes(data)
    assert same(Dictionary.load(folder), whole)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_was_read_does_not_change_with_its_file(tmp_path, layout):
    """Tools write a file again in its place, and what lies in its pages would be gone."""
    folder = make(tmp_path, layout)
    read = Dictionary.load(folder)
    before = {name: tensor.clone() for name, tensor in read.named_parameters()}
    for path in folder.iterdir():
        size = path.stat().st_size
        with open(path, "r+b") as file:
            file.write(bytes(size))
            file.truncate(size // 2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in read.named_parameters())
