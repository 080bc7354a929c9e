"""What is particular to Triton: ties, room for codes, waiting for the device, compilation. What the
operations compute is tested in ``../test_operations.py``, on a card where there is one.

Triton reads ``TRITON_INTERPRET`` when it is imported, so its interpreter on the CPU gets a process
of its own: one test here runs both files in it. That the kernels compile is tested without a card.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import sparse_cases as cases
import torch
from sparse_cases import D_IN, F32, INTERPRETED, SUMS, cast, everything, integers, over, random
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llm_wsae.machine.hardware import DeferredScalar
from llm_wsae.sparse import operations
from llm_wsae.sparse.codes import Product, RaggedCodes, SlotCapacity
from llm_wsae.training.architecture import Batch
from llm_wsae.training.arm import Arm, ArmConfig
from llm_wsae.weights.loss_weights import LossWeights
from llm_wsae.weights.rules import RULES

pytest.importorskip("triton", reason="Triton is not installed (it comes with torch for CUDA)")

DEVICE = "cpu" if INTERPRETED else "cuda"
D_SAE, BATCH = 17, 4
UNIFORM = RULES["uniform"]


@pytest.fixture(params=[pytest.param(DEVICE, marks=[] if INTERPRETED else pytest.mark.gpu)])
def triton(request, monkeypatch):
    """The implementation, used by all operations, with tiles that cut these small inputs."""
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    cases.cut_tiles("triton", monkeypatch)
    with cases.using("triton"):
        yield


def layer(batch=BATCH, d_in=D_IN, shift=0):
    """A product in float32 that is exact."""
    x, encoder, bias = cases.whole(batch, D_SAE, shift)
    return cast(Product(x[:, :d_in], encoder[:, :d_in], bias), F32, DEVICE)


@over(k=[7, 1, 40], tied=[True, False])
def test_ties_go_to_the_lowest_latents(triton, k, tied):
    pre = (integers(3, 40) if tied else random(3, 40)).float().to(DEVICE)
    expected = pre.sort(dim=1, descending=True, stable=True).indices[:, :k]
    best = operations.select_topk(pre, k)
    assert torch.equal(best.indices.sort(dim=1).values, expected.sort(dim=1).values)
    assert torch.equal(best.values, pre.gather(1, best.indices))  # of either sign


def test_numbers_that_are_not_finite_are_selected_so_that_they_are_seen(triton):
    pre = random(3, 40).float().to(DEVICE)
    pre[1, 34] = -torch.nan
    pre[2, 5], pre[2, ::2] = torch.inf, -torch.inf
    best = operations.select_topk(pre, 7)
    assert best.values.isnan().sum(1).tolist() == [0, 1, 0]
    assert 34 in best.indices[1].tolist() and 5 in best.indices[2].tolist()
    assert best.values[2].isfinite().sum() == 6


def test_rows_without_room_are_told_and_have_it_the_next_time(triton):
    product = layer(shift=200)  # all latents are active
    given = (product, torch.zeros(D_SAE, device=DEVICE))
    little = SlotCapacity()
    little.slots = 5
    codes = operations.encode_above(*given, little)
    assert not little.enough() and little.enough()  # a report is read once
    assert codes.offsets.tolist() == [5 * i for i in range(BATCH + 1)]
    pre = product.pre()
    assert torch.equal(pre.gather(1, codes.indices.view(BATCH, 5)), codes.values.view(BATCH, 5))
    codes = operations.encode_above(*given, little)
    assert little.enough() and torch.equal(cases.dense(codes, codes.values, D_SAE), pre)


def test_a_batch_has_as_many_slots_whatever_the_guess(triton):
    given = layer()
    first, *others = (operations.encode_batch_topk(given, 5, guess) for guess in (0.0, 7.0, 1e9))
    assert len(first.values) == 5 * BATCH
    for other in others:
        assert all(map(torch.equal, first, other))


class Watched(TorchDispatchMode):
    """Records what would wait for the device, and the largest tensor made; what was asked for first
    and is read later does not count."""

    # lift_fresh: a number that a tensor is made of is copied to the device.
    waits = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount", "is_nonzero",
             "lift_fresh")  # fmt: skip

    def __init__(self, monkeypatch):
        super().__init__()
        self.waited, self.largest, self._reading = [], 0, False
        tolist, read = torch.Tensor.tolist, DeferredScalar.read

        def watched_tolist(tensor):
            self.waited.append("tolist")
            return tolist(tensor)

        def watched_read(number):
            self._reading = True
            found = read(number)
            self._reading = False
            return found

        monkeypatch.setattr(torch.Tensor, "tolist", watched_tolist)
        monkeypatch.setattr(DeferredScalar, "read", watched_read)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function._schema.name
        waits = any(word in name for word in self.waits)
        if name in ("aten::index", "aten::index_put", "aten::index_put_"):
            waits = any(i is not None and i.dtype == torch.bool for i in args[1])
        if name == "aten::repeat_interleave":
            waits = kwargs.get("output_size") is None
        if waits and not self._reading:
            self.waited.append(name)
        made = function(*args, **kwargs)
        for one in tree_leaves(made):
            if isinstance(one, torch.Tensor) and one.dtype != torch.uint8:  # the interpreter's
                self.largest = max(self.largest, one.numel())
        return made


def test_no_operation_waits_for_the_device(triton, monkeypatch):
    given = layer(batch=10), cast(SUMS["nothing used"], F32, DEVICE)
    with Watched(monkeypatch) as watched:
        everything(*given)
    assert watched.waited == []
    if DEVICE == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            everything(*given)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_no_encoding_holds_all_pre_activations(triton, monkeypatch):
    product, threshold = layer(batch=10, d_in=4), torch.full((D_SAE,), 9.0, device=DEVICE)
    some = Product(product.x, product.encoder[:9], product.bias[:9])
    with Watched(monkeypatch) as watched:
        operations.encode_topk(product, 3)
        operations.encode_batch_topk(product, 1, 0.0)
        operations.encode_above(product, threshold, SlotCapacity())
        operations.encode_dead(some, threshold[:9] > 0, 3)
    assert 0 < watched.largest < 10 * D_SAE


@pytest.mark.parametrize(
    "architecture", ["topk", "batch-topk", "matryoshka", "jumprelu", "dense relu", "sparse relu"]
)
def test_no_whole_step_waits_for_the_device(triton, architecture, monkeypatch):
    """With a masked row, and with dead latents that were looked for in the first step."""
    weights, relu = LossWeights(torch.ones(8), UNIFORM), architecture.endswith(" relu")
    kind = {"l1": 0.1, "architecture": "relu"} if relu else {"k": 2, "architecture": architecture}
    arm = Arm(ArmConfig(weights, **kind), 8, D_SAE, torch.device(DEVICE))
    arm._finder._waits = True  # as on a card
    if relu:
        arm.parameters.encoder_bias.fill_(-2.4 if architecture == "sparse relu" else -0.3)
    arm.last_fired.fill_(-10_000)
    x = layer(batch=6, d_in=8).x.contiguous()
    mask = (torch.arange(6, device=DEVICE) != 3).float()
    x *= mask[:, None] / x.std()
    batch = Batch(x, x, mask)
    arm.step(batch, 6, 0.01, 1 / 32, 1600)
    before = arm.parameters.encoder.clone()
    with monkeypatch.context() as patch, Watched(patch) as watched:
        arm.step(batch, 12, 0.01, 1 / 32, 1600)
    assert watched.waited == []
    if relu:
        assert (arm.architecture._active_share.read() < 1 / 64) == (architecture == "sparse relu")
    moved = (arm.parameters.encoder != before).any(1)
    assert moved[arm.dead(12, 1600)].any() == arm.architecture.revives_dead


@over(l1=[None, 0.1])
def test_a_step_that_lacked_room_is_made_again(triton, l1):
    """The same numbers come out as with the implementation that needs none."""
    x = random(6, D_IN).float().to(DEVICE)
    batch, weights = Batch(x, x, torch.ones_like(x[:, 0])), LossWeights(torch.ones(D_IN), UNIFORM)
    kind = {"l1": l1, "architecture": "relu"} if l1 else {"k": 12, "architecture": "jumprelu"}
    found = []
    for name in ("triton", "pytorch"):
        arm = Arm(ArmConfig(weights, **kind), D_IN, D_SAE, torch.device(DEVICE))
        arm.parameters.encoder_bias.fill_(1)
        if l1:  # so that it goes sparse
            arm.architecture.follow(torch.tensor(0.001, device=DEVICE), 0.01)
        arm.architecture._capacity.slots = 2
        with cases.using(name):
            step = arm.evaluate(batch)
        assert (arm.architecture._capacity.slots > 2) == (name == "triton")
        found.append((step.firings, step.observed, *step.summed(), step.by_decoder_bias))
    assert float(found[0][0].sum()) > 6 * 4
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


if not INTERPRETED:

    @pytest.mark.slow
    def test_all_of_this_in_the_interpreter():
        operations_too = Path(__file__).parents[1] / "test_operations.py"
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__, operations_too],
            env=os.environ | {"TRITON_INTERPRET": "1"},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
        outcome = run.stdout.splitlines()[-1]
        assert int(re.match(r"(\d+) passed", outcome)[1]) > 25 and "skipped" not in outcome

    @pytest.mark.slow
    def test_the_kernels_compile_for_a_card_without_one(monkeypatch, tmp_path):
        """To machine code for an H100, specialised as each launch would be."""
        from triton import runtime
        from triton.backends.compiler import GPUTarget

        from llm_wsae.sparse.backends import triton

        card = SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
            get_current_device=lambda: 99,  # a number of its own in the caches of a real card
            get_current_stream=lambda device: 0,
            utils=SimpleNamespace(get_device_properties=lambda device: {"max_shared_mem": 232448}),
        )
        compiled = {}

        def compile_only(kernel, grid, *arguments, **constants):
            binary = kernel.warmup(*arguments, grid=grid, enable_fp_fusion=True, **constants)
            compiled.setdefault(kernel.__name__, []).append(binary.asm)
            if kernel.__name__ == "_select_kernel":
                arguments[2].zero_()  # the places that it would write are read again

        monkeypatch.setattr(runtime.driver, "_active", card)
        monkeypatch.setattr(triton, "_run", compile_only)
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        rows, encoder, vector = torch.zeros(40, 768), torch.zeros(5000, 768), torch.zeros(5000)
        codes = RaggedCodes(torch.zeros(1280).long(), torch.zeros(1280), torch.arange(41) * 32)
        case = cases.Sums(codes, rows, encoder, rows[0], rows)
        with cases.using("triton"):
            for dtype in (F32, cases.BF16):  # of products
                everything(cast(Product(rows, encoder, vector), dtype), case, dtype)
        kernels = {name for name in vars(triton) if name.endswith("_kernel")}
        assert compiled.keys() == kernels
        assert all(code["cubin"] for codes in compiled.values() for code in codes)
        for code in compiled["_sparse_adam_kernel"][2:]:
            assert "cvt.rn.bf16" in code["ptx"]  # rounded to nearest, which the interpreter isn't
