"""The command line: one short function per command. Imports nothing heavy; the only door to Typer."""

from __future__ import annotations

import json
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from finetune.cli_text import cache_text, check_text, reading_line, stage_line, train_text
from finetune.errors import FinetuneError, Interrupted, OutOfMemoryError, Problem, UserError
from finetune.machine import go_offline, launched_rank, prepare_libraries
from finetune.stop import stop_on_signals
from finetune.trust import allow_foreign_code, trusted_code, without_passwords

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
TrustedCode = Annotated[
    str | None,
    typer.Option(
        "--trust-remote-code", metavar="REPO@COMMIT", help="Let this base run its own Python; see docs/security.md."
    ),
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
    allow_change: Annotated[
        list[str] | None,
        typer.Option("--allow-change", metavar="world_size", help="Go on with another number of ranks."),
    ] = None,
    foreign_code: TrustedCode = None,
    as_json: AsJson = False,
    offline: Offline = False,
) -> None:
    """Train what the recipe asks for: recipe -> run folder."""
    rank, _, ranks = launched_rank()
    with stop_on_signals(rank=rank, ranks=ranks, tell=_report) as stop:
        _prepare(offline, foreign_code)
        from finetune.run import run

        folder = run(
            recipe,
            overrides or (),
            out=out,
            resume=resume,
            allow_change=allow_change or (),
            reading=reading_line,
            stop=stop,
        )
    if rank == 0:
        result = {"run": str(folder.path), **folder.result}
        _answer(result, as_json, train_text(result))


@app.command()
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    on: Annotated[
        str | None,
        typer.Option(
            "--on",
            metavar="MACHINE",
            help="For h200, h100, a100-80, a100-40, l40s, 4090, 3090, t4, mac or cpu in place of this machine.",
        ),
    ] = None,
    fit: Annotated[
        str | None, typer.Option("--fit", metavar="SIZE", help="Which keys to change to fit in so much memory: 24GB.")
    ] = None,
    foreign_code: TrustedCode = None,
    as_json: AsJson = False,
    offline: Offline = False,
) -> None:
    """Every number a run will use, resolved, before a weight is loaded; of a published base also without having it."""
    _prepare(offline, foreign_code)
    from finetune.plan_text import plan_text
    from finetune.planned import plan_values

    with reading_line() as progress:
        values = plan_values(recipe, overrides or (), progress=progress, on=on, fit=fit)
    _answer({**values, "foreign_code": trusted_code()}, as_json, plan_text(values))


@app.command()
def check(
    recipe: RecipeFile,
    only: Annotated[
        str | None,
        typer.Option("--only", metavar="recipe|data|rehearsal", help="The recipe, the data, or the rehearsal alone."),
    ] = None,
    overrides: Overrides = None,
    foreign_code: TrustedCode = None,
    as_json: AsJson = False,
    offline: Offline = False,
) -> None:
    """Prove what can be proven before training: recipe, base, every row, labels, memory, disk, and a rehearsal."""
    _prepare(offline, foreign_code)
    from finetune.check import check as prove
    from finetune.rehearsal import rehearse

    with reading_line() as progress:
        rehearsed = partial(rehearse, tell=stage_line)
        checked = prove(recipe, overrides or (), only=only, progress=progress, rehearse=rehearsed)
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
    foreign_code: TrustedCode = None,
    as_json: AsJson = False,
    offline: Offline = False,
) -> None:
    """Rows as the model sees them: which tokens are learned, special tokens visible."""
    _prepare(offline, foreign_code)
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
    foreign_code: TrustedCode = None,
    as_json: AsJson = False,
    offline: Offline = False,
) -> None:
    """Text from a run, adapter, merged folder or base."""
    _prepare(offline, foreign_code)
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
    foreign_code: TrustedCode = None,
    offline: Offline = False,
) -> None:
    """Talk with a run, adapter, merged folder or base."""
    _prepare(offline, foreign_code)
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
    foreign_code: TrustedCode = None,
    as_json: AsJson = False,
    offline: Offline = False,
) -> None:
    """Loss, perplexity and exact match of greedy answers."""
    _prepare(offline, foreign_code)
    _refuse_missing(target)
    from finetune.use.evaluate import evaluate as score
    from finetune.use.evaluate import evaluation_text

    evaluation = score(target, data=data, against=against, template=template, by=by)
    _answer(evaluation.to_json(), as_json, evaluation_text(evaluation))


@app.command()
def merge(
    runs: Annotated[list[str], typer.Argument(metavar="RUN", help="A finished run folder or an adapter; or several.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The release folder to write.")],
    onto: Annotated[
        str, typer.Option("--onto", metavar="auto|original|dequantized", help="The weights the adapter is folded into.")
    ] = "auto",
    weights: Annotated[
        list[str] | None,
        typer.Option("--weights", metavar="W...", help="How much of each run, in their order: --weights 0.7 0.3."),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option("--method", metavar="linear|cat|ties|dare", help="How several are combined; see docs/release.md."),
    ] = None,
    density: Annotated[
        float | None, typer.Option("--density", metavar="D", help="ties, dare: the share of each change that is kept.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="dare: what is dropped is drawn by it.")] = None,
    form: Annotated[
        str, typer.Option("--as", metavar="weights|adapter", help="Several as a merged model, or as one LoRA adapter.")
    ] = "weights",
    foreign_code: TrustedCode = None,
    as_json: AsJson = False,
    offline: Offline = False,
) -> None:
    """Fold a run's adapter, or several with weights, into their base; proven before it is published."""
    _prepare(offline, foreign_code)
    paths, shares = _runs_and_weights(runs, weights or ())
    for path in paths:
        _refuse_missing(path)
    is_combined = len(paths) > 1 or shares or method or density is not None or seed is not None or form != "weights"
    from finetune.release.merge import merge as fold
    from finetune.release.merge import release_text

    tell = partial(typer.echo, err=True)
    if is_combined:
        from finetune.release.algebra import make_formula
        from finetune.release.combined import combined_text, merge_combined

        formula = make_formula(len(paths), weights=shares, method=method, density=density, seed=seed)
        release = merge_combined(paths, formula, out=out, onto=onto, form=form, progress=tell)
        text = combined_text(release, form=form)
    else:
        release = fold(paths[0], out=out, onto=onto, progress=tell)
        text = release_text(release)
    _answer(release.to_json(), as_json, text)


@app.command()
def extract(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The model that was tuned: a folder or hub id.")],
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="What became of it: a folder or hub id.")],
    rank: Annotated[int, typer.Option("--rank", metavar="R", min=1, help="Rank of the adapter; more is more exact.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The adapter folder to write.")],
    linears_only: Annotated[
        bool, typer.Option("--linears-only", help="Leave out what differs elsewhere (norms, embeddings), and name it.")
    ] = False,
    foreign_code: TrustedCode = None,
    as_json: AsJson = False,
    offline: Offline = False,
) -> None:
    """A LoRA adapter from the difference of two models, by truncated SVD; its error is told and proven."""
    _prepare(offline, foreign_code)
    for model in (base, tuned):
        _refuse_missing(model)
    from finetune.release.extract import extract as take_difference
    from finetune.release.extract import extract_text

    tell = partial(typer.echo, err=True)
    done = take_difference(base, tuned, rank=rank, out=out, linears_only=linears_only, progress=tell)
    _answer(done.to_json(), as_json, extract_text(done))


@app.command()
def export(
    target: TargetName,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to write.")],
    format: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="F",
            help="Of the model: safetensors (as merge), gguf (llama.cpp), ollama (gguf and Modelfile), "
            "compressed-tensors (4 bits for vLLM). Of a run's adapter alone: adapter (PEFT), gguf-adapter (llama.cpp).",
        ),
    ],
    quant: Annotated[
        str | None,
        typer.Option(
            "--quant",
            metavar="Q",
            help="Of gguf and ollama: f32, f16, bf16, q8_0 (default), q6_k, q5_k_m, q5_0, q4_k_m or q4_0.",
        ),
    ] = None,
    onto: Annotated[
        str, typer.Option("--onto", metavar="auto|original|dequantized", help="The weights the adapter is folded into.")
    ] = "auto",
    without_template: Annotated[
        bool,
        typer.Option("--without-template", help="ollama: go on where Ollama's language cannot say the chat template."),
    ] = False,
    foreign_code: TrustedCode = None,
    as_json: AsJson = False,
    offline: Offline = False,
) -> None:
    """Write a run, release or base in the format others load; proven before it is published."""
    _prepare(offline, foreign_code)
    _refuse_missing(target)
    from finetune.release.export import export as write
    from finetune.release.export import export_text

    tell = partial(typer.echo, err=True)
    done = write(
        target,
        format=format,
        out=out,
        quant=quant,
        onto=onto,
        without_template=without_template,
        progress=tell,
    )
    _answer(done.to_json(), as_json, export_text(done))


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A release folder.")],
    foreign_code: TrustedCode = None,
    as_json: AsJson = False,
    offline: Offline = False,
) -> None:
    """Prove a release folder again from its manifest."""
    _prepare(offline, foreign_code)
    _refuse_missing(folder)
    from finetune.release.verify import verify as prove_again
    from finetune.release.verify import verify_text

    again = prove_again(folder)
    _answer(again.to_json(), as_json, verify_text(again))


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A release: what merge or export wrote.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the hub; made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Only you can see it; a public one is refused.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List every file with its bytes; no network, no token.")
    ] = False,
    revision: Annotated[str, typer.Option("--revision", metavar="BRANCH", help="Made if it is not there.")] = "main",
    files_only: Annotated[
        bool, typer.Option("--files-only", help="Compare the files with the manifest, prove nothing again.")
    ] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Delete the repository's other files in the same commit.")
    ] = False,
    as_json: AsJson = False,
    offline: Offline = False,
) -> None:
    """Upload a release to the hub: proven again first, in one commit, compared with the hub's hashes afterwards.

    The token is the one that `hf auth login` saved, or HF_TOKEN.
    """
    _prepare(offline)
    _refuse_missing(folder)
    from finetune.release.push import push as upload
    from finetune.release.push import push_text

    tell = partial(typer.echo, err=True)
    done = upload(
        folder,
        repo,
        private=private,
        revision=revision,
        files_only=files_only,
        replace=replace,
        dry_run=dry_run,
        progress=tell,
    )
    _answer(done.to_json(), as_json, push_text(done))


@app.command()
def fetch(
    base: Annotated[str, typer.Argument(metavar="BASE", help="OWNER/NAME on the hub.")],
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="COMMIT", help="A commit, tag or branch; else the newest.")
    ] = None,
    foreign_code: TrustedCode = None,
    as_json: AsJson = False,
    offline: Offline = False,
) -> None:
    """Download a base ahead of time, with every hash compared; a broken download goes on where it stopped."""
    _prepare(offline, foreign_code)
    from finetune.fetch import fetch as download
    from finetune.fetch import fetch_text

    done = download(base, revision=revision, tell=partial(typer.echo, err=True))
    _answer(done.to_json(), as_json, fetch_text(done))


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
    width = max(len(recipe.name) for recipe in found)
    text = "\n".join(f"{recipe.name:{width}}  {recipe.summary}" for recipe in found)
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
def doctor(
    measure: Annotated[
        bool, typer.Option("--calibrate", help="Measure how fast this machine is (about 10 s), for `plan`")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """One line per capability of this machine, with the cure where one is missing."""
    from finetune.doctor import examine, measure_machine

    if measure:
        measure_machine()
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
        typer.echo(without_passwords(traceback.format_exc()), err=True)
        cure = "a bug in finetune; please report it with the lines above and your recipe"
        _report(FinetuneError(Problem(type(error).__name__, cure)))
        raise SystemExit(FinetuneError.code) from None


def _prepare(offline: bool, foreign_code: str | None = None) -> None:
    """Before any library is imported: no telemetry or chatter, no code but what is allowed, no network if asked."""
    prepare_libraries()
    allow_foreign_code(foreign_code)
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


def _runs_and_weights(words: Sequence[str], weights: Sequence[str]) -> tuple[list[Path], list[float]]:
    """Run folders and weights; `--weights 0.7 0.3` gives its first number to the option, the others to the runs."""
    loose = [word for word in words if weights and _is_number(word) and not Path(word).exists()]
    numbers = [number for word in weights for number in word.replace(",", " ").split()] + loose
    odd = [word for word in numbers if not _is_number(word)]
    if odd:
        raise UserError(Problem("--weights", f"{odd[0]!r} is no number; write one for each run: --weights 0.7 0.3"))
    return [Path(word) for word in words if word not in loose], [float(number) for number in numbers]


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _answer(values: Mapping[str, Any], as_json: bool, text: str) -> None:
    typer.echo(json.dumps(values, ensure_ascii=False) if as_json else text)


def _report(error: FinetuneError) -> None:
    if not error.problems:  # of several ranks, one speaks
        return
    for problem in error.problems:
        typer.echo(without_passwords(str(problem)), err=True)
    if error.total > 1:
        typer.echo(f"{error.total} problems", err=True)
    _report_json(error)


def _report_json(error: FinetuneError) -> None:
    if "--json" in sys.argv:
        failure = {"code": error.code, "problems": [_problem(p) for p in error.problems]}
        typer.echo(json.dumps({**error.answer, "error": failure}))


def _problem(problem: Problem) -> dict[str, str]:
    return {"where": without_passwords(problem.where), "message": without_passwords(problem.message)}
