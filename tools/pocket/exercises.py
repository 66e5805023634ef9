"""Small closed exercises (sums, opposites, capitals, ...): a kind in, every problem of that kind out."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from world import ANIMALS, COLOURS, COUNTRIES, JOBS, MATERIALS, words

OPPOSITES = (
    "big small, hot cold, day night, up down, old new, fast slow, hard soft, wet dry, long short, high low, early "
    "late, full empty, open closed, happy sad, rich poor, strong weak, loud quiet, clean dirty, thick thin, heavy "
    "light, near far, left right, good bad, first last, inside outside, buy sell, give take, push pull, win lose, "
    "laugh cry, summer winter, north south, east west, young aged, sweet sour, wide narrow, deep shallow, brave "
    "timid, true false, start finish, lost found, above below, always never, wild tame, smooth rough, love hate, "
    "front back, more less"
)
CATEGORIES: dict[str, str] = {
    "fruit": "apple pear plum cherry banana grape lemon peach melon fig",
    "vegetable": "carrot onion potato cabbage pea bean leek turnip radish pumpkin",
    "tool": "hammer saw drill spade rake axe chisel pliers wrench file",
    "bird": "robin eagle sparrow crow swan falcon pigeon gull stork wren",
    "fish": "trout salmon herring carp pike cod eel tuna perch sole",
    "tree": "oak pine birch maple willow elm ash beech cedar poplar",
    "flower": "rose tulip daisy lily violet poppy orchid iris lotus pansy",
    "insect": "ant bee wasp beetle moth fly cricket flea gnat termite",
    "drink": "juice milk coffee cider lemonade water wine cocoa beer broth",
    "clothing": "shirt hat coat sock glove scarf skirt shoe belt jacket",
    "furniture": "table chair bed shelf desk sofa bench stool cupboard drawer",
    "instrument": "piano violin flute drum harp guitar trumpet cello organ fiddle",
    "vehicle": "car bus train ship bicycle tram wagon sledge truck canoe",
    "metal": "tin lead zinc nickel steel bronze chrome titanium mercury cobalt",
}
LARGEST_ADDEND = 15
BUYERS = words("traveller child farmer woman man neighbour sister brother friend stranger")
GOODS = words("lamp bowl chair hat box spoon ring basket bottle scarf")


@dataclass(frozen=True)
class Problem:
    """One thing to do with one right answer; `text` is what it is done to where that stands apart from the question.

    Two problems of one kind with the same `subject` have the same answer.
    """

    kind: str
    question: str
    text: str
    answer: str
    subject: str

    def in_one_line(self) -> str:
        """Question and text as one line."""
        return f"{self.question} {self.text}".strip()


def opposite_pairs() -> list[tuple[str, str]]:
    """Every word with its opposite, both ways."""
    pairs = [tuple(pair.split()) for pair in OPPOSITES.split(", ")]
    return [pair for left, right in pairs for pair in ((left, right), (right, left))]


def category_pairs() -> list[tuple[str, str]]:
    """Every word with the category it belongs to."""
    return [(word, category) for category, members in CATEGORIES.items() for word in members.split()]


def plain_words() -> list[str]:
    """The closed vocabulary of the exercises on letters."""
    named = {*ANIMALS, *COLOURS, *JOBS, *MATERIALS, *(word for word, _ in category_pairs())}
    return sorted(word for word in named if len(word) <= 6)


def sums(rng: random.Random) -> Problem:
    """Add two small numbers."""
    left, right = rng.randint(1, LARGEST_ADDEND), rng.randint(1, LARGEST_ADDEND)
    question = rng.choice(
        (
            f"What is {left} plus {right}?",
            f"{left} + {right} =",
            f"Add {left} and {right}.",
            f"How much is {left} + {right}?",
            f"Calculate {left} + {right}.",
        )
    )
    return Problem("sum", question, "", str(left + right), subject=f"{left} {right}")


def opposites(rng: random.Random) -> Problem:
    """Give the opposite of a word."""
    word, answer = rng.choice(opposite_pairs())
    question = rng.choice(
        (
            f"What is the opposite of {word}?",
            f"Name the opposite of {word}.",
            f"Which word is the opposite of {word}?",
            f"Give a word that means the opposite of {word}.",
        )
    )
    return Problem("opposite", question, "", answer, subject=word)


def capitals(rng: random.Random) -> Problem:
    """Write a word in capital letters."""
    word = rng.choice(plain_words())
    question = rng.choice(
        (
            "Write the word in capital letters.",
            "Turn the word into capital letters.",
            "Make every letter a capital letter.",
            "Change the word to upper case.",
        )
    )
    return Problem("uppercase", question, word, word.upper(), subject=word)


def categories(rng: random.Random) -> Problem:
    """Say what kind of thing a word names."""
    word, category = rng.choice(category_pairs())
    question = rng.choice(
        (
            "What kind of thing is this?",
            "Which group does the word belong to?",
            "Sort the word into its group.",
            "Name the category of the word.",
        )
    )
    return Problem("category", question, word, category, subject=word)


def last_items(rng: random.Random) -> Problem:
    """Find the last item of a list."""
    items = rng.sample(plain_words(), rng.randint(3, 5))
    text = ", ".join(items)
    question = rng.choice(
        (
            "Which word comes last in the list?",
            "Name the last word of the list.",
            "What is the last item of the list?",
            "Give the item at the end of the list.",
        )
    )
    return Problem("last item", question, text, items[-1], subject=text)


# What can be asked about the sentence of `extractions`, and how.
EXTRACTABLE: dict[str, tuple[str, ...]] = {
    "colour": ("Which colour is named in the text?", "Find the colour in the text.", "Name the colour in the text."),
    "job": ("Which job is named in the text?", "Find the job in the text.", "Name the job in the text."),
    "material": ("Which material is named in the text?", "Find the material in the text."),
    "price": ("Which number is in the text?", "Find the number in the text.", "How many coins are in the text?"),
    "country": ("Which country is named in the text?", "Find the country in the text."),
}


def extractions(rng: random.Random) -> Problem:
    """Find one value in a sentence that holds several."""
    values = {
        "colour": rng.choice(COLOURS),
        "job": rng.choice(JOBS),
        "material": rng.choice(MATERIALS),
        "price": str(rng.randint(11, 60)),
        "country": rng.choice(COUNTRIES),
    }
    buyer, good, day = rng.choice(BUYERS), rng.choice(GOODS), rng.choice(("Yesterday", "On Monday", "Last week"))
    text = rng.choice(
        (
            "{day} a {buyer} from {country} bought a {colour} {good} of {material} from a {job} for {price} coins.",
            "{day} the {job} in {country} sold a {colour} {good} made of {material} to a {buyer} for {price} coins.",
            "A {job} gave {price} coins to a {buyer} for a {colour} {good} of {material} from {country}.",
            "For {price} coins a {buyer} got a {colour} {good} of {material} from the {job} of {country}.",
        )
    ).format(buyer=buyer, good=good, day=day, **values)
    asked = rng.choice(sorted(EXTRACTABLE))
    return Problem("extract", rng.choice(EXTRACTABLE[asked]), text, values[asked], subject=text)


EXERCISES: dict[str, Callable[[random.Random], Problem]] = {
    "sum": sums,
    "opposite": opposites,
    "uppercase": capitals,
    "category": categories,
    "last item": last_items,
    "extract": extractions,
}
