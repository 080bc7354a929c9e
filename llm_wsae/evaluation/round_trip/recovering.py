"""``recover``: the recovery report of dictionaries, on the last rows of a store."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict

from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from llm_wsae.data.store import ActivationStore
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.errors import UsageError
from llm_wsae.evaluation.baselines import frozen_random
from llm_wsae.evaluation.round_trip.config import RecoverConfig
from llm_wsae.evaluation.round_trip.measuring import measure_round_trip
from llm_wsae.evaluation.round_trip.report import (
    Recovered,
    RecoveryNumbers,
    RecoveryReport,
    per_latent,
)
from llm_wsae.inspecting.firings import check_store

_ROWS_AT_ONCE = 1024  # as many as a dictionary encodes at once


def recover(
    dictionaries: Mapping[str, Dictionary],
    store: ActivationStore,
    config: RecoverConfig = RecoverConfig(),  # noqa: B008 - frozen
) -> RecoveryReport:
    """What dictionaries, by name, recover of their own codes on the last rows of a store.

    Theorem 1 of Cui et al. 2026 with each dictionary in the place of W_p: which latents vanish,
    shrink or appear when codes are decoded and encoded again, and what is missed of a latent that
    is added to rows. A random dictionary of the same shape and L0 is measured beside each.

    Raises UsageError if there is no dictionary or the store lacks its site; LlmWsaeError if its
    rows are of another width or model, cannot be read, or no latent fires on them.
    """
    if not dictionaries:
        raise UsageError("there is no dictionary to measure; name at least one")
    for dictionary in dictionaries.values():
        check_store(store, dictionary)
        store.source(dictionary.site)  # raises if the store lacks the site
    rows = min(config.rows, store.num_rows)
    found = {}
    total = 2 * rows * len(dictionaries)
    with tqdm(total=total, desc="recover", unit="row", unit_scale=True) as bar:
        for name, dictionary in dictionaries.items():
            found[name] = _recovered(dictionary, store, rows, config, bar)
    sites = {dictionary.site for dictionary in dictionaries.values()}
    return RecoveryReport(
        config=asdict(config),
        store={
            "folder": str(store.folder),
            "rows": {str(site): store.identity(site)["sha256"] for site in sorted(sites)},
        },
        dictionaries=found,
        notes=_notes(dictionaries, store),
    )


def _recovered(
    dictionary: Dictionary, store: ActivationStore, rows: int, config: RecoverConfig, bar: tqdm
) -> Recovered:
    statistics = store.statistics(dictionary.site)
    threshold = dictionary.info.massive_threshold
    if threshold is None:  # another tool's
        threshold = statistics.massive_threshold

    def batches() -> Iterator[Float[Tensor, "batch d_in"]]:
        reader = store.reader(dictionary.site)
        for start in range(store.num_rows - rows, store.num_rows, _ROWS_AT_ONCE):
            stop = min(start + _ROWS_AT_ONCE, store.num_rows)
            batch = reader.rows(start, stop).float()
            yield batch[batch.norm(dim=1) <= threshold]
            bar.update(stop - start)

    trained = measure_round_trip(dictionary, batches(), rows, config)
    mean = statistics.usual_sample.mean(0)
    beside = frozen_random(dictionary, mean, trained.sums.l0, config.seed)
    return Recovered(
        site=dictionary.info.site,
        sha256=dictionary.decoder_digest(),
        trained=RecoveryNumbers.of(trained),
        random=RecoveryNumbers.of(measure_round_trip(beside, batches(), rows, config)),
        per_latent=per_latent(trained),
    )


def _notes(dictionaries: Mapping[str, Dictionary], store: ActivationStore) -> list[str]:
    """A sentence for every dictionary that was trained on these rows."""
    return [
        f"{name} was trained on these rows; harvest others to see what it does on new text"
        for name, dictionary in dictionaries.items()
        if dictionary.info.store.get("sha256") == store.identity(dictionary.site)["sha256"]
    ]
