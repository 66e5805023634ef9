"""Training on one NVIDIA GPU: tokens per second and memory of large LLaMAs with random weights, made on the GPU itself.

    python benchmarks/gpu.py --out benchmarks/results/gpu_speed.json

Nothing is loaded and nothing is downloaded: weights are drawn (and quantised) layer by layer on the GPU, documents have
the lengths of Alpaca rows (quantiles below) with a common beginning of 36 tokens and their second part learned. Needs
torch 2.11, transformers 5.17, peft; nf4 needs bitsandbytes, the contender `trl` needs trl and datasets. Ends with exit
code 2 where there is no GPU.

Work points: W1, W2, W3 are 8, 16, 128 documents a step; W4 is 16,384 tokens of 2,048 each; W5 the same as W3 with
32,768 tokens a pass; W6 one document of 2,048 tokens with recomputation (memory mode). A step is all passes, clipping
and AdamW; every cell is a process of its own that times steps after three. Cells take turns between ways; with
--budget-seconds no new cell is begun after that time, and a later call goes on with what is missing from the file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# Tokens of raw Alpaca rows with template at these fractions of all rows.
QUANTILES = [(0, 45), (0.01, 53), (0.05, 62), (0.1, 69), (0.25, 84), (0.5, 112), (0.75, 156), (0.9, 202), (0.95, 239)]
QUANTILES += [(0.98, 308), (0.99, 361), (0.995, 411), (1.0, 1304)]
TEMPLATE_TOKENS, PROMPT_TOKENS = 36, 64


@dataclass(frozen=True)
class Size:
    """Sizes of a LLaMA."""

    hidden: int
    inner: int
    layers: int
    heads: int
    key_value_heads: int
    head_size: int
    vocabulary: int = 128_256
    tied: bool = False

    @property
    def linear_parameters(self) -> int:
        """Of the layers' products, which every token goes through."""
        heads = self.head_size * (2 * self.heads + 2 * self.key_value_heads)
        return self.layers * self.hidden * (heads + 3 * self.inner)


SIZES = {
    "1B": Size(2048, 8192, 16, 32, 8, 64, tied=True),
    "8B": Size(4096, 14336, 32, 32, 8, 128),
    "70B": Size(8192, 28672, 80, 64, 8, 128),
    "tiny": Size(256, 512, 2, 4, 2, 64, vocabulary=1000),
}


@dataclass(frozen=True)
class Point:
    """How many documents make a step (of Alpaca's lengths, or all of one), and how it is laid out."""

    documents: int
    length: int | None = None
    tokens_per_pass: int = 16_384
    recompute: bool = False


POINTS = {
    "W1": Point(8),
    "W2": Point(16),
    "W3": Point(128),
    "W4": Point(8, 2048),
    "W5": Point(128, tokens_per_pass=32_768),
    "W6": Point(1, 2048, recompute=True),
}
OURS = ("auto", "none", "fp8")  # own pieces, the libraries' code, own pieces with model.compute: fp8
WAYS = (*OURS, "trl: defaults", "trl: no checkpointing", "trl: padding-free")
PLANNED = [
    *[("8B", weights, point, way) for point in ("W1", "W3", "W4") for weights in ("nf4", "none") for way in WAYS],
    *[("8B", "nf4", point, way) for point in ("W2", "W5", "W6") for way in OURS],
    *[("1B", "nf4", point, way) for point in ("W1", "W3", "W4") for way in (*OURS, WAYS[3])],
    ("70B", "nf4", "W6", "auto"),
    ("70B", "nf4", "W6", "none"),
]  # fmt: skip


def make_examples(point: Point, vocabulary: int, steps: int) -> list[list[Any]]:
    """The documents of every step; those of Alpaca's lengths begin alike, and each is learned from its answer on."""
    from finetune.data.examples import Example

    random = np.random.default_rng(0)
    template = random.integers(3, vocabulary, TEMPLATE_TOKENS).astype(np.int32)
    fractions, tokens = zip(*QUANTILES, strict=True)
    made = []
    for _ in range(steps):
        step = []
        for _ in range(point.documents):
            length = point.length or int(np.interp(random.random(), fractions, tokens))
            ids = random.integers(3, vocabulary, length).astype(np.int32)
            learned = np.ones(length, bool)
            if point.length is None:
                ids[:TEMPLATE_TOKENS] = template
                learned[: min(PROMPT_TOKENS, length // 2)] = False
            step.append(Example(ids, learned, "", 0, 0))
        made.append(step)
    return made


def make_model(size: Size, quantization: str, device: str, attention: str) -> Any:
    """A LLaMA with random bfloat16 weights, drawn module by module on the device, its linears quantised there."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from finetune.model.load import keep_4bit_weights_unpacked

    config = LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_value_heads,
        head_dim=size.head_size,
        vocab_size=size.vocabulary,
        tie_word_embeddings=size.tied,
        max_position_embeddings=131_072,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.bfloat16)
    torch.manual_seed(0)
    for path, module in list(model.named_modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            drawn = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
            drawn = drawn.fill_(1.0) if drawn.ndim == 1 else drawn.normal_(std=0.02)
            setattr(module, name, torch.nn.Parameter(drawn, requires_grad=False))
        if quantization == "nf4" and isinstance(module, torch.nn.Linear) and path != "lm_head":
            parent = model.get_submodule(path.rpartition(".")[0])
            setattr(parent, path.rpartition(".")[2], in_four_bits(module, device))
    model.tie_weights()
    keep_4bit_weights_unpacked(model)  # on a CPU
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)  # its buffers were on meta
    if quantization == "nf4":
        model.is_loaded_in_4bit = True  # what TRL asks for
    return model


def in_four_bits(linear: Any, device: str) -> Any:
    """The same module in nf4, double quantised."""
    import bitsandbytes as bnb
    import torch

    quantized = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=torch.bfloat16,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4")
    quantized.weight = weight.to(device)
    linear.weight = None
    return quantized


def adapted(model: Any) -> Any:
    """With a LoRA of rank 16 on all linear modules, in float32."""
    from peft import LoraConfig, get_peft_model

    tuned = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return tuned.train()


def steps_of_ours(model: Any, point: Point, way: str, steps: list[list[Any]], device: str) -> list[float]:
    """Seconds of every step: the passes of finetune's trainer, clipping, fused AdamW."""
    import torch

    from finetune.layout import cut_into_passes
    from finetune.model.fast.speed_up import speed_up
    from finetune.plan_layout import SPEEDUPS
    from finetune.train.loss import lay_end_to_end, stretch_losses_S

    speedups = () if way == "none" else SPEEDUPS
    swapped = speed_up(model, speedups, compute="fp8" if way == "fp8" else "auto")
    print({name: (each.count, sorted(set(each.left.values()))) for name, each in swapped.items()}, file=sys.stderr)
    if point.recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, fused=True)
    lay = partial(lay_end_to_end, device=device, share_prefixes="prefix" in speedups)
    seconds = []
    for examples in steps:
        started = time.perf_counter()
        supervised = sum(example.supervised_tokens for example in examples)
        for members in cut_into_passes([e.tokens for e in examples], tokens_per_pass=point.tokens_per_pass):
            stretch = lay([examples[index] for index in members])
            with torch.autocast(device, dtype=torch.bfloat16):
                loss = stretch_losses_S(model, stretch).sum() / supervised
            loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize() if device == "cuda" else None
        seconds.append(time.perf_counter() - started)
    return seconds


def steps_of_trl(model: Any, configuration: dict[str, Any], steps: list[list[Any]]) -> list[float]:
    """Seconds of every step of TRL's trainer over the same documents in the same order."""
    import tempfile

    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    from benchmarks.speed.with_trl import Watch

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="<pad>")
    rows = [{"input_ids": e.ids.tolist(), "labels": e.labels.tolist()} for step in steps for e in step]
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=folder,
                num_train_epochs=1,
                train_sampling_strategy="sequential",
                shuffle_dataset=False,
                bf16=True,
                use_cpu=not torch.cuda.is_available(),
                save_strategy="no",
                report_to="none",
                logging_steps=50,
                **{"max_length": 8192, **configuration, "per_device_train_batch_size": len(steps[0])},
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[watch],
        )
        trainer.train()
    return watch.seconds


def child(cell: dict[str, Any], seconds_wanted: float) -> dict[str, Any]:
    """One cell in this process: the rate of its steps, memory, and how fast this GPU multiplies."""
    import torch

    from benchmarks.speed.facts import product_rate
    from finetune.model.attention import register_attention

    device = "cuda" if torch.cuda.is_available() else "cpu"
    register_attention()
    size, point, way = SIZES[cell["model"]], POINTS[cell["point"]], cell["way"]
    ours = way in OURS
    started = time.perf_counter()
    model = adapted(make_model(size, cell["quantization"], device, "documents" if ours else "sdpa"))
    made = time.perf_counter() - started
    count = max(8, min(40, int(seconds_wanted * 10_000 / (point.documents * (point.length or 128)))))
    steps = make_examples(point, size.vocabulary, count)
    if ours:
        seconds = steps_of_ours(model, point, way, steps, device)
    else:
        from benchmarks.speed.trl_configurations import CONFIGURATIONS

        named = {name: value for name, value in CONFIGURATIONS[way.removeprefix("trl: ")].items() if name != "base"}
        seconds = steps_of_trl(model, named, steps)
    real = [sum(example.tokens for example in step) for step in steps]
    answer = {
        "tokens_per_second": sum(real[3:]) / sum(seconds[3:]),
        "median_step_seconds": statistics.median(seconds[3:]),
        "steps": len(steps),
        "tokens_per_step": statistics.fmean(real),
        "making_the_model_seconds": made,
        "flops_per_token_of_layers": 4 * size.linear_parameters,  # forward, and backward to the inputs
    }
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        answer |= {
            "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
            "used_on_device_bytes": total - free,
        }
        del model
        torch.cuda.empty_cache()
    return {**answer, "product_tflops": product_rate(8192 if device == "cuda" else 512)}


def measure(cell: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """A cell in a process of its own.

    Raises:
        RuntimeError: it failed; the end of what it printed is in the message.
    """
    command = [sys.executable, __file__, "--child", json.dumps(cell), "--seconds", str(arguments.seconds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    sys.stderr.write(done.stderr[-500:])
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def cells(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What is measured, round by round."""
    names = ("model", "quantization", "point", "way")
    planned = [dict(zip(names, cell, strict=True)) for cell in PLANNED]
    chosen = [c for c in planned if all(c[n] in getattr(arguments, n) for n in names)]
    if "tiny" in arguments.model:
        places = [("tiny", "none", "W1"), ("tiny", "nf4", "W1"), ("tiny", "none", "W6")]
        chosen = [dict(zip(names, (*place, way), strict=True)) for place in places for way in arguments.way]
    return [{**cell, "round": number} for number in range(arguments.rounds) for cell in chosen]


def main() -> None:
    """Measure what is missing; exit code 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu_speed.json"))
    parser.add_argument("--model", nargs="+", choices=SIZES, default=["8B", "1B", "70B"])
    parser.add_argument("--quantization", nargs="+", choices=["nf4", "none"], default=["nf4", "none"])
    parser.add_argument("--point", nargs="+", choices=POINTS, default=list(POINTS))
    parser.add_argument("--way", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0, help="of steps in a cell, roughly")
    parser.add_argument("--budget-seconds", type=float, default=1e9, help="begin no cell after that time")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    import torch

    if arguments.child:
        print(json.dumps(child(json.loads(arguments.child), arguments.seconds)))
        return
    if not torch.cuda.is_available() and arguments.model != ["tiny"]:
        print("benchmarks/gpu.py: no CUDA GPU here; run it on a machine that has one", file=sys.stderr)
        sys.exit(2)
    from benchmarks.speed.facts import command_line, header
    from benchmarks.speed.outside import Report

    report = Report(arguments.out, sizes={n: asdict(s) for n, s in SIZES.items()}, **header(command_line()))
    until = time.perf_counter() + arguments.budget_seconds
    for cell in cells(arguments):
        if time.perf_counter() > until:
            print("out of time; call again to go on", file=sys.stderr)
            return
        report.fill([cell], lambda key: measure(key, arguments))


if __name__ == "__main__":
    main()
