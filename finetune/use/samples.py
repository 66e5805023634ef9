"""Answer prompts with a model that is being trained: it and prompts in; greedy answers out, the model as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from finetune.base import Base
from finetune.data.prompts import Prompt
from finetune.data.template import Template
from finetune.plan import Plan
from finetune.train.held_out import EvaluationStopped, evaluating
from finetune.use.generate import complete
from finetune.use.target import Target, closing_token, transformers_model

MOST_TOKENS = 128  # of an answer


def answer_all(
    plan: Plan,
    base: Base,
    template: Template,
    model: torch.nn.Module,
    prompts: Sequence[Prompt],
    stopping: Callable[[], bool],
) -> list[dict[str, Any]]:
    """The likeliest answer to every prompt, of at most MOST_TOKENS tokens, as `finetune generate` would give it.

    Raises:
        EvaluationStopped: `stopping` answered True between two tokens.
    """
    target = Target(
        name=plan.name,
        kind="run",
        base=base,
        template=template,
        system=None,
        stop_token_ids=tuple(sorted({*plan.stop_token_ids, *closing_token(template, base)})),
        plan=replace(plan.model, attention="sdpa"),
        adapter=None,
        model=model,
    )

    def token_said(_rows: int) -> None:
        if stopping():
            raise EvaluationStopped

    with evaluating(model), _attending_by_masks(model):
        ids = [prompt.ids for prompt in prompts]
        # Together no more than a pass of the training holds, so that they need no more memory.
        room = plan.train.tokens_per_pass
        said = complete(target, ids, max_new_tokens=MOST_TOKENS, batch_tokens=room, advance=token_said)
    return [
        {"prompt": prompt.asked, "answer": answer.text, "tokens": answer.tokens, "stopped": answer.stopped}
        for prompt, answer in zip(prompts, said, strict=True)
    ]


@contextmanager
def _attending_by_masks(model: torch.nn.Module) -> Iterator[None]:
    """Padded prompts and a cache need a mask, which attention by documents does not look at."""
    inner = transformers_model(model)
    before = inner.config._attn_implementation
    inner.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        inner.set_attn_implementation(before)
