"""A transcoder trained by eai-sparsify's SparseCoder on rows of a file, as its Trainer does it.

python train_sparsify.py ROWS.safetensors FOLDER adam|signum RATE SEED K    # prints the seconds

The rate is in multiples of the tool's own. Adam's is warmed up over a twentieth of the steps, as
the tool's usual 1,000 would be longer than the training, and falls to zero, as there.
"""

import os
import sys
import time

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # it would take it where there is no card, too

import torch
from safetensors.torch import load_file
from schedulefree import ScheduleFreeWrapper
from sparsify import SparseCoder
from sparsify.config import SparseCoderConfig
from sparsify.sign_sgd import SignSGD
from transformers import get_linear_schedule_with_warmup

EXPANSION, BATCH = 8, 4096

rows, folder, way, rate, seed, k = sys.argv[1:]
torch.manual_seed(int(seed))
pairs = load_file(rows)
batches = list(zip(pairs["x"].split(BATCH), pairs["y"].split(BATCH), strict=True))
d_in = pairs["x"].shape[1]
coder = SparseCoder(d_in, SparseCoderConfig(expansion_factor=EXPANSION, k=int(k), transcode=True))
usual = {"adam": 2e-4, "signum": 5e-3}[way] / (EXPANSION * d_in / 2**14) ** 0.5
groups = [{"params": list(coder.parameters()), "lr": float(rate) * usual}]
if way == "adam":
    optimiser = torch.optim.Adam(groups)
    schedule = get_linear_schedule_with_warmup(optimiser, len(batches) // 20, len(batches))
else:
    optimiser, schedule = ScheduleFreeWrapper(SignSGD(groups), momentum=0.95), None
    optimiser.train()
began = time.perf_counter()
for number, (x, y) in enumerate(batches):
    x, y = x.float(), y.float()
    if not number:
        coder.encoder.bias.data = -x.mean(0) @ coder.encoder.weight.data.T
        coder.b_dec.data = y.mean(0)
    coder(x, y).fvu.backward()
    optimiser.step()
    optimiser.zero_grad()
    if schedule is not None:
        schedule.step()
seconds = time.perf_counter() - began
if schedule is None:
    optimiser.eval()
coder.save_to_disk(folder)
print(seconds)
