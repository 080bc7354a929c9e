"""Damage to files that the program writes and later reads: it is named, and none passes for other
content. There is one kind for each way to prove bytes: JSON and tensors with digests of their own,
in which every bit counts, are not repeated for each file that is written so."""

import json
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from command_line import SITE, call, works
from fuzzing import blind, flipped, frozen
from refusals import fails
from safetensors.torch import save_file
from small_dictionaries import SCORES, said_of
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
from llm_wsae.data.store import ActivationStore, tokens_path
from llm_wsae.dictionary import folder as dictionary_folder
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.explanations import keep_explanations, read_explanations
from llm_wsae.errors import LlmWsaeError
from llm_wsae.machine.processes import Processes
from llm_wsae.model.site import Site
from llm_wsae.training.arm import Arm
from llm_wsae.training.checkpoint import CHECKPOINT, LOG, TrainingLog, load_checkpoint, training_in
from llm_wsae.training.trainer import Interrupted, train
from llm_wsae.weights.loss_weights import LossWeights

PLACE = Site.parse(SITE)
PLAIN, OTHER = "trained/uniform-k4", "trained/variance-a0.5-k4"
SHORT = CONFIG.__class__(**{**vars(CONFIG), "tokens": 256 * 60, "log_every": 10})
USUAL = 30
"""Random changes of each file."""


class Kind(NamedTuple):
    """A kind of file: one of it, another one, and how the package reads it."""

    path: Path
    other: Path
    read: Callable[[], Any]


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


def fresh_arms() -> list[Arm]:
    return [Arm(arm, 16, 64, torch.device("cpu")) for arm in arms_for(Planted(2000))[:2]]


# --- Random damage


@pytest.fixture(scope="module")
def kinds(made_world, stopped_once, tmp_path_factory) -> dict[str, Kind]:
    folder = shutil.copytree(made_world, tmp_path_factory.mktemp("fuzzed") / "world")
    stopped = shutil.copytree(stopped_once, folder / "stopped")
    log = folder / "trained" / LOG
    return {**of_dictionaries(folder), **of_stores(folder), **of_trainings(stopped, log)}


def of_dictionaries(folder: Path) -> dict[str, Kind]:
    one, other = folder / PLAIN, folder / OTHER
    for place in (one, other):
        said = [said_of(latent, f"word {latent}", SCORES) for latent in (3, 5, 8)]
        keep_explanations(place, said)

    def read() -> Any:
        found = Dictionary.load(one)
        return found, found.sparsity, found.info, found.extras

    names = ("cfg.json", "wsae.json", "sae_weights.safetensors", "wsae.safetensors")
    kinds = {f"dictionary, {name}": Kind(one / name, other / name, read) for name in names}
    name = "explanations.jsonl"
    kinds["explanations"] = Kind(one / name, other / name, lambda: read_explanations(one))
    return kinds


def of_stores(folder: Path) -> dict[str, Kind]:
    place, rows = folder / "store", folder / "store" / SITE
    store = ActivationStore.open(place)

    def read_rows() -> torch.Tensor:
        return store.reader(PLACE).rows(0, store.num_rows)

    first, third, whole, own = (
        rows / f"{name}.safetensors"
        for name in ("00000", "00002", "statistics", "00001.statistics")
    )
    tokens = place / tokens_path(0), place / tokens_path(1)
    return {
        "store, rows and their header": Kind(first, third, read_rows),
        "store, tokens": Kind(*tokens, lambda: ActivationStore.open(place).contexts(0)),
        "store, statistics": Kind(whole, own, lambda: store.statistics(PLACE).to_tensors()),
    }


def of_trainings(stopped: Path, other_log: Path) -> dict[str, Kind]:
    fresh = fresh_arms()
    start = [{name: t.clone() for name, t in arm.state().items()} for arm in fresh]

    def read_checkpoint() -> Any:
        """Restores fresh arms: how far the training had come, and their state."""
        for arm, state in zip(fresh, start, strict=True):
            arm.load_state({name: tensor.clone() for name, tensor in state.items()})
        reached = load_checkpoint(stopped, fresh, Processes())
        return reached, [arm.state() for arm in fresh]

    written = read_checkpoint()[0].log

    def read_log() -> bytes:
        TrainingLog(stopped, 31, written=written)  # what a resumed training goes on from
        return (stopped / LOG).read_bytes()

    checkpoint = stopped / CHECKPOINT
    return {
        "training, checkpoint": Kind(checkpoint, checkpoint, read_checkpoint),
        "training, log": Kind(stopped / LOG, other_log, read_log),
    }


def test_random_damage(kinds, fuzz):
    for name, kind in kinds.items():
        good, other, whole = kind.path.read_bytes(), kind.other.read_bytes(), frozen(kind.read())
        assert frozen(kind.read()) == whole
        for number, draw in fuzz.cases(name, USUAL):
            done, data = blind(good, draw, other)
            if data != other:  # a whole file, but of something else
                kind.path.write_bytes(data)
                fuzz.reads(name, f"case {number} ({done})", kind.read, whole)
        kind.path.write_bytes(good)


def test_verify_finds_what_random_damage_does(fuzz, world):
    for place in (world / "store", world / "trained"):
        files = [path for path in sorted(place.rglob("*")) if path.is_file()]
        files = [path for path in files if path.stat().st_size]
        for number, draw in fuzz.cases(f"verify {place.name}", USUAL):
            path, other = draw.choice(files), draw.choice(files)
            good = path.read_bytes()
            done, data = blind(good, draw, other.read_bytes())
            path.write_bytes(data)

            def sees(place=place) -> None:
                found = verify(place)
                if named := [*found.problems, *map(str, found.without_digest)]:
                    raise LlmWsaeError("; ".join(named))

            outcome = fuzz.reads("verify", f"{path.name} {number} ({done})", sees, None)
            assert outcome == "refused" or data == good, f"{path.name} {number} ({done})"
            path.write_bytes(good)


# --- Every bit, and what belongs together


def test_every_bit_of_a_json_file_counts(made_world):
    value = {"k": 4, "share": 1e-05, "name": 'größe "\\\x1f', "of": [{"a": None}, True, 0.1]}
    for good in (json_text(value), (made_world / PLAIN / "wsae.json").read_text()):
        assert check_json(good)
        data = good.encode()
        for at, bit in ((at, bit) for at in range(len(data)) for bit in range(8)):
            with pytest.raises(ValueError):
                check_json(flipped(data, at, bit).decode())
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


def test_weights_that_are_no_numbers_do_not_pass(tmp_path):
    path, gamma = tmp_path / "w.safetensors", torch.tensor([1.0, torch.nan])
    for save in (save_file, lambda *what: save_own_tensors(*what[::-1], {"rule": "variance"})):
        save({"gamma": gamma}, path)
        for place in (path, tmp_path):
            (said,) = verify(place).problems
            assert "w.safetensors is no weights file: the weights must be finite" in said


def test_a_reader_never_sees_two_dictionaries_mixed(world, monkeypatch):
    """Another one replaces it before its checksums were compared, or after."""
    folder = world / PLAIN
    wanted, before = Dictionary.load(world / OTHER), Dictionary.load(folder)
    for function in ("read_tensors", "sha256"):
        read, replacing = getattr(dictionary_folder, function), [wanted.save]

        def replaced(*given, read=read, replacing=replacing):
            if replacing:
                replacing.pop()(folder)
            return read(*given)

        with monkeypatch.context() as patched:
            patched.setattr(dictionary_folder, function, replaced)
            fails(r"replaced while it was read|changed since", Dictionary.load, folder)
            assert torch.equal(Dictionary.load(folder).W_enc, wanted.W_enc)
        before.save(folder)


def test_rows_are_compared_once_when_they_are_first_read(world):
    store = ActivationStore.open(world / "store")
    reader = store.reader(PLACE)
    rows = reader.rows(0, store.num_rows)
    first, second = (world / "store" / SITE / f"0000{index}.safetensors" for index in range(2))
    good = second.read_bytes()
    second.write_bytes(first.read_bytes())
    assert not torch.equal(reader.rows(0, store.num_rows), rows)
    with pytest.raises(LlmWsaeError, match=r"00001\.safetensors is damaged: rows 0 to 127 are not"):
        for batch in islice(store.source(PLACE).batches(512, 0), 1 + store.num_rows // 512):
            assert batch.isfinite().all()
    second.write_bytes(good[:-1])
    fails(r"00001\.safetensors is truncated; delete it", store.rows, PLACE, 0, store.num_rows)


# --- Trainings


def test_a_damaged_checkpoint_leaves_the_arms_as_they_are(stopped):
    path, arms = stopped / CHECKPOINT, fresh_arms()
    good, before = path.read_bytes(), frozen([arm.state() for arm in arms])
    for at in (20, -1):  # in the header, and in the last tensor
        path.write_bytes(flipped(good, at, 1))
        with pytest.raises(LlmWsaeError, match=r"checkpoint\.safetensors is (damaged|not a read)"):
            load_checkpoint(stopped, arms, Processes())
    assert frozen([arm.state() for arm in arms]) == before
    save_file({"x": torch.ones(2)}, path)
    fails("is damaged: it has no checksum; delete it to start", resume, stopped)
    path.write_bytes(good)
    assert load_checkpoint(stopped, arms, Processes()).step == 31


def test_a_damaged_log_is_named_and_a_lost_one_is_begun_anew(stopped, tmp_path):
    lost = shutil.copytree(stopped, tmp_path / "lost")
    (lost / LOG).unlink()
    resume(lost)
    assert steps_of(lost) == [40, 50, 60]
    log = stopped / LOG
    good = log.read_bytes()
    for data in (flipped(good, 20, 1), good[:-3], b"", b"\xff\xfe" + good):
        log.write_bytes(data)
        fails(r"log\.jsonl is damaged.*to resume without it", resume, stopped)
    log.write_bytes(good + b'{"step": 40, \xff')  # lines of a lost run are not kept
    assert not verify(stopped).problems
    resume(stopped)
    lines = log.read_bytes()
    assert lines.startswith(good) and steps_of(stopped) == [10, 20, 30, 40, 50, 60]
    assert verify(stopped).problems == []
    for data in (lines + b"\n", flipped(lines, len(lines) // 2, 0)):
        log.write_bytes(data)
        assert "log.jsonl is " in verify(stopped).problems[0]


def steps_of(training: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (training / LOG).read_bytes().splitlines()]


def test_a_training_without_its_record_is_not_resumed(stopped):
    record = training_in(stopped).path
    write_json(record, {"rows": {}, "arms": {}})
    fails(r"training\.json as the record of the training", resume, stopped)
    record.unlink()
    fails(r"holds other files \(checkpoint\.safetensors, log", resume, stopped)
    assert (stopped / CHECKPOINT).exists()


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
    keep_explanations(world / PLAIN, [said_of(1, "cats")])
    (world / "notes.txt").write_text("my notes")
    together, nothing = f"is checked together with its folder; give {world}", "that verify knows"
    for name, said in {
        f"{PLAIN}/cfg.json": f"{together}/{PLAIN}",
        f"{PLAIN}/sae_weights.safetensors": f"{together}/{PLAIN}",
        f"{PLAIN}/explanations.jsonl": f"{together}/{PLAIN}",
        "trained/log.jsonl": f"{together}/trained",
        "store/tokens/00000.safetensors": f"{together}/store",
        f"store/{SITE}/statistics.safetensors": f"{together}/store",
        "text.jsonl": nothing,
        "notes.txt": nothing,
    }.items():
        found = call("verify", world / name)
        assert found.code == 1 and said in found.err and name in found.err, name
        assert "delete" not in found.err and "damaged" not in found.err, name
    own = world / PLAIN / "wsae.json"
    assert f"{own} is intact" in works("verify", own).out
    own.write_text(own.read_text().replace("uniform", "unifurm"))
    found = call("verify", own)
    assert found.code == 1 and "wsae.json is damaged" in found.err and "restore" in found.err


def test_verify_finds_what_was_exchanged_or_is_missing(world):
    trained, weights = world / PLAIN, "uniform-k4/sae_weights.safetensors"
    dictionary_folder.keep_measurements(trained, {"fidelity": {"fvu": 0.25}})
    assert not verify(world / "trained").problems
    shutil.rmtree(trained)
    said = call("verify", world / "trained").err
    assert f"{weights} is missing; restore it from a copy, or del" in said
    shutil.copytree(world / OTHER, trained)
    said = call("verify", world / "trained").err
    assert f"{weights} is damaged: its checksum does not match" in said
