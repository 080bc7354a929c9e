"""Whatever befalls a file that is read back, it is named; no damage passes for other content."""

import copy
import json
import os
import shutil
import struct
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from command_line import HARVEST, SITE, call, content, works
from mutations import OTHER_VALUES, config_changes
from safetensors.torch import load_file, save_file
from training_cases import CONFIG, Planted, arms_for

from llm_wsae.artifact import digests
from llm_wsae.artifact.files import (
    load_own_tensors,
    read_own_json,
    save_own_tensors,
    write_json,
)
from llm_wsae.commands import verifying
from llm_wsae.commands.verifying import verify
from llm_wsae.data import shard_reader
from llm_wsae.data.manifest import MANIFEST, Manifest
from llm_wsae.data.store import ActivationStore
from llm_wsae.dictionary import atomic_folder, checks
from llm_wsae.dictionary import folder as dictionary_folder
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.explanations import Explanation, keep_explanations
from llm_wsae.dictionary.folder import OWN_DIGEST
from llm_wsae.errors import LlmWsaeError
from llm_wsae.machine.processes import Processes
from llm_wsae.model.site import Site
from llm_wsae.training.arm import Arm
from llm_wsae.training.checkpoint import CHECKPOINT, FINISHED, load_checkpoint, read_finished
from llm_wsae.training.log import LOG
from llm_wsae.training.trainer import Interrupted, train
from llm_wsae.weights.loss_weights import LossWeights

PLACE = Site.parse(SITE)
SHORT = CONFIG.__class__(**{**vars(CONFIG), "tokens": 256 * 60, "log_every": 10})


def flipped(data: bytes, at: int, bit: int) -> bytes:
    return data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :]


def every_bit(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    for at in range(len(data)):
        for bit in range(8):
            yield at, bit, flipped(data, at, bit)


def some_bits(data: bytes, count: int = 40) -> Iterator[bytes]:
    """Spread over a file, another bit each time."""
    for number in range(count):
        yield flipped(data, number * (len(data) - 1) // (count - 1), number % 8)


@pytest.fixture(autouse=True)
def in_haste(monkeypatch):
    """Thousands of files are written; none must outlive a loss of power."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def world(made_world, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(made_world, tmp_path / "world")


@pytest.fixture
def store(world):
    return ActivationStore.open(world / "store")


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


# --- The mechanism


def test_every_bit_of_a_json_file_counts():
    value = {"k": 4, "share": 1e-05, "name": 'größe "\\\x1f', "of": [{"a": None}, True, 0.1]}
    good = digests.json_text(value)
    assert digests.check_json(good) == value
    for at, bit, data in every_bit(good.encode()):
        with pytest.raises(ValueError):
            digests.check_json(data.decode())
            pytest.fail(f"bit {bit} of byte {at} passed: {data[at - 20 : at + 20]!r}")
    for text in (good.replace("\n", "\r\n"), good + " ", good.replace('": ', '":', 1)):
        with pytest.raises(digests.Damaged):
            digests.check_json(text)


def test_every_bit_of_a_file_of_tensors_counts(tmp_path):
    path, facts = tmp_path / "f.safetensors", {"step": 31, "name": "größe"}
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(7)}
    save_own_tensors(path, tensors, facts)
    found, read = load_own_tensors(path, "file")
    assert read == facts and all(torch.equal(found[name], t) for name, t in tensors.items())
    for at, bit, data in every_bit(path.read_bytes()):
        path.write_bytes(data)
        with pytest.raises(LlmWsaeError):
            load_own_tensors(path, "file")
            pytest.fail(f"bit {bit} of byte {at} passed: {data[at - 20 : at + 20]!r}")


def test_large_files_are_hashed_in_blocks(tmp_path, monkeypatch):
    """Also where the digest's own digits lie across two of them."""
    path = tmp_path / "f.safetensors"
    for size in (64, 100, 129):
        monkeypatch.setattr(digests, "_BLOCK", size)
        save_own_tensors(path, {"a": torch.arange(500.0)}, {"size": size})
        assert load_own_tensors(path, "file")[1] == {"size": size}
        whole = path.read_bytes()
        for data in some_bits(whole, 60):
            path.write_bytes(data)
            with pytest.raises(LlmWsaeError):
                load_own_tensors(path, "file")


def test_files_without_a_digest_open(tmp_path):
    """Whatever they hold; a digest of something else is none of ours."""
    save_file({"gamma": torch.ones(3)}, tmp_path / "w.safetensors", {"format": "pt"})
    assert LossWeights.load(tmp_path / "w.safetensors").gamma.tolist() == [1, 1, 1]
    assert verify(tmp_path / "w.safetensors").without_digest == [tmp_path / "w.safetensors"]


# --- Dictionaries


def test_every_bit_of_a_dictionarys_json_counts(world):
    folder = world / "trained/uniform-k4"
    cfg, info = ((folder / name).read_bytes() for name in ("cfg.json", "wsae.json"))
    digests.check_json(info.decode(), OWN_DIGEST)
    for at, bit, data in every_bit(info):
        with pytest.raises(ValueError):
            digests.check_json(data.decode(), OWN_DIGEST)
            pytest.fail(f"bit {bit} of byte {at} passed: {data[at - 20 : at + 20]!r}")
    for name, good, step in (("cfg.json", cfg, 2), ("wsae.json", info, 19)):
        for at in range(0, len(good), step):
            (folder / name).write_bytes(flipped(good, at, at % 8))
            with pytest.raises(LlmWsaeError):
                dictionary_folder.check_folder(folder)
                pytest.fail(f"byte {at} of {name} passed")
        (folder / name).write_bytes(good)


def test_a_changed_k_is_not_loaded(world):
    folder = world / "trained/uniform-k4"
    cfg = (folder / "cfg.json").read_text()
    assert "sha256" not in cfg  # SAELens reads it
    (folder / "cfg.json").write_text(cfg.replace('"k": 4', '"k": 5'))
    with pytest.raises(LlmWsaeError, match=r"cfg\.json changed since it was saved"):
        Dictionary.load(folder)
    assert "cfg.json changed" in call("verify", folder).err


def test_measurements_are_covered_too(world):
    folder = world / "trained/uniform-k4"
    dictionary_folder.keep_measurements(folder, {"fidelity": {"fvu": 0.25}})
    assert Dictionary.load(folder).info.metrics["fidelity"] == {"fvu": 0.25}
    info = (folder / "wsae.json").read_text()
    (folder / "wsae.json").write_text(info.replace('"fvu": 0.25', '"fvu": 0.05'))
    with pytest.raises(LlmWsaeError, match=r"wsae\.json is damaged: its checksum"):
        Dictionary.load(folder)
    with pytest.raises(LlmWsaeError, match=r"wsae\.json is damaged: its checksum"):
        dictionary_folder.keep_measurements(folder, {})


def test_a_reader_never_sees_two_dictionaries_mixed(world, monkeypatch):
    """Replaced by another after its configuration was read, and between two renames."""
    folder, other = world / "trained/uniform-k4", world / "trained/variance-a0.5-k4"
    wanted, read = Dictionary.load(other), checks.read_tensors
    replacing = [wanted.save]

    def replaced(*given, **named):
        if replacing:
            replacing.pop()(folder)
        return read(*given, **named)

    monkeypatch.setattr(dictionary_folder, "read_tensors", replaced)
    assert torch.equal(Dictionary.load(folder).W_enc, wanted.W_enc)
    aside = atomic_folder._temporary(folder, "old")
    folder.rename(aside)
    monkeypatch.setattr(atomic_folder.time, "sleep", lambda _: aside.rename(folder))
    assert Dictionary.load(folder).info == wanted.info
    monkeypatch.setattr(atomic_folder.time, "sleep", lambda _: None)
    replacing += [lambda place: shutil.rmtree(place)]
    with pytest.raises(LlmWsaeError, match="is not a folder"):
        Dictionary.load(folder)


def test_a_reader_does_not_meet_the_systems_own_errors(world, monkeypatch):
    """A file goes while its folder is replaced, or cannot be read at all."""
    folder, wanted = (
        world / "trained/uniform-k4",
        Dictionary.load(world / "trained/variance-a0.5-k4"),
    )
    digest, replacing = dictionary_folder.sha256, [wanted.save]

    def gone(path):
        if replacing:
            replacing.pop()(folder)
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return digest(path)

    def broken(path):
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(dictionary_folder, "sha256", gone)
    assert torch.equal(Dictionary.load(folder).W_enc, wanted.W_enc)
    monkeypatch.setattr(dictionary_folder, "sha256", broken)
    with pytest.raises(LlmWsaeError, match="uniform-k4: input/output error; check it, and try"):
        Dictionary.load(folder)


# --- Checkpoints and what belongs to them


def test_a_damaged_checkpoint_is_never_resumed(stopped):
    path = stopped / CHECKPOINT
    good = path.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    damages = [data + good[header:] for data in some_bits(good[:header], 60)]
    damages += [good[:header] + data for data in some_bits(good[header:])]
    arms, load = loading(stopped)
    before = [p.clone() for arm in arms for p in arm.parameters]
    for data in damages:
        path.write_bytes(data)
        with pytest.raises(LlmWsaeError, match=r"checkpoint\.safetensors is (damaged|not a read)"):
            load()
    after = [p for arm in arms for p in arm.parameters]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    path.write_bytes(good)
    assert load().step == 31


def loading(folder):
    """New arms, and a function that restores them from a checkpoint."""
    arms = [Arm(arm, 16, 64, torch.device("cpu")) for arm in arms_for(Planted(2000))[:2]]
    identity = own_header(folder / CHECKPOINT)["identity"]
    return arms, lambda: load_checkpoint(folder, arms, identity, Processes())


def own_header(path: Path) -> dict:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["llm_wsae"])


def checkpoint_changes(tensors, header):
    """(what, tensors, header) of checkpoints that no training writes."""
    encoder = "uniform-k2/encoder"
    whole = tensors[encoder]
    for value in (torch.tensor(0.5), whole[0].clone(), whole[:1].clone(), whole.T.contiguous(),
                  whole.half()):  # fmt: skip
        yield "its uniform-k2/encoder is", tensors | {encoder: value}, header
    yield "its uniform-k2/other is F32", tensors | {"uniform-k2/other": torch.ones(2)}, header
    yield "it lacks uniform-k2/encoder", {n: t for n, t in tensors.items() if n != encoder}, header
    for step in (1_000_000_000, 61, -1, 31.0, "31", None, True, [31]):
        yield "its step is", tensors, header | {"step": step}
    for numbers in ([1], {"uniform-k2": 3}, {"uniform-k2": {"loss": "0"}}, None):
        yield "is not what this version writes", tensors, header | {"numbers": numbers}
    for log in ([], {"length": 3}, {"length": "3", "sha256": ""}, 7):
        yield "its log is", tensors, header | {"log": log}
    for identity in (None, [], 3):
        yield "does not say which settings", tensors, header | {"identity": identity}


def test_a_checkpoint_that_no_training_writes_is_refused(stopped):
    """With its old digest, with a valid one, and with none."""
    path = stopped / CHECKPOINT
    tensors, header = load_file(path), own_header(path)
    _, load = loading(stopped)
    for sentence, others, changed in checkpoint_changes(tensors, header):
        save_file(others, path, {"llm_wsae": json.dumps(changed)})
        with pytest.raises(LlmWsaeError, match="is damaged: its checksum does not match; delete"):
            load()
        facts = {key: value for key, value in changed.items() if key != "sha256"}
        save_own_tensors(path, others, facts)
        with pytest.raises(LlmWsaeError, match=sentence):
            load()
        save_file(others, path, {"llm_wsae": json.dumps(facts)})
        with pytest.raises(LlmWsaeError, match=sentence):
            load()
    with pytest.raises(LlmWsaeError, match=sentence):
        resume(stopped)
    assert not list(stopped.glob("*/cfg.json"))


def test_a_damaged_log_is_named_and_a_lost_one_is_begun_anew(stopped):
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
        assert "log.jsonl is damaged" in verify(stopped).problems[0]


def test_a_log_may_be_deleted(stopped):
    (stopped / LOG).unlink()
    resume(stopped)
    steps = [json.loads(line)["step"] for line in (stopped / LOG).read_bytes().splitlines()]
    assert steps == [40, 50, 60]


def test_an_odd_record_of_a_training_is_one_sentence(stopped):
    for value in (*OTHER_VALUES, {"rows": 3, "arms": {}}, {"rows": {}, "arms": {}, "log": 3}):
        if isinstance(value, dict):
            write_json(stopped / FINISHED, value)
        else:
            (stopped / FINISHED).write_text(json.dumps(value))
        with pytest.raises(LlmWsaeError, match=r"training\.json is not"):
            read_finished(stopped)
    with pytest.raises(LlmWsaeError, match=r"training\.json is not"):
        resume(stopped)
    assert (stopped / CHECKPOINT).exists()


# --- Stores


def read_everything(store: ActivationStore) -> None:
    """As a training, a rule and an inspection do."""
    store.statistics(PLACE)
    for shard in range(len(store.manifest.shards)):
        store.contexts(shard)
    for batch in islice(store.source(PLACE).batches(512, seed=0), 1 + store.num_rows // 512):
        assert batch.isfinite().all()


def test_no_damage_to_a_store_is_trained_on(made_world, tmp_path):
    folder = shutil.copytree(made_world / "store", tmp_path / "store")
    store = ActivationStore.open(folder)
    read_everything(store)
    of_shards = {path for shard in store.manifest.shards for path in shard.files}
    for name in sorted(store.manifest.all_files()):
        if name in of_shards and name.endswith(".statistics.safetensors"):
            continue  # read only while a harvest is finished
        path = folder / name
        good = path.read_bytes()
        for data in (*some_bits(good, 5), good[:-1], good + b"x", good[: len(good) // 2]):
            path.write_bytes(data)
            with pytest.raises(LlmWsaeError, match=r"(damaged|truncated|does not hold).*; delete"):
                read_everything(ActivationStore.open(folder))
        path.write_bytes(good)
    read_everything(ActivationStore.open(folder))


def test_a_shard_in_anothers_place_and_a_moved_header_are_found(store):
    first, second = (store.folder / SITE / f"0000{i}.safetensors" for i in (0, 1))
    good = second.read_bytes()
    if first.stat().st_size == second.stat().st_size:
        second.write_bytes(first.read_bytes())
        with pytest.raises(LlmWsaeError, match=r"00001\.safetensors is damaged: rows 0 to 127"):
            read_everything(store)
    length = int.from_bytes(good[:8], "little")
    entry = json.loads(good[8 : 8 + length])
    for begin, end in ((-8, 0), (8, 8), (-(10**30), 0), (0, 1)):
        moved = copy.deepcopy(entry)
        offsets = moved["activations"]["data_offsets"]
        moved["activations"]["data_offsets"] = [offsets[0] + begin, offsets[1] + end]
        text = json.dumps(moved, separators=(",", ":")).encode()
        whole = struct.pack("<Q", len(text)) + text + good[8 + length :]
        second.write_bytes(whole.ljust(len(good))[: len(good)])
        with pytest.raises(LlmWsaeError, match=r"does not hold the .* rows that the manifest"):
            read_everything(store)


def test_every_row_is_compared_once(store, monkeypatch):
    compared = []

    def counted(data, size):
        compared.append(len(data))
        return digests.crc32s(data, size)

    monkeypatch.setattr(shard_reader, "crc32s", counted)
    batches = store.source(PLACE, window_bytes=1 << 16).batches(128, seed=0)
    for _ in islice(batches, 4 * store.num_rows // 128):
        pass
    batches.close()
    assert sum(compared) == store.num_rows * store.d_in * 4


def test_a_damaged_store_is_mended_by_the_same_harvest(world):
    store = world / "store"
    before = content(store)
    lost = [f"{SITE}/{name}.safetensors" for name in ("00001", "statistics")]
    lost.append("tokens/00003.safetensors")
    for name in lost:
        (store / name).unlink()
    said = call("verify", store).err
    assert all(name in said for name in lost) and "run the same harvest again" in said
    with pytest.raises(LlmWsaeError, match=r"is missing; delete it, if it is there, and run"):
        ActivationStore.open(store).contexts(3)
    works("harvest", "--model", world / "model", "--corpus", world / "text.jsonl", *HARVEST,
          "--dtype", "float32", "--out", store)  # fmt: skip
    after = content(store)
    assert {n: d for n, d in after.items() if n != "harvest.json"} == {
        n: d for n, d in before.items() if n != "harvest.json"
    }


FREE = ("package_version", "model.", "corpus.", "bos_token_id", "packing.prepend_bos",
        "packing.one_document", "packing.drop", "packing.context_size", "format_version",
        "contexts_per_batch")  # fmt: skip
"""What a manifest may say as it likes, as long as the type is right."""


def manifest_changes(value):
    yield from config_changes(value)
    for path in ("shards", "sites"):
        for other in OTHER_VALUES:
            yield f"{path}.0", other, value | {path: [other, *value[path][1:]]}
    first = value["shards"][0]
    for key, other, changed in config_changes(first):
        yield f"shards.0.{key}", other, value | {"shards": [changed, *value["shards"][1:]]}
    for text in ("save", "float16", "int8"):
        yield "dtype", text, value | {"dtype": text}
    begun = value | {"complete": False, "shards": [], "statistics": {}}  # no file has its path yet
    for site in ("../../x", "blocks.1.hook_resid_post/", "blocks.01.hook_resid_post"):
        for store in (value, begun):
            yield "sites", site, store | {"sites": [site]}
    yield "sites", "twice", begun | {"sites": [SITE, SITE]}
    for name in ("d_in", "contexts_per_shard", "num_contexts"):
        yield name, -1, begun | {name: -1}
    for name in ("../../etc/passwd", "/etc/passwd"):
        files = {name: next(iter(first["files"].values()))}
        changed = [first | {"files": files}, *value["shards"][1:]]
        yield "shards.0.files", name, value | {"shards": changed}


def test_a_manifest_that_no_harvest_writes_is_refused(world):
    """Its digest is valid each time."""
    folder = world / "store"
    good = read_own_json(folder / MANIFEST, "manifest")
    passed = []
    for key, other, value in manifest_changes(good):
        write_json(folder / MANIFEST, value)
        try:
            manifest = Manifest.load(folder)
        except LlmWsaeError:
            continue
        if value != good and not key.startswith(FREE):
            passed.append((key, other))
        assert type(manifest.d_in) is int and manifest.sites == [SITE]
    assert not passed


# --- verify


def test_verify_checks_every_file_that_is_written(world, stopped, monkeypatch):
    resume(shutil.copytree(stopped, world / "finished"))
    shutil.copytree(stopped, world / "stopped")
    works("weigh", world / "store", "--site", SITE, "--rule", "whitening", "--out",
          world / "weights.safetensors")  # fmt: skip
    assert (world / "store/evidence").is_dir()
    kinds = {"store": "store", "trained": "training", "finished": "training",
             "stopped": "training", "weights.safetensors": "weights file"}  # fmt: skip
    for name, kind in kinds.items():
        place = world / name
        assert works("verify", place).out == f"{place}: {kind} is intact\n"
        with monkeypatch.context() as long:
            long.setattr(verifying, "_SHORT", 0)
            assert "verify: 100%" in works("verify", place).err
        files = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.is_file())
        for path in files:
            if path.name == ".lock":
                continue
            good = path.read_bytes()
            for data in islice(some_bits(good, 4), 1, None):
                path.write_bytes(data)
                found = verify(place)
                assert found.problems, f"damage to {path} passes"
                said = "; ".join(found.problems)
                assert path.name in said and str(path.parent) in said
                assert any(w in said for w in ("delete", "restore")), said
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
    assert "record is intact" in works("verify", own).out
    own.write_text(own.read_text().replace("uniform", "unifurm"))
    found = call("verify", own)
    assert found.code == 1 and "wsae.json is damaged" in found.err and "restore" in found.err


def test_verify_finds_what_was_exchanged_or_cannot_be(world, tmp_path):
    trained, other = world / "trained/uniform-k4", world / "trained/variance-a0.5-k4"
    dictionary_folder.keep_measurements(trained, {"fidelity": {"fvu": 0.25}})
    assert not verify(world / "trained").problems
    trained.rename(tmp_path / "aside")
    shutil.copytree(other, trained)
    (said,) = verify(world / "trained").problems
    assert "uniform-k4 is not what was trained; delete" in said
    shutil.rmtree(trained)
    (tmp_path / "aside").rename(trained)
    save_own_tensors(tmp_path / "w.safetensors", {"gamma": torch.tensor([1.0, torch.nan])},
                     {"rule": "variance"})  # fmt: skip
    for place in (tmp_path / "w.safetensors", world):
        shutil.copy(tmp_path / "w.safetensors", world / "trained/weights.safetensors")
        assert "must be finite, but 1 are not" in "; ".join(verify(place).problems)
    (world / "trained/weights.safetensors").unlink()


def test_verify_says_what_is_missing_from_a_training(world):
    shutil.rmtree(world / "trained/uniform-k4")
    said = call("verify", world / "trained").err
    assert "trained/uniform-k4 is missing; delete" in said and "run the same command again" in said


def test_what_the_first_version_wrote_is_refused_in_a_sentence(world, stopped):
    """By its version, or by what it lacks."""
    value = read_own_json(world / "store" / MANIFEST, "manifest")
    write_json(world / "store" / MANIFEST, {**value, "package_version": "0.1.0"})
    with pytest.raises(LlmWsaeError, match=r"0\.1\.0', which this version does not read; harvest"):
        ActivationStore.open(world / "store")
    folder = world / "trained/uniform-k4"
    value = read_own_json(folder / "wsae.json", "file", key=OWN_DIGEST)
    write_json(folder / "wsae.json", {**value, "package_version": "0.1.0"}, key=OWN_DIGEST)
    with pytest.raises(LlmWsaeError, match=r"saved by llm-wsae 0\.1\.0.*; train it again"):
        Dictionary.load(folder)
    value = read_own_json(world / "trained" / FINISHED, "record")
    write_json(world / "trained" / FINISHED, {k: v for k, v in value.items() if k != "log"})
    with pytest.raises(LlmWsaeError, match="is not what this version writes"):
        read_finished(world / "trained")
