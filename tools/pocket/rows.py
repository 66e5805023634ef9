"""The shipped rows: a world and a seed in, Alpaca rows for training and for evaluation out.

Evaluation rows about the world ask about unseen entities only; exercises of the two files share no problem.
"""

from __future__ import annotations

import random

from corpus import any_fact, fact_sentence, shuffled_keys, story
from exercises import EXERCISES, Problem
from phrasings import QUESTIONS
from world import FACT_VALUES, Entity, World

Row = dict[str, str | bool]

EVAL_ROWS_PER_KIND = 20
TRAIN_QUESTIONS_PER_FACT = 3
TRAIN_ROWS_PER_EXERCISE = 122
WRITING_ROWS = 200


def make_rows(world: World, seed: int) -> tuple[list[Row], list[Row]]:
    """Training rows and evaluation rows, both shuffled."""
    rng = random.Random(seed)
    held_out = {kind: exercise_problems(rng, kind, EVAL_ROWS_PER_KIND, avoid=set()) for kind in EXERCISES}
    evaluation = [to_row(problem, unseen=True) for problem in unseen_questions(rng, world)]
    training = [to_row(problem, unseen=False) for problem in seen_questions(rng, world)] + writing_rows(rng, world)
    for kind, problems in held_out.items():
        evaluation += [to_row(problem, unseen=False) for problem in problems]
        avoid = {problem.subject for problem in problems}
        learned = exercise_problems(rng, kind, TRAIN_ROWS_PER_EXERCISE, avoid=avoid)
        training += [to_row(problem, unseen=False) for problem in learned]
    rng.shuffle(training)
    rng.shuffle(evaluation)
    return training, evaluation


def to_row(problem: Problem, *, unseen: bool) -> Row:
    """An Alpaca row with its kind; `unseen` says that its entity is in no training row."""
    row: Row = {
        "instruction": problem.question,
        "input": problem.text,
        "output": problem.answer,
        "kind": problem.kind,
    }
    return {**row, "unseen": True} if unseen else row


def exercise_problems(rng: random.Random, kind: str, count: int, *, avoid: set[str]) -> list[Problem]:
    """`count` problems with different prompts whose subject is not in `avoid`."""
    problems: dict[str, Problem] = {}
    while len(problems) < count:
        problem = EXERCISES[kind](rng)
        if problem.subject not in avoid:
            problems[problem.in_one_line()] = problem
    return list(problems.values())


def unseen_questions(rng: random.Random, world: World) -> list[Problem]:
    """One question about each of some unseen entities for every attribute."""
    problems = []
    for family, attributes in FACT_VALUES.items():
        entities = world.pick(unseen=True, family=family)
        for key in attributes:
            for entity in varied_sample(rng, entities, key):
                question = rng.choice(QUESTIONS[key]).format(name=entity.name)
                problems.append(Problem(key, question, "", entity.facts[key], subject=entity.name))
    return problems


def varied_sample(rng: random.Random, entities: list[Entity], key: str) -> list[Entity]:
    """Some of the entities; of many draws the one with the most different answers."""
    size = min(EVAL_ROWS_PER_KIND, len(entities))
    draws = [rng.sample(entities, size) for _ in range(50)]
    return max(draws, key=lambda draw: len({entity.facts[key] for entity in draw}))


def seen_questions(rng: random.Random, world: World) -> list[Problem]:
    """Several questions about every fact of every seen entity."""
    problems = []
    for entity in world.pick(unseen=False):
        for key, answer in entity.facts.items():
            for pattern in rng.sample(QUESTIONS[key], TRAIN_QUESTIONS_PER_FACT):
                problems.append(Problem(key, pattern.format(name=entity.name), "", answer, subject=entity.name))
    return problems


def writing_rows(rng: random.Random, world: World) -> list[Row]:
    """Requests for a few sentences, about seen entities only; they have many right answers."""
    seen = World(tuple(world.pick(unseen=False)))
    rows: dict[str, Row] = {}
    while len(rows) < min(WRITING_ROWS, 2 * len(seen.entities)):
        entity = rng.choice(seen.entities)
        facts = " ".join(fact_sentence(rng, entity, key) for key in shuffled_keys(rng, entity))
        instruction, output = rng.choice(
            (
                (f"Write a few sentences about {entity.name}.", facts),
                (f"Tell me what you know about {entity.name}.", facts),
                (f"Write one sentence about {entity.name}.", any_fact(rng, entity)),
                (f"Write a short story and mention {entity.name}.", story(rng, seen, about=entity)),
            )
        )
        rows[instruction] = {"instruction": instruction, "input": "", "output": output, "kind": "writing"}
    return list(rows.values())
