"""SAEBench's core evaluation of our dictionaries: as SAELens loads them, and as ours through
SAEBench's interface for other people's classes.

The model has two random blocks and the tokens are random: what is compared are two ways to one
dictionary. ``job.json`` leads from a name to a folder.
"""

import json

import torch
from sae_bench.custom_saes.base_sae import BaseSAE
from sae_bench.evals.core.eval_config import CoreEvalConfig
from sae_bench.evals.core.main import run_evals
from sae_bench.sae_bench_utils.general_utils import load_and_format_sae
from sae_lens import SAE
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig
from written import D_IN, OUT, done

from llm_wsae.dictionary.dictionary import Dictionary

CONTEXT, PROMPTS, VOCABULARY = 32, 8, 200


class Ours(BaseSAE):
    """A dictionary of ours with what SAEBench asks of anybody's."""

    def __init__(self, dictionary: Dictionary):
        super().__init__(
            dictionary.d_in,
            dictionary.d_sae,
            "tiny",
            dictionary.site.block,
            torch.device("cpu"),
            torch.float32,
            hook_name=str(dictionary.site),
        )
        self.dictionary = dictionary
        for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
            getattr(self, name).data = getattr(dictionary, name).data

    def encode(self, x: Tensor) -> Tensor:
        return self.dictionary.encode(x)

    def decode(self, feature_acts: Tensor) -> Tensor:
        return self.dictionary.decode(feature_acts)

    def forward(self, x: Tensor) -> Tensor:
        return self.dictionary(x)


class Tokens:
    """As much of an activation store as the evaluation uses: the same random tokens each time."""

    context_size, store_batch_size_prompts = CONTEXT, PROMPTS

    def __init__(self):
        self.reset_input_dataset()

    def reset_input_dataset(self) -> None:
        self._generator = torch.Generator().manual_seed(0)

    def get_batch_tokens(self, number: int) -> Tensor:
        return torch.randint(VOCABULARY, (number, CONTEXT), generator=self._generator)


torch.manual_seed(0)
model = HookedTransformer(
    HookedTransformerConfig(
        n_layers=2,
        d_model=D_IN,
        n_ctx=CONTEXT,
        d_head=12,
        act_fn="gelu",
        d_vocab=VOCABULARY,
        default_prepend_bos=False,
        device="cpu",
        init_weights=True,
    )
)
config = CoreEvalConfig(
    batch_size_prompts=PROMPTS,
    n_eval_reconstruction_batches=4,
    n_eval_sparsity_variance_batches=4,
    compute_kl=True,
    compute_ce_loss=True,
    compute_l2_norms=True,
    compute_sparsity_metrics=True,
    compute_variance_metrics=True,
    compute_featurewise_density_statistics=True,
    compute_featurewise_weight_based_metrics=True,
)


def measure(sae: object) -> dict[str, object]:
    """All that the evaluation finds."""
    _, sae, _ = load_and_format_sae("ours", sae, "cpu")
    found, by_latent = run_evals(sae, Tokens(), model, config)
    return {"metrics": found, "latents": by_latent}


results = {}
for name, folder in json.loads((OUT / "job.json").read_text()).items():
    results[name] = {
        "SAELens": measure(SAE.load_from_disk(folder)),
        "ours": measure(Ours(Dictionary.load(folder))),
    }
(OUT / "results.json").write_text(json.dumps(results))
done("sae-bench", "sae-lens", "transformer-lens")
