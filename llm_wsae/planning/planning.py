"""The plan of a run: rows, disk, memory, time by stage and money.

Sizes follow from what is asked (``sizes``). Times come from ``speeds``: measured here, or computed
for an accelerator that is not here.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch

from llm_wsae.data.config import HarvestConfig, StreamConfig
from llm_wsae.data.finishing import NO_ROWS
from llm_wsae.data.packing import Packer
from llm_wsae.errors import LlmWsaeError, UsageError, nearest
from llm_wsae.evaluation.activations import Context
from llm_wsae.evaluation.config import EvaluateConfig
from llm_wsae.hardware import choose_device, memory_of, peak_memory_bytes
from llm_wsae.harvesting import manifest_of
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.model.prepacking import prepackable
from llm_wsae.model.site import Site
from llm_wsae.outputs import existing, free_space
from llm_wsae.planning.report import Advice, Plan, Times, in_bytes
from llm_wsae.planning.sizes import Sizes, parameters_bytes
from llm_wsae.planning.speeds import ACCELERATORS, Speeds, measure, published
from llm_wsae.training.arm import ArmConfig, make_arms
from llm_wsae.training.config import BESIDE_BASELINES, ArchitectureName, TrainConfig
from llm_wsae.tuning import CANDIDATES, TRIAL_ROWS, TRIAL_TOKENS
from llm_wsae.weights.config import WeightConfig
from llm_wsae.weights.loss_weights import LossWeights
from llm_wsae.weights.rules import Rule

_SAMPLED = 8  # forward passes' worth of text that is looked at


def plan(
    model: LanguageModel,
    sites: Sequence[Site],
    *,
    rules: Sequence[str] = ("uniform", "variance", "whitening"),
    alphas: Sequence[float | Literal["auto"]] = (0.5,),
    ks: Sequence[int] = (32,),
    l1s: Sequence[float] = (),
    architectures: Sequence[ArchitectureName] = BESIDE_BASELINES,
    init_seeds: Sequence[int] = (0,),
    num_arms: int | None = None,
    contexts: Iterable[Context] | None = None,
    accelerator: str | None = None,
    price_per_hour: float | None = None,
    out: Path = Path("runs"),
    harvest_config: HarvestConfig = HarvestConfig(),  # noqa: B008 - frozen
    stream_config: StreamConfig | None = None,
    weight_config: WeightConfig = WeightConfig(),  # noqa: B008 - frozen
    train_config: TrainConfig = TrainConfig(),  # noqa: B008 - frozen
    evaluate_config: EvaluateConfig = EvaluateConfig(),  # noqa: B008 - frozen
) -> Plan:
    """What ``run`` with the same settings takes on this machine, or on an ``accelerator`` that is
    not here (one of ``ACCELERATORS``).

    Times are measured in a few seconds each, on some ``contexts`` of the text; without these, on
    random tokens. ``num_arms`` replaces the number of dictionaries that rules, k and seeds give.
    ``out`` lies on the disk whose free space counts; that of an accelerator elsewhere is not known.
    Where something does not fit, ``Plan.shortage`` says so, and no time is measured.

    Raises UsageError for a site that the model lacks and for settings that cannot be, LlmWsaeError
    for a text that gives no row.
    """
    peak = peak_memory_bytes()  # before anything is measured
    sites = sorted(set(sites))
    _check_asked(model, sites, accelerator)
    check_rows(harvest_config, train_config)
    sample = _sample(model, contexts, harvest_config)
    parsed = [Rule.parse(rule) for rule in rules]
    weights = _stand_ins(parsed, alphas, model.d_model, weight_config)
    arms = _counted(make_arms(weights, ks, l1s, init_seeds, architectures), num_arms)
    for arm in arms:
        arm.check(train_config.expansion * model.d_model)
    kept = sum(int(context.keep.sum()) for context in sample) / len(sample)
    rows = round(harvest_config.num_contexts * kept)
    if not rows:
        raise LlmWsaeError(NO_ROWS)
    steps = max(1, (train_config.tokens or rows) // train_config.batch_size)
    trained = steps * train_config.batch_size
    train_config = replace(train_config, tokens=trained)
    sizes = Sizes(
        sites=len(sites),
        rows=rows,
        d_in=model.d_model,
        d_sae=train_config.expansion * model.d_model,
        arms=len(arms),
        row_item=getattr(torch, manifest_of(model, {}, sites, harvest_config).dtype).itemsize,
        model_item=model.dtype.itemsize,
        model_bytes=parameters_bytes(model.hf_model),
        prepacked=sum(one.weight.nbytes for one in prepackable(model.hf_model)),
        batch_size=train_config.batch_size,
        spaces=sum(arm.weights.is_matrix for arm in arms),
        whitens=any(rule.need == "second_moment" for rule in parsed),
        harvest=harvest_config,
        stream=stream_config,
    )
    device = choose_device(train_config.device)
    card = None if accelerator is None else ACCELERATORS[accelerator]
    name, there = (str(device), memory_of(device)) if card is None else (card.name, card.memory)
    if card is None and device.type != "cuda":
        needed = sizes.host(peak, evaluate_config)
    else:
        needed = sizes.device(evaluate_config, there)
    place = existing(out)
    free = free_space(out) if card is None else None
    shortage = _shortage(sizes, free, place, needed, there, name, harvest_config.tokens)
    advice, why = _advice(sizes, free, trained)
    seconds: dict[str, float] = {}
    times: Times = "not measured"
    if shortage is None:
        if card is None:
            settings = harvest_config, train_config, evaluate_config
            speeds = measure(model, sites, arms, sample, place, *settings)
        else:
            size = harvest_config.context_size
            speeds = published(card, model, sites, arms, place, size, train_config)
        seconds = _seconds(speeds, sizes, train_config, evaluate_config, "auto" in alphas)
        name, times = speeds.device, "measured" if speeds.measured else "estimated"
    needs = {rule.need: rule.name for rule in parsed if rule.need in ("fisher", "coherence")}
    return Plan(
        model=model.name,
        sites=[str(site) for site in sites],
        device=name,
        tokens=harvest_config.num_contexts * harvest_config.context_size,
        rows=rows,
        trained_rows=trained,
        evaluated_rows=evaluate_config.tokens,
        arms=len(arms),
        d_in=sizes.d_in,
        d_sae=sizes.d_sae,
        store_bytes=sizes.store(),
        checkpoint_bytes=sizes.checkpoint(),
        dictionary_bytes=sizes.dictionaries() * len(sites),
        disk_bytes=sizes.disk(),
        disk_free=free,
        memory_bytes=needed,
        memory_there=there,
        times=times,
        seconds=seconds,
        price_per_hour=price_per_hour,
        advice=advice,
        why=why,
        shortage=shortage,
        notes=[f"not counted: what the rule {rule!r} measures" for rule in needs.values()],
    )


def _check_asked(model: LanguageModel, sites: Sequence[Site], accelerator: str | None) -> None:
    """Raises UsageError for no site, one that the model lacks, or an unknown accelerator."""
    if not sites:
        raise UsageError("there is no site to plan for; name at least one")
    for site in sites:
        model.check_site(site)
    if accelerator is not None and accelerator not in ACCELERATORS:
        hint = nearest(accelerator, ACCELERATORS)
        raise UsageError(f"there are no published numbers of {accelerator!r} here; {hint}")


def check_rows(harvesting: HarvestConfig, training: TrainConfig) -> None:
    """Raises UsageError for a harvest that cannot fill one batch of the training."""
    if training.tokens is None and harvesting.tokens < training.batch_size:
        raise UsageError(
            f"{harvesting.tokens:,} tokens are less than one batch of {training.batch_size:,}; "
            "harvest more"
        )


def _sample(
    model: LanguageModel, contexts: Iterable[Context] | None, config: HarvestConfig
) -> list[Context]:
    """Contexts to measure on. Raises UsageError for longer ones than the model reads."""
    Packer.for_model(model, config)
    if contexts is None:
        contexts = _random_contexts(model, config)
    wanted = min(_SAMPLED * config.contexts_per_batch, config.num_contexts)
    sample = list(islice(contexts, max(2, wanted)))
    if len(sample) < 2:
        raise LlmWsaeError("the text to plan for fills fewer than 2 contexts; provide more text")
    return sample


def _random_contexts(model: LanguageModel, config: HarvestConfig) -> Iterator[Context]:
    """Contexts of random tokens, none of them special, without end."""
    draw = torch.Generator().manual_seed(0)
    special = set(model.tokenizer.all_special_ids)
    usual = torch.tensor([i for i in range(len(model.W_E)) if i not in special])
    keep = torch.arange(config.context_size) >= max(
        config.drop_positions,
        int(config.drop_special and config.prepend_bos and model.bos_token_id is not None),
    )
    while True:
        drawn = torch.randint(len(usual), (config.context_size,), generator=draw)
        yield SimpleNamespace(ids=usual[drawn], keep=keep)


def _stand_ins(
    rules: Sequence[Rule],
    alphas: Sequence[float | Literal["auto"]],
    d_in: int,
    config: WeightConfig,
) -> list[LossWeights]:
    """Weights of the names and forms of those that will be chosen once there are rows. Their values
    do not matter, except that arms which do not share a space must not seem to."""
    found: dict[str, LossWeights] = {}
    for rule in rules:
        own = [float(alpha) for alpha in alphas if alpha != "auto"]
        if "auto" in alphas and rule.has_automatic_alpha:
            own = [CANDIDATES[0]]
        for alpha in (1.0,) if rule.is_plain else own:
            matrix = rule.form(config) == "matrix"
            gamma = torch.eye(d_in) if matrix else torch.ones(d_in)
            gamma *= 1 + len(found) / 1000
            weights = LossWeights(gamma, rule, alpha, rule.settings(config))
            found.setdefault(weights.name, weights)
    return list(found.values())


def _counted(arms: list[ArmConfig], wanted: int | None) -> list[ArmConfig]:
    """As many arms as wanted: the first ones, or all and more of the same kinds."""
    if wanted is None:
        return arms
    if wanted < 1 or not arms:
        raise UsageError("there is nothing to train: ask for at least one dictionary")
    seeds = 1 + max(arm.init_seed for arm in arms)
    rounds = range(-(-wanted // len(arms)))
    more = [replace(arm, init_seed=arm.init_seed + n * seeds) for n in rounds for arm in arms]
    return more[:wanted]


def _seconds(
    speeds: Speeds,
    sizes: Sizes,
    train: TrainConfig,
    evaluate: EvaluateConfig,
    auto: bool,
) -> dict[str, float]:
    """The times of all stages over all sites; with ``auto`` that of choosing α."""
    assert train.tokens is not None
    sites, config = sizes.sites, sizes.harvest
    of_steps = train.tokens * speeds.row
    seconds = sizes.together * of_steps  # that all sites take in turn, or together
    checkpoints = int(seconds / train.checkpoint_seconds) if train.checkpoint_seconds else 0
    saved = checkpoints * sizes.checkpoint() + sizes.dictionaries()
    tokens, of_moment = config.num_contexts * config.context_size, sizes.rows
    if sizes.stream is not None:  # which measures the covariance if a rule whitens
        first = sizes.stream.statistics_tokens
        of_moment = first * sizes.rows // tokens * sizes.whitens
        tokens = tokens * train.tokens // sizes.rows + first * (1 + sizes.whitens)
    found = {"harvest": tokens * speeds.token + sites * of_moment * speeds.moment}
    if sizes.whitens:
        found["weigh"] = sites * speeds.weigh
    if auto:
        share = (1 + len(CANDIDATES)) / sizes.arms
        trials = (
            sites * min(TRIAL_ROWS, train.tokens) * speeds.row + TRIAL_TOKENS * speeds.evaluated
        )
        found["choose α"] = share * trials
    found["train"] = sites * (of_steps + speeds.export + saved * speeds.byte)
    found["evaluate"] = evaluate.tokens * speeds.evaluated
    return found


def _shortage(
    sizes: Sizes, free: int | None, place: Path, needed: int, there: int, device: str, tokens: int
) -> str | None:
    """What does not fit, and the way out: of the disk of ``place``, with ``free`` bytes if that is
    known, or of the device's memory, ``needed`` bytes of ``there``. None if all fits."""
    if free is not None and sizes.disk() > free:
        rest = sizes.disk() - sizes.store()
        fit = max(0, int(tokens * (free - rest) / sizes.store()))
        way = f"ask for fewer tokens (about {fit:,} fit)" if fit else "train fewer or smaller ones"
        return (
            f"the run would need {in_bytes(sizes.disk())} on the disk of {place}, but "
            f"{in_bytes(free)} are free; {way}, or choose a folder on a larger disk"
        )
    if needed > there:
        return (
            f"the run would need {in_bytes(needed)} of memory, but {device} has {in_bytes(there)} "
            "in all; lower the expansion, or train fewer dictionaries at once"
        )
    return None


def _advice(sizes: Sizes, free: int | None, trained: int) -> tuple[Advice, str]:
    """Whether rows should be kept on the disk or made while they are trained on, and why."""
    if sizes.stream is not None:
        return "stream", "no rows are kept; a later training runs the model again"
    store, times = in_bytes(sizes.store()), trained / sizes.rows
    if free is not None and sizes.disk() > free >= sizes.disk() - sizes.store():
        return "stream", (
            f"a store of {store} and the dictionaries do not fit into {in_bytes(free)}; "
            f"llm-wsae run --stream keeps no rows, and runs the model over {times:.2g} × the tokens"
        )
    fits = f"it takes {store} of a disk" if free is None else f"its {store} fit on the disk"
    if times > 1:
        return "store", (
            f"{fits}, and the model reads the text once, where a stream would run it over "
            f"{times:.2g} × the tokens"
        )
    return "store", (
        f"{fits}; a stream would do for one pass, but each later training would run the model again"
    )
