"""Two launchers, as two machines would start them, on this one: one of them is killed."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import HARVEST, SITE, TRAIN, asked, content, works
from places import ROOT

SECONDS = 240


@pytest.fixture(scope="module")
def world(made_world):
    return made_world


IMPATIENT = """
import runpy
from llm_wsae import processes

processes._BEAT_SECONDS, processes._BEATS_MISSED, processes._LINGER_SECONDS = 0.1, 30, 1
runpy.run_module("llm_wsae", run_name="__main__")
"""
"""The command line of processes that give others up after three seconds rather than a minute."""


def agents(folder, *words):
    """Both launchers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = folder / "impatient.py"
    script.write_text(IMPATIENT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2",
                "--nproc-per-node", "1", "--master-addr", "127.0.0.1",
                "--master-port", str(port)]  # fmt: skip
    return [
        subprocess.Popen(
            [*launcher, "--node-rank", str(rank), script, *asked(words)],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        for rank in range(2)
    ]


def end(agent):
    """Its exit code and what it said."""
    try:
        _, said = agent.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        agent.kill()
        raise
    return agent.returncode, said


def unbroken(folder, words):
    for agent in agents(folder, *words):
        code, said = end(agent)
        assert code == 0, said


def killed_and_restarted(folder, words, begun):
    """Kill the second machine once ``begun()``; the first must end by itself; start both again."""
    first, second = agents(folder, *words)
    until = time.monotonic() + SECONDS
    while not begun():
        assert time.monotonic() < until and second.poll() is None and first.poll() is None
        time.sleep(0.01)
    workers = Path(f"/proc/{second.pid}/task/{second.pid}/children").read_text().split()
    second.kill()
    for worker in workers:
        os.kill(int(worker), signal.SIGKILL)
    code, said = end(first)
    assert code != 0 and "llm-wsae:" in said, said
    second.communicate()
    unbroken(folder, words)


def test_a_training(world, tmp_path):
    words = ("train", world / "store", *TRAIN, "--k", 4, "--tokens", 400_000,
             "--checkpoint-seconds", 0.2)  # fmt: skip
    out = tmp_path / "two"
    killed_and_restarted(tmp_path, (*words, "--out", out), (out / "checkpoint.safetensors").exists)
    works("verify", out)
    unbroken(tmp_path, (*words, "--out", tmp_path / "at once"))
    weights = [
        (folder / "uniform-k4/sae_weights.safetensors").read_bytes()
        for folder in (tmp_path / "at once", out)
    ]
    assert weights[0] == weights[1]


def test_a_harvest(world, tmp_path):
    words = ("harvest", "--model", world / "model", "--corpus", world / "text.jsonl", *HARVEST,
             "--shard-tokens", 512, "--dtype", "float32")  # fmt: skip
    out = tmp_path / "two"
    killed_and_restarted(
        tmp_path, (*words, "--out", out), lambda: any(out.glob(f"{SITE}/*.safetensors"))
    )
    works("verify", out)
    works(*words, "--out", tmp_path / "one")
    rows = [
        {name: data for name, data in content(folder / SITE).items()}
        for folder in (tmp_path / "one", out)
    ]
    assert rows[0] == rows[1]
