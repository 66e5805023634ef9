"""Step 3, in the project's environment: the loss of several folders on the rows that were held out.

.venv/bin/python tools/gptq/compare.py ROWS FOLDER...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM


def main() -> None:
    rows = json.loads(Path(sys.argv[1]).read_text())["held_out"]
    for folder in sys.argv[2:]:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        total = tokens = 0.0
        for row in rows:
            labels = torch.tensor(row["labels"][1:])
            with torch.no_grad():
                logits = model(torch.tensor([row["ids"]])).logits[0, :-1].float()
            total += F.cross_entropy(logits, labels, reduction="sum").item()
            tokens += int((labels != -100).sum())
        size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        print(f"{folder}: {total / tokens:.5f} nats a token over {len(rows)} rows, {size:,} bytes")


if __name__ == "__main__":
    main()
