"""What is particular to the C++ kernels: overflowing lists, threads, memory, and their build. What
the operations compute is tested in ``../test_operations.py``."""

import os
import stat
import subprocess
import sys

import pytest
import torch
from looping import over
from sparse_cases import ENCODINGS, SUMS, cast, everything, needs_compiler, random

from llm_wsae.errors import UsageError
from llm_wsae.sparse import operations
from llm_wsae.sparse.backends import cpu
from llm_wsae.sparse.codes import Codes, Product, ragged


@needs_compiler
@over(k=[1, 32, 500])
def test_selection_from_many_latents(k):
    """Long rows: candidate lists are cut back many times, also where nearly all entries tie."""
    encoder = random(5000, 8, seed=1).float()
    for x in (random(100, 8).float(), torch.eye(8)[:1].expand(100, 8).contiguous()):
        for step in (1.0, 0.25):
            rounded = (encoder / step).round() * step
            found = operations.encode_topk(Product(x, rounded, torch.zeros(5000)), k)
            pre = x @ rounded.T
            expected = pre.topk(k).values.relu()
            torch.testing.assert_close(found.values.sort(descending=True).values, expected)
            used = found.values > 0
            chosen = pre.gather(1, found.indices)[used]
            torch.testing.assert_close(chosen, found.values[used])
            for row, kept in zip(found.indices, used, strict=True):
                assert len(set(row[kept].tolist())) == int(kept.sum())


@needs_compiler
def test_infinite_entries_do_not_hide():
    """A training that blows up must be seen to. (NaN in an encoder's row is not selected: the
    check of the finished weights finds it.)"""
    x = torch.tensor([[1e30, 1.0]])
    encoder = torch.tensor([[1e30, 0.0]] + [[0.0, 1.0]] * 31)
    codes = operations.encode_topk(Product(x, encoder, torch.zeros(32)), 2)
    assert codes.values.max() == torch.inf and codes.indices[0, codes.values[0].argmax()] == 0


CASE = cast(SUMS["few latents hot"], torch.float32)
ENCODING = cast(ENCODINGS["random"], torch.float32)


@needs_compiler
@over(default=[torch.bfloat16, torch.float64])
def test_neither_threads_nor_the_default_dtype_change_a_bit(default):
    """The kernels write float32, so their memory must not follow it."""
    expected, threads = everything(ENCODING, CASE), torch.get_num_threads()
    before = torch.get_default_dtype()
    try:
        torch.set_num_threads(3)
        torch.set_default_dtype(default)
        assert all(map(torch.equal, everything(ENCODING, CASE), expected))
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(before)


@needs_compiler
def test_rows_and_latents_need_not_be_contiguous():
    """And short integers are taken as they are."""

    def spread(part):
        if isinstance(part, tuple):
            return type(part)(*map(spread, part))
        part = part if part.is_floating_point() else part.int()
        return torch.stack([part, part], -1)[..., 0]

    apart = spread(CASE)
    assert not apart.x.is_contiguous() and not apart.codes.values.is_contiguous()
    found = everything(spread(ENCODING), apart)
    assert all(map(torch.equal, found, everything(ENCODING, CASE)))


@needs_compiler
def test_weights_of_another_dtype_are_not_read_as_float32():
    """A user's γ may be float64."""
    codes, x, decoder, bias, _ = CASE
    row_weights, columns = torch.ones(len(x)), torch.rand(x.shape[1], dtype=torch.float64)
    found, expected = (
        operations.reconstruct(codes, decoder, bias, x, row_weights, weights, torch.float32)
        for weights in (columns, columns.float())
    )
    assert torch.equal(found.output_gradient, expected.output_gradient)
    wide = cast(SUMS["few latents hot"], torch.float64)
    for encoder in (wide.decoder, wide.decoder.bfloat16()):  # of float64 rows
        found = operations.exact_values(wide.codes, wide.x, encoder, torch.zeros(160).double())
        pre = (wide.x @ encoder.double().T)[wide.codes.rows(), wide.codes.indices]
        assert torch.allclose(found.values, pre.relu() * (wide.codes.values > 0))


@needs_compiler
@over(latent=[160, -1])
def test_a_latent_that_does_not_exist_is_refused(latent):
    """C++ would read whatever lies there; codes may come from a user (``Dictionary.decode``)."""
    codes = ragged(Codes(torch.tensor([[3, latent]]), torch.ones(1, 2)))
    with pytest.raises(UsageError, match=rf"{min(3, latent)} to {max(3, latent)}.* has 160"):
        operations.decode(codes, torch.ones(160, 4), torch.ones(4))


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """Makes a compiler that runs a line of shell, and remembers for which files it was asked."""

    def make(line):
        script, log = tmp_path / "g++", tmp_path / "asked"
        told = 'case "$*" in *-###*) exit 0;; esac\nfor last; do :; done\necho "$last" >> '
        script.write_text(f"#!/bin/sh\n{told}{log}\n{line}\n")
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))
        return log

    return make


SCRIPT = """
import torch
from llm_wsae.sparse import operations
from llm_wsae.sparse.codes import Codes, ragged
codes = ragged(Codes(torch.tensor([[0, 1]]), torch.ones(1, 2)))
print(operations.decode(codes, torch.eye(2), torch.zeros(2)).tolist())
"""


@pytest.mark.slow
@needs_compiler
def test_two_processes_that_build_at_once_leave_one_whole_library(tmp_path, monkeypatch, compiler):
    both = f"until [ $(wc -l < {tmp_path}/asked) = 2 ]; do sleep 0.02; done"
    compiler(f'{both}; cp {cpu._built()} "$last"')
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    words = [sys.executable, "-c", SCRIPT]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    for process in [subprocess.Popen(words, **pipes) for _ in range(2)]:
        assert process.communicate() == ("[[1.0, 1.0]]\n", "")
    assert len([*tmp_path.joinpath("llm_wsae", "kernels").iterdir()]) == 1


@needs_compiler
def test_the_library_is_built_once_and_kept(tmp_path, monkeypatch, compiler):
    log = compiler(f'cp {cpu._built()} "$last"')
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    built = cpu._built()
    assert built == cpu._built() and len(log.read_text().split()) == 1
    assert built.parent == tmp_path / "llm_wsae" / "kernels"
    assert stat.S_IMODE(built.parent.stat().st_mode) == 0o700
    if os.geteuid() == 0:  # somebody else's is not loaded
        os.chown(built, 65534, -1)
        assert cpu._built() == built and len(log.read_text().split()) == 2
        assert built.stat().st_uid == 0


def test_without_kernels_the_plain_operations_take_over(tmp_path, monkeypatch, capsys, compiler):
    """One sentence says why, unless one asked for it. A library that others can write is not
    loaded."""
    blocked, everybodys, theirs = (tmp_path / name for name in ("blocked", "everybodys", "theirs"))
    blocked.mkdir()
    (blocked / "llm_wsae").write_text("a file where a folder should be")
    for folder, mode in ((everybodys, 0o777), (theirs / "llm_wsae" / "kernels", 0o775)):
        folder.mkdir(parents=True)
        folder.chmod(mode)
    compiler("echo 'no room on the device' >&2\nexit 1")
    cases = [
        ({}, "no room on the device"),
        ({"XDG_CACHE_HOME": blocked}, "could not be built"),
        ({"XDG_CACHE_HOME": everybodys}, f"others can write to {everybodys}; close it to them"),
        ({"XDG_CACHE_HOME": theirs}, f"others can write to {theirs}/llm_wsae/kernels; close it"),
        ({"PATH": "", "CXX": ""}, "none of g++"),
        ({"LLM_WSAE_NO_COMPILER": "1"}, ""),
    ]
    codes = ragged(Codes(torch.tensor([[0, 1]]), torch.ones(1, 2)))
    for environment, reason in cases:
        with monkeypatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
            for name, value in environment.items():
                patch.setenv(name, str(value))
            cpu._library.cache_clear()
            operations._backend.cache_clear()
            decoded = operations.decode(codes, torch.eye(2), torch.zeros(2))
            assert decoded.tolist() == [[1.0, 1.0]] and not cpu.available()
        complaint = capsys.readouterr().err
        assert complaint.count("\n") == bool(reason) and reason in complaint
    cpu._library.cache_clear()
    operations._backend.cache_clear()
