"""UTF-8 bytes a token of instructions and answers, by tokenizer: what plans of absent bases are estimated with.

python benchmarks/bytes_per_token.py ROWS.json TOKENIZER_FOLDER...
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

from transformers import AutoTokenizer  # noqa: E402 - after the environment is set


def bytes_per_token(texts: list[str], folder: Path) -> float:
    """All bytes over all tokens, special tokens not counted."""
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return sum(len(text.encode()) for text in texts) / sum(map(len, ids))


def main() -> None:
    """Print one line a tokenizer."""
    rows = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    texts = [row[column] for row in rows for column in ("instruction", "input", "output") if row[column]]
    for name in sys.argv[2:]:
        print(f"{Path(name).name:20} {bytes_per_token(texts, Path(name)):.2f}")


if __name__ == "__main__":
    main()
