"""Whatever befalls a file that is read back, it is named; no damage passes for other content."""

import json
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from command_line import SITE, call, works
from fuzzing import frozen
from safetensors.torch import save_file
from training_cases import CONFIG, Planted, arms_for

from llm_wsae.artifact.files import (
    Damaged,
    check_json,
    json_text,
    load_own_tensors,
    save_own_tensors,
    write_json,
)
from llm_wsae.commands.verifying import verify
from llm_wsae.data.manifest import STATISTICS
from llm_wsae.data.store import ActivationStore
from llm_wsae.dictionary import folder as dictionary_folder
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.explanations import Explanation, keep_explanations
from llm_wsae.errors import LlmWsaeError
from llm_wsae.machine.processes import Processes
from llm_wsae.model.site import Site
from llm_wsae.training.arm import Arm
from llm_wsae.training.checkpoint import CHECKPOINT, LOG, load_checkpoint, training_in
from llm_wsae.training.trainer import Interrupted, train
from llm_wsae.weights.loss_weights import LossWeights

PLACE = Site.parse(SITE)
OTHER = "trained/variance-a0.5-k4"
SHORT = CONFIG.__class__(**{**vars(CONFIG), "tokens": 256 * 60, "log_every": 10})


def flipped(data: bytes, at: int, bit: int) -> bytes:
    at %= len(data)
    return data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :]


def every_bit(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    for at in range(len(data)):
        for bit in range(8):
            yield at, bit, flipped(data, at, bit)


@pytest.fixture
def world(made_world, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(made_world, tmp_path / "world")


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory):
    out = tmp_path_factory.mktemp("stopped")
    source = Planted(stop_after=31)
    with pytest.raises(Interrupted, match="after step 31"):
        train(source, arms_for(source)[:2], SHORT, out)
    return out


@pytest.fixture
def stopped(stopped_once, tmp_path):
    return shutil.copytree(stopped_once, tmp_path / "stopped")


def resume(out: Path) -> dict[str, Dictionary]:
    source = Planted()
    return train(source, arms_for(source)[:2], SHORT, out)


def test_every_bit_of_a_json_file_counts(world):
    value = {"k": 4, "share": 1e-05, "name": 'größe "\\\x1f', "of": [{"a": None}, True, 0.1]}
    info = (world / "trained/uniform-k4/wsae.json").read_text()
    for good in (json_text(value), info):
        assert check_json(good)
        for at, bit, data in every_bit(good.encode()):
            with pytest.raises(ValueError):
                check_json(data.decode())
                pytest.fail(f"bit {bit} of byte {at} passed: {data[at - 20 : at + 20]!r}")
        for text in (good.replace("\n", "\r\n"), good + " ", good.replace('": ', '":', 1)):
            with pytest.raises(Damaged):
                check_json(text)
    assert check_json(json_text(value)) == value


def test_every_byte_of_a_file_of_tensors_counts(tmp_path):
    path, facts = tmp_path / "f.safetensors", {"step": 31, "name": "größe"}
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(7)}
    save_own_tensors(path, tensors, facts)
    good = frozen(load_own_tensors(path, "file"))
    assert good == frozen((tensors, facts))
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(flipped(whole, at, at % 8))
        try:
            found = load_own_tensors(path, "file")
        except LlmWsaeError:
            continue  # a space in the header may become a tab
        assert frozen(found) == good, f"byte {at}: {whole[max(at - 20, 0) : at + 20]!r}"


def test_weights_of_another_tool_have_no_checksum_and_open(tmp_path):
    save_file({"gamma": torch.ones(3)}, tmp_path / "w.safetensors", {"format": "pt"})
    assert LossWeights.load(tmp_path / "w.safetensors").gamma.tolist() == [1, 1, 1]
    assert verify(tmp_path / "w.safetensors").without_digest == [tmp_path / "w.safetensors"]


def test_a_reader_never_sees_two_dictionaries_mixed(world, monkeypatch):
    """Another one replaces it before its checksums were compared, or after."""
    folder, other = world / "trained/uniform-k4", world / "trained/variance-a0.5-k4"
    wanted, before = Dictionary.load(other), Dictionary.load(folder)
    for function in ("read_tensors", "sha256"):
        read, replacing = getattr(dictionary_folder, function), [wanted.save]

        def replaced(*given, read=read, replacing=replacing):
            if replacing:
                replacing.pop()(folder)
            return read(*given)

        with monkeypatch.context() as patched:
            patched.setattr(dictionary_folder, function, replaced)
            with pytest.raises(LlmWsaeError, match=r"replaced while it was read|changed since"):
                Dictionary.load(folder)
            assert torch.equal(Dictionary.load(folder).W_enc, wanted.W_enc)
        before.save(folder)


# --- Checkpoints and what belongs to them


def test_a_damaged_checkpoint_leaves_the_arms_as_they_are(stopped):
    path = stopped / CHECKPOINT
    good = path.read_bytes()
    arms = [Arm(arm, 16, 64, torch.device("cpu")) for arm in arms_for(Planted(2000))[:2]]
    before = [p.clone() for arm in arms for p in arm.parameters]
    for at in (20, len(good) - 1):  # in the header, and in the last tensor
        path.write_bytes(flipped(good, at, 1))
        with pytest.raises(LlmWsaeError, match=r"checkpoint\.safetensors is (damaged|not a read)"):
            load_checkpoint(stopped, arms, Processes())
    after = [p for arm in arms for p in arm.parameters]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    save_file({"x": torch.ones(2)}, path)
    with pytest.raises(LlmWsaeError, match="is damaged: it has no checksum; delete it to start"):
        resume(stopped)
    path.write_bytes(good)
    assert load_checkpoint(stopped, arms, Processes()).step == 31


def test_a_damaged_log_is_named_and_a_lost_one_is_begun_anew(stopped, tmp_path):
    lost = shutil.copytree(stopped, tmp_path / "lost")
    (lost / LOG).unlink()
    resume(lost)
    steps = [json.loads(line)["step"] for line in (lost / LOG).read_bytes().splitlines()]
    assert steps == [40, 50, 60]
    log = stopped / LOG
    good = log.read_bytes()
    for data in (flipped(good, 20, 1), good[:-3], b"", b"\xff\xfe" + good):
        log.write_bytes(data)
        with pytest.raises(LlmWsaeError, match=r"log\.jsonl is damaged.*to resume without it"):
            resume(stopped)
    log.write_bytes(good + b'{"step": 40, \xff')  # lines of a lost run are not kept
    assert not verify(stopped).problems
    resume(stopped)
    lines = log.read_bytes()
    assert lines.startswith(good) and [json.loads(x)["step"] for x in lines.splitlines()] == [
        10, 20, 30, 40, 50, 60
    ]  # fmt: skip
    assert verify(stopped).problems == []
    for data in (lines + b"\n", flipped(lines, len(lines) // 2, 0)):
        log.write_bytes(data)
        assert "log.jsonl is " in verify(stopped).problems[0]


def test_a_training_without_its_record_is_not_resumed(stopped):
    record = training_in(stopped).path
    write_json(record, {"rows": {}, "arms": {}})
    with pytest.raises(LlmWsaeError, match=r"training\.json is not the record"):
        resume(stopped)
    record.unlink()
    with pytest.raises(LlmWsaeError, match=r"holds other files \(checkpoint\.safetensors, log"):
        resume(stopped)
    assert (stopped / CHECKPOINT).exists()


# --- Stores


def test_rows_are_compared_once_when_they_are_first_read(world):
    folder = world / "store"
    store = ActivationStore.open(folder)
    reader = store.reader(PLACE)
    rows = reader.rows(0, store.num_rows)
    first, second = (folder / SITE / f"0000{index}.safetensors" for index in range(2))
    good = second.read_bytes()
    second.write_bytes(first.read_bytes())
    assert not torch.equal(reader.rows(0, store.num_rows), rows)
    with pytest.raises(LlmWsaeError, match=r"00001\.safetensors is damaged: rows 0 to 127 are not"):
        for batch in islice(store.source(PLACE).batches(512, 0), 1 + store.num_rows // 512):
            assert batch.isfinite().all()
    second.write_bytes(good[:-1])
    with pytest.raises(LlmWsaeError, match=r"00001\.safetensors is truncated; delete it"):
        store.rows(PLACE, 0, store.num_rows)
    tokens, statistics = folder / "tokens/00000.safetensors", folder / SITE / STATISTICS
    for path, read in (
        (tokens, lambda: store.contexts(0)),
        (statistics, lambda: store.statistics(PLACE)),
    ):
        path.write_bytes(flipped(path.read_bytes(), -1, 0))
        with pytest.raises(LlmWsaeError, match=r"is damaged.*; delete it"):
            read()


# --- verify


def test_verify_checks_every_file_that_is_written(world, stopped):
    resume(shutil.copytree(stopped, world / "finished"))
    shutil.copytree(stopped, world / "stopped")
    works("weigh", world / "store", "--site", SITE, "--rule", "whitening", "--out",
          world / "weights.safetensors")  # fmt: skip
    assert (world / "store/evidence").is_dir()
    for name in ("store", "trained", "finished", "stopped", "weights.safetensors"):
        place = world / name
        assert works("verify", place).out == f"{place} is intact\n"
        files = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.is_file())
        for path in files:
            if path.name == ".lock":
                continue
            good = path.read_bytes()
            path.write_bytes(flipped(good, len(good) // 2, 3))
            said = "; ".join(verify(place).problems)
            assert path.name in said and str(path.parent) in said, f"damage to {path} passes"
            assert "delete" in said or "restore" in said, said
            path.write_bytes(good)
        assert not verify(place).problems


def test_a_file_that_verify_cannot_judge_alone_is_not_called_damaged(world):
    said_of = Explanation(1, "cats", "a model", {})
    keep_explanations(world / "trained/uniform-k4", [said_of])
    (world / "notes.txt").write_text("my notes")
    together, nothing = f"is checked together with its folder; give {world}", "that verify knows"
    for name, said in {
        "trained/uniform-k4/cfg.json": f"{together}/trained/uniform-k4",
        "trained/uniform-k4/sae_weights.safetensors": f"{together}/trained/uniform-k4",
        "trained/uniform-k4/explanations.jsonl": f"{together}/trained/uniform-k4",
        "trained/log.jsonl": f"{together}/trained",
        "store/tokens/00000.safetensors": f"{together}/store",
        f"store/{SITE}/statistics.safetensors": f"{together}/store",
        "text.jsonl": nothing,
        "notes.txt": nothing,
    }.items():
        found = call("verify", world / name)
        assert found.code == 1 and said in found.err and name in found.err, name
        assert "delete" not in found.err and "damaged" not in found.err, name
    own = world / "trained/uniform-k4/wsae.json"
    assert f"{own} is intact" in works("verify", own).out
    own.write_text(own.read_text().replace("uniform", "unifurm"))
    found = call("verify", own)
    assert found.code == 1 and "wsae.json is damaged" in found.err and "restore" in found.err


def test_verify_finds_what_was_exchanged_or_is_missing(world):
    trained, other = world / "trained/uniform-k4", world / OTHER
    dictionary_folder.keep_measurements(trained, {"fidelity": {"fvu": 0.25}})
    assert not verify(world / "trained").problems
    shutil.rmtree(trained)
    said = call("verify", world / "trained").err
    assert "uniform-k4/sae_weights.safetensors is missing; restore it from a copy, or del" in said
    shutil.copytree(other, trained)
    said = call("verify", world / "trained").err
    assert "uniform-k4/sae_weights.safetensors is damaged: its checksum does not match" in said
