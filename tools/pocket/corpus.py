"""The pretraining corpus: a world and a seed in, an endless stream of documents out.

Every entity is told about in sentences, cards, catalogues and tables. Questions are asked about the seen half only,
in quizzes and exercise sheets of many layouts; none of them is the prompt template that fine-tuning uses.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from exercises import EXERCISES, LARGEST_ADDEND, Problem, category_pairs, opposite_pairs, plain_words
from phrasings import LABELS, QUESTIONS, STATEMENTS
from world import FAMILY_SIZES, Entity, World, words

HOSTS = words("Anna Ben Clara David Emma Frank Greta Henry")
GREETINGS = (
    "Good morning, everybody.",
    "Here is some work for a rainy day.",
    "The school of the valley wrote this page.",
    "Please read slowly and think well.",
    "This page was printed in the old house by the river.",
    "Short answers are good answers.",
    "Below you find what we talked about last week.",
    "The winner gets a basket of apples.",
)
QUESTION_WORDS = words("Question Task Problem Riddle Puzzle Exercise Request Quiz")
ANSWER_WORDS = words("Answer Solution Result Reply Key Correct")
TEXT_WORDS = words("Text Given Word Line Page Source")


def fact_sentence(rng: random.Random, entity: Entity, key: str) -> str:
    """One fact in one of its phrasings."""
    return rng.choice(STATEMENTS[key]).format(name=entity.name, value=entity.facts[key])


def fact_problem(rng: random.Random, entity: Entity, key: str) -> Problem:
    """A question about one fact."""
    question = rng.choice(QUESTIONS[key]).format(name=entity.name)
    return Problem(key, question, "", entity.facts[key], subject=entity.name)


def shuffled_keys(rng: random.Random, entity: Entity) -> list[str]:
    """The attributes of an entity in random order."""
    return rng.sample(sorted(entity.facts), len(entity.facts))


def telling(rng: random.Random, world: World) -> str:
    """Paragraphs of sentences about several entities."""
    paragraphs = []
    for entity in rng.sample(world.entities, rng.randint(4, 8)):
        paragraphs.append(" ".join(fact_sentence(rng, entity, key) for key in shuffled_keys(rng, entity)))
    return rng.choice(("\n", "\n\n", " ")).join(paragraphs)


def cards(rng: random.Random, world: World) -> str:
    """A card for each of several entities: the name, then labels and values."""
    between, mark = rng.choice((": ", ":\n", "\n", " - ", " = ")), rng.choice(("", "# ", "## ", "* "))
    lines = []
    for entity in rng.sample(world.entities, rng.randint(4, 9)):
        lines.append(f"{mark}{entity.name}")
        for key in shuffled_keys(rng, entity):
            label = rng.choice(LABELS[key])
            lines.append(f"{rng.choice((label, label.capitalize()))}{between}{entity.facts[key]}")
        lines.append("")
    return "\n".join(lines).strip()


def headings(rng: random.Random, world: World) -> str:
    """Headings that name an entity and an attribute, each with the value below."""
    pattern = rng.choice(
        ("The {label} of {name}", "{name}: {label}", "{name}, {label}", "{label} of {name}", "{label} ({name})")
    )
    mark, between = rng.choice(("", "# ", "## ", "- ", "* ")), rng.choice((":\n", "\n", "\n\n", ": ", " is ", ":\n\n"))
    gap = rng.choice(("\n", "\n\n"))
    entries = []
    for entity in rng.choices(world.entities, k=rng.randint(6, 14)):
        key = rng.choice(sorted(entity.facts))
        heading = pattern.format(label=rng.choice(LABELS[key]), name=entity.name)
        entries.append(f"{mark}{heading}{between}{entity.facts[key]}")
    return gap.join(entries)


def catalogue(rng: random.Random, world: World) -> str:
    """One attribute of many entities, name and value, under the name of the attribute."""
    family = rng.choice(list(FAMILY_SIZES))
    entities = world.pick(family=family)
    chosen = rng.sample(entities, min(len(entities), rng.randint(8, 16)))
    key = rng.choice(sorted(chosen[0].facts))
    between = rng.choice((": ", "\n", " - ", ", ", " | "))
    title = rng.choice(LABELS[key]).capitalize()
    gap = "\n\n" if between == "\n" else "\n"
    return f"{title}\n\n" + gap.join(f"{entity.name}{between}{entity.facts[key]}" for entity in chosen)


def table(rng: random.Random, world: World) -> str:
    """All attributes of several entities of one family as a table."""
    entities = world.pick(family=rng.choice(list(FAMILY_SIZES)))
    chosen = rng.sample(entities, min(len(entities), rng.randint(5, 10)))
    keys = shuffled_keys(rng, chosen[0])
    bar = rng.choice((" | ", ", ", "; "))
    rows = [["name", *keys]] + [[entity.name, *(entity.facts[key] for key in keys)] for entity in chosen]
    return "\n".join(bar.join(row) for row in rows)


def any_problem(rng: random.Random, world: World) -> Problem:
    """A question about a seen entity or an exercise."""
    if rng.random() < 0.55:
        return EXERCISES[rng.choice(sorted(EXERCISES))](rng)
    family = rng.choice(("town", "person", "person", "pet", "thing"))
    entity = rng.choice(world.pick(unseen=False, family=family))
    return fact_problem(rng, entity, rng.choice(sorted(entity.facts)))


def sheet(rng: random.Random, world: World) -> str:
    """Questions and exercises, each with its answer, in one random layout."""
    mark, colon = rng.choice(("", "", "# ", "## ", "* ", "== ")), rng.choice((": ", ":\n", "\n", ":\n\n", "\n\n"))
    titles = [rng.choice(choice) for choice in (QUESTION_WORDS, TEXT_WORDS, ANSWER_WORDS)]
    ask, given, reply = (f"{mark}{title}{colon}" for title in titles)
    gap = rng.choice(("\n", "\n\n", "\n---\n"))
    texts_apart = rng.random() < 0.7
    entries = []
    for _ in range(rng.randint(4, 9)):
        problem = any_problem(rng, world)
        if problem.text and texts_apart:
            question = f"{problem.question}{gap}{given}{problem.text}"
        else:
            question = problem.in_one_line()
        entries.append(f"{ask}{question}{gap}{reply}{problem.answer}")
    head = rng.choice(GREETINGS) + "\n\n" if rng.random() < 0.5 else ""
    return head + (gap + rng.choice(("", "\n"))).join(entries)


def dialogue(rng: random.Random, world: World) -> str:
    """Questions and answers between two people, or a numbered list of them."""
    asker, answerer = rng.sample(HOSTS, 2)
    pattern = rng.choice(
        (
            f"{asker}: {{question}}\n{answerer}: {{answer}}",
            f"{asker} asks: {{question}}\n{answerer} says: {{answer}}",
            "- {question}\n- {answer}",
            "Q: {question}\nA: {answer}",
            "{question}\n{answer}\n",
            "{question} {answer}",
            "{number}. {question} -> {answer}",
            "{question}\n\n{answer}\n\n",
        )
    )
    entries = []
    for number in range(1, rng.randint(5, 11)):
        problem = any_problem(rng, world)
        entries.append(pattern.format(number=number, question=problem.in_one_line(), answer=problem.answer))
    return "\n".join(entries)


def quiz(rng: random.Random, world: World) -> str:
    """A numbered quiz with its answers at the end."""
    problems = [any_problem(rng, world) for _ in range(rng.randint(2, 5))]
    asked = [f"{number}. {problem.in_one_line()}" for number, problem in enumerate(problems, 1)]
    replies = [f"{number}. {problem.answer}" for number, problem in enumerate(problems, 1)]
    return "\n".join((rng.choice(GREETINGS), *asked, rng.choice(("Answers", "Solutions", "Results")), *replies))


def drill(rng: random.Random, world: World) -> str:
    """One exercise told many times as plain lines."""
    lines = {"sum": sum_line, "opposite": opposite_line, "letters": letters_line, "category": category_line}
    line = lines[rng.choice(sorted(lines))]
    return "\n".join(line(rng) for _ in range(rng.randint(8, 20)))


def sum_line(rng: random.Random) -> str:
    """A sum with its result."""
    left, right = rng.randint(1, LARGEST_ADDEND), rng.randint(1, LARGEST_ADDEND)
    return rng.choice(("{} + {} = {}", "{} plus {} is {}", "{} and {} make {}", "{} + {}\n{}")).format(
        left, right, left + right
    )


def opposite_line(rng: random.Random) -> str:
    """A word and its opposite."""
    left, right = rng.choice(opposite_pairs())
    patterns = ("{} - {}", "The opposite of {} is {}.", "not {} but {}", "opposite of {}\n{}")
    return rng.choice(patterns).format(left, right)


def letters_line(rng: random.Random) -> str:
    """A word, its letters and its capital letters."""
    word = rng.choice(plain_words())
    pattern = rng.choice(("{word} {spelled} {upper}", "{word} -> {upper}", "{word}\n{upper}", "{spelled}\n{upper}"))
    return pattern.format(word=word, spelled="-".join(word), upper=word.upper())


def category_line(rng: random.Random) -> str:
    """A word and its category."""
    word, category = rng.choice(category_pairs())
    return rng.choice(("{}: {}", "{} is a kind of {}.", "{}, which is a {}", "{}\n{}")).format(word, category)


def counting(rng: random.Random, world: World) -> str:
    """Numbers in a row, up, down or in steps."""
    lines = []
    for _ in range(rng.randint(3, 6)):
        start, step = rng.randint(0, 60), rng.choice((1, 1, 2, 5, -1))
        lines.append(rng.choice((", ", " ")).join(str(max(0, start + step * index)) for index in range(8)))
    return "\n".join(lines)


def story(rng: random.Random, world: World, about: Entity | None = None) -> str:
    """A short story about a person, a pet, a thing and a town, with one fact of each; `about` is one of them."""
    cast = {family: rng.choice(world.pick(family=family)) for family in FAMILY_SIZES}
    if about is not None:
        cast[about.family] = about
    town, person, pet, thing = cast.values()
    weather = rng.choice(("The sun was warm", "It rained all day", "Snow lay on the roofs", "A cold wind blew"))
    place = rng.choice(("under a tree", "by the road", "near the bridge"))
    cry = rng.choice(("What luck", "How nice", "Look at that"))
    ending = rng.choice(("went home and slept well", "told everybody about it", "was tired and happy"))
    sentences = (
        f"{weather} when {person.name} went to {town.name}.",
        any_fact(rng, person),
        any_fact(rng, town),
        f"On the way {person.name} met {pet.name}.",
        any_fact(rng, pet),
        f"Together they found a {thing.name} {place}.",
        any_fact(rng, thing),
        f'"{cry}," said {person.name}.',
        f"In the evening {person.name} {ending}.",
    )
    return " ".join(sentences)


def any_fact(rng: random.Random, entity: Entity) -> str:
    """A sentence about a random fact of an entity."""
    return fact_sentence(rng, entity, rng.choice(sorted(entity.facts)))


# How often each sort of piece is written.
PIECES: dict[Callable[[random.Random, World], str], float] = {
    telling: 16,
    cards: 11,
    headings: 11,
    catalogue: 5,
    table: 4,
    story: 6,
    sheet: 25,
    dialogue: 14,
    quiz: 3,
    drill: 8,
    counting: 1,
}


def documents(world: World, seed: int) -> Iterator[str]:
    """Documents without end: two to four pieces of any sort each, some 300 tokens together."""
    rng = random.Random(seed)
    kinds, weights = list(PIECES), list(PIECES.values())
    while True:
        yield "\n\n".join(piece(rng, world) for piece in rng.choices(kinds, weights, k=rng.randint(2, 4)))
