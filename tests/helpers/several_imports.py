"""What the processes of ``several`` have imported when they begin."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import tiny  # noqa: F401
import torch

import llm_wsae.harvesting
import llm_wsae.training.trainer  # noqa: F401

torch.set_num_threads(1)
