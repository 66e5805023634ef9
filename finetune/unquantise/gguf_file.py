"""A GGUF file as an ordinary base: the file and what lies beside it in; config, tokenizer, template and tensors out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from finetune.errors import Problem, UserError
from finetune.release.gguf.read import damage_told, read_gguf
from finetune.release.gguf.read_config import token_ids_of
from finetune.release.gguf.read_vocabulary import differing_token, template_file, tokenizer_files
from finetune.unquantise.tensors import DTYPE_NAMES, Tensor, Unquantised

OWN_TOKENIZER = ("tokenizer.json", "tokenizer.model")


def unquantised(file: Path, beside: Sequence[Path]) -> Unquantised:
    """The base that a file stands for; a tokenizer beside it takes the place of the one inside.

    Raises:
        UserError: something of it is not read, or the tokenizer beside it is another one.
        StorageError: a damaged file.
    """
    model = read_gguf(file)
    dtype = getattr(torch, model.dtype)
    tensors = [
        Tensor(tensor.name, DTYPE_NAMES[dtype], tensor.shape, partial(tensor.read, dtype)) for tensor in model.tensors
    ]
    written = {"generation_config.json": json.dumps(token_ids_of(model.fields), indent=2)}
    if any(path.name in OWN_TOKENIZER for path in beside):
        _refuse_other_tokenizer(file, model.fields)
        has_template = any(path.suffix == ".jinja" for path in beside) or _names_template(file.parent)
        written |= {} if has_template else template_file(model.fields)
        copied = list(beside)
    else:
        with damage_told(file):
            written |= tokenizer_files(file, model.fields)
        copied = [path for path in beside if not path.name.startswith(("tokenizer", "special_tokens"))]
    form = f"GGUF, {model.type.lower()}"
    return Unquantised(form, model.bits, model.config, tensors, copied, written)


def _names_template(folder: Path) -> bool:
    file = folder / "tokenizer_config.json"
    return file.is_file() and "chat_template" in file.read_text(encoding="utf-8")


def _refuse_other_tokenizer(file: Path, fields: Mapping[str, Any]) -> None:
    from transformers import AutoTokenizer

    try:
        vocabulary = AutoTokenizer.from_pretrained(str(file.parent), trust_remote_code=False).get_vocab()
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(Problem(str(file.parent), f"the tokenizer beside the file cannot be read: {reason}")) from error
    token = differing_token(vocabulary, file, fields)
    if token is not None:
        message = f"is not the file's: {token!r} has another id, or none; put the one of its base there, or none"
        raise UserError(Problem(f"{file.parent}: tokenizer", message))
