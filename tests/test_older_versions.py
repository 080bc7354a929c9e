"""What the first version of the package wrote still opens, resumes and is read back.

``fixtures/made-by-0.1.0.tar.xz`` holds what its commands left of a tiny model: a store, weights, a
finished training of fifteen dictionaries, and the same training stopped at step 40 of 100.
"""

import tarfile
from pathlib import Path

import pytest
import torch
from command_line import SITE, content, works
from places import ROOT

from llm_wsae import ActivationStore, Dictionary, LossWeights, Site

ARCHIVE = ROOT / "tests" / "fixtures" / "made-by-0.1.0.tar.xz"
TRAIN = ("--site", SITE, "--expansion", 2, "--batch-size", 64, "--dtype", "float32", "--rule",
         "uniform", "variance", "--alpha", -0.25, "--k", 4, "--architecture", "topk", "batch-topk",
         "matryoshka", "jumprelu", "--l1", 0.05, "--tokens", 6400,
         "--weights", "weights/whitening.safetensors")  # fmt: skip
CLOSE = 1e-4  # another processor sums in another order


@pytest.fixture
def old(tmp_path, monkeypatch) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_store_opens(old):
    store = ActivationStore.open(old / "store")
    assert works("verify", "store").code == 0
    rows = store.rows(Site.parse(SITE), 0, store.num_rows)
    assert rows.shape == (store.num_rows, 16)
    mean = store.statistics(Site.parse(SITE)).mean
    torch.testing.assert_close(rows.double().mean(0), mean.double(), rtol=1e-5, atol=1e-5)


def test_weights_open(old):
    weights = LossWeights.load(old / "weights/whitening.safetensors")
    assert (weights.name, weights.gamma.shape) == ("whitening-a0.25-space", (16, 16))


def test_a_stopped_training_is_resumed_to_the_dictionaries_of_an_unbroken_one(old):
    works("train", "store", *TRAIN, "--out", "stopped")
    finished = sorted(path.parent.name for path in (old / "finished").glob("*/cfg.json"))
    assert len(finished) == 15
    for name in finished:
        one, other = (Dictionary.load(old / folder / name) for folder in ("stopped", "finished"))
        assert (one.sparsity, one.info.rule, one.info.seed) == (
            other.sparsity, other.info.rule, other.info.seed
        )  # fmt: skip
        for key, tensor in other.state_dict().items():
            torch.testing.assert_close(
                one.state_dict()[key], tensor, rtol=CLOSE, atol=CLOSE, msg=f"{name}: {key}"
            )


def test_a_finished_training_is_read_back(old):
    written_anew = {"train.json", ".lock"}
    before, _ = content(old / "finished"), works("train", "store", *TRAIN, "--out", "finished")
    after = content(old / "finished")
    assert after.keys() - before.keys() <= written_anew
    assert all(after[path] == before[path] for path in before.keys() - written_anew)
