"""What a pass predicts: every learned token from the one before it, and no example's first token from its neighbour."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.examples import Example
from finetune.train.loss import lay_end_to_end

examples = st.lists(
    st.lists(st.tuples(st.integers(0, 999), st.booleans()), min_size=1, max_size=6), min_size=1, max_size=5
)


@given(examples)
def test_each_learned_token_is_predicted_inside_its_example(drawn: list[list[tuple[int, bool]]]) -> None:
    predicting, targets, lengths, start = [], [], [], 0
    for tokens in drawn:
        for place, (token, is_learned) in enumerate(tokens):
            if is_learned and place > 0:  # with loss_on: everything the first token is learned too; nothing predicts it
                predicting.append(start + place - 1)
                targets.append(token)
        # What follows the last learned token is not computed, nor is that one; one token stays of every example.
        lengths.append(max([1, *(place for place, (_, is_learned) in enumerate(tokens) if is_learned)]))
        start += lengths[-1]
    stretch = lay_end_to_end(
        [
            Example(
                ids=np.array([token for token, _ in tokens], np.int32),
                learned=np.array([is_learned for _, is_learned in tokens]),
                where="rows.jsonl:1",
                prompt_tokens=0,
                cut_tokens=0,
            )
            for tokens in drawn
        ]
    )
    assert stretch.predicting_S.tolist() == predicting
    assert stretch.target_S.tolist() == targets
    assert stretch.document_lengths == lengths
    assert stretch.position_ids_1T[0].tolist() == [place for length in lengths for place in range(length)]
