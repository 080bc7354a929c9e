import json
import sys
import types

import pytest

from llm_wsae.errors import LlmWsaeError
from llm_wsae.train.log import TrainingLog

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

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    log = TrainingLog(tmp_path, 0, "tensorboard")
    log.write(7, 700, NUMBERS)
    log.close()
    assert written == [("uniform-k4/loss", 0.5, 7), ("uniform-k4/fvu", 0.4, 7)]


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_a_missing_tracker_is_named_with_the_way_to_get_it(tmp_path, monkeypatch, tracker):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(LlmWsaeError, match=rf"pip install 'llm-wsae\[{tracker}\]'"):
        TrainingLog(tmp_path, 0, tracker)
