"""Second half of `make test-llama-cpp`, where llama-cpp-python is installed: does llama.cpp agree with our files?

    python tools/llama_cpp/check.py FOLDER [NAME]...

Prints one line a check and ends with 1 if one of them failed. FOLDER is what export.py wrote.
"""

from __future__ import annotations

import ctypes
import json
import math
import sys
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "q5_0": 8, "q4_k_m": 15, "q5_k_m": 17, "q6_k": 18, "bf16": 32}
F32_KEYS = 0  # GGML_TYPE_F32: keys and values are kept in float32, as the reference keeps them
# Largest difference of a logit to transformers', in standard deviations of the logits. f32: order of summation and
# llama.cpp's float32 rotation tables; f16: its activations are rounded to float16 before each product.
LOGITS_LIMIT = {"f32": 2e-4, "f16": 0.05}
GELU_LOGITS_LIMIT = {"f32": 0.04, "f16": 0.2}  # llama.cpp looks GELU up in a table of float16 values
EFFECT = 0.5  # an adapter moves some logit at least so far, or its comparison would say nothing
CLEAR = 0.05  # a token counts as clearly the likeliest when its logit leads by more
# Perplexity over that of f16, at most. Measured: see README.md in this folder.
PERPLEXITY_LIMIT = {
    "f32": 1.001,
    "bf16": 1.005,
    "q8_0": 1.01,
    "q6_k": 1.02,
    "q5_k_m": 1.03,
    "q5_0": 1.04,
    "q4_k_m": 1.05,
    "q4_0": 1.15,
}
OWN_QUANTIZER_LIMIT = 1.01  # perplexity over that of llama.cpp's own quantizer, at most
ENDS_BY_NAME = {b"<|endoftext|>"}  # llama.cpp ends at such a token whatever the file says (src/llama-vocab.cpp)


@dataclass(frozen=True)
class Check:
    """One comparison with what llama.cpp does."""

    name: str
    passed: bool
    told: str


def main() -> int:
    folder, chosen = Path(sys.argv[1]), sys.argv[2:]
    llama_cpp.llama_log_set(_quiet, None)
    failed = count = 0
    for name in chosen or json.loads((folder / "names.json").read_text()):
        for check in checks(folder / name):
            print(f"{'ok  ' if check.passed else 'FAIL'} {name}: {check.name}: {check.told}", flush=True)
            count += 1
            failed += not check.passed
    print(f"{count} checks, {failed} failed")
    return 1 if failed else 0


@llama_cpp.llama_log_callback
def _quiet(level: int, text: bytes, data: Any) -> None:
    pass


def checks(folder: Path) -> Iterator[Check]:
    expected = json.loads((folder / "expected.json").read_text())
    for quant in ("f32", "f16"):
        model = load(folder / f"{quant}.gguf")
        if quant == "f16":
            yield from text_checks(model, expected)
        yield from logit_checks(model, expected, np.load(folder / "logits.npy"), quant)
        if quant == "f16" and "greedy" in expected:
            yield greedy_check(model, *expected["greedy"])
    for name in expected["adapters"]:
        yield from adapter_checks(folder, expected, name)
    quants = [quant for quant in expected["quants"] if quant not in {"f32", "f16"}]
    for quant in quants:
        yield from quantizer_checks(folder, quant)
    if quants:
        yield from perplexity_checks(folder, expected, ["f32", *quants])
    for file in folder.glob("own-*.gguf"):
        file.unlink()


def load(file: Path, adapter: Path | None = None) -> llama_cpp.Llama:
    return llama_cpp.Llama(
        str(file),
        lora_path=None if adapter is None else str(adapter),
        n_ctx=0,
        n_batch=1024,
        logits_all=True,
        type_k=F32_KEYS,
        type_v=F32_KEYS,
        flash_attn=False,
        n_threads=1,
        verbose=False,
    )


def text_checks(model: llama_cpp.Llama, expected: dict[str, Any]) -> Iterator[Check]:
    """Ids of plain text and of rendered chats, stop tokens, the template."""
    bos, adds_bos = expected["bos"], model.metadata["tokenizer.ggml.add_bos_token"] == "true"
    different = []
    for text, ids in expected["chats"]:
        stripped = text.removeprefix(bos) if adds_bos else text  # as llama.cpp does (common/chat.cpp)
        different += [text] * (model.tokenize(stripped.encode(), add_bos=True, special=True) != ids)
    if expected["chats"]:
        yield Check("ids of chats", not different, f"{len(different)} of {len(expected['chats'])} differ {different}")
    different = [
        text for text, ids in expected["plain"] if model.tokenize(text.encode(), add_bos=True, special=True) != ids
    ]
    # One flag cannot serve both where a tokenizer puts a space before the very first text only; chats come first then.
    prefix = model.metadata.get("tokenizer.ggml.add_space_prefix")
    allowed = bool(expected["chats"]) and prefix == "false"
    # Where llama.cpp puts a space, it puts one before a space as well; transformers does not.
    odd = [text for text in different if not (prefix == "true" and text.startswith(" "))]
    if expected["composes"]:  # llama.cpp leaves text as it is; the export's notes say so
        odd = [text for text in odd if unicodedata.normalize("NFC", text) == text]
    told = f"{len(different)} of {len(expected['plain'])} differ {different[:3]}"
    yield Check("ids of plain text", not odd or allowed, told)
    vocabulary = llama_cpp.llama_model_get_vocab(model._model.model)
    tokens = llama_cpp.llama_vocab_n_tokens(vocabulary)
    ends = [
        token_id
        for token_id in range(tokens)
        if llama_cpp.llama_vocab_is_eog(vocabulary, token_id)
        and (token_id in expected["stops"] or llama_cpp.llama_vocab_get_text(vocabulary, token_id) not in ENDS_BY_NAME)
    ]
    yield Check("stop tokens", ends == sorted(expected["stops"]), f"{ends}, of the model {expected['stops']}")
    same = model.metadata.get("tokenizer.chat_template") == expected["chat_template"]
    yield Check("chat template", same, "the same" if same else "another")


def logit_checks(
    model: llama_cpp.Llama, expected: dict[str, Any], logits_TV: np.ndarray, quant: str
) -> Iterator[Check]:
    ours = logits_of(model, expected["forced"])
    largest = float(np.abs(ours - logits_TV).max() / logits_TV.std())
    limit = (GELU_LOGITS_LIMIT if expected["gelu"] else LOGITS_LIMIT)[quant]
    yield Check(f"{quant} logits", largest <= limit, f"{largest:.2e}, limit {limit:.0e}")
    top = np.sort(logits_TV, axis=1)
    clear = top[:, -1] - top[:, -2] > CLEAR
    wrong = int((ours.argmax(axis=1) != logits_TV.argmax(axis=1))[clear].sum())
    yield Check(f"{quant} likeliest tokens", wrong == 0, f"{wrong} of {int(clear.sum())} clear ones differ")


def adapter_checks(folder: Path, expected: dict[str, Any], name: str) -> Iterator[Check]:
    """llama.cpp's `--lora` on the f32 file computes what PEFT computes, which is far from what the base computes."""
    base_TV, tuned_TV = np.load(folder / "logits.npy"), np.load(folder / f"adapter-{name}.npy")
    moved = float(np.abs(tuned_TV - base_TV).max() / base_TV.std())
    yield Check(f"adapter {name} changes the base", moved > EFFECT, f"{moved:.2f}, at least {EFFECT}")
    model = load(folder / "f32.gguf", folder / f"adapter-{name}.gguf")
    for check in logit_checks(model, expected, tuned_TV, "f32"):
        yield Check(f"adapter {name}, {check.name}", check.passed, check.told)


def logits_of(model: llama_cpp.Llama, ids: list[int]) -> np.ndarray:
    """Logits [tokens, vocabulary], float32."""
    model.reset()
    model.eval(ids)
    return np.array(model.scores[: len(ids)])


def greedy_check(model: llama_cpp.Llama, start: list[int], answer: list[int]) -> Check:
    model.reset()
    model.eval(start)
    ids: list[int] = []
    while len(ids) < len(answer):
        ids.append(int(model.scores[model.n_tokens - 1].argmax()))
        model.eval(ids[-1:])
    text = model.detokenize(ids, special=True).decode(errors="replace")
    return Check(f"greedy text of {len(answer)} tokens", ids == answer, repr(text[:90]))


def quantizer_checks(folder: Path, quant: str) -> Iterator[Check]:
    """llama.cpp's quantizer on our f16 file gives the same types, on our f32 file the same bytes."""
    ours = tensors(folder / f"{quant}.gguf")
    types = {name: kind for name, (kind, _) in tensors(quantize(folder / "f16.gguf", quant)).items()}
    odd = [f"{name}: {ours[name][0]}, not {kind}" for name, kind in types.items() if ours[name][0] != kind]
    yield Check(f"{quant} types", not odd and types.keys() == ours.keys(), f"{len(types)} tensors, {odd[:3]}")
    theirs = tensors(quantize(folder / "f32.gguf", quant))
    odd = [name for name, (_, data) in theirs.items() if not np.array_equal(ours[name][1], data)]
    yield Check(f"{quant} bytes", not odd, f"{len(odd)} tensors differ from llama.cpp's own {odd[:3]}")


def quantize(file: Path, quant: str) -> Path:
    target = file.with_name(f"own-{file.stem}-{quant}.gguf")
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = FILE_TYPES[quant], 1
    if llama_cpp.llama_model_quantize(str(file).encode(), str(target).encode(), ctypes.byref(settings)):
        raise RuntimeError(f"llama.cpp could not quantise {file} to {quant}")
    return target


def tensors(file: Path) -> dict[str, tuple[str, np.ndarray]]:
    reader = gguf.GGUFReader(file)
    return {tensor.name: (tensor.tensor_type.name, np.asarray(tensor.data)) for tensor in reader.tensors}


def perplexity_checks(folder: Path, expected: dict[str, Any], quants: list[str]) -> Iterator[Check]:
    """Every file is read and scored; that of a random model means nothing, so it need only be a number."""
    ids = expected.get("text", expected["forced"])
    reference = perplexity(folder / "f16.gguf", ids)
    for quant in quants:
        ours = perplexity(folder / f"{quant}.gguf", ids)
        theirs = reference if quant == "f32" else perplexity(folder / f"own-f16-{quant}.gguf", ids)
        limit, own_limit = PERPLEXITY_LIMIT[quant], OWN_QUANTIZER_LIMIT
        if "text" not in expected:
            limit = own_limit = math.inf
        told = f"{ours:.4f}, {ours / reference:.4f} times f16's, limit {limit}; own quantizer {theirs:.4f}"
        yield Check(f"{quant} perplexity", ours <= limit * reference and ours <= own_limit * theirs, told)


def perplexity(file: Path, ids: list[int]) -> float:
    logits_TV = logits_of(load(file), ids)[:-1].astype(np.float64)
    peak = logits_TV.max(axis=1, keepdims=True)
    logs = logits_TV - peak - np.log(np.exp(logits_TV - peak).sum(axis=1, keepdims=True))
    return math.exp(-logs[np.arange(len(logs)), ids[1:]].mean())


if __name__ == "__main__":
    sys.exit(main())
