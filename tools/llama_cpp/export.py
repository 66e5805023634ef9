"""First half of `make test-llama-cpp`, in the project's environment: GGUF files, and what transformers makes of them.

    python tools/llama_cpp/export.py FOLDER

FOLDER/NAME/ then holds one file per quantisation and expected.json: token ids, greedy text, logits.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models import ADAPTERS, CHECKOUT, Trial, make_adapter, make_trials
from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers.utils.chat_template_utils import render_jinja_template

from finetune.base import load_tokenizer, read_base
from finetune.machine import quiet_libraries
from finetune.release.gguf.adapter import write_gguf_adapter
from finetune.release.gguf.mix import QUANTS
from finetune.release.gguf.prove import prove_gguf
from finetune.release.gguf.vocabulary import read_tokenizer
from finetune.release.gguf.write import write_gguf
from finetune.release.source import read_source

PROBES = (
    ("What is the capital of France?",),
    ("Write a short story about a dog.", "Once there was a dog.", "Go on."),
    ("Add 17 and 25.\n\n### Input:\n17 + 25",),
    ("  two spaces before, a tab\tinside, two newlines after\n\n",),
    ("Übersetze: Straße, naïve café, façade, Ångström.",),
    ("日本語の文章と한국어 문장과 العربية וגם עברית",),
    ("👩‍👩‍👧‍👦 🇪🇺 🏳️‍🌈 zero\u200bwidth, e\u0301 is not é, \u202eright to left",),
    ("def f(x):\n    return {'a': [1, 2.5e-3], \"b\": x ** 2}  # <tag> & <tool> |pipe|",),
    ("Hello.", "Hello! How can I help?", "Tell me a joke.", "No.", "Please."),
    ("I'll say IT'S 1234567 o'clock",),
)
PROMPTS = {"pocket-llama": "Calculate 15 + 1.", "stories260K": "Once upon a time"}
READ_BACK = {"pocket-llama": tuple(QUANTS), "stories260K": tuple(QUANTS)}  # what transformers reads too
READ_BACK |= {"tokenizer-llama3.2-instruct": ("f16", "q4_k_m")}  # a large tokenizer takes it seconds
GREEDY_TOKENS = 64
FORCED_TOKENS = 96
TEXT_TOKENS = 1024


def main() -> None:
    quiet_libraries()
    out = Path(sys.argv[1])
    names = []
    for trial in make_trials(out / "models"):
        folder = out / trial.name
        folder.mkdir(parents=True, exist_ok=True)
        wanted = list(QUANTS) if trial.quants else ["f32", "f16"]
        for quant in wanted:
            report = write_gguf(
                trial.folder,
                folder / f"{quant}.gguf",
                quant=quant,
                chat_template=trial.chat_template,
                stop_token_ids=trial.stop_token_ids,
                name=trial.name,
            )
            print(f"{trial.name} {quant}: {report.bytes:,} bytes, {report.types()}")
            if quant in READ_BACK.get(trial.name, ()):
                read_back(trial, folder / f"{quant}.gguf", quant)
        values = expected(trial, folder, wanted)
        adapters = {name: settings for name, (base, settings) in ADAPTERS.items() if base == trial.name}
        for name, settings in adapters.items():
            adapter = make_adapter(out / "models" / f"adapter-{name}", trial.folder, settings)
            export_adapter(folder, adapter, name, values["forced"])
        values["adapters"] = list(adapters)
        (folder / "expected.json").write_text(json.dumps(values), encoding="utf-8")
        names.append(trial.name)
    (out / "names.json").write_text(json.dumps(names))


def read_back(trial: Trial, file: Path, quant: str) -> None:
    """Every proof of an export, transformers' own reading of the file among them; a failed one ends the program."""
    base = read_base(str(trial.folder))
    proofs = prove_gguf(
        file,
        trial.folder,
        quant=quant,
        chat_template=trial.chat_template,
        stop_token_ids=trial.stop_token_ids,
        name=trial.name,
        chat_texts=[render(trial.chat_template, turns, base) for turns in PROBES] if trial.chat_template else [],
    )
    failed = [found for found in proofs if not found.passed]
    if failed:
        sys.exit(f"{file}: {failed}")
    logits = next(found for found in proofs if found.name == "logits as transformers reads the file")
    print(f"{trial.name} {quant}: {len(proofs)} proofs passed; {logits.name}: {logits.value:.1e}")


def expected(trial: Trial, folder: Path, quants: list[str]) -> dict[str, Any]:
    """What llama.cpp has to agree with; logits go to a file of their own."""
    base = read_base(str(trial.folder))
    tokenizer = load_tokenizer(base.tokenizer_folder / "tokenizer.json")
    model = AutoModelForCausalLM.from_pretrained(str(trial.folder), dtype=torch.float32, attn_implementation="eager")
    texts = [turns[0] for turns in PROBES]
    chats = [render(trial.chat_template, turns, base) for turns in PROBES] if trial.chat_template else []
    values: dict[str, Any] = {
        "quants": quants,
        "stops": trial.stop_token_ids,
        "bos": base.bos_token,
        "composes": read_tokenizer(trial.folder).composes,
        "gelu": model.config.model_type.startswith("gemma"),
        "chat_template": trial.chat_template,
        "plain": [[text, tokenizer.encode(text, add_special_tokens=True).ids] for text in texts],
        "chats": [[text, tokenizer.encode(text, add_special_tokens=False).ids] for text in chats],
    }
    torch.manual_seed(1)
    forced = torch.randint(3, min(512, model.config.vocab_size), (FORCED_TOKENS,)).tolist()
    if trial.trained:
        prompt = PROMPTS[trial.name]
        if trial.chat_template:
            prompt = render(trial.chat_template, (prompt,), base)
        start = tokenizer.encode(prompt, add_special_tokens=trial.chat_template is None).ids
        values["greedy"] = [start, greedy(model, start)]
        text = some_text(trial, model, tokenizer, base)
        values["text"] = text
        forced = text[:FORCED_TOKENS]
    values["forced"] = forced
    with torch.no_grad():
        np.save(folder / "logits.npy", model(torch.tensor([forced])).logits[0].numpy())
    return values


def export_adapter(folder: Path, adapter: Path, name: str, forced: list[int]) -> None:
    """The adapter's GGUF file, and the logits of the base with it as PEFT computes them."""
    source = read_source(adapter)
    write_gguf_adapter(source, folder / f"adapter-{name}.gguf", name=name)
    base = AutoModelForCausalLM.from_pretrained(
        str(source.base.facts.folder), dtype=torch.float32, attn_implementation="eager"
    )
    model = PeftModel.from_pretrained(base, str(adapter))
    with torch.no_grad():
        np.save(folder / f"adapter-{name}.npy", model(torch.tensor([forced])).logits[0].numpy())
    print(f"{folder.name} adapter {name}: {(folder / f'adapter-{name}.gguf').stat().st_size:,} bytes")


def render(template: str | None, turns: tuple[str, ...], base: Any) -> str:
    messages = [{"role": "assistant" if place % 2 else "user", "content": text} for place, text in enumerate(turns)]
    names = {"bos_token": base.bos_token, "eos_token": base.eos_token}
    return render_jinja_template([messages], chat_template=template, add_generation_prompt=True, **names)[0][0]


def greedy(model: Any, start: list[int]) -> list[int]:
    """The GREEDY_TOKENS ids after `start`, stop tokens or not."""
    ids = list(start)
    with torch.no_grad():
        for _ in range(GREEDY_TOKENS):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(start) :]


def some_text(trial: Trial, model: Any, tokenizer: Any, base: Any) -> list[int]:
    """Token ids to measure perplexity on: shipped rows, or text that the model writes itself."""
    if trial.chat_template:
        ids: list[int] = []
        rows = (CHECKOUT / "datasets" / "quickstart.jsonl").read_text(encoding="utf-8").splitlines()
        for row in map(json.loads, rows):
            told = f"{row['instruction']}\n{row['input']}".strip()
            ids += tokenizer.encode(f"<s>{told} {row['output']}</s>", add_special_tokens=False).ids
            if len(ids) >= TEXT_TOKENS:
                break
        return ids[: min(TEXT_TOKENS, model.config.max_position_embeddings)]
    torch.manual_seed(2)
    with torch.no_grad():
        return model.generate(
            input_ids=torch.tensor([[model.config.bos_token_id]]),
            attention_mask=torch.ones(1, 1, dtype=torch.long),
            do_sample=True,
            top_k=0,
            max_new_tokens=model.config.max_position_embeddings - 1,
            eos_token_id=None,
            pad_token_id=0,
        )[0].tolist()


if __name__ == "__main__":
    main()
