"""Step 2, in the environment of requirements.txt: a merged release in; its weights in 4 bits by GPTQ out.

    build/gptq/bin/python tools/gptq/quantize.py RELEASE ROWS OUT

The form is the one of `finetune export --format compressed-tensors`: 4-bit codes, groups of 128, for vLLM.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM

TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def main() -> None:
    release, rows, out = map(Path, sys.argv[1:4])
    if out.exists():
        raise SystemExit(f"{out} is there already; name another folder")
    calibration = json.loads(rows.read_text())["calibration"]
    model = AutoModelForCausalLM.from_pretrained(release, dtype="auto")
    oneshot(
        model=model,
        dataset=Dataset.from_list([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in calibration]),
        recipe=GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head", r"re:.*\.gate$"]),
        max_seq_length=max(map(len, calibration)),
        num_calibration_samples=len(calibration),
    )
    model.save_pretrained(out, save_compressed=True)
    for name in TEXT_FILES:  # as they were proven, not as another version of transformers would write them
        if (release / name).is_file():
            shutil.copyfile(release / name, out / name)


if __name__ == "__main__":
    main()
