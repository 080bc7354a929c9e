"""Measures what weight rules need beyond the statistics: covariance, Fisher information, a decoder.
What took minutes is kept with the rows, and read from there the next time.

The Fisher information is F = E[g gᵀ], g = ∂ log p(y | x) / ∂h, with y drawn from the model itself.
A small change δ of the activation h moves the predictions by ½ δᵀFδ (KL divergence, second order).
One backward pass per context is enough: with independently drawn labels the gradients of different
predictions are uncorrelated, E[(Σ_t g_t)(Σ_t g_t)ᵀ] = Σ_t E[g_t g_tᵀ], summed over all predictions
from the position to the end of its text.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from llm_wsae.data.rows import ActivationSource, SiteRows, SiteSource, source_of, target_of
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.machine.processes import join, progress
from llm_wsae.model.site import Site
from llm_wsae.statistics.moments import Statistics
from llm_wsae.weights.config import RuleInputConfig
from llm_wsae.weights.rules import Rule
from llm_wsae.weights.scoring import RuleInputs, check_rows_of_covariance

if TYPE_CHECKING:  # it takes seconds to import, and most rules need none
    from llm_wsae.model.language_model import LanguageModel

_TOKENS_AT_ONCE = 1024  # memory holds three times the size of their float32 logits


def measure_inputs(
    rules: Iterable[Rule | str],
    rows: SiteRows | ActivationSource | Tensor | np.ndarray,
    site: Site | None = None,
    *,
    model: "LanguageModel | None" = None,
    dictionary: Dictionary | None = None,
    config: RuleInputConfig = RuleInputConfig(),  # noqa: B008 - frozen
) -> RuleInputs:
    """The statistics of a site, and what the rules need in addition.

    ``rows``: a store or the streams of a model, with one of their sites; or what is trained on, a
    source or rows of one's own. A transcoder's weights are of what it writes. What cannot be
    measured without a ``model`` (a stream has its own) or a ``dictionary``, and is not kept, is
    omitted: the rule will name it. Under ``torchrun`` all processes make the same call. Raises
    UsageError for a dictionary of another site, or rows that cannot be trained on; LlmWsaeError for
    a model that did not make the store.
    """
    needs = {Rule.parse(rule).need for rule in rules}
    source = source_of(rows.source(site) if isinstance(rows, SiteRows) and site else rows)
    source = target_of(source)
    processes = join()
    with processes.together():
        own = source.statistics()
        own.check_varying()
        found: dict[str, Any] = {"statistics": own}
        if "second_moment" in needs:
            check_rows_of_covariance(own.count, own.d_in)
            found["second_moment"] = source.second_moment()
        if not processes.leads:
            processes.meet()  # rank 0 has measured, and kept what the others read
        if "dictionary" in needs and dictionary is not None:
            found["decoder"], found["energy"] = used_decoder(dictionary, source.site, own)
        if "fisher" in needs and isinstance(source, SiteSource):  # which has text
            found["fisher"] = _kept_fisher(source.rows, source.site, model, config)
        if processes.leads:
            processes.meet()
    return RuleInputs(**found)


def _kept_fisher(
    rows: SiteRows, site: Site, model: "LanguageModel | None", config: RuleInputConfig
) -> Tensor | None:
    """The measurement that is kept, or made with the model and then kept; else None."""
    kept = rows.evidence(site, "fisher", **asdict(config))
    found, model = kept.read(), model or rows.model
    if found is not None:
        return found["fisher"]
    if model is None:
        return None
    rows.check_model(model.identity())
    tokens = min(config.sensitivity_tokens, rows.statistics(site).count)

    def contexts() -> Iterator[tuple[Tensor, Tensor]]:
        with progress("sensitivity", tokens, "tok") as bar:
            for ids, keep in rows.some_text(config.sensitivity_tokens):
                yield ids, keep
                bar.update(int(keep.sum()))

    measured = fisher_information(model, contexts(), site, config.seed)
    kept.write({"fisher": measured})
    return measured


def used_decoder(
    dictionary: Dictionary, site: Site, statistics: Statistics
) -> tuple[Float[Tensor, "latents d_in"], Float[Tensor, " latents"]]:
    """Decoder rows of the latents that fire on the site's usual sample, and E z² of each. Raises
    UsageError for a dictionary of another site."""
    if dictionary.site != site:
        raise UsageError(
            f"the dictionary {dictionary.info.name!r} explains {dictionary.site}, not {site}; "
            "pass one of the same site"
        )
    with torch.no_grad():
        sample = statistics.usual_sample.to(dictionary.W_enc.device)
        codes = dictionary.encode_sparse(sample)
        indices, values = codes.indices.flatten().cpu(), codes.values.flatten().cpu().double()
        energy = torch.zeros(dictionary.d_sae, dtype=torch.float64)
        energy.index_add_(0, indices, values.square())
        energy /= max(len(sample), 1)
        used = energy > 0
        return dictionary.W_dec.detach().cpu()[used], energy[used]


def fisher_information(
    model: "LanguageModel",
    contexts: Iterable[
        tuple[Integer[Tensor, "contexts positions"], Bool[Tensor, "contexts positions"]]
    ],
    site: Site,
    seed: int = 0,
) -> Float[Tensor, "d_model d_model"]:
    """Mean of g gᵀ over the kept positions of the contexts, float64 on the CPU.

    ``contexts`` yields token ids with a mask of the positions that count, some contexts at a time;
    ``seed`` determines the labels. Raises UsageError for a site that the model lacks, LlmWsaeError
    if no position is kept or a prediction or gradient is not finite.
    """
    model.check_site(site)
    total = torch.zeros(model.d_model, model.d_model, dtype=torch.float64)
    count = 0
    generator = torch.Generator(device=model.device).manual_seed(seed)
    for ids, keep in contexts:
        size = max(1, _TOKENS_AT_ONCE // ids.shape[1])
        for part, kept in zip(ids.split(size), keep.split(size), strict=True):
            kept = kept.to(model.device)
            gradients = _gradients(model, part, kept, site, generator)[kept].float()
            total += (gradients.T @ gradients).cpu().double()
            count += len(gradients)
    if count == 0:
        raise LlmWsaeError("there is no text on which to measure the model's sensitivity")
    if not bool(torch.isfinite(total).all()):
        raise _not_finite("gradients", model, site)
    return total / count


def _not_finite(what: str, model: "LanguageModel", site: Site) -> LlmWsaeError:
    return LlmWsaeError(
        f"the {what} of {model.name} at {site} are not finite; load the model in float32 "
        "(--model-dtype float32)"
    )


def _gradients(
    model: "LanguageModel", ids: Tensor, keep: Tensor, site: Site, generator: torch.Generator
) -> Float[Tensor, "contexts positions d_model"]:
    """∂ Σ_t log p(y_t) / ∂h at every position, y drawn from the model's predictions; t runs to the
    last position that is kept, so that nothing is predicted from padding."""
    scored = keep.flip(1).cumsum(1).flip(1) > 0
    hidden = model.activations(ids, [site])[site].requires_grad_()
    with torch.enable_grad():
        logits = model.resume(ids, site, hidden).flatten(0, 1).float()
        chances = logits.detach().softmax(-1)
        if bool(chances.isnan().any()):
            raise _not_finite("predictions", model, site)
        labels = torch.multinomial(chances, 1, generator=generator).squeeze(1)
        losses = F.cross_entropy(logits, labels, reduction="none")
        return torch.autograd.grad(-losses[scored.flatten()].sum(), hidden)[0]
