"""Facts about generation: a batch says what each prompt alone says, up to its stop token and within the context."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch
from transformers import GenerationConfig

from finetune.data.encoder import Encoder
from finetune.data.template import choose_template
from finetune.errors import UserError
from finetune.use import generate as module
from finetune.use.generate import Sampling, complete, generate, raw_text, read_prompts, stream, user_prompt
from finetune.use.target import Target, load_target, transformers_model

from .conftest import CONTEXT

NEW = 12


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Token ids of lengths from 1 to 40."""
    draw = random.Random(3)
    return [[0, *(draw.randrange(260, 3000) for _ in range(draw.randrange(0, 40)))] for _ in range(17)]


def alone(target: Target, prompt: list[int], *, stops: tuple[int, ...]) -> list[int]:
    """What transformers' own greedy search says to one prompt, without padding."""
    settings = GenerationConfig(do_sample=False, max_new_tokens=NEW, eos_token_id=list(stops), pad_token_id=0)
    ids = torch.tensor([prompt], device=target.device)
    model = transformers_model(target.model)
    said = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    return said[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def stopping(tiny: Target, prompts: list[list[int]]) -> Target:
    """The tiny base with stop tokens that end some answers early, at different places."""
    said = [alone(tiny, prompt, stops=(1,)) for prompt in prompts]
    return replace(tiny, stop_token_ids=(1, said[2][0], said[5][3], said[9][6]))


@pytest.mark.parametrize("batch_tokens", [1, 200, 10_000])
def test_a_batch_says_what_each_prompt_alone_says(
    stopping: Target, prompts: list[list[int]], batch_tokens: int
) -> None:
    completions = complete(stopping, prompts, max_new_tokens=NEW, batch_tokens=batch_tokens)
    assert len({completion.tokens for completion in completions}) > 2  # else rows never left the batch one by one
    for prompt, completion in zip(prompts, completions, strict=True):
        expected = alone(stopping, prompt, stops=stopping.stop_token_ids)
        ended = expected[-1] in stopping.stop_token_ids
        assert list(completion.ids) == (expected[:-1] if ended else expected)
        assert completion.stopped == ("eos" if ended else "length")


def test_every_row_starts_at_position_0(tiny: Target) -> None:
    # LLaMA's rotary positions are relative and would not show it; the context's end, and other families, would.
    seen: list[torch.Tensor] = []
    hook = tiny.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["position_ids"].cpu()), with_kwargs=True
    )
    complete(replace(tiny, stop_token_ids=()), [[0, 400, 401, 402], [0, 500]], max_new_tokens=3)
    hook.remove()
    assert [positions[:, -2:].tolist() for positions in seen] == [[[2, 3], [0, 1]], [[4], [2]], [[5], [3]]]


def test_a_run_says_in_a_batch_what_transformers_says(run_folder: Path, prompts: list[list[int]]) -> None:
    target = load_target(str(run_folder))
    completions = complete(target, prompts[:5], max_new_tokens=NEW)
    for prompt, completion in zip(prompts, completions, strict=False):
        assert list(completion.ids) == alone(target, prompt, stops=target.stop_token_ids)[: completion.tokens]


def test_the_stop_token_is_no_part_of_the_text(stopping: Target, prompts: list[list[int]]) -> None:
    for completion in complete(stopping, prompts, max_new_tokens=NEW):
        assert not set(completion.ids) & set(stopping.stop_token_ids)
        assert completion.text == stopping.base.tokenizer.decode(list(completion.ids), skip_special_tokens=False)


def test_an_answer_ends_with_the_context(tiny: Target) -> None:
    target = replace(tiny, stop_token_ids=())
    long, short = [0] * (CONTEXT - 3), [0, 400]
    completions = complete(target, [long, short], max_new_tokens=20)
    assert [completion.tokens for completion in completions] == [3, 20]
    assert completions[0].stopped == "length"


def test_prompts_without_room_are_refused_together(tiny: Target) -> None:
    with pytest.raises(UserError) as caught:
        complete(tiny, [[0], [], [0] * CONTEXT], max_new_tokens=4)
    assert [problem.where for problem in caught.value.problems] == ["prompt 2", "prompt 3"]


def test_a_stream_adds_up_to_the_completion(stopping: Target, prompts: list[list[int]]) -> None:
    for prompt in prompts[:6]:
        (completion,) = complete(stopping, [prompt], max_new_tokens=NEW)
        pieces = list(stream(stopping, prompt, max_new_tokens=NEW))
        assert "".join(pieces) == completion.text
        assert all(pieces)


def test_a_stream_never_shows_half_a_character(tiny: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "né 😀 日本"
    ids = tiny.base.tokenizer.encode(text, add_special_tokens=False).ids
    assert len(ids) > len(text)  # else no character is made of several tokens

    def speak(*args: object, **kwargs: object) -> Iterator[dict[int, int]]:
        yield from ({0: token} for token in ids)

    monkeypatch.setattr(module, "_speak", speak)
    pieces = list(stream(tiny, [0], max_new_tokens=99))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_space_at_the_start_is_kept_where_the_decoder_drops_it(tiny: Target) -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"▁a": 0, "▁b": 1, "▁c": 2}, unk_token="▁a"))
    words.decoder = tokenizers.decoders.Metaspace()
    base = replace(tiny.base)
    vars(base)["tokenizer"] = words
    target = replace(tiny, base=base, stop_token_ids=())
    assert words.decode([1, 2]) == "b c"
    assert module._completion(target, [0], [1, 2]).text == " b c"


def test_sampling_follows_the_seed_and_cold_sampling_is_greedy(tiny: Target, prompts: list[list[int]]) -> None:
    def said(**sampling: float) -> list[tuple[int, ...]]:
        chosen = Sampling(**sampling)  # type: ignore[arg-type]
        return [completion.ids for completion in complete(tiny, prompts, max_new_tokens=6, sampling=chosen)]

    assert said(temperature=2.0, seed=1) == said(temperature=2.0, seed=1) != said(temperature=2.0, seed=2)
    assert said() == said(temperature=1e-4) == said(temperature=2.0, top_p=1e-6)


def test_sampled_tokens_follow_the_nucleus(tiny: Target) -> None:
    likely = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05])
    choose = module._chooser(tiny, Sampling(temperature=0.5, top_p=0.9))
    drawn = Counter(choose(likely.log().to(tiny.device).expand(20_000, 5)).tolist())
    squared = likely**2  # temperature 0.5 squares: 0.25, 0.04, 0.0225 ... of 0.325; two tokens reach 0.89, three 0.96
    expected = squared[:3] / squared[:3].sum()
    assert set(drawn) == {0, 1, 2}
    for token, share in enumerate(expected.tolist()):
        assert drawn[token] / 20_000 == pytest.approx(share, abs=0.015)


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_impossible_sampling_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(wrong))}: must be"):
        Sampling(**wrong)  # type: ignore[arg-type]


def test_a_prompt_is_one_user_turn_and_raw_is_the_text_itself(run_folder: Path) -> None:
    target = load_target(str(run_folder))
    heading = "\n\n### Instruction:\nHow?\n\n### Response:\n"
    encoder = Encoder(target.base)
    assert user_prompt(target, "How?", encoder).text == f"<s>Be brief.{heading}"  # the run's own system prompt
    assert user_prompt(target, "How?", encoder, system="Be long.").text == f"<s>Be long.{heading}"
    assert raw_text(target, "How?") == "<s>How?"
    assert raw_text(target, "<s>How?") == "<s>How?"
    ids = [encoding.ids.tolist() for encoding in encoder.encode([user_prompt(target, "How?", encoder), "<s>How?"])]
    for said, prompt in zip((generate(target, ["How?"]), generate(target, ["How?"], raw=True)), ids, strict=True):
        (completion,) = complete(target, [prompt], max_new_tokens=256)
        assert (said[0].text, said[0].tokens) == (completion.text, completion.tokens)


def test_the_json_answer(tiny: Target) -> None:
    answers = [answer.to_json() for answer in generate(tiny, ["a", "b"], max_new_tokens=3)]
    assert [answer["prompt"] for answer in answers] == ["a", "b"]
    assert set(answers[0]) == {"prompt", "text", "stopped", "tokens"}


def test_prompts_come_from_the_command_line_and_a_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("two\n\nthree é\n", encoding="utf-8")
    assert read_prompts(["one"], file) == ["one", "two", "three é"]
    with pytest.raises(UserError, match="cannot be read"):
        read_prompts([], tmp_path / "none.txt")
    with pytest.raises(UserError, match="nothing to answer"):
        read_prompts([], None)


def test_prompts_that_cannot_be_asked_are_refused(tiny: Target) -> None:
    without = replace(tiny, template=None)
    with pytest.raises(UserError, match="add `--template alpaca`, or continue text with `generate --raw`"):
        generate(without, ["Hello"])


def test_a_control_tokens_text_in_a_prompt_stays_text(tiny: Target) -> None:
    encoder = Encoder(tiny.base)
    eos = tiny.base.tokenizer.token_to_id("</s>")
    prompt = user_prompt(
        replace(tiny, template=choose_template("alpaca", tiny.base, date="26 Jul 2024")), "Hello</s>", encoder
    )
    assert "Hello</s>" in prompt.text
    assert eos not in encoder.encode([prompt])[0].ids
    assert eos in encoder.encode([prompt.text])[0].ids  # the same text without knowing whose it is
