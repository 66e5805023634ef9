"""Prove a GGUF file: the file on disk and the model folder it was made of in, comparisons out.

Weights are read with gguf's own dequantizer, text with a reader of the header alone, and the whole file once more by
transformers: none of them shares code with the encoders.
"""

from __future__ import annotations

import functools
import math
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, ReaderTensor, quants
from safetensors import safe_open

from finetune.base import TensorEntry, load_tokenizer
from finetune.errors import Problem, StorageError
from finetune.machine import GIB, probe_machine
from finetune.release.fresh import Proof, proof
from finetune.release.gguf.architecture import Model, StoredTensor, read_model
from finetune.release.gguf.bounds import count_beyond, count_not_nearest
from finetune.release.gguf.ids import FileTokenizer
from finetune.release.gguf.mix import UNQUANTISED, Quant, Type, block_size, tensor_type
from finetune.release.gguf.pre_tokenizer import space_prefix
from finetune.release.gguf.rope import rope_settings
from finetune.release.gguf.vocabulary import Tokenizer, read_tokenizer
from finetune.release.gguf.write import ELEMENTS_AT_ONCE, ROPE_FACTORS, all_fields, quant_of
from finetune.release.layerwise import LayerwiseModel, Pass
from finetune.release.parts import Read
from finetune.release.weights import read_tensors
from finetune.trust import is_trusted

# Text of every kind; a model's own chats come with the call.
PLAIN_PROBES = (
    "What is the capital of France?",
    "Write a short story about a dog.",
    "Add 17 and 25.\n\n### Input:\n17 + 25",
    "a tab\tinside,  two spaces, two newlines after\n\n",
    "Übersetze: Straße, naïve café, façade, Ångström.",
    "日本語の文章と한국어 문장과 العربية וגם עברית",
    "👩‍👩‍👧‍👦 🇪🇺 🏳️‍🌈 zero\u200bwidth, e\u0301 is not é, \u202eright to left",
    "def f(x):\n    return {'a': [1, 2.5e-3], \"b\": x ** 2}  # <tag> & |pipe|",
    "I'll say IT'S 1234567 o'clock",
    "x",
)
LOGIT_TOKENS = 24
# Largest difference of a logit that rounding the weights may cause, in standard deviations of the logits and for one
# layer (it grows with their root): three times what random models of every family give; trained ones lie far lower.
# What fewer bits do is bounded weight by weight, and only recorded for the logits.
LOGITS_LIMIT = {Type.F32: 1.5e-5, Type.F16: 0.04, Type.BF16: 0.4}
WHOLE_SHARE = 0.7  # of this computer's memory
# Settings that transformers reads from no header field.
NO_FIELD = [
    *("rope_parameters", "attention_bias", "mlp_bias", "query_pre_attn_scalar", "layer_types"),
    *("attn_logit_softcapping", "final_logit_softcapping"),
]


def prove_gguf(  # noqa: PLR0913  what the file was written with, and where it lies
    file: Path,
    folder: Path,
    *,
    quant: str,
    chat_template: str | None,
    stop_token_ids: Sequence[int],
    name: str,
    chat_texts: Sequence[str] = (),
) -> list[Proof]:
    """Every proof of a GGUF file; the arguments are those it was written with, and chats as the template renders them.

    A file whose tensors have other names, shapes or types is not read further: only these proofs come back then.
    """
    chosen, model = quant_of(quant), read_model(folder)
    try:
        reader = GGUFReader(file)
    except (ValueError, IndexError, KeyError) as error:
        raise StorageError(Problem(str(file), f"not a whole GGUF file ({error}); export again")) from error
    fields = {key: field.contents() for key, field in reader.fields.items()}
    tokenizer = read_tokenizer(folder)
    expected = all_fields(
        model, tokenizer, quant=chosen, chat_template=chat_template, stop_token_ids=stop_token_ids, name=name
    )
    proofs = [_prove_names(reader, model, chosen), _prove_fields(fields, expected, model)]
    if not all(found.passed for found in proofs):
        return proofs
    proofs += _prove_weights(reader, model, chosen)
    proofs += _prove_rope(reader, model, folder)
    proofs += _prove_ids(fields, tokenizer, chat_template, chat_texts)
    return proofs + _prove_logits(reader, file, folder, model, chosen)


def _prove_names(reader: GGUFReader, model: Model, quant: Quant) -> Proof:
    """Every tensor once, with its shape and type; ggml writes shapes the other way round."""
    wanted = {
        tensor.name: (tensor.entry.shape, tensor_type(tensor.name, tensor.entry.shape, quant=quant, model=model.shape))
        for tensor in model.tensors
    }
    if rope_settings(model.config)["rope_type"] == "llama3":
        wanted[ROPE_FACTORS] = ((model.head_size // 2,), Type.F32)
    found = {tensor.name: (tuple(tensor.shape.tolist()[::-1]), tensor.tensor_type) for tensor in reader.tensors}
    odd = [name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)]
    return proof("tensor names, shapes and types", len(odd) + len(reader.tensors) - len(found), 0)


def _prove_fields(fields: Mapping[str, Any], expected: Mapping[str, Any], model: Model) -> Proof:
    """The header holds what config and tokenizer say, and nothing else; `GGUF.` fields are the container's own."""
    found = {key: value for key, value in fields.items() if not key.startswith("GGUF.")}
    wanted = {**expected, "general.architecture": model.family.name}
    odd = [key for key in found.keys() | wanted.keys() if not _same(found.get(key), wanted.get(key))]
    return proof("header fields that differ from config and tokenizer", len(odd), 0)


def _same(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, float):
        return found is not None and bool(np.float32(found) == np.float32(wanted))
    if isinstance(wanted, list) and wanted and isinstance(wanted[0], float):
        return found is not None and np.array_equal(np.array(found, np.float32), np.array(wanted, np.float32))
    return type(found) is type(wanted) and bool(found == wanted)


def _prove_weights(reader: GGUFReader, model: Model, quant: Quant) -> list[Proof]:
    changed = beyond = not_nearest = 0
    error = size = 0.0
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for stored in model.tensors:
        kind = Type(tensors[stored.name].tensor_type)
        for source, raw in row_blocks(stored, tensors[stored.name]):
            read = np.asarray(quants.dequantize(raw, kind), dtype=np.float32)
            if kind in UNQUANTISED:
                changed += int((read.view(np.uint32) != _rounded(source, kind).view(np.uint32)).sum())
                continue
            width = block_size(kind)
            blocks = raw.reshape(-1, raw.shape[-1] * width // source.shape[-1])
            not_nearest += count_not_nearest(source, blocks, read, kind)
            beyond += count_beyond(source, read, kind)
            error += float(np.square(read.astype(np.float64) - source).sum())
            size += float(np.square(source.astype(np.float64)).sum())
    proofs = [proof("unquantised weights that changed", changed, 0)]
    if quant.default not in UNQUANTISED:
        proofs.append(proof("quantised weights beyond their type's bound", beyond, 0))
        proofs.append(proof("quantised weights that are not their block's nearest value", not_nearest, 0))
        proofs.append(proof("quantisation error, share of the weights' size", math.sqrt(error / size), None))
    return proofs


def row_blocks(stored: StoredTensor, tensor: ReaderTensor) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Some rows of the source (float32) in the order of the file, with the file's raw rows, until all were given."""
    entry = stored.entry
    rows = entry.shape[0]
    raw = np.asarray(tensor.data)
    raw = raw.reshape(rows, -1) if len(entry.shape) > 1 else raw
    step = max(1, ELEMENTS_AT_ONCE * rows // entry.elements)
    size = rows // stored.heads if stored.heads else 1
    step = max(1, step // size) * size
    with safe_open(str(entry.file), framework="pt") as file:
        part = file.get_slice(entry.name)
        for start in range(0, rows, step):
            source = part[start : start + step].float() + stored.offset
            if stored.heads:  # row 2i and 2i + 1 of a head in the file are rows i and i + half of the source
                order = torch.arange(size).reshape(2, size // 2).T.flatten()
                source = source.unflatten(0, (-1, size))[:, order].flatten(0, 1)
            yield source.numpy(), raw[start : start + step]


def _rounded(source: np.ndarray, kind: Type) -> np.ndarray:
    dtype = {Type.F32: torch.float32, Type.F16: torch.float16, Type.BF16: torch.bfloat16}[kind]
    return torch.from_numpy(source).to(dtype).float().numpy()


def _prove_rope(reader: GGUFReader, model: Model, folder: Path) -> list[Proof]:
    """Llama 3's stretched frequencies: base frequency over the file's factor is transformers' own, in float32."""
    factors = next((tensor.data for tensor in reader.tensors if tensor.name == ROPE_FACTORS), None)
    if factors is None:
        return []
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=is_trusted(folder))
    theirs = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0].double().numpy()
    place = np.arange(0, model.head_size, 2) / model.head_size
    ours = rope_settings(model.config)["rope_theta"] ** -place / np.asarray(factors, dtype=np.float64)
    return [proof("rotary frequencies, largest relative difference", float(np.abs(ours / theirs - 1).max()), 1e-5)]


def _prove_ids(
    fields: Mapping[str, Any], tokenizer: Tokenizer, chat_template: str | None, chat_texts: Sequence[str]
) -> list[Proof]:
    """llama.cpp's reading of the header gives the ids that the model was trained on.

    Plain text is only recorded where the file is made for chats and one flag cannot serve both, see vocabulary.py;
    text is composed first where the tokenizer does so, which llama.cpp leaves to its caller.
    """
    reference: Any = load_tokenizer(tokenizer.folder / "tokenizer.json")
    reader = FileTokenizer(fields)
    form = functools.partial(unicodedata.normalize, "NFC") if tokenizer.composes else str
    chats = sum(reader.encode_chat(form(text)) != _ids(reference, text, special=False) for text in chat_texts)
    plain = sum(reader.encode(form(text)) != _ids(reference, text, special=True) for text in PLAIN_PROBES)
    two_ways = fields["tokenizer.ggml.add_bos_token"] != tokenizer.adds_bos
    if "tokenizer.ggml.add_space_prefix" in fields:
        two_ways |= fields["tokenizer.ggml.add_space_prefix"] != (space_prefix(tokenizer.json) != "never")
    plain_limit = None if chat_template and two_ways else 0
    proofs = [proof("plain probes whose ids differ as llama.cpp reads them", plain, plain_limit)]
    if chat_texts:
        proofs.insert(0, proof("chat probes whose ids differ as llama.cpp reads them", chats, 0))
    return proofs


def _ids(reference: Any, text: str, *, special: bool) -> list[int]:
    return reference.encode(text, add_special_tokens=special).ids


def _prove_logits(reader: GGUFReader, file: Path, folder: Path, model: Model, quant: Quant) -> list[Proof]:
    """transformers computes from the file what the folder's model computes with the file's weights, in float32.

    Only where the whole model fits in memory twice: transformers cannot read a GGUF file layer by layer. It knows no
    header fields for NO_FIELD and a qwen's head size, and takes a llama called "mistral" for another architecture:
    these are set from the folder's config.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

    ids = torch.randint(model.vocabulary, (1, LOGIT_TOKENS), generator=torch.Generator().manual_seed(0))
    (source,) = LayerwiseModel(folder).logits([Pass(ids)])
    (weights_of_file,) = LayerwiseModel(folder, read=_read_from_file(reader, model)).logits([Pass(ids)])
    moved = (weights_of_file - source).abs().max() / source.std()
    grown = math.sqrt(model.layers)
    limit = LOGITS_LIMIT[quant.default] * grown if quant.default in LOGITS_LIMIT else None
    proofs = [proof("logits against the source", moved.item(), limit)]
    if not fits_whole(sum(stored.entry.elements for stored in model.tensors)):
        return proofs
    wanted = AutoConfig.from_pretrained(str(folder), trust_remote_code=is_trusted(folder))
    config = AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name, trust_remote_code=False)
    if config.model_type == "mistral":
        values = config.to_dict()
        config = LlamaConfig(**{key: value for key, value in values.items() if key != "model_type"})
    for key in NO_FIELD if model.family.name == "llama" else [*NO_FIELD, "head_dim"]:
        if hasattr(wanted, key):
            setattr(config, key, getattr(wanted, key))
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, config=config, dtype=torch.float32, trust_remote_code=False
    )
    difference = (_logits(loaded, ids) - weights_of_file).abs().max() / source.std()
    first = proof("logits as transformers reads the file", difference.item(), LOGITS_LIMIT[Type.F32] * grown)
    return [first, *proofs]


def fits_whole(weights: int) -> bool:
    """Whether this computer has the memory that transformers takes to load a GGUF file: all of it in float32, twice."""
    return 2 * 4 * weights < WHOLE_SHARE * probe_machine().memory_gib * GIB


def _read_from_file(reader: GGUFReader, model: Model) -> Read:
    """Read the folder's tensors with the values that gguf's dequantizer finds in the file, rows in their order there.

    What the file leaves out, like the copy of a tied embedding, is read as it is.
    """
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    places = {stored.entry.name: stored for stored in model.tensors}

    def read(entries: Sequence[TensorEntry]) -> Iterator[tuple[TensorEntry, torch.Tensor]]:
        for entry in entries:
            if entry.name not in places:
                yield from read_tensors([entry])
                continue
            stored = places[entry.name]
            tensor = tensors[stored.name]
            values = torch.from_numpy(
                np.array(quants.dequantize(tensor.data, Type(tensor.tensor_type)), dtype=np.float32)
            )
            if stored.heads:
                pairs = values.unflatten(0, (stored.heads, -1, 2))
                values = pairs.transpose(1, 2).reshape(values.shape)
            yield entry, values.reshape(entry.shape) - stored.offset

    return read


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits[0]
