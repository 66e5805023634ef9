"""Seconds of a forward and backward pass over documents of equal length, as one JSON line.

python benchmarks/speed/one_pass.py RECIPE SPEEDUPS DOCUMENT_TOKENS DOCUMENTS SECONDS
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

from benchmarks.speed.ready import add_gradients, ready, synthetic_examples
from finetune.machine import quiet_libraries

MOST, FEWEST = 50, 3  # passes

quiet_libraries()
recipe, speedups = Path(sys.argv[1]), sys.argv[2]
tokens, documents, enough = int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5])
model, resolved = ready(recipe, f"train.speedups={speedups}")
examples = synthetic_examples(model.config.vocab_size, tokens=tokens, count=documents)
add_gradients(model, resolved, examples)
walls, processor = [], []
until = time.perf_counter() + enough
while len(walls) < FEWEST or (time.perf_counter() < until and len(walls) < MOST):
    model.zero_grad(set_to_none=True)
    wall, cpu = time.perf_counter(), time.process_time()
    add_gradients(model, resolved, examples)
    walls.append(time.perf_counter() - wall)
    processor.append(time.process_time() - cpu)
answer = {
    "passes": len(walls),
    "pass_seconds": statistics.median(walls),
    "pass_cpu_seconds": statistics.median(processor),
}
print(json.dumps({"tokens": tokens * documents, **answer}))
