"""Train rows of given tokens with plain transformers and PEFT: ten lines of PyTorch; the step losses as one JSON line.

    python benchmarks/speed/with_peft.py RECIPE TOKENS.jsonl

The start is the run's own (the same A); the order is the file's; constant rate, AdamW, clipping, bfloat16 autocast.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.speed.plain import plain_model
from benchmarks.speed.ready import ready
from finetune.machine import quiet_libraries
from finetune.train.held_out import autocast

quiet_libraries()
recipe, tokens = Path(sys.argv[1]), Path(sys.argv[2])
ours, resolved = ready(recipe, "train.speedups=none")
start = {name: parameter.data for name, parameter in ours.named_parameters() if parameter.requires_grad}
model = plain_model(resolved, torch.bfloat16)
trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
assert trained.keys() == start.keys()
for name, parameter in trained.items():
    parameter.data = start[name].clone()
del ours
plan = resolved.plan.train
optimizer = torch.optim.AdamW(
    trained.values(),
    lr=plan.learning_rate,
    betas=plan.adam_betas,
    eps=plan.adam_epsilon,
    weight_decay=plan.weight_decay,
)
rows = [json.loads(line) for line in tokens.read_text().splitlines()]
losses = []
for first in range(0, len(rows), plan.batch_size):
    step = rows[first : first + plan.batch_size]
    supervised = sum(label != -100 for row in step for label in row["labels"][1:])
    loss_sum = 0.0
    for row in step:
        labels = torch.tensor(row["labels"])
        with autocast("cpu", "bfloat16"):
            logits = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0]
        loss = F.cross_entropy(logits[:-1].float(), labels[1:], reduction="sum") / supervised
        loss.backward()
        loss_sum += loss.item()
    torch.nn.utils.clip_grad_norm_(list(trained.values()), plan.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss_sum)
print(json.dumps({"losses": losses}))
