"""Shared fixtures; shapes and types of the package's annotations are checked while tests run."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import torch
from jaxtyping import install_import_hook

# The models here are tiny: more threads would only wait for each other.
torch.set_num_threads(1)

install_import_hook("llm_wsae", "beartype.beartype")
