"""The command line: one short function per command. Imports nothing heavy; the only door to Typer."""

from __future__ import annotations

import json
import signal
import sys
import traceback
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from finetune.cli_text import cache_text, check_text, plan_text, reading_line, train_text
from finetune.errors import FinetuneError, Interrupted, OutOfMemoryError, Problem, UserError
from finetune.machine import go_offline, quiet_libraries, share_cores

app = typer.Typer(
    name="finetune",
    help="Parameter-efficient fine-tuning for the LLaMA family: a recipe in, a proven release out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

INTERRUPTED = Interrupted(Problem("finetune", "interrupted"), signal_number=signal.SIGINT)

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe: see `finetune recipes`.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Another value for a key, e.g. train.epochs=1.")
]
TargetName = Annotated[str, typer.Argument(metavar="TARGET", help="A run, adapter, merged folder, base or hub id.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout; everything else on stderr.")]
Offline = Annotated[bool, typer.Option("--offline", help="No network at all.")]
TemplateName = Annotated[
    str | None, typer.Option("--template", metavar="T", help="alpaca, none or a .jinja file, for a base without one.")
]
SystemText = Annotated[str | None, typer.Option("--system", metavar="TEXT", help="A system turn before the first.")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer in tokens.")]
TopP = Annotated[float, typer.Option("--top-p", min=0.0, max=1.0, help="Sample from this much of the probability.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="The source of randomness when sampling.")]
Temperature = Annotated[float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token each time.")]


@app.command()
def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Run folder, in place of the recipe's.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Start, or continue from the newest checkpoint.")] = False,
    as_json: AsJson = False,
    offline: Offline = False,
) -> None:
    """Train what the recipe asks for: recipe -> run folder."""
    _prepare(offline)
    from finetune.run import run

    folder = run(recipe, overrides or (), out=out, resume=resume, reading=reading_line)
    result = {"run": str(folder.path), **folder.result}
    _answer(result, as_json, train_text(result))


@app.command()
def plan(recipe: RecipeFile, overrides: Overrides = None, as_json: AsJson = False, offline: Offline = False) -> None:
    """Every number a run will use, resolved, before a weight is loaded."""
    _prepare(offline)
    from finetune.resolve import resolve

    with reading_line() as progress:
        values = resolve(recipe, overrides or (), progress=progress).plan.to_json()
    _answer(values, as_json, plan_text(values))


@app.command()
def check(
    recipe: RecipeFile,
    only: Annotated[
        str | None, typer.Option("--only", metavar="recipe|data", help="No more than the recipe, or it and the data.")
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
    offline: Offline = False,
) -> None:
    """Prove what can be proven before training: recipe, every row, template, labels, memory, disk."""
    _prepare(offline)
    from finetune.check import check as prove

    with reading_line() as progress:
        checked = prove(recipe, overrides or (), only=only, progress=progress)
    values, error = checked.to_json(), checked.error()
    if not (error and as_json):
        _answer(values, as_json, check_text(values, colour=sys.stdout.isatty()))
    if error:
        raise error


@app.command()
def show(
    recipe: RecipeFile,
    row: Annotated[
        str, typer.Option("--row", metavar="N|FILE:LINE", help="Row number from 0, or where it stands.")
    ] = "0",
    split: Annotated[
        str | None, typer.Option("--split", metavar="train|eval", help="Only a training or only a held-out row.")
    ] = None,
    step: Annotated[
        int | None, typer.Option("--step", metavar="K", help="All rows of a step, from 1, as passes.")
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write a page to look through.")] = None,
    rows: Annotated[int, typer.Option("--rows", metavar="N", min=1, help="So many rows on the page.")] = 300,
    overrides: Overrides = None,
    as_json: AsJson = False,
    offline: Offline = False,
) -> None:
    """Rows as the model sees them: which tokens are learned, special tokens visible."""
    _prepare(offline)
    from finetune.show import read_recipe_data, show_page, show_row, show_step

    with reading_line() as progress:
        asked, data = read_recipe_data(recipe, overrides or (), progress=progress)
    colour = sys.stdout.isatty()
    if html:
        values, text = show_page(asked, data, html, rows=rows)
    elif step is not None:
        values, text = show_step(asked, data, step, colour=colour)
    else:
        values, text = show_row(data, row, split=split, colour=colour)
    _answer(values, as_json, text)


@app.command()
def generate(
    target: TargetName,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", metavar="TEXT", help="One user turn; repeatable.")
    ] = None,
    file: Annotated[Path | None, typer.Option("--file", metavar="FILE", help="One prompt a line.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without a template.")] = False,
    template: TemplateName = None,
    system: SystemText = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 17,
    as_json: AsJson = False,
) -> None:
    """Text from a run, adapter, merged folder or base."""
    _prepare(offline=False)
    _refuse_missing(target)
    from finetune.use.generate import generate as complete_prompts
    from finetune.use.generate import read_prompts
    from finetune.use.target import load_target

    prompts = read_prompts(prompt or (), file)
    loaded = load_target(target, template=template)
    answers = complete_prompts(
        loaded,
        prompts,
        raw=raw,
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )
    _answer({"completions": [a.to_json() for a in answers]}, as_json, "\n\n".join(a.text for a in answers))


@app.command()
def chat(
    target: TargetName,
    template: TemplateName = None,
    system: SystemText = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 17,
) -> None:
    """Talk with a run, adapter, merged folder or base."""
    _prepare(offline=False)
    _refuse_missing(target)
    from finetune.use.chat import chat as talk
    from finetune.use.target import load_target

    talk(
        load_target(target, template=template),
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )


@app.command()
def evaluate(
    target: TargetName,
    data: Annotated[str, typer.Option("--data", metavar="FILE", help="Rows with right answers.")],
    against: Annotated[
        str | None, typer.Option("--against", metavar="TARGET", help="Score this one on the same tokens.")
    ] = None,
    template: TemplateName = None,
    by: Annotated[str | None, typer.Option("--by", metavar="COLUMN", help="Also per value of this column.")] = None,
    as_json: AsJson = False,
) -> None:
    """Loss, perplexity and exact match of greedy answers."""
    _prepare(offline=False)
    _refuse_missing(target)
    from finetune.use.evaluate import evaluate as score
    from finetune.use.evaluate import evaluation_text

    evaluation = score(target, data=data, against=against, template=template, by=by)
    _answer(evaluation.to_json(), as_json, evaluation_text(evaluation))


@app.command()
def merge(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run folder.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The release folder to write.")],
    onto: Annotated[
        str, typer.Option("--onto", metavar="auto|original|dequantized", help="The weights the adapter is folded into.")
    ] = "auto",
    as_json: AsJson = False,
) -> None:
    """Fold a run's adapter into its base; proven before it is published."""
    _prepare(offline=False)
    _refuse_missing(run)
    from finetune.release.merge import merge as fold
    from finetune.release.merge import release_text

    release = fold(run, out=out, onto=onto, progress=lambda line: typer.echo(line, err=True))
    _answer(release.to_json(), as_json, release_text(release))


@app.command()
def export(
    target: TargetName,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to write.")],
    format: Annotated[str, typer.Option("--format", metavar="gguf|safetensors|adapter", help="What to write.")],
    quant: Annotated[
        str | None,
        typer.Option(
            "--quant",
            metavar="Q",
            help="gguf: f32, f16, bf16, q8_0 (default), q6_k, q5_k_m, q5_0, q4_k_m or q4_0.",
        ),
    ] = None,
    onto: Annotated[
        str, typer.Option("--onto", metavar="auto|original|dequantized", help="The weights the adapter is folded into.")
    ] = "auto",
    as_json: AsJson = False,
) -> None:
    """Write a run, release or base in the format others load; proven before it is published."""
    _prepare(offline=False)
    _refuse_missing(target)
    from finetune.release.export import export as write
    from finetune.release.export import export_text

    tell = partial(typer.echo, err=True)
    done = write(target, format=format, out=out, quant=quant, onto=onto, progress=tell)
    _answer(done.to_json(), as_json, export_text(done))


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A release folder.")], as_json: AsJson = False
) -> None:
    """Prove a release folder again from its manifest."""
    _prepare(offline=False)
    _refuse_missing(folder)
    from finetune.release.merge import release_text
    from finetune.release.verify import verify as prove_again

    release = prove_again(folder)
    _answer(release.to_json(), as_json, release_text(release))


recipes_app = typer.Typer(help="The shipped recipes.", invoke_without_command=True, rich_markup_mode=None)
app.add_typer(recipes_app, name="recipes")


@recipes_app.callback()
def recipes(context: typer.Context, as_json: AsJson = False) -> None:
    """The shipped recipes; without a word after it, a list of them."""
    if context.invoked_subcommand is None:
        recipes_list(as_json=as_json)


@recipes_app.command("list")
def recipes_list(as_json: AsJson = False) -> None:
    """Name and summary of every shipped recipe."""
    from finetune.shipped import list_recipes

    found = list_recipes()
    text = "\n".join(f"{recipe.name:16} {recipe.summary}" for recipe in found)
    _answer({"recipes": [{"name": r.name, "summary": r.summary} for r in found]}, as_json, text)


@recipes_app.command("show")
def recipes_show(name: Annotated[str, typer.Argument(metavar="NAME")], as_json: AsJson = False) -> None:
    """The text of a shipped recipe."""
    from finetune.shipped import show_recipe

    text = show_recipe(name)
    _answer({"name": name, "text": text}, as_json, text.rstrip("\n"))


@recipes_app.command("copy")
def recipes_copy(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="Where to copy it.")] = Path("."),
    as_json: AsJson = False,
) -> None:
    """Copy a shipped recipe and its data."""
    from finetune.shipped import copy_recipe

    files = [str(path) for path in copy_recipe(name, to)]
    _answer({"files": files}, as_json, "\n".join(files))


@app.command()
def cache(
    action: Annotated[str, typer.Argument(metavar="[show|clear]", help="clear removes all of it.")] = "show",
    as_json: AsJson = False,
) -> None:
    """What the caches hold; everything in them can be made again."""
    from finetune.cache import clear_caches, look_at_caches

    if action not in ("show", "clear"):
        raise UserError(Problem("cache", f"{action!r} is not possible; write show or clear"))
    found = clear_caches() if action == "clear" else look_at_caches()
    total = sum(each.bytes for each in found)
    _answer(
        {"bytes": total, "cleared": action == "clear", "caches": [each.to_json() for each in found]},
        as_json,
        cache_text(found, total, cleared=action == "clear"),
    )


@app.command()
def schema() -> None:
    """JSON Schema of the recipe, for editors."""
    from finetune.recipe import recipe_schema

    typer.echo(json.dumps(recipe_schema(), indent=2))


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """One line per capability of this machine, with the cure where one is missing."""
    from finetune.doctor import examine

    findings = examine()
    lines = [
        f"{'ok  ' if f.ok else 'no  '} {f.name:18} {f.found}" + (f" -> {f.cure}" if f.cure else "") for f in findings
    ]
    _answer({"findings": [vars(finding) for finding in findings]}, as_json, "\n".join(lines))


def main() -> None:
    """Run the command line; every way it can end is one of the documented exit codes."""
    try:
        app()
    except SystemExit as end:  # Typer's own: help (0), a command line that it cannot read (2), Ctrl-C (130)
        if end.code == INTERRUPTED.code:
            _report(INTERRUPTED)
        elif end.code:
            _report_json(UserError(Problem("command line", "cannot be read; see the message above it, or --help")))
        raise
    except KeyboardInterrupt:
        _report(INTERRUPTED)
        raise SystemExit(INTERRUPTED.code) from None
    except FinetuneError as error:
        _report(error)
        raise SystemExit(error.code) from None
    except MemoryError:
        cure = "out of memory; lower train.tokens_per_pass or set train.recompute: all"
        _report(OutOfMemoryError(Problem("memory", cure)))
        raise SystemExit(OutOfMemoryError.code) from None
    except Exception as error:
        traceback.print_exc()
        cure = "a bug in finetune; please report it with the lines above and your recipe"
        _report(FinetuneError(Problem(type(error).__name__, cure)))
        raise SystemExit(FinetuneError.code) from None


def _prepare(offline: bool) -> None:
    """Before any library is imported: no telemetry, no chatter, and no network if asked."""
    quiet_libraries()
    share_cores()
    if offline:
        go_offline()


def _refuse_missing(target: str | Path) -> None:
    """Before torch is imported, which takes seconds: a target that is nowhere is told at once; a path is no hub id."""
    if Path(target).expanduser().exists():
        return
    from finetune.base import find_base_folder

    try:
        find_base_folder(target if isinstance(target, str) else str(target.absolute()))
    except UserError as error:
        raise UserError(Problem(str(target), problem.message) for problem in error.problems) from error


def _answer(values: Mapping[str, Any], as_json: bool, text: str) -> None:
    typer.echo(json.dumps(values, ensure_ascii=False) if as_json else text)


def _report(error: FinetuneError) -> None:
    for problem in error.problems:
        typer.echo(str(problem), err=True)
    if error.total > 1:
        typer.echo(f"{error.total} problems", err=True)
    _report_json(error)


def _report_json(error: FinetuneError) -> None:
    if "--json" in sys.argv:
        failure = {"code": error.code, "problems": [_problem(p) for p in error.problems]}
        typer.echo(json.dumps({**error.answer, "error": failure}))


def _problem(problem: Problem) -> dict[str, str]:
    return {"where": problem.where, "message": problem.message}
