"""What is particular to the C++ kernels: overflowing lists, threads, memory, and their build.

What the operations compute is tested in ``../test_operations.py``.
"""

import os
import subprocess
import sys

import pytest
import torch
from looping import over
from sparse_cases import ENCODINGS, SUMS, cast, needs_compiler, random

from llm_wsae.errors import UsageError
from llm_wsae.sparse import operations
from llm_wsae.sparse.codes import Codes, Latents, RaggedCodes, SparseGradients, ragged


@needs_compiler
@over(k=[1, 32, 500])
def test_selection_from_many_latents(k):
    """Long rows: candidate lists are cut back many times, also where nearly all entries tie."""
    encoder = random(5000, 8, seed=1).float()
    for x in (random(100, 8).float(), torch.eye(8)[:1].expand(100, 8).contiguous()):
        for step in (1.0, 0.25):
            rounded = (encoder / step).round() * step
            found = operations.encode_topk(x, rounded, torch.zeros(5000), k)
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
    codes = operations.encode_topk(x, encoder, torch.zeros(32), 2)
    assert codes.values.max() == torch.inf and codes.indices[0, codes.values[0].argmax()] == 0


def everything(encoding, case):
    """What all operations make of a problem, float32."""
    codes, x, decoder, bias, gradient = case
    columns = random(decoder.shape[1]).float()
    parts = [*operations.reconstruct(codes, decoder, bias, x, x[:, 0], columns, torch.bfloat16)]
    by_value = operations.value_gradients(codes, decoder, gradient)
    parts += [by_value, operations.decode(codes, decoder, bias)]
    gradients = SparseGradients(codes, x, gradient, by_value)
    sums = operations.weight_gradients(gradients, len(decoder))
    dense = [part.contiguous() for part in (decoder, decoder, *sums[:2], *sums[:2])]
    latents = Latents(*(part.abs().clone() for part in dense))
    parts += [operations.adam(latents, sums, 3, 0.1), operations.adam(latents, gradients, 4, 0.1)]
    parts += [*sums, *latents[:6], *operations.encode_topk(*encoding, 9)]
    parts += [*operations.encode_above(*encoding, encoding[2] * 0)]
    return [*parts, *operations.encode_batch_topk(*encoding, 5, 0.0)]


def assert_equal(found, expected):
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.fixture
def case():
    return cast(SUMS["few latents hot"], torch.float32)


@pytest.fixture
def encoding():
    return cast(ENCODINGS["random"], torch.float32)


@needs_compiler
def test_the_number_of_threads_changes_no_bit(encoding, case):
    one, threads = everything(encoding, case), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert_equal(everything(encoding, case), one)
    finally:
        torch.set_num_threads(threads)


@needs_compiler
def test_rows_and_latents_need_not_be_contiguous(encoding, case):
    """And short integers are taken as they are."""

    def spread(part):
        if isinstance(part, RaggedCodes):
            short = RaggedCodes(part.indices.int(), part.values, part.offsets.int())
            return RaggedCodes(*map(spread, short))
        return torch.stack([part, part], -1)[..., 0]

    apart = type(case)(*map(spread, case))
    assert not apart.x.is_contiguous() and not apart.codes.values.is_contiguous()
    found = everything(list(map(spread, encoding)), apart)
    assert_equal(found, everything(encoding, case))


@needs_compiler
@over(default=[torch.bfloat16, torch.float64])
def test_the_default_dtype_of_torch_changes_nothing(encoding, case, default):
    """The kernels write float32, so their memory must not follow it."""
    expected, before = everything(encoding, case), torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        assert_equal(everything(encoding, case), expected)
    finally:
        torch.set_default_dtype(before)


@needs_compiler
def test_weights_of_another_dtype_are_not_read_as_float32(case):
    """A user's γ may be float64."""
    codes, x, decoder, bias, _ = case
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


SCRIPT = """
import torch
from llm_wsae.sparse import operations
from llm_wsae.sparse.backends import cpu
from llm_wsae.sparse.codes import Codes, ragged
codes = ragged(Codes(torch.tensor([[0, 1]]), torch.ones(1, 2)))
for _ in range(2):
    assert operations.decode(codes, torch.eye(2), torch.zeros(2)).tolist() == [[1.0, 1.0]]
print(cpu.available())
"""


def start(cache, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"XDG_CACHE_HOME": str(cache)} | environment,
    )


@pytest.mark.slow
@needs_compiler
def test_the_library_is_built_once_and_kept(tmp_path):
    """Also by two processes at once; only whole libraries are ever in the cache."""
    for process in [start(tmp_path) for _ in range(2)]:
        assert process.communicate() == ("True\n", "")
    (library,) = tmp_path.joinpath("llm_wsae", "kernels").iterdir()
    assert library.parent.stat().st_mode & 0o777 == 0o700
    before = library.stat().st_mtime_ns
    assert start(tmp_path).communicate() == ("True\n", "")
    assert library.stat().st_mtime_ns == before
    if os.geteuid() == 0:  # somebody else's is not loaded
        os.chown(library, 65534, -1)
        assert start(tmp_path).communicate() == ("True\n", "")
        assert library.stat().st_uid == 0


@pytest.mark.slow
def test_without_kernels_the_plain_operations_take_over(tmp_path):
    """One sentence says why, unless one asked for it. A library that others can write is not
    loaded."""
    compiler, blocked, asked = tmp_path / "g++", tmp_path / "blocked", tmp_path / "asked"
    compiler.write_text("#!/bin/sh\necho 'no room on the device' >&2\nexit 1\n")
    compiler.chmod(0o755)
    blocked.mkdir()
    (blocked / "llm_wsae").write_text("a file where a folder should be")
    everybodys, theirs = tmp_path / "everybodys", tmp_path / "theirs"
    for folder, mode in ((everybodys, 0o777), (theirs / "llm_wsae" / "kernels", 0o775)):
        folder.mkdir(parents=True)
        folder.chmod(mode)
    cases = [
        (start(tmp_path, PATH="", CXX=""), "none of g++"),
        (start(tmp_path, CXX=str(compiler)), "no room on the device"),
        (start(blocked), "could not be built"),
        (start(everybodys), f"others can write to {everybodys}; close it to them"),
        (start(theirs), f"others can write to {theirs}/llm_wsae/kernels; close it to them"),
        (start(asked, LLM_WSAE_NO_COMPILER="1"), ""),
    ]
    for process, reason in cases:
        found, complaint = process.communicate()
        assert found == "False\n" and complaint.count("\n") == bool(reason)
        assert reason in complaint
    assert not asked.exists()
