"""Experts that routers choose: what transformers chooses, and what it computes with another model's choices."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from finetune.release.layerwise import LayerwiseModel, Pass
from finetune.release.measure import answer_passes, greedy_answers
from finetune.release.routes import Route, Routing, largest_lead, share_of_others
from tests.release.test_layerwise import FAMILIES, equal, make_model, probes

MIXTURES = {
    "mixtral": FAMILIES["mixtral"],
    "qwen3_moe": FAMILIES["qwen3_moe"] | {"norm_topk_prob": True},
}


@pytest.fixture(scope="module", params=MIXTURES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random mixture, and the same with every weight changed a little: at some tokens it chooses other experts."""
    one, other = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("other")
    for folder in (one, other):
        make_model(folder, MIXTURES[request.param])
    tensors = load_file(str(other / "model.safetensors"))
    generator = torch.Generator().manual_seed(7)
    changed = {name: each + 0.05 * torch.randn(each.shape, generator=generator) for name, each in tensors.items()}
    save_file(changed, str(other / "model.safetensors"), metadata={"format": "pt"})
    return one, other


def whole(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()


def computed(model: PreTrainedModel, ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits, and what each layer's router says of each token [T, experts]."""
    with torch.no_grad():
        found: Any = model(input_ids=ids, output_router_logits=True, use_cache=False)
    return found.logits[0], [logits.reshape(ids.shape[1], -1) for logits in found.router_logits]


def choices(router_logits: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [logits.topk(2).indices for logits in router_logits]


def computed_on(folder: Path, chosen: Sequence[torch.Tensor], ids: torch.Tensor) -> tuple[Any, list[torch.Tensor]]:
    """transformers' model with its routers told what to choose: shares of the chosen, brought to a sum of one."""
    model = whole(folder)
    for layer, index in zip(model.model.layers, chosen, strict=True):

        def choose(_module: Any, _args: Any, found: Any, index: torch.Tensor = index) -> Any:
            shares = found[0].softmax(dim=-1).gather(-1, index)
            return found[0], shares / shares.sum(dim=-1, keepdim=True), index

        layer.mlp.gate.register_forward_hook(choose)
    return computed(model, ids)


def test_a_route_is_what_the_routers_chose(pair: tuple[Path, Path]) -> None:
    passes = [Pass(ids) for ids in probes()]
    list(LayerwiseModel(pair[0]).logits(passes))
    reference = whole(pair[0])
    for one, ids in zip(passes, probes(), strict=True):
        theirs = choices(computed(reference, ids)[1])
        assert all(torch.equal(ours, expected) for ours, expected in zip(one.route.chosen, theirs, strict=True))
        assert one.route.rated == 3 * 4 * ids.shape[1]  # layers, experts, tokens
        assert (one.route.others, one.route.lead) == (0, 0)


def test_a_model_follows_anothers_route(pair: tuple[Path, Path]) -> None:
    """Logits, and how many candidates its own routers would have treated otherwise, by how much."""
    first = [Pass(ids) for ids in probes()]
    list(LayerwiseModel(pair[0]).logits(first))
    following = [Pass(ids, follow=one.route) for ids, one in zip(probes(), first, strict=True)]
    found = list(LayerwiseModel(pair[1]).logits(following))
    differing, leads, free = 0, [0.0], []
    for one, ids, logits in zip(first, probes(), found, strict=True):
        expected, rated = computed_on(pair[1], one.route.chosen, ids)
        assert equal([logits], [expected])
        free.append(computed(whole(pair[1]), ids)[0])
        for own, taken in zip(rated, one.route.chosen, strict=True):
            shares = own.softmax(dim=-1)
            for row, best, forced in zip(shares, own.topk(2).indices.tolist(), taken.tolist(), strict=True):
                differing += len(set(best) ^ set(forced))
                leads.append(((min(row[best]) - min(row[forced])) / shares.std()).item())
    routes = [one.route for one in following]
    assert share_of_others(routes) == differing / (3 * 4 * sum(ids.shape[1] for ids in probes()))
    assert largest_lead(routes) == pytest.approx(max(leads), rel=1e-3)
    assert differing > 0
    assert not equal(found, free)


def test_a_model_on_its_own_route_computes_what_it_computes(pair: tuple[Path, Path]) -> None:
    model, first = LayerwiseModel(pair[0]), [Pass(ids) for ids in probes()]
    free = list(model.logits(first))
    again = [Pass(ids, follow=one.route) for ids, one in zip(probes(), first, strict=True)]
    assert equal(list(model.logits(again)), free)
    assert (share_of_others([one.route for one in again]), largest_lead([one.route for one in again])) == (0, 0)


def test_the_route_of_an_answer_is_that_of_its_tokens_at_once(pair: tuple[Path, Path]) -> None:
    model, prompts = LayerwiseModel(pair[0]), [ids[0].tolist() for ids in probes()]
    for answer in greedy_answers(model, prompts, tokens=5, stops=()):
        (one,) = answer_passes([answer])
        free = Pass(one.input_ids_1T)
        list(model.logits([free]))
        assert all(torch.equal(a, b) for a, b in zip(answer.route.chosen, free.route.chosen, strict=True))
        assert answer.route.rated == free.route.rated


def test_only_a_choice_among_more_is_one() -> None:
    """All of them, or along another dimension than the last, is no choice of a token's experts."""
    values = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 4.0]])
    route = Route()
    with Routing(route, None):
        values.topk(3)
        torch.topk(values, 1, dim=0)
        largest = torch.topk(input=values, k=2, dim=-1)
        values.sort(dim=-1)
    assert largest.indices.tolist() == [[0, 2], [1, 2]]
    assert [chosen.tolist() for chosen in route.chosen] == [[[0, 2], [1, 2]]]
    assert route.rated == 6
    follow = Route([torch.tensor([[2, 0], [1, 0]])])
    turned = Route()
    with Routing(turned, follow):
        taken = values.topk(2)
    assert (taken.values.tolist(), taken.indices.tolist()) == ([[2.0, 3.0], [5.0, 0.0]], [[2, 0], [1, 0]])
    assert turned.others == 2  # the first token's are the same ones
    assert turned.lead == pytest.approx((4.0 - 0.0) / values.std().item())


@pytest.mark.parametrize("family", ["llama, tied", "falcon"])
def test_a_model_without_routers_has_no_route(tmp_path: Path, family: str) -> None:
    passes = [Pass(ids) for ids in probes()]
    list(LayerwiseModel(make_model(tmp_path, FAMILIES[family])).logits(passes))
    assert [(one.route.chosen, one.route.rated) for one in passes] == [([], 0)] * len(passes)
