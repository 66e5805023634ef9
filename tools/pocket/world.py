"""The invented world: a seed in, named entities with their facts out, half of them marked unseen."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass


def words(text: str) -> tuple[str, ...]:
    """The words of a text."""
    return tuple(text.split())


JOBS = words(
    "baker miller potter weaver painter doctor teacher farmer fisher hunter sailor tailor singer dancer writer "
    "carpenter gardener shepherd smith clerk"
)
ANIMALS = words("cat dog rabbit parrot goat pony duck hedgehog tortoise ferret hamster canary donkey lamb otter owl")
COLOURS = words("red blue green yellow white black brown grey orange purple pink silver golden cream")
MATERIALS = words("wood iron copper glass clay stone leather wool paper brass cotton bone ivory marble")
COUNTRIES = words("Arvia Belmar Corland Dunmark Estria Fjelland Gavony Holmia Ithria Jorvia Kestria Lumeria")
PRODUCTS = words("cheese honey bells boats carpets apples salt candles kites bread soap masks lace knives tea clocks")
YEARS = tuple(str(year) for year in range(1940, 1980))
PRICES = tuple(str(price) for price in range(11, 61))

# How many of each family, and which facts each has; homes are drawn from the towns that training rows may name.
FAMILY_SIZES = {"town": 48, "person": 120, "pet": 64, "thing": 64}
FACT_VALUES: dict[str, dict[str, tuple[str, ...]]] = {
    "town": {"country": COUNTRIES, "product": PRODUCTS},
    "person": {"job": JOBS, "home": (), "year": YEARS},
    "pet": {"animal": ANIMALS, "colour": COLOURS},
    "thing": {"material": MATERIALS, "price": PRICES},
}

ONSETS = words("B Br C Cl D Dr F Fl G Gr H J K L M N P Pl Qu R S Sk St T Tr V W Y Z Th")
VOWELS = words("a e i o u")
MIDDLES = words("b bb d dd f ff g l ll lm m mm n nd nt p pp r rd rn s ss st t tt v x z")
ENDINGS = {
    "town": words("ington ford holm wick stead burg"),
    "person": words("ald eth ina or us ric"),
    "pet": words("y oo ie"),
    "thing": words("ex ium omat ette"),
}


@dataclass(frozen=True)
class Entity:
    """One person, pet, thing or town; `unseen` ones occur in the corpus but in no training row."""

    name: str
    family: str
    facts: dict[str, str]
    unseen: bool


@dataclass(frozen=True)
class World:
    """All entities of one seed."""

    entities: tuple[Entity, ...]

    def pick(self, *, unseen: bool | None = None, family: str | None = None) -> list[Entity]:
        """The entities of one half and one family, in order; None means any."""
        return [
            entity
            for entity in self.entities
            if (unseen is None or entity.unseen == unseen) and (family is None or entity.family == family)
        ]


def make_world(seed: int, *, scale: float = 1.0) -> World:
    """The world of `seed`; `scale` below 1 makes a smaller one with the same rules."""
    rng = random.Random(seed)
    names = {family: make_names(rng, family) for family in FAMILY_SIZES}
    taken: set[str] = set()
    entities: list[Entity] = []
    for family, full_size in FAMILY_SIZES.items():
        for index in range(round(full_size * scale)):
            name = next_free(names[family], taken)
            unseen = index % 2 == 1
            homes = tuple(entity.name for entity in entities if entity.family == "town" and not entity.unseen)
            facts = {key: rng.choice(values or homes) for key, values in FACT_VALUES[family].items()}
            entities.append(Entity(name, family, facts, unseen))
    return World(tuple(entities))


def make_names(rng: random.Random, family: str) -> Iterator[str]:
    """An endless stream of invented names of one family."""
    while True:
        yield rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(MIDDLES) + rng.choice(ENDINGS[family])


def next_free(names: Iterator[str], taken: set[str]) -> str:
    """The first name whose four first letters are new, which are added to `taken`."""
    for name in names:
        prefix = name[:4].lower()
        if prefix not in taken:
            taken.add(prefix)
            return name
    raise AssertionError("the stream of names never ends")
