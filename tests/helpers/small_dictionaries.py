"""Small dictionaries with everything a real one remembers, for tests of files and of the Hub."""

import torch

from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.explanations import Explanation, Score
from llm_wsae.dictionary.info import DictionaryInfo
from llm_wsae.dictionary.sparsity import ReLU, Sparsity, TopK

SITE = "blocks.1.hook_resid_post"
FIDELITY = {
    "rows": 5000, "fvu": 0.25, "explained_variance": 0.75, "l0": 3.5, "dead_share": 0.125,
    "dense_share": 0.0625, "ce_clean": 3.0, "ce_spliced": 3.25, "ce_mean_ablated": 8.0,
    "ce_zero_ablated": 13.0, "ce_recovered": 0.975, "ce_recovered_interval": [0.96, 0.99],
    "ce_recovered_mean": 0.95, "kl": 0.5,
}  # fmt: skip


SCORES = {"detection": Score(0.75, (0.5, 1.0), 16, 15)}


def said_of(
    latent: int, text: str | None, scores: dict[str, Score] | None = None, by: str = "a model"
) -> Explanation:
    return Explanation(latent, text, by, scores or {})


def make_info(name: str = "plain-k4", **changes) -> DictionaryInfo:
    values = dict(
        site=SITE,
        name=name,
        rule="variance",
        alpha=-0.25,
        seed=3,
        context_size=64,
        prepend_bos=True,
        massive_threshold=123.5,
        model={"name": "owner/tiny-lm", "revision": "0" * 40},
        corpus={"name": "owner/words:english+sotu"},
        store={"num_rows": 12_345},
        training={"num_steps": 6, "batch_size": 2048, "learning_rate": 0.003},
        metrics={"training": {"fvu": 0.3}, "fidelity": FIDELITY},
    )
    return DictionaryInfo(**{**values, **changes})


def make_dictionary(
    name: str = "plain-k4",
    seed: int = 0,
    d_in: int = 12,
    d_sae: int = 80,
    sparsity: Sparsity = TopK(4),  # noqa: B008 - frozen
    **info,
) -> Dictionary:
    draw = torch.Generator().manual_seed(seed)
    return Dictionary(
        W_enc=torch.randn(d_in, d_sae, generator=draw),
        W_dec=torch.randn(d_sae, d_in, generator=draw),
        b_enc=torch.randn(d_sae, generator=draw),
        b_dec=torch.randn(d_in, generator=draw),
        threshold=torch.rand(d_sae, generator=draw) * 3 if sparsity.has_threshold else None,
        sparsity=sparsity,
        info=make_info(name, **info),
        extras={
            "gamma": torch.rand(d_in, generator=draw) + 0.5,
            "robust_variance": torch.rand(d_in, generator=draw) + 0.1,
        },
    )


def of_matrices(
    W_enc: torch.Tensor,
    W_dec: torch.Tensor,
    b_dec: torch.Tensor | None = None,
    sparsity: Sparsity = ReLU(),  # noqa: B008 - frozen
    site: str = SITE,
    **info,
) -> Dictionary:
    """A dictionary that remembers nothing else; without b_dec it is 0, as b_enc is."""
    d_in, d_sae = W_enc.shape
    b_dec = torch.zeros(d_in) if b_dec is None else b_dec
    matrices = {"W_enc": W_enc, "W_dec": W_dec, "b_enc": torch.zeros(d_sae), "b_dec": b_dec}
    return Dictionary(**matrices, sparsity=sparsity, info=DictionaryInfo(site=site, **info))


def like(one: Dictionary, **changes) -> Dictionary:
    """A dictionary with other tensors, sparsity or info."""
    names = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold", "sparsity", "info")
    return Dictionary(**{name: getattr(one, name) for name in names} | changes)
