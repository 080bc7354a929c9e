import json
import sys
import types
from pathlib import Path

import pytest

from llm_wsae.errors import LlmWsaeError
from llm_wsae.training.log import TrainingLog

NUMBERS = {"uniform-k4": {"loss": 0.5, "fvu": 0.4}}


def steps(folder):
    return [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_lines_of_a_lost_run_are_cut_off(tmp_path):
    log = TrainingLog(tmp_path, 0)
    for step in (10, 20, 30):
        log.write(step, 100 * step, NUMBERS, tokens_per_second=5.0)
    log.close()
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 4')  # a process killed in the middle of a line
    log = TrainingLog(tmp_path, 20)
    assert steps(tmp_path) == [10, 20]
    log.write(30, 3000, NUMBERS)
    log.close()
    assert steps(tmp_path) == [10, 20, 30]


def test_a_tracker_gets_the_same_numbers(tmp_path, monkeypatch):
    written = []

    class Writer:
        def __init__(self, folder):
            assert folder == str(tmp_path)

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def close(self):
            written.append("closed")

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    log = TrainingLog(tmp_path, 0, "tensorboard")
    log.write(7, 700, NUMBERS)
    log.close()
    assert written == [("uniform-k4/loss", 0.5, 7), ("uniform-k4/fvu", 0.4, 7), "closed"]


def test_a_folder_is_one_run_of_wandb(tmp_path, monkeypatch):
    started, sent = [], []

    class Run:
        def log(self, numbers, step):
            sent.append((step, numbers))

        def finish(self):
            sent.append("finished")

    def init(**settings):
        started.append(settings)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for step in (7, 8):
        log = TrainingLog(tmp_path, step, "wandb")
        log.write(step, 700, NUMBERS)
        log.close()
    assert started[0] == started[1] and started[0]["id"] and started[0]["resume"] == "allow"
    assert sent[0] == (7, {"uniform-k4/loss": 0.5, "uniform-k4/fvu": 0.4})
    assert sent[1] == sent[3] == "finished"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_a_sentence(tmp_path):
    log = TrainingLog(tmp_path, 0)
    (tmp_path / "log.jsonl").unlink()
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(LlmWsaeError, match=r"cannot write .*log.jsonl: No space left on device"):
        log.write(7, 700, NUMBERS)


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_a_missing_tracker_is_named_with_the_way_to_get_it(tmp_path, monkeypatch, tracker):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(LlmWsaeError, match=rf"pip install 'llm-wsae\[{tracker}\]'"):
        TrainingLog(tmp_path, 0, tracker)
