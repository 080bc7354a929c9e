"""How large a run becomes on the disk and in memory: sums over what its stages keep."""

from dataclasses import dataclass

import torch

from llm_wsae.data.config import HarvestConfig, StreamConfig
from llm_wsae.data.shard_writer import sampled_rows
from llm_wsae.data.shuffling import WINDOW_BYTES
from llm_wsae.evaluation.activations import CACHE_BYTES
from llm_wsae.evaluation.config import EvaluateConfig
from llm_wsae.evaluation.fidelity.evaluator import sites_together
from llm_wsae.evaluation.fidelity.splicing import HELD_BYTES
from llm_wsae.statistics.moments import SAMPLE_ROWS, Statistics
from llm_wsae.training.optimiser import PAIR_BYTES

_FILE = 1024  # of a file's header, and of its entry in the manifest
_TOKEN = 3 * 4 + 1  # id, document and offset, and whether it gives a row
_WINDOWS = 3  # in memory: one is cut into batches while the next is read and shuffled
_TRAINED = PAIR_BYTES + 2  # and the encoder in the number format of the products


@dataclass(frozen=True)
class Sizes:
    """All that the bytes of a run follow from."""

    sites: int
    rows: int
    """At each site."""
    d_in: int
    d_sae: int
    arms: int
    row_item: int
    """Bytes of a number in the store."""
    model_item: int
    """Bytes of a number in the model."""
    model_bytes: int
    prepacked: int
    """Bytes of the copies of weights that an evaluation on the processor multiplies with."""
    batch_size: int
    spaces: int
    """Arms with a matrix Γ."""
    whitens: bool
    """Whether a rule whitens: a stream then measures the covariance, which a store always has."""
    harvest: HarvestConfig
    stream: StreamConfig | None = None
    """How rows are streamed, if they are not kept."""

    @property
    def together(self) -> int:
        """Sites whose arms are trained at once: of a stream all, of a store one after the other."""
        return 1 if self.stream is None else self.sites

    @property
    def matrix(self) -> int:
        """Weights of an encoder, or of a decoder."""
        return self.d_in * self.d_sae

    def store(self) -> int:
        """Rows, tokens, statistics and covariance sums. A stream has only the last two."""
        if self.stream is not None:
            tensors = Statistics(self.d_in, self.stream.context_size).to_tensors()
            own = sum(tensor.nbytes for tensor in tensors.values())
            own += SAMPLE_ROWS * self.d_in * 4 + 8 * self.d_in * (self.d_in + 1) * self.whitens
            return self.sites * own
        config = self.harvest
        shards = -(-config.num_contexts // config.contexts_per_shard)
        statistics = Statistics(self.d_in, config.context_size).to_tensors()
        moments = sum(tensor.nbytes for tensor in statistics.values())
        row = self.d_in * self.row_item
        of_shard = sampled_rows(config.contexts_per_shard * config.context_size)
        of_shard = min(of_shard, self.rows // shards)
        sample = shards * of_shard + min(SAMPLE_ROWS, shards * of_shard)
        site = self.rows * row + sample * (row + 8) + (shards + 1) * moments + 2 * shards * _FILE
        site += 8 * self.d_in * (self.d_in + 1)
        tokens = config.num_contexts * config.context_size * _TOKEN + shards * _FILE
        return self.sites * site + tokens

    def checkpoint(self) -> int:
        """One checkpoint of all arms of a site: weights with their moments, and when latents last
        fired."""
        state = PAIR_BYTES * self.matrix + PAIR_BYTES // 2 * (self.d_sae + self.d_in)
        state += 8 * self.d_sae
        return self.arms * state

    def dictionaries(self) -> int:
        """The folders of one site."""
        weights = 2 * self.matrix + self.d_sae + self.d_in
        gamma = self.arms * self.d_in + self.spaces * self.d_in * (self.d_in - 1)
        return 4 * (self.arms * (weights + 3 * self.d_in) + gamma)

    def disk(self) -> int:
        """The most at a time: a checkpoint is replaced by a new one, and in the end by the
        dictionaries. Beside it lie those of the other sites, or their dictionaries."""
        own, checkpoint = self.dictionaries(), self.checkpoint()
        other = own if self.together == 1 else max(checkpoint, own)
        return self.store() + (self.sites - 1) * other + checkpoint + max(checkpoint, own)

    def host(self, before: int, evaluate: EvaluateConfig) -> int:
        """The most in memory at a time where all is computed on the processor, and ``before`` is
        what Python and the loaded model take."""
        row = self.d_in * self.row_item
        harvest = self.sites * row * self.harvest.contexts_per_shard * self.harvest.context_size
        windows = _WINDOWS * min(WINDOW_BYTES, self.rows * row)
        if self.stream is not None:
            windows = 2 * self.sites * self.stream.buffer_tokens * self.d_in * self.model_item
            harvest = 0
        trained = (self.sites - self.together) * self._loaded  # of the sites before the last
        train = trained + self._training() + max(windows, self._export())
        evaluation = self._evaluation(evaluate, self.sites) + self.prepacked
        return before + max(harvest, train, evaluation)

    def device(self, evaluate: EvaluateConfig, memory: int) -> int:
        """The most in an accelerator's memory, of ``memory`` bytes, the model included."""
        free = memory - self.model_bytes
        at_once = max(sites_together([self._loaded] * self.sites, memory, free))
        return self.model_bytes + max(self._training(), self._evaluation(evaluate, at_once))

    def _training(self) -> int:
        weights = self.together * self.arms * _TRAINED * self.matrix
        return weights + self.batch_size * self.d_sae * 4

    @property
    def _loaded(self) -> int:
        """The dictionaries of a site in memory."""
        return self.arms * 2 * 4 * self.matrix

    def _export(self) -> int:
        """The dictionaries beside their arms; one of them in float64."""
        return self.together * self._loaded + 2 * 8 * self.matrix

    def _evaluation(self, config: EvaluateConfig, sites: int) -> int:
        """What ``sites`` evaluated together take: their dictionaries; the activations of the text,
        at the sites and after the last block; and those after the last block once for each variant
        of a batch (zeros, the mean, and every dictionary twice: massive rows may be replaced)."""
        row = self.d_in * self.model_item
        kept = min(CACHE_BYTES, (self.sites + 1) * config.tokens * row)
        of_batch = min(config.batch_tokens, config.tokens) * row
        held = min(HELD_BYTES + 2 * of_batch, sites * (2 * self.arms + 2) * of_batch)
        return kept + sites * self._loaded + held


def parameters_bytes(model: torch.nn.Module) -> int:
    """Of all parameters and buffers."""
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
