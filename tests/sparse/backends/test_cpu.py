"""What is particular to the C++ kernels: blocks, lists that overflow, threads, and their build."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from looping import over
from sparse_cases import ENCODINGS, SUMS, cast, integers, needs_compiler, random

from llm_wsae.errors import UsageError
from llm_wsae.sparse import operations
from llm_wsae.sparse.backends import build, cpu, reference
from llm_wsae.sparse.codes import Codes, RaggedCodes, SparseGradients, ragged


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of a few latents and tiles of a few rows, so that small inputs have several."""
    monkeypatch.setattr(cpu, "_TILE_ROWS", 70)
    monkeypatch.setattr(cpu, "_BLOCK_BYTES", 70 * 2 * 37)
    monkeypatch.setattr(cpu, "_FEW", 3)


@needs_compiler
@over(dtype=[torch.float32, torch.bfloat16], name=ENCODINGS)
def test_blocks_and_tiles_leave_no_trace(small_blocks, name, dtype):
    x, encoder, bias = cast(ENCODINGS[name], dtype)
    if name == "random":  # whose rounding depends on the block
        x, encoder, bias = x.round(), encoder.round(), bias.round()
    for k in (1, 5, 19):
        k = min(k, len(encoder))
        found = cpu.encode_topk(x, encoder, bias, k)
        expected = reference.encode_topk(x, encoder, bias, k)
        assert torch.equal(found.values.sort(descending=True).values, expected.values)
    threshold = integers(len(encoder)).abs().float()
    found = cpu.encode_above(x, encoder, bias, threshold)
    expected = reference.encode_above(x, encoder, bias, threshold)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    found = cpu.encode_batch_topk(x, encoder, bias, 3, 4.0)
    expected = reference.encode_batch_topk(x, encoder, bias, 3, 4.0)
    assert torch.equal(found.values.sort().values, expected.values.sort().values)


@needs_compiler
@over(k=[1, 32, 500])
def test_selection_from_many_latents(k):
    """Long rows: candidate lists are cut back many times, also where nearly all entries tie."""
    encoder = random(5000, 8, seed=1).float()
    for x in (random(100, 8).float(), torch.eye(8)[:1].expand(100, 8).contiguous()):
        for step in (1.0, 0.25):
            rounded = (encoder / step).round() * step
            found = cpu.encode_topk(x, rounded, torch.zeros(5000), k)
            pre = x @ rounded.T
            expected = pre.topk(k).values.relu()
            torch.testing.assert_close(found.values.sort(descending=True).values, expected)
            used = found.values > 0
            chosen = pre.gather(1, found.indices)[used]
            torch.testing.assert_close(chosen, found.values[used])
            assert all(
                len(set(row[kept].tolist())) == int(kept.sum())
                for row, kept in zip(found.indices, used, strict=True)
            )


@needs_compiler
def test_infinite_entries_do_not_hide():
    """A training that blows up must be seen to. (NaN in an encoder's row is not selected: the
    check of the finished weights finds it.)"""
    x = torch.tensor([[1e30, 1.0]])
    encoder = torch.tensor([[1e30, 0.0]] + [[0.0, 1.0]] * 31)
    codes = cpu.encode_topk(x, encoder, torch.zeros(32), 2)
    assert codes.values.max() == torch.inf and codes.indices[0, codes.values[0].argmax()] == 0


@needs_compiler
def test_the_number_of_threads_changes_no_bit():
    codes, x, decoder, bias, gradient = cast(SUMS["few latents hot"], torch.float32)
    columns = random(x.shape[1]).float()
    encoding = cast(ENCODINGS["random"], torch.float32)

    def everything():
        made = cpu.reconstruct(codes, decoder, bias, x, x[:, 0], columns, torch.bfloat16)
        gradients = SparseGradients(codes, x, gradient, made.by_value)
        sums = cpu.weight_gradients(gradients, len(decoder))
        rows, means, squares = (decoder.clone(), decoder.clone()), sums[:2], sums[:2]
        squares = tuple(square.abs() for square in squares)
        cpu.adam_rows(rows, (decoder, decoder), means, squares, 3, 0.1, None)
        cpu.sparse_adam(gradients, rows, means, squares, 4, 0.1, None)
        selected = cpu.encode_topk(*encoding, 9)
        return (*made, *sums, *rows, *squares, *selected)

    one = everything()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for first, second in zip(one, everything(), strict=True):
            assert torch.equal(first, second)
    finally:
        torch.set_num_threads(threads)


@needs_compiler
def test_rows_and_latents_need_not_be_contiguous():
    codes, x, decoder, bias, gradient = cast(SUMS["ragged"], torch.float32)
    apart = [torch.stack([t, t], -1)[..., 0] for t in (x, decoder, bias, gradient)]
    spread = RaggedCodes(*(torch.stack([part, part], -1)[:, 0] for part in codes))
    assert not apart[0].is_contiguous() and not spread.values.is_contiguous()
    found = cpu.decode(spread, apart[1], apart[2])
    assert torch.equal(found, cpu.decode(codes, decoder, bias))
    by_value = cpu.value_gradients(spread, apart[1], apart[3])
    assert torch.equal(by_value, cpu.value_gradients(codes, decoder, gradient))
    encoding = cast(ENCODINGS["odd width"], torch.float32)
    strided = [torch.stack([t, t], -1)[..., 0] for t in encoding]
    for one, other in zip(
        (*cpu.encode_topk(*strided, 5), *cpu.encode_above(*strided, strided[2] * 0)),
        (*cpu.encode_topk(*encoding, 5), *cpu.encode_above(*encoding, strided[2] * 0)),
        strict=True,
    ):
        assert torch.equal(one, other)
    for one, other in zip(
        cpu.weight_gradients(SparseGradients(spread, apart[0], apart[3], by_value), len(decoder)),
        cpu.weight_gradients(SparseGradients(codes, x, gradient, by_value), len(decoder)),
        strict=True,
    ):
        assert torch.equal(one, other)


@needs_compiler
@over(default=[torch.bfloat16, torch.float64])
def test_the_default_dtype_of_torch_changes_nothing(default):
    """The kernels write float32, so their memory must not follow it."""
    codes, x, decoder, bias, gradient = cast(SUMS["ragged"], torch.float32)
    encoding = cast(ENCODINGS["odd width"], torch.float32)
    calls = [
        lambda: [cpu.decode(codes, decoder, bias)],
        lambda: cpu.weight_gradients(
            SparseGradients(codes, x, gradient, codes.values), len(decoder)
        ),
        lambda: cpu.encode_topk(*encoding, 5),
        lambda: cpu.encode_above(*encoding, encoding[2] * 0),
        lambda: cpu.encode_batch_topk(*encoding, 5, 0.0),
    ]
    expected = [part for call in calls for part in call()]
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        found = [part for call in calls for part in call()]
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@needs_compiler
def test_weights_of_another_dtype_are_not_read_as_float32():
    """A user's γ may be float64."""
    codes, x, decoder, bias, _ = cast(SUMS["ragged"], torch.float32)
    row_weights, columns = torch.ones(len(x)), torch.rand(x.shape[1], dtype=torch.float64)
    found, expected = (
        operations.reconstruct(codes, decoder, bias, x, row_weights, weights, torch.float32)
        for weights in (columns, columns.float())
    )
    assert torch.equal(found.output_gradient, expected.output_gradient)
    wide = cast(SUMS["ragged"], torch.float64)
    for encoder in (wide.decoder, wide.decoder.bfloat16()):  # of float64 rows
        given = (wide.codes, wide.x, encoder, wide.decoder[:, 0])
        values = operations.exact_values(*given).values
        with operations.using("reference"):
            assert torch.allclose(values, operations.exact_values(*given).values)


@needs_compiler
@over(latent=[160, -1])
def test_a_latent_that_does_not_exist_is_refused(latent):
    """C++ would read whatever lies there; codes may come from a user (``Dictionary.decode``)."""
    codes = ragged(Codes(torch.tensor([[3, latent]]), torch.ones(1, 2)))
    with pytest.raises(UsageError, match=rf"{min(3, latent)} to {max(3, latent)}.* has 160"):
        cpu.decode(codes, torch.ones(160, 4), torch.ones(4))


@needs_compiler
def test_short_integers_are_taken_as_they_are():
    codes, _, decoder, bias, _ = cast(SUMS["ragged"], torch.float32)
    short = RaggedCodes(codes.indices.int(), codes.values, codes.offsets.int())
    found = cpu.decode(short, decoder, bias)
    assert torch.equal(found, cpu.decode(codes, decoder, bias))


SCRIPT = """
import torch
from llm_wsae.sparse import operations
from llm_wsae.sparse.backends import cpu
from llm_wsae.sparse.codes import Codes, ragged
codes = ragged(Codes(torch.tensor([[0, 1]]), torch.ones(1, 2)))
for _ in range(2):
    print(operations.decode(codes, torch.eye(2), torch.zeros(2)).tolist())
print(cpu.available())
"""


def in_a_process(**environment):
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | environment,
    )
    first, second, available = found.stdout.splitlines()
    assert first == second == "[[1.0, 1.0]]"
    return available == "True", found.stderr


@needs_compiler
def test_the_library_is_built_once_and_kept(tmp_path):
    """Also by two processes at once; only whole libraries are ever in the cache."""
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    both = [
        subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, env=environment)
        for _ in range(2)
    ]
    assert all(b"True" in process.communicate()[0] for process in both)
    (library,) = tmp_path.joinpath("llm_wsae", "kernels").iterdir()
    before = library.stat().st_mtime_ns
    assert in_a_process(XDG_CACHE_HOME=str(tmp_path)) == (True, "")
    assert library.stat().st_mtime_ns == before


def test_without_a_compiler_the_plain_operations_take_over(tmp_path):
    available, complaint = in_a_process(PATH="", CXX="", XDG_CACHE_HOME=str(tmp_path))
    assert not available and complaint.count("\n") == 1 and "none of g++" in complaint


def test_a_compiler_that_fails_is_quoted_once(tmp_path):
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\necho 'no room on the device' >&2\nexit 1\n")
    compiler.chmod(0o755)
    available, complaint = in_a_process(CXX=str(compiler), XDG_CACHE_HOME=str(tmp_path))
    assert not available and complaint.count("\n") == 1 and "no room on the device" in complaint


def test_a_cache_that_cannot_be_written_is_no_reason_to_stop(tmp_path):
    (tmp_path / "llm_wsae").write_text("a file where a folder should be")
    available, complaint = in_a_process(XDG_CACHE_HOME=str(tmp_path))
    assert not available and complaint.count("\n") == 1


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """Not one, but it writes a file; how often it did."""
    runs, program = tmp_path / "runs", tmp_path / "g++"
    program.write_text(
        f"#!/bin/sh\n[ $1 = --version ] && exit\necho >> {runs}\n"
        'for out; do :; done\necho machine code > "$out"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("CXX", str(program))
    return lambda: runs.read_text().count("\n")


def test_a_library_that_is_damaged_or_not_ones_own_is_built_again(tmp_path, compiler):
    folder = tmp_path / "llm_wsae" / "kernels"
    library = build._built(folder)
    assert build._built(folder) == library and compiler() == 1
    assert library.read_text() == "machine code\n" and folder.stat().st_mode & 0o777 == 0o700

    def half():
        library.write_bytes(library.read_bytes()[:5])

    def emptied():
        library.write_bytes(b"")

    def of_another():
        os.chown(library, 65534, -1)

    def open_to_all():
        library.chmod(0o666)

    damages = [half, emptied, open_to_all, *([of_another] if os.geteuid() == 0 else [])]
    for built, damage in enumerate(damages, 2):
        damage()
        assert build._built(folder) == library and compiler() == built
        assert library.read_text() == "machine code\n" and library.stat().st_uid == os.geteuid()


def test_a_library_is_on_the_disk_before_it_has_its_name(tmp_path, compiler, monkeypatch):
    """Or a loss of power could leave an empty one."""
    folder, done = tmp_path / "llm_wsae" / "kernels", []
    replace = os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: done.append(os.fstat(handle).st_ino))
    monkeypatch.setattr(os, "replace", lambda *names: done.append("renamed") or replace(*names))
    library = build._built(folder)
    assert done == [library.stat().st_ino, "renamed", folder.stat().st_ino]


def test_a_folder_that_others_can_write_to(tmp_path, compiler):
    folder = tmp_path / "llm_wsae" / "kernels"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    build._built(folder)
    assert folder.stat().st_mode & 0o777 == 0o755  # closed, since it is this user's
    tmp_path.chmod(0o777)
    with pytest.raises(build.BuildFailed, match=r"everybody can write to .*; set XDG_CACHE_HOME"):
        build._built(folder)
    tmp_path.chmod(0o1777)  # as /tmp is
    build._built(folder)
    if os.geteuid() == 0:
        os.chown(folder, 65534, -1)
        with pytest.raises(build.BuildFailed, match="kernels belongs to another user"):
            build._built(folder)


def test_a_user_without_a_home_is_no_reason_to_stop(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    with pytest.raises(build.BuildFailed, match="no folder to keep them in: no home"):
        build.cache_folder()


def test_it_can_be_asked_not_to_compile(tmp_path):
    asked = in_a_process(LLM_WSAE_NO_COMPILER="1", XDG_CACHE_HOME=str(tmp_path))
    assert asked == (False, "") and not list(tmp_path.iterdir())


def test_the_source_is_installed_with_the_package():
    """``[tool.setuptools.package-data]`` names it; without it there would be no C++ kernels."""
    assert all(source.is_file() for source in build.SOURCES) and operations.cpu is cpu
