"""Continue texts: prompts in, what the model says up to its stop token out; many at once, or one token at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from finetune.data.encoder import Encoder
from finetune.data.rows import Turn
from finetune.data.template import Rendered, TemplateProblem
from finetune.errors import Problem, UserError, raise_problems
from finetune.train.held_out import autocast
from finetune.use.target import Target, transformers_model

# B = rows of a batch, T = tokens so far, V = vocabulary
BATCH_TOKENS = {"cpu": 8192, "cuda": 65536}  # padded tokens of a batch, answers included


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; temperature 0 takes the likeliest and needs neither top_p nor seed."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 17

    def __post_init__(self) -> None:
        problems = []
        if not 0 <= self.temperature < float("inf"):
            problems.append(Problem("temperature", f"must be 0 (the likeliest token) or more, got {self.temperature}"))
        if not 0 < self.top_p <= 1:
            problems.append(Problem("top_p", f"must be above 0 and at most 1, got {self.top_p}"))
        raise_problems(problems)


GREEDY = Sampling()


@dataclass(frozen=True)
class Completion:
    """What a model said: `ids` and `text` without the stop token, and what ended it ("eos" or "length")."""

    ids: tuple[int, ...]
    text: str
    stopped: str

    @property
    def tokens(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Answer:
    """A prompt as it was given and what was said to it; tokens counts those of the text, without the stop token."""

    prompt: str
    text: str
    stopped: str
    tokens: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def read_prompts(prompts: Sequence[str], file: Path | None) -> list[str]:
    """The prompts of the command line, then those of a file, one a line; empty lines are none.

    Raises:
        UserError: the file is not there or not UTF-8, or there is no prompt at all.
    """
    found = list(prompts)
    if file is not None:
        try:
            found += [line for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            message = f"cannot be read ({error}); give a UTF-8 text file, one prompt a line"
            raise UserError(Problem(str(file), message)) from error
    if not found:
        raise UserError(
            Problem("prompt", "there is nothing to answer; give --prompt TEXT or a --file with a line each")
        )
    return found


def generate(  # noqa: PLR0913 - the options of the command, one to one
    target: Target,
    prompts: Sequence[str],
    *,
    raw: bool = False,
    system: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 17,
) -> list[Answer]:
    """One answer a prompt, in order; a prompt is one user turn through the template, or with `raw` a text to go on.

    Raises:
        UserError: the target has no template, or a prompt leaves no room to answer.
    """
    sampling = Sampling(temperature, top_p, seed)
    encoder = Encoder(target.base)
    ids = encoder.encode(
        [raw_text(target, prompt) if raw else user_prompt(target, prompt, encoder, system=system) for prompt in prompts]
    )
    completions = complete(
        target, [encoding.ids.tolist() for encoding in ids], max_new_tokens=max_new_tokens, sampling=sampling
    )
    return [Answer(prompt, c.text, c.stopped, c.tokens) for prompt, c in zip(prompts, completions, strict=True)]


def user_prompt(target: Target, prompt: str, encoder: Encoder, *, system: str | None = None) -> Rendered:
    """What asks for an answer to one user turn; without `system` the run's own system prompt stands first."""
    system = target.system if system is None else system
    before = [Turn("system", system)] if system is not None else []
    return conversation_prompt(target, [*before, Turn("user", prompt)], encoder)


def raw_text(target: Target, text: str) -> str:
    """The text as it is, after the bos token where the base has one and the text does not bring it."""
    bos = target.base.bos_token or ""
    return text if text.startswith(bos) else bos + text


def conversation_prompt(target: Target, turns: Sequence[Turn], encoder: Encoder) -> Rendered:
    """The turns as the template writes them, up to where the assistant starts to speak; a turn's text stays text.

    Raises:
        UserError: no template, or one that refuses these turns.
    """
    if target.template is None:
        message = "this base has no chat template; add `--template alpaca`, or continue text with `generate --raw`"
        raise UserError(Problem(target.name, message))
    try:
        return target.template.render_prompt(turns, control_texts=encoder.special_texts)
    except TemplateProblem as problem:
        raise UserError(Problem(f"template {target.template.name}", str(problem))) from problem


def complete(
    target: Target,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    batch_tokens: int | None = None,
    advance: Callable[[int], None] = lambda rows: None,
) -> list[Completion]:
    """One completion a prompt (token ids), in order; `advance` is told after every token how many more rows are done.

    Prompts of like length share a batch of at most `batch_tokens` padded tokens. In float32 a batch's answers are those
    of each prompt alone; in 16 bit near-ties between two tokens may fall differently.

    Raises:
        UserError: every prompt that is empty or leaves no room in the base's context.
    """
    _refuse_prompts_without_room(target, prompts)
    limit = batch_tokens or BATCH_TOKENS[target.device]
    choose = _chooser(target, sampling)
    answers: dict[int, Completion] = {}
    for batch in _batches([len(prompt) for prompt in prompts], max_new_tokens=max_new_tokens, limit=limit):
        chosen = [prompts[index] for index in batch]
        said: list[list[int]] = [[] for _ in batch]
        for tokens in _speak(target, chosen, max_new_tokens=max_new_tokens, choose=choose):
            for row, token in tokens.items():
                said[row].append(token)
            advance(0)
        for index, prompt, ids in zip(batch, chosen, said, strict=True):
            answers[index] = _completion(target, prompt, ids)
        advance(len(batch))
    return [answers[index] for index in range(len(prompts))]


def stream(target: Target, prompt: Sequence[int], *, max_new_tokens: int, sampling: Sampling = GREEDY) -> Iterator[str]:
    """The pieces of one answer's text as they come; a character of several tokens comes when it is whole."""
    _refuse_prompts_without_room(target, [prompt])
    ids: list[int] = []
    shown = 0
    for tokens in _speak(target, [prompt], max_new_tokens=max_new_tokens, choose=_chooser(target, sampling)):
        ids.append(tokens[0])
        text = _completion(target, prompt, ids).text
        if not text.endswith("\ufffd") and len(text) > shown:
            yield text[shown:]
            shown = len(text)
    rest = _completion(target, prompt, ids).text[shown:] if ids else ""
    if rest:
        yield rest


@torch.no_grad()
def _speak(
    target: Target, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, choose: Callable
) -> Iterator[dict[int, int]]:
    """After each forward pass the new token of every row that still speaks, the stop token included.

    Rows are padded on the left, so that all of them end where the next token goes. Rows that are done leave the batch
    and its cache. transformers' generate would also do; it keeps every row until the last one is done.
    """
    device, longest = target.device, max(map(len, prompts))
    cache = DynamicCache(config=transformers_model(target.model).config)
    input_BT = torch.tensor([[0] * (longest - len(ids)) + list(ids) for ids in prompts], device=device)
    mask_BT = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
    positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
    rows = list(range(len(prompts)))
    room = [min(max_new_tokens, target.base.facts.context_tokens - len(ids)) for ids in prompts]
    for count in range(1, max_new_tokens + 1):
        with autocast(target.device, target.dtype):
            logits_B1V = target.model(
                input_ids=input_BT,
                attention_mask=mask_BT,
                position_ids=positions_BT,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits
        token_B = choose(logits_B1V[:, -1].float())
        tokens = dict(zip(rows, token_B.tolist(), strict=True))
        yield tokens
        keep = [i for i, row in enumerate(rows) if tokens[row] not in target.stop_token_ids and room[row] > count]
        if not keep:
            return
        if len(keep) < len(rows):
            kept = torch.tensor(keep, device=device)
            rows = [rows[i] for i in keep]
            cache.batch_select_indices(kept)
            token_B, mask_BT, positions_BT = token_B[kept], mask_BT[kept], positions_BT[kept]
        input_BT = token_B[:, None]
        mask_BT = torch.cat([mask_BT, torch.ones_like(input_BT)], dim=1)
        positions_BT = positions_BT[:, -1:] + 1


def _chooser(target: Target, sampling: Sampling) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function from float32 logits [B, V] to the next tokens [B]."""
    if sampling.temperature == 0:
        return lambda logits_BV: logits_BV.argmax(dim=-1)
    generator = torch.Generator(device=target.device).manual_seed(sampling.seed)

    def draw(logits_BV: torch.Tensor) -> torch.Tensor:
        sorted_BV, order_BV = (logits_BV / sampling.temperature).softmax(dim=-1).sort(dim=-1, descending=True)
        # Nucleus sampling (arXiv:1904.09751): the fewest likeliest tokens that together reach top_p.
        sorted_BV = sorted_BV * (sorted_BV.cumsum(dim=-1) - sorted_BV < sampling.top_p)
        return order_BV.gather(1, torch.multinomial(sorted_BV, 1, generator=generator))[:, 0]

    return draw


def _completion(target: Target, prompt: Sequence[int], ids: list[int]) -> Completion:
    """The ids cut before the stop token and as text; the only place where finetune decodes.

    Decoded after the prompt's last token, because a SentencePiece decoder drops the space a text starts with.
    """
    stopped = "eos" if ids and ids[-1] in target.stop_token_ids else "length"
    said = ids[:-1] if stopped == "eos" else ids
    before = target.base.tokenizer.decode([prompt[-1]], skip_special_tokens=False)
    text = target.base.tokenizer.decode([prompt[-1], *said], skip_special_tokens=False)[len(before) :]
    return Completion(tuple(said), text, stopped)


def _batches(lengths: Sequence[int], *, max_new_tokens: int, limit: int) -> Iterator[list[int]]:
    """Positions, longest first, so that a batch that does not fit in memory is met at once."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    while order:
        rows = max(1, limit // (lengths[order[0]] + max_new_tokens))
        yield order[:rows]
        order = order[rows:]


def _refuse_prompts_without_room(target: Target, prompts: Sequence[Sequence[int]]) -> None:
    context = target.base.facts.context_tokens
    raise_problems(
        Problem(f"prompt {number}", f"has {len(ids)} tokens; {target.name} needs 1 to {context - 1} to answer")
        for number, ids in enumerate(prompts, start=1)
        if not 0 < len(ids) < context
    )
