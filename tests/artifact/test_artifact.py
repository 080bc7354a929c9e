"""A folder is begun, resumed or refused with what differs, finished and verified."""

import json

import pytest
from refusals import fails

from llm_wsae.artifact.artifact import Artifact, FileRecord
from llm_wsae.artifact.files import write_json
from llm_wsae.errors import UsageError

REQUEST = {"model": {"name": "tiny", "layers": (1, 2)}, "k": 4, "gamma_sum": 3.0, "l1": None,
           "arms": [{"name": f"whitening-a0.5-k{k}", "seed": k} for k in range(3)]}  # fmt: skip
OTHER_ARMS = [*REQUEST["arms"][:2], {"name": "whitening-a0.5-k2", "seed": 7}]


@pytest.fixture
def artifact(tmp_path):
    return Artifact(tmp_path / "out", "made.json", "made thing")


def test_the_same_request_resumes_and_another_is_refused_with_what_differs(artifact):
    assert not artifact.is_begun()
    begun = artifact.begin(REQUEST)
    content = artifact.path.read_bytes()
    assert artifact.begin({**REQUEST, "gamma_sum": 3.000001}) == begun
    assert not artifact.is_complete()
    for change, clause in (
        ({"k": 5}, "k: 4 in the saved made thing, 5 in this command"),
        ({"model": {"name": "other", "layers": [1, 2]}}, 'model name: "tiny" in the saved'),
        ({"model": None}, "the saved made thing has model; this command does not"),
        ({"gamma_sum": 3.1}, "gamma_sum: 3.0 in the saved"),
        ({"seed": {}}, "this command has seed; the saved made thing does not"),
        ({"arms": OTHER_ARMS}, "other settings (arms 2 seed: 2 in the saved made thing, 7 in"),
    ):
        assert clause in fails("or use the same settings", artifact.begin, {**REQUEST, **change})
    assert artifact.path.read_bytes() == content


def test_a_finished_folder_knows_its_files(artifact):
    record = artifact.begin(REQUEST)
    path = artifact.folder / "a" / "b.bin"
    path.parent.mkdir()
    path.write_bytes(b"rows")
    record.facts["rows"] = 7
    artifact.finish(record, ["a/b.bin"])
    found = artifact.read()
    assert found == record and artifact.is_complete()
    assert found.files == {"a/b.bin": FileRecord.of(path)}
    assert found.files["a/b.bin"].problem(path) is None
    for damage, sentence in ((b"row", "truncated"), (b"rowz", "damaged"), (None, "missing")):
        path.unlink() if damage is None else path.write_bytes(damage)
        assert sentence in str(found.files["a/b.bin"].problem(path))


def test_what_others_wrote_is_left_alone(artifact):
    artifact.check_place()
    assert not artifact.folder.exists()
    artifact.folder.mkdir()
    (artifact.folder / ".lock").touch()
    artifact.check_place()
    (artifact.folder / "notes.txt").touch()
    artifact.check_place("log.jsonl", "rows")
    for names in ((), ("notes.txt",)):
        fails(r"holds other files \(notes\.txt\); choose another", artifact.begin, REQUEST, *names)
    assert not artifact.is_begun()
    with pytest.raises(UsageError, match=r"notes\.txt is a file"):
        Artifact(artifact.folder / "notes.txt", "made.json", "thing").check_place()


def test_a_record_of_another_version_or_kind_is_one_sentence(artifact):
    """Damage is in tests/fuzzing."""
    fails(r"there is no made thing in .*: it has no made\.json", artifact.read)
    for value in ({"kind": "other thing"}, {"kind": "made thing", "format": 9}):
        write_json(artifact.path, value)
        fails(r"cannot read .* as the record of the made thing", artifact.begin, REQUEST)
    for text, sentence in (("{", "is not a readable rec"), (json.dumps(REQUEST), "is damaged: ")):
        artifact.path.write_text(text)
        fails(f"{sentence}.*; restore it from a copy", artifact.read)
