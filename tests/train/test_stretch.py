"""How examples lie in a pass, and that beginning together changes neither a loss nor a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.examples import Example
from finetune.model.adapter import attach_adapter
from finetune.model.attention import swap_attention
from finetune.model.load import load_base
from finetune.resolve import resolve
from finetune.train.loss import stretch_losses_S
from finetune.train.stretch import SHORTEST_PREFIX, Stretch, lay_end_to_end, shared_beginnings
from tests.conftest import alpaca_rows, write_recipe

# Few different tokens and a shared start, so that beginnings of all lengths are shared.
beginnings = st.sampled_from([[7] * 12, [7] * 9 + [8] * 9, [7] * 9 + [9] * 20, [5] * 30, []])
tails = st.lists(st.integers(0, 2), min_size=1, max_size=6)
drawn_ids = st.lists(st.builds(lambda start, tail: start + tail, beginnings, tails), min_size=1, max_size=7)


def example(ids: Sequence[int], learned: Sequence[bool] | None = None) -> Example:
    marks = np.array(learned if learned is not None else [index % 3 > 0 for index in range(len(ids))])
    return Example(ids=np.array(ids, np.int32), learned=marks, where="rows.jsonl:1", prompt_tokens=0, cut_tokens=0)


def seen(ids: list[int]) -> list[int]:
    """What losses are computed from: all before the last learned token of `example`."""
    return ids[: max((index for index in range(1, len(ids)) if index % 3 > 0), default=1)]


@given(drawn_ids)
def test_every_example_can_be_read_back(drawn: list[list[int]]) -> None:
    """From the documents alone: a prefix's tokens and then the own ones are the example, at its own positions."""
    examples = [example(ids) for ids in drawn]
    stretch = lay_end_to_end(examples, share_prefixes=True)
    ids, positions = (t[0].split(stretch.document_lengths) for t in (stretch.input_ids_1T, stretch.position_ids_1T))
    places = torch.arange(stretch.tokens).split(stretch.document_lengths)
    continued = set(stretch.document_prefixes)
    whole = [number for number in range(len(ids)) if number not in continued]
    assert len(whole) == len(drawn)
    predicting, targets = [], []
    for number, tokens in zip(whole, drawn, strict=True):
        prefix = stretch.document_prefixes[number]
        parts = [number] if prefix < 0 else [prefix, number]
        assert torch.cat([ids[part] for part in parts]).tolist() == seen(tokens)
        assert torch.cat([positions[part] for part in parts]).tolist() == list(range(len(seen(tokens))))
        at = torch.cat([places[part] for part in parts]).tolist()
        learned = [index for index in range(1, len(tokens)) if index % 3 > 0]
        predicting += [at[index - 1] for index in learned]
        targets += [tokens[index] for index in learned]
    assert stretch.predicting_S.tolist() == predicting
    assert stretch.target_S.tolist() == targets
    for number, prefix in enumerate(stretch.document_prefixes):
        assert prefix < number  # a prefix is laid before what continues it
        assert prefix < 0 or stretch.document_prefixes[prefix] < 0
        assert prefix < 0 or stretch.document_lengths[prefix] >= SHORTEST_PREFIX


def fewest_tokens(drawn: Sequence[list[int]]) -> int:
    """Every way to cut the sorted examples into groups, each with the longest beginning its members share."""
    fewest = sum(map(len, drawn))
    for cuts in product([False, True], repeat=len(drawn) - 1):
        groups = [[drawn[0]]]
        for each, cut in zip(drawn[1:], cuts, strict=True):
            groups += [[each]] if cut else []
            groups[-1] += [] if cut else [each]
        tokens = 0
        for group in groups:
            shared = 0
            while all(len(each) > shared + 1 and each[shared] == group[0][shared] for each in group):
                shared += 1
            saved = shared if shared >= SHORTEST_PREFIX else 0
            tokens += sum(map(len, group)) - saved * (len(group) - 1)
        fewest = min(fewest, tokens)
    return fewest


@settings(max_examples=60)
@given(drawn_ids)
def test_no_other_groups_of_neighbours_leave_fewer_tokens(drawn: list[list[int]]) -> None:
    stretch = lay_end_to_end([example(ids) for ids in drawn], share_prefixes=True)
    assert stretch.tokens == fewest_tokens(sorted(map(seen, drawn)))


def test_identical_examples_keep_a_token_of_their_own() -> None:
    stretch = lay_end_to_end([example(range(20)), example(range(20)), example(range(50, 53))], share_prefixes=True)
    assert stretch.document_lengths == [18, 1, 1, 2]
    assert stretch.document_prefixes == [-1, 0, 0, -1]


def test_a_short_beginning_is_not_shared() -> None:
    ids = [[1] * (SHORTEST_PREFIX - 1) + [2, 3], [1] * (SHORTEST_PREFIX - 1) + [4, 5]]
    assert lay_end_to_end(list(map(example, ids)), share_prefixes=True).document_prefixes == [-1, -1]
    assert shared_beginnings([np.array([1] + each) for each in ids])[1].tokens == SHORTEST_PREFIX


def test_nothing_is_shared_unless_asked() -> None:
    stretch = lay_end_to_end([example(range(20)), example(range(20))])
    assert (stretch.document_lengths, stretch.document_prefixes) == ([19, 19], [-1, -1])


SYSTEM = list(range(40, 140))
MIXES = {
    "one beginning": [SYSTEM + [3, 4, 5], SYSTEM + [6], SYSTEM + [7] * 30],
    "two beginnings, others between": [
        SYSTEM[:39] + [3, 4, 5, 6], [9] * 12 + [1, 2], SYSTEM[:29] + [2, 1, 0], [8, 7], SYSTEM[:39] + [1] * 70,
        [9] * 12 + [3], SYSTEM[:29] + [5, 4],
    ],
    "the same twice": [SYSTEM[:20], SYSTEM[:20], SYSTEM[:20] + [1, 2]],
    "one begins another": [SYSTEM[:30], SYSTEM[:60], SYSTEM],
    "longer than all that follows": [SYSTEM + [3], SYSTEM + [4, 5], SYSTEM + [6]],
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    """A LoRA on every linear module whose B is not zero."""
    resolved = resolve(write_recipe(tmp_path_factory.mktemp("stretch"), tiny_base, alpaca_rows(4)))
    model = attach_adapter(load_base(resolved.plan.model), resolved.plan.adapter, base="x")
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(number))
    return model


def losses_and_gradients(model: torch.nn.Module, stretch: Stretch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    losses = stretch_losses_S(model, stretch)
    losses.sum().backward()
    return losses.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def relative_error(found: torch.Tensor, right: torch.Tensor) -> float:
    return ((found - right).norm() / right.norm()).item()


def marks(tokens: int, loss_on: str) -> list[bool]:
    """Every token; the last ones; or those of two answers, the first of them where beginnings are shared."""
    return [
        loss_on == "all" or index >= tokens - 3 or (loss_on == "turns" and 5 <= index < 15) for index in range(tokens)
    ]


@pytest.mark.parametrize("by", ["torch", "our code"])
@pytest.mark.parametrize("loss_on", ["all", "last", "turns"])
@pytest.mark.parametrize("mix", MIXES)
def test_shared_beginnings_change_no_loss_and_no_gradient(
    model: torch.nn.Module, mix: str, loss_on: str, by: str
) -> None:
    examples = [example(ids, marks(len(ids), loss_on)) for ids in MIXES[mix]]
    inner = model.get_base_model()
    inner.set_attn_implementation("documents")
    right, right_gradients = losses_and_gradients(model, lay_end_to_end(examples))
    if by == "our code" and not swap_attention(model).count:
        pytest.skip("no compiled attention here")
    shared = lay_end_to_end(examples, share_prefixes=True)
    assert shared.tokens < sum(each.tokens for each in examples)
    losses, gradients = losses_and_gradients(model, shared)
    assert relative_error(losses, right) < 1e-5
    assert len(gradients) == 2 * 7 * 2
    assert max(relative_error(gradients[name], right_gradients[name]) for name in right_gradients) < 1e-5


@pytest.mark.parametrize("share", [False, True])
def test_what_no_loss_is_computed_from_is_left_out(model: torch.nn.Module, share: bool) -> None:
    """Beside whole rows, one by one, all logits written out."""
    learned = [[5, 6, 9], [3], [0], [11, 4], [0, 1]]  # of rows of 12; nothing predicts a row's first token
    rows = [example([*SYSTEM[:9], 7 + number, 5, 3], [at in marked for at in range(12)])
            for number, marked in enumerate(learned)]  # fmt: skip
    model.get_base_model().set_attn_implementation("documents")
    expected = [
        torch.nn.functional.cross_entropy(model(input_ids=ids[None]).logits[0, at - 1], ids[at])
        for row, marked in zip(rows, learned, strict=True)
        for ids in [torch.tensor(row.ids).long()]
        for at in sorted(marked)
        if at
    ]
    stretch = lay_end_to_end(rows, share_prefixes=share)
    if not share:
        assert stretch.document_lengths == [9, 3, 1, 11, 1]
    assert relative_error(stretch_losses_S(model, stretch), torch.stack(expected)) < 1e-5


@pytest.mark.parametrize("wrong", ["sees another", "positions start again", "sees no prefix"])
def test_the_comparison_sees(model: torch.nn.Module, wrong: str) -> None:
    """Three ways to be wrong, each far beyond the bound above."""
    examples = [example(ids, marks(len(ids), "all")) for ids in MIXES["one beginning"]]
    model.get_base_model().set_attn_implementation("documents")
    right, _ = losses_and_gradients(model, lay_end_to_end(examples))
    shared = lay_end_to_end(examples, share_prefixes=True)
    prefix, *others = shared.document_prefixes
    broken = {
        "sees another": {"document_prefixes": [prefix, *others[:-1], 1]},
        "positions start again": {
            "position_ids_1T": torch.cat([torch.arange(length) for length in shared.document_lengths])[None]
        },
        "sees no prefix": {"document_prefixes": [-1] * (1 + len(others))},
    }
    assert relative_error(losses_and_gradients(model, replace(shared, **broken[wrong]))[0], right) > 1e-3
