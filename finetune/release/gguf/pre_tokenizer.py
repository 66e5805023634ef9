"""What a tokenizer does to text before it merges, and llama.cpp's name for it; tokenizer.json in, names out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SPACE = "\u2581"  # what SentencePiece writes for a space
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Split:
    """A way to cut text before BPE: its expressions in order; whether a word that is a token is cut no further."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False


# llama.cpp's names (src/llama-vocab.cpp) for the pre-tokenizers of the families we write.
SPLITS = {
    "llama-bpe": Split((_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST,), ignore_merges=True),
    "qwen2": Split((_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST,)),
    "gpt-2": Split((GPT2_SPLIT,)),
    "smollm": Split((r"\p{N}", GPT2_SPLIT)),
}


def split_name(tokenizer_json: Mapping[str, Any]) -> str | None:
    """llama.cpp's name for the way the tokenizer splits text, or None if it has none."""
    patterns = _split_patterns(tokenizer_json.get("pre_tokenizer") or {})
    ignore = bool(tokenizer_json["model"].get("ignore_merges"))
    found = (name for name, split in SPLITS.items() if split.patterns == patterns and split.ignore_merges == ignore)
    return next(found, None)


def space_prefix(tokenizer_json: Mapping[str, Any]) -> str | None:
    """When a SentencePiece tokenizer puts a space before text: always (after special tokens too), first or never."""
    normalizer, pre = tokenizer_json.get("normalizer"), tokenizer_json.get("pre_tokenizer")
    steps = normalizer.get("normalizers", [normalizer]) if normalizer else []
    kinds = [step["type"] for step in steps]
    if not kinds and pre and pre["type"] == "Metaspace" and pre["replacement"] == SPACE and not pre.get("split"):
        return str(pre["prepend_scheme"])
    if pre is None and kinds == ["Prepend", "Replace"]:
        return "always"
    return "never" if kinds == ["Replace"] else None


def _split_patterns(pre: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The regular expressions of a byte-level pre-tokenizer in order, or None if it does anything else."""
    steps = pre.get("pretokenizers", [pre])
    patterns = []
    for step in steps:
        if step.get("type") == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            patterns.append(step["pattern"].get("Regex", ""))
        elif step.get("type") == "Digits" and step["individual_digits"]:
            patterns.append(r"\p{N}")
        elif step.get("type") == "ByteLevel" and not step["add_prefix_space"] and step is steps[-1]:
            patterns += [GPT2_SPLIT] if step.get("use_regex", True) else []
        else:
            return None
    return tuple(patterns)
