"""Tiny models as dictionaries are attached to them, plain and as a bridge, and what is on them."""

import functools

import pytest
import torch
from looping import looped, over
from small_dictionaries import make_dictionary
from tiny import BLOCKS, KNOWN, WIDTH, tiny_hf_model, tiny_tokenizer

from llm_wsae.model.language_model import LanguageModel

SITE = "blocks.1.hook_resid_post"
both = over(backend=("transformers", "bridge"))


def families(*names):
    return looped("model", names or KNOWN, model_of)


@functools.cache
def model_of(family):
    return LanguageModel.from_live(tiny_hf_model(family), tiny_tokenizer())


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 50, (3, 11), generator=torch.Generator().manual_seed(1))


def sites_of(model):
    points = ("pre", "mid", "post") if model.paths.mid else ("pre", "post")
    return [f"blocks.{b}.hook_resid_{point}" for b in (0, 2, BLOCKS - 1) for point in points]


def dictionary(site=SITE, seed=0, **info):
    """80 latents for the tiny models, 4 active; no row is massive unless told."""
    info = {"massive_threshold": None, **info}
    return make_dictionary(d_in=WIDTH, seed=seed, site=site, **info)


def place(model, backend):
    return model.bridge() if backend == "bridge" else model


@torch.no_grad()
def logits(target, ids):
    return target.logits(ids) if isinstance(target, LanguageModel) else target(ids)


def hooks_of(target):
    """Everything that could be left on a module, and TransformerLens' own lists of it."""
    if isinstance(target, LanguageModel):
        root, points = target.hf_model, []
    else:
        root, points = target.original_model, target.hook_dict.items()
    return [
        (name, len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in m.__dict__)
        for name, m in root.named_modules()
    ] + [(name, len(point.fwd_hooks), len(point._forward_hooks)) for name, point in points]
