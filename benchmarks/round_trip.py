"""What a user does, from a recipe to answers of llama.cpp: train, merge, export, ask 300 held-out rows.

The shipped quickstart recipe is trained, merged and exported as f16, q8_0 and q4_k_m. llama.cpp answers the rows of
datasets/quickstart-eval.jsonl greedily, through the template and up to the end tokens that each file carries, and so
it does with the q4_k_m file that its own quantizer makes of our f16 file. Exact match is that of `finetune evaluate`.
Ends with 1 if q8_0 is over a point below the tuned model, or q4_k_m over a point below llama.cpp's own q4_k_m.

    make build/llama-cpp/.ready        # once: llama-cpp-python in an environment of its own
    python benchmarks/round_trip.py --out benchmarks/results/round_trip.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import unicodedata
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[1]
LLAMA_CPP = CHECKOUT / "build" / "llama-cpp" / "bin" / "python"
RECIPE, DATA, BASE = "recipes/quickstart.yaml", "datasets/quickstart-eval.jsonl", "builtin:pocket-llama"
QUANTS = ("f16", "q8_0", "q4_k_m")
Q4_K_M = 15  # LLAMA_FTYPE_MOSTLY_Q4_K_M
OWN = "q4_k_m by llama.cpp"
ALLOWED_LOSS = 0.01  # of exact match, in each of the two demands
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")


def main() -> int:
    """Run every command of the round trip, then this file again where llama.cpp is; write and judge the report."""
    options = read_options()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        run, release = work / "run", work / "release"
        trained = finetune("train", options.recipe, "--out", run, *(f"--set={value}" for value in options.set))
        finetune("merge", run, "--out", release)
        for quant in QUANTS:
            finetune("export", release, "--format", "gguf", "--quant", quant, "--out", work / quant)
        rows = first_rows(work, options.rows)
        told = finetune("evaluate", run, "--against", BASE, "--data", rows)["targets"]
        told += finetune("evaluate", release, "--data", rows)["targets"]
        scores = {
            name: {key: score[key] for key in ("exact_match", "loss", "stopped")}
            for name, score in zip(("tuned", "base", "merged"), told, strict=True)
        }
        (work / "prompts.json").write_text(json.dumps(prompts_of(run, rows)), encoding="utf-8")
        answered = run_command([LLAMA_CPP, __file__, "--answer", work, "--data", rows])
    report = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": " ".join(["python", "benchmarks/round_trip.py", *sys.argv[1:]]),
        "machine": f"{os.cpu_count()} cores, {platform.platform()}",
        "versions": versions() | answered["versions"],
        "recipe": options.recipe,
        "set": options.set,
        "rows": answered["rows"],
        "steps": trained["steps"],
        "finetune evaluate": scores,
        "llama.cpp": answered["files"],
    }
    report["demands"] = demands(scores, answered["files"])
    text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    print(text, end="")
    return 0 if all(demand["met"] for demand in report["demands"]) else 1


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the report there")
    parser.add_argument("--recipe", default=RECIPE, metavar="FILE", help="a recipe on pocket-llama")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of finetune train")
    parser.add_argument("--rows", type=int, metavar="N", help="ask only N of the rows, evenly spread")
    return parser.parse_args()


def finetune(*arguments: Any) -> dict[str, Any]:
    """The JSON answer of a finetune command, which is printed as it could be typed."""
    print("$ finetune", *arguments, file=sys.stderr, flush=True)
    return run_command([sys.executable, "-m", "finetune", *arguments, "--json"])


def run_command(command: list[Any]) -> dict[str, Any]:
    """The JSON object that a command prints last; what it says to people is shown only if it fails."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=CHECKOUT, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\nended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout)


def first_rows(work: Path, count: int | None) -> Path:
    """The evaluation rows as one file: all of them, or `count` evenly spread, so that every kind is among them."""
    lines = (CHECKOUT / DATA).read_text(encoding="utf-8").splitlines()
    if count is not None:
        lines = [lines[index * len(lines) // count] for index in range(count)]
    file = work / "rows.jsonl"
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return file


def prompts_of(run: Path, rows: Path) -> dict[str, Any]:
    """The token ids of each row's prompt and the longest answer, as `finetune evaluate` has them."""
    from finetune.machine import quiet_libraries

    quiet_libraries()
    from finetune.data.trace import read_eval_examples
    from finetune.use.evaluate import SPARE_TOKENS
    from finetune.use.target import find_target

    found = find_target(str(run))
    examples = [each.example for each in read_eval_examples(str(rows), found.base, found.template, system=found.system)]
    longest = max(example.tokens - example.prompt_tokens for example in examples)
    return {"ids": [example.prompt_ids.tolist() for example in examples], "answer_tokens": longest + SPARE_TOKENS}


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("finetune-toolkit", *LIBRARIES)} | {"python": platform.python_version()}


def demands(scores: dict[str, Any], files: dict[str, Any]) -> list[dict[str, Any]]:
    """Both demands with their figures; a hair of slack because shares of 300 rows are not exact in binary."""
    pairs = {
        "q8_0 at most 1 point below the tuned model": (files["q8_0"], scores["tuned"]),
        "q4_k_m at most 1 point below llama.cpp's own q4_k_m": (files["q4_k_m"], files[OWN]),
    }
    return [
        {
            "demand": name,
            "exact_match": ours["exact_match"],
            "of": theirs["exact_match"],
            "met": ours["exact_match"] >= theirs["exact_match"] - ALLOWED_LOSS - 1e-9,
        }
        for name, (ours, theirs) in pairs.items()
    ]


def answer_main(work: Path, rows_file: Path) -> None:
    """Where llama-cpp-python is installed: every file's answers to the rows, as one JSON object on stdout."""
    import llama_cpp

    rows = [json.loads(line) for line in rows_file.read_text(encoding="utf-8").splitlines()]
    prompts = json.loads((work / "prompts.json").read_text(encoding="utf-8"))
    files = {quant: next((work / quant).glob("*.gguf")) for quant in QUANTS}
    files[OWN] = quantize(files["f16"], work / "own.gguf")
    answers = {name: score(file, rows, prompts) for name, file in files.items()}
    told = {"versions": {"llama-cpp-python": llama_cpp.__version__}, "rows": len(rows), "files": answers}
    print(json.dumps(told))


def quantize(file: Path, target: Path) -> Path:
    """q4_k_m as llama.cpp's own quantizer makes it."""
    import ctypes

    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = Q4_K_M, 1
    silence()
    if llama_cpp.llama_model_quantize(str(file).encode(), str(target).encode(), ctypes.byref(settings)):
        raise RuntimeError(f"llama.cpp could not quantise {file}")
    return target


def score(file: Path, rows: list[dict[str, Any]], prompts: dict[str, Any]) -> dict[str, Any]:
    """Exact match and what else tells where it comes from; nothing but the file says how a chat is written."""
    import llama_cpp

    silence()
    model = llama_cpp.Llama(str(file), n_ctx=0, verbose=False)
    formatted = chat_formatter(model)
    correct = stopped = other_ids = 0
    started = time.perf_counter()
    for row, ids in zip(rows, prompts["ids"], strict=True):
        messages = [{"role": "user", "content": user_text(row)}]
        prompt = formatted(messages=messages).prompt
        other_ids += model.tokenize(prompt.encode(), add_bos=False, special=True) != ids
        told = model.create_chat_completion(messages, temperature=0, max_tokens=prompts["answer_tokens"])
        answer = told["choices"][0]
        correct += comparable(answer["message"]["content"]) == comparable(row["output"])
        stopped += answer["finish_reason"] == "stop"
    return {
        "exact_match": correct / len(rows),
        "stopped": stopped / len(rows),
        "prompts_whose_ids_differ": other_ids,
        "bytes": file.stat().st_size,
        "seconds": round(time.perf_counter() - started, 1),
    }


def chat_formatter(model: Any) -> Any:
    """The file's own template, as llama-cpp-python's chat completion renders it."""
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    texts = [model._model.token_get_text(token) for token in (model.token_bos(), model.token_eos())]
    template = model.metadata["tokenizer.chat_template"]
    return Jinja2ChatFormatter(template=template, bos_token=texts[0], eos_token=texts[1])


def silence() -> None:
    """Keep llama.cpp's log off the screen; the callback has to outlive the calls."""
    import llama_cpp

    llama_cpp.llama_log_set(_nothing(), None)


_kept: list[Any] = []


def _nothing() -> Any:
    import llama_cpp

    if not _kept:
        _kept.append(llama_cpp.llama_log_callback(lambda level, text, data: None))
    return _kept[0]


def user_text(row: dict[str, str]) -> str:
    """What a user types for an Alpaca row, as docs/data.md says."""
    return f"{row['instruction']}\n\n### Input:\n{row['input']}" if row.get("input") else row["instruction"]


def comparable(text: str) -> str:
    return unicodedata.normalize("NFC", text).strip()


if __name__ == "__main__":
    if "--answer" in sys.argv:
        answer_main(Path(sys.argv[2]), Path(sys.argv[4]))
    else:
        sys.exit(main())
