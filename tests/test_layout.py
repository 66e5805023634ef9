"""Which examples make a step and how steps are cut into passes: closed formulas and properties."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.layout import Mixture, count_steps, cut_into_passes, lay_out_steps

counts = st.integers(1, 60)


def one_source(examples: int) -> Mixture:
    return Mixture((examples,), (1.0,))


@pytest.mark.parametrize(
    ("examples", "batch_size", "epochs", "steps"),
    [(160, 16, 1, 10), (161, 16, 1, 11), (1, 16, 3, 3), (17, 4, 2, 10), (999, 16, 3, 189)],
)
def test_steps_are_counted_with_the_last_smaller_batch(examples: int, batch_size: int, epochs: int, steps: int) -> None:
    assert count_steps(examples, batch_size=batch_size, epochs=epochs) == steps


@given(examples=counts, batch_size=counts, epochs=st.integers(1, 4), seed=st.integers(0, 2**32))
def test_every_example_comes_once_an_epoch(examples: int, batch_size: int, epochs: int, seed: int) -> None:
    steps = count_steps(examples, batch_size=batch_size, epochs=epochs)
    layout = lay_out_steps(one_source(examples), batch_size=batch_size, steps=steps, seed=seed)
    a_trip = math.ceil(examples / batch_size)
    assert len(layout) == steps == epochs * a_trip
    for epoch in range(epochs):
        trip = layout[epoch * a_trip : (epoch + 1) * a_trip]
        assert sorted(sum(trip, [])) == list(range(examples))
        assert [len(step) for step in trip[:-1]] == [batch_size] * (a_trip - 1)
        assert len(trip[-1]) == examples - (a_trip - 1) * batch_size


@given(examples=counts, batch_size=counts, steps=st.integers(1, 40), more=st.integers(0, 20), seed=st.integers(0, 99))
def test_a_longer_run_begins_like_a_shorter_one(
    examples: int, batch_size: int, steps: int, more: int, seed: int
) -> None:
    short = lay_out_steps(one_source(examples), batch_size=batch_size, steps=steps, seed=seed)
    assert len(short) == steps
    assert lay_out_steps(one_source(examples), batch_size=batch_size, steps=steps + more, seed=seed)[:steps] == short


def test_epochs_differ_and_seeds_differ() -> None:
    first, second = (lay_out_steps(one_source(50), batch_size=50, steps=2, seed=1)[epoch] for epoch in (0, 1))
    assert first != second
    assert first != list(range(50))
    assert lay_out_steps(one_source(50), batch_size=50, steps=1, seed=2) != [first]


@given(
    examples=st.lists(counts, min_size=1, max_size=4),
    weights=st.lists(st.floats(0.05, 3.5), min_size=4, max_size=4),
    epochs=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_weights_say_how_often_a_row_comes_in_an_epoch(
    examples: list[int], weights: list[float], epochs: int, seed: int
) -> None:
    mixture = Mixture(tuple(examples), tuple(weights[: len(examples)]))
    layout = lay_out_steps(mixture, batch_size=mixture.examples_per_epoch, steps=epochs, seed=seed)
    assert layout == lay_out_steps(mixture, batch_size=mixture.examples_per_epoch, steps=epochs, seed=seed)
    first = 0
    for count, weight in zip(mixture.examples, mixture.weights, strict=True):
        seen = Counter(index for epoch in layout for index in epoch if first <= index < first + count)
        a_trip = [sum(first <= index < first + count for index in epoch) for epoch in layout]
        assert len(set(a_trip)) == 1
        assert abs(a_trip[0] - weight * count) <= 1
        # Nobody waits while another has a second turn: how often two rows of a source were seen differs by one at most.
        often = [seen[index] for index in range(first, first + count)]
        assert max(often) - min(often) <= 1
        first += count


def test_half_a_weight_takes_the_other_half_next_time() -> None:
    first, second = lay_out_steps(Mixture((10, 4), (0.5, 1.0)), batch_size=9, steps=2, seed=3)
    assert sorted(index for index in first + second if index < 10) == list(range(10))
    assert sorted(index for index in first if index >= 10) == [10, 11, 12, 13]


@given(tokens=st.lists(st.integers(1, 50), min_size=1, max_size=40), limit=st.integers(1, 120))
def test_passes_are_a_partition_within_the_limit(tokens: list[int], limit: int) -> None:
    passes = cut_into_passes(tokens, tokens_per_pass=limit)
    assert sorted(sum(passes, [])) == list(range(len(tokens)))
    for each in passes:
        assert each
        assert sum(tokens[position] for position in each) <= limit or len(each) == 1
    assert passes == cut_into_passes(tokens, tokens_per_pass=limit)
    # First fit: two passes that fit into one would never both be opened, so all but one are at least half full.
    sums = sorted(sum(tokens[position] for position in each) for each in passes)
    assert all(low + high > limit for low, high in zip(sums, sums[1:], strict=False))


def test_an_example_over_the_limit_has_a_pass_of_its_own() -> None:
    assert cut_into_passes([5, 100, 5], tokens_per_pass=10) == [[1], [0, 2]]
