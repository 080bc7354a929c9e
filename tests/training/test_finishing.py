"""A finish through the model: its gradient, what it gains, and that it resumes."""

import os
import signal
from dataclasses import replace

import pytest
import torch
from looping import over
from training_cases import CPU, check_same

from llm_wsae.errors import UsageError
from llm_wsae.evaluation.config import EvaluateConfig
from llm_wsae.evaluation.fidelity.evaluator import FidelityEvaluator
from llm_wsae.model.site import Site
from llm_wsae.training.architecture import Batch
from llm_wsae.training.arm import Arm, ArmConfig, Pull, make_arms
from llm_wsae.training.config import TrainConfig
from llm_wsae.training.finishing import Finish, Replaced
from llm_wsae.training.trainer import Interrupted, train
from llm_wsae.weights.config import WeightConfig
from llm_wsae.weights.loss_weights import choose_weights
from llm_wsae.weights.weighing import measure_inputs

SITE = Site(1, "post")
SHORT = TrainConfig(expansion=4, tokens=64 * 60, batch_size=64, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def weights(store):
    inputs = measure_inputs(["whitening"], store, SITE)
    spaced = choose_weights(inputs, ["whitening"], [0.5], config=WeightConfig(place="space"))
    return [*choose_weights(inputs, ["uniform", "variance"], [0.5]), *spaced]


@over(number=(0, 1, 2))
def test_a_pulled_step_has_the_gradient_of_both_losses(weights, number):
    """By autograd, for the plain loss, a weighted one, and a space."""
    arm = Arm(ArmConfig(weights[number], k=3), 16, 64, CPU)
    draw = torch.Generator().manual_seed(1)
    x, g = torch.randn(2, 40, 16, generator=draw)
    plain = Batch(x, x, torch.ones(40))
    batch = arm.space.enter(plain) if arm.space else plain
    found = arm.evaluate(arm._pulled(batch, arm.evaluate(batch).residual, Pull(x.new_tensor(7), g)))

    leaves = [part.clone().requires_grad_() for part in arm.parameters]
    encoder, decoder, b_enc, b_dec = leaves
    before = (batch.x @ encoder.T + b_enc).relu()
    values, indices = before.topk(3)
    codes = torch.zeros_like(before).scatter(1, indices, values)
    made = codes @ decoder + b_dec
    error = ((made - batch.x) * arm.gamma).square().mean()
    as_rows = made if arm.space is None else arm.space.leave(made)
    (error + error.detach() / 7 * (as_rows * g).sum()).backward()
    for ours, leaf in zip([*found.summed(), found.by_decoder_bias], leaves, strict=True):
        torch.testing.assert_close(
            ours, leaf.grad, rtol=1e-3, atol=1e-5 * float(leaf.grad.abs().max())
        )


@over(point=("post", "mlp_out"))
def test_a_pull_is_the_gradient_of_the_divergence(store, model, point):
    """By differences, and in pieces as in one; rows that are not usual keep the model's own."""
    finish = Finish([store.source(SITE)], model, 200, 64, 0)
    text = next(finish.batch(0))
    site = Site(1, point)
    rows = torch.randn(int(text.keep.sum()), 16, generator=torch.Generator().manual_seed(2))
    text.there.update(model.activations(text.ids, [site, site.entrance]))
    usual = torch.arange(len(rows)) % 5 > 0

    def kl(shift):
        return finish.pulls(text, [Replaced(site, rows + shift, usual)])[0]

    _, gradient = kl(0)
    direction = gradient * rows.norm() / gradient.norm()
    up, down = (float(kl(step * direction)[0]) for step in (1e-2, -1e-2))
    assert (up - down) / 2e-2 == pytest.approx(float((gradient * direction).sum()), rel=0.02)
    assert not gradient[~usual].any() and gradient[usual].any()


def test_a_finish_lowers_the_divergence_and_resumes_with_the_same_bytes(
    store, model, weights, tmp_path, monkeypatch
):
    """Beside a finish whose steps know the error alone."""
    arms = make_arms(weights, [3], architectures=["topk", "batch-topk", "jumprelu"])
    source, config = store.source(SITE), replace(SHORT, finish=0.3, checkpoint_seconds=0.0)
    whole = train(source, arms, config, tmp_path / "whole", model)
    pulls, batch = Finish.pulls, Finish.batch

    def none(self, text, replaced):
        return [(kl, 0 * gradient) for kl, gradient in pulls(self, text, replaced)]

    def interrupting(self, number):
        if number == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return batch(self, number)

    with monkeypatch.context() as patched:
        patched.setattr(Finish, "pulls", none)
        alone = train(source, arms, config, tmp_path / "alone", model)
        patched.setattr(Finish, "pulls", pulls)
        patched.setattr(Finish, "batch", interrupting)
        with pytest.raises(Interrupted):
            train(source, arms, config, tmp_path / "killed", model)
    train(source, arms, config, tmp_path / "killed", model)
    check_same(tmp_path / "killed", tmp_path / "whole", [arm.name for arm in arms])

    text = [(ids, keep) for part in store.some_text(500) for ids, keep in zip(*part, strict=True)]
    evaluator = FidelityEvaluator(model, map(One, text), EvaluateConfig(tokens=400))
    before, after = (evaluator.evaluate(one).dictionaries for one in (alone, whole))
    ratios = {name: after[name].kl / before[name].kl for name in before}
    assert sum(ratio < 1 for ratio in ratios.values()) >= 8, ratios


class One:
    def __init__(self, pair):
        self.ids, self.keep = pair


def test_what_cannot_be_finished_is_refused(store, weights, tmp_path):
    config, arms = replace(SHORT, finish=0.2), make_arms(weights[:1], [3])
    nested = make_arms(weights[:1], [3], architectures=["matryoshka"])
    for source, own, said in (
        (store.source(SITE), arms, "name that of the store with --model"),
        (torch.randn(500, 16), arms, "needs the text of a store or stream"),
        (store.source(SITE), nested, "matryoshka takes no finish"),
    ):
        with pytest.raises(UsageError, match=said):
            train(source, own, config, tmp_path / "refused")
        assert not (tmp_path / "refused").exists()
    with pytest.raises(UsageError, match="must be below 1"):
        TrainConfig(finish=1.0)
