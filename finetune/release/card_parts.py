"""The fixed words of a model card by format: how to use the files, and what their proofs show and cannot show."""

from __future__ import annotations

TRANSFORMERS = """\
from transformers import pipeline
chat = pipeline("text-generation", "{name}")
print(chat([{{"role": "user", "content": "Hello"}}])[0]["generated_text"][-1]["content"])"""
PEFT = """\
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
model, tokenizer = AutoPeftModelForCausalLM.from_pretrained("{name}"), AutoTokenizer.from_pretrained("{name}")"""

# (language, text) of every block; {name} is the release, {base} its base, {file} its GGUF file.
USE: dict[str, tuple[tuple[str, str], ...]] = {
    "safetensors": (("python", TRANSFORMERS), ("sh", "vllm serve {name}")),
    "compressed-tensors": (("sh", "vllm serve {name}"), ("python", TRANSFORMERS)),
    "adapter": (("python", PEFT), ("sh", "vllm serve {base} --enable-lora --lora-modules {name}=PATH/TO/{name}")),
    "gguf": (("sh", "llama-cli -m {file}\nllama-server -m {file}"),),
    "gguf-adapter": (("sh", "llama-cli -m BASE.gguf --lora {file}\nllama-server -m BASE.gguf --lora {file}"),),
    "ollama": (("sh", "ollama create {name} -f Modelfile\nollama run {name}"),),
}

NEVER = "None of them says that the answers are right or harmless, or that the model is good at a task."

PROOFS_MEAN: dict[str, str] = {
    "safetensors": (
        "They show that these are the base's weights with the trained adapter added once and rounded once, that "
        "tokenizer, chat template and stop tokens are those of training, and that transformers computes with the folder"
        f" what base and adapter compute on the probes. They do not show other programs' arithmetic. {NEVER}"
    ),
    "compressed-tensors": (
        "They show that every code is the nearest for its scale, that nothing else changed, that transformers reads "
        "the folder as it was written, and how far its logits are from those of its model. Tokenizer, chat "
        "template and stop tokens are copies of the model's files. They do not show the arithmetic of the server that "
        f"computes with few bits. {NEVER}"
    ),
    "adapter": (
        "They show that plain PEFT with this folder computes what the base with the trained delta computes, and that "
        "tokenizer, chat template and stop tokens are those of training. They hold for the base named above; for "
        f"another, or the same one quantised in another way, nothing was measured. {NEVER}"
    ),
    "gguf": (
        "They show that each tensor is in the file once and as near to its source as the type allows, that the header "
        "holds the tokenizer, chat template and stop tokens of training, and how far the logits are. They do not show "
        f"what fewer bits cost on your texts, nor llama.cpp's own arithmetic. {NEVER}"
    ),
    "gguf-adapter": (
        "They show that the file holds the trained adapter for the right tensors with its scale, and that base and "
        "file together compute what base and adapter compute. They do not show llama.cpp's own arithmetic, nor what it "
        f"computes on a base of few bits. {NEVER}"
    ),
    "ollama": (
        "They show what those of the GGUF file show; where the Modelfile has a TEMPLATE, that it writes the probes as "
        "the one of training does; and that its stop tokens are those of training. They do not show other kinds of "
        f"conversations, nor Ollama's own arithmetic. {NEVER}"
    ),
}
