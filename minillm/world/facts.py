"""Who exists in the little world, what is true of them, which names nobody knows, and the splits.

Known and unknown names are made of the same parts, so nothing in a name tells whether it is known; but
each holds a word that no other does, and that a small model can remember whether it heard of. Every
list that a model may be asked about is dealt to four splits that share nothing.
"""

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise
from typing import Any

from minillm.world.phrases import ADVICE, ATTRIBUTES, HELD_OUT_ACTS, NAME_PARTS, SHE_NAMES, UNKNOWABLE

SPLIT_SHARES = {"train": 0.42, "reward": 0.24, "dev": 0.14, "test": 0.20}
SPLITS = tuple(SPLIT_SHARES)
KNOWN = {"person": 48, "animal": 28, "town": 24, "tool": 20}  # and as many names that nobody knows
ACTS = {side: tuple(act for trouble in ADVICE.values() for act in trouble[side]) for side in ("good", "bad")}
"""What people give as advice, and the rubric hears."""
ALL_ACTS = {
    side: acts + tuple(act for table in HELD_OUT_ACTS.values() for act in table[side])
    for side, acts in ACTS.items()
}
"""With those that only the texts tell of."""
# A split for each place in a cycle of ten: deals combinations so that every part meets every split.
CYCLE = ("train", "reward", "test", "train", "reward", "train", "dev", "test", "reward", "train")


def pick(rng: random.Random, table: Sequence[Any]) -> Any:
    """One entry at random, from random() alone: of all draws the one that no Python will change."""
    return table[int(rng.random() * len(table))]


def shuffled(rng: random.Random, items: Sequence[Any]) -> list[Any]:
    """The items in random order, from random() alone."""
    return [items[i] for _, i in sorted((rng.random(), i) for i in range(len(items)))]


def cut(items: Sequence[Any]) -> dict[str, Sequence[Any]]:
    """The items cut into the four splits by SPLIT_SHARES, as they come."""
    cuts = [0, *(round(total * len(items)) for total in accumulate(SPLIT_SHARES.values()))]
    return {split: items[start:end] for split, (start, end) in zip(SPLITS, pairwise(cuts), strict=True)}


def split_of(key: str) -> str:
    """The split a piece of content belongs to, by its checksum: for what is too much to list."""
    return CYCLE[zlib.crc32(key.encode()) % len(CYCLE)]


@dataclass(frozen=True)
class Entity:
    """Somebody or something with a name. `known` is False for names of which no text tells anything."""

    name: str
    type: str
    split: str
    known: bool

    @property
    def pronoun(self) -> str:
        if self.type != "person":
            return "it"
        return "she" if self.name.split()[0] in SHE_NAMES else "he"

    def slots(self, pronoun: bool = False) -> dict[str, str]:
        """What the tables' entity slots stand for; with `pronoun`, x and xs do not say the name."""
        noun = f"the {self.name}" if self.type == "tool" else self.name  # inside a sentence
        their = {"she": "her", "he": "his", "it": "its"}[self.pronoun]
        x, xs = (self.pronoun, their) if pronoun else (noun, f"{noun}'s")
        return {
            "n": noun, "N": capitalise(noun), "bare": self.name, "their": their,
            "x": x, "X": capitalise(x), "xs": xs, "Xs": capitalise(xs),
        }  # fmt: skip


def capitalise(text: str) -> str:
    """The text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


@cache
def state(
    attribute: str, entity: Entity, value: str = "", key: str = "says", pronoun: bool = False
) -> tuple[str, ...]:
    """All sentences of ATTRIBUTES[attribute][key] about the entity, known or not, with this value."""
    slots = entity.slots(pronoun)
    return tuple(capitalise(text.format(v=value, **slots)) for text in ATTRIBUTES[attribute][key])


@dataclass(frozen=True)
class Fact:
    """One value of one attribute of one known entity."""

    entity: Entity
    attribute: str
    value: str

    @property
    def asks(self) -> tuple[str, ...]:
        """Every question that it answers."""
        return state(self.attribute, self.entity, key="asks")


def attributes_of(kind: str) -> tuple[str, ...]:
    """The attributes that entities of this type have."""
    return tuple(name for name, table in ATTRIBUTES.items() if table["type"] == kind)


class Facts:
    """Everything that is true: `entities` (known) and `unknown` (names only), `values` by attribute, and
    `facts` in a list, `of` an entity and `by_value` of an attribute."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(f"world {seed} facts")
        everyone = [entity for kind, parts in NAME_PARTS.items() for entity in _named(rng, kind, parts)]
        self.entities = [entity for entity in everyone if entity.known]
        self.unknown = [entity for entity in everyone if not entity.known]
        self.by_name = {entity.name: entity for entity in self.entities + self.unknown}
        self.names = {kind: [n for n, e in self.by_name.items() if e.type == kind] for kind in NAME_PARTS}
        self.asks = {entity.name: _questions(entity) for entity in everyone}  # answerable, unanswerable
        known = {kind: tuple(e.name for e in self.entities if e.type == kind) for kind in NAME_PARTS}
        self.values: dict[str, tuple[str, ...]] = {}
        self.facts: list[Fact] = []
        self.of: dict[str, list[Fact]] = {entity.name: [] for entity in self.entities}
        self.by_value: dict[str, dict[str, list[Fact]]] = {attribute: {} for attribute in ATTRIBUTES}
        for attribute, table in ATTRIBUTES.items():
            # Words, or the names of everybody known of a type; dealt round, so that each is true of nearly
            # equally many and no guess is a good one.
            values = self.values[attribute] = known.get(table["values"]) or table["values"]
            owners, dealt = known[table["type"]], list[str]()
            while len(dealt) < len(owners):
                dealt += shuffled(rng, values)
            for name, value in zip(owners, dealt, strict=False):
                fact = Fact(self.by_name[name], attribute, value)
                self.facts.append(fact)
                self.of[name].append(fact)
                self.by_value[attribute].setdefault(value, []).append(fact)


def _named(rng: random.Random, kind: str, parts: Sequence[Sequence[str]]) -> list[Entity]:
    """The known entities of a type and as many unknown ones, each kind cut into the splits."""
    firsts, stems, ends = (shuffled(rng, column) for column in parts)
    # Diagonals of the rectangle of stems and ends: every part is in nearly equally many known names, also
    # in one split. Were it not so, to learn by parts would be to learn the opposite.
    lasts = [stem + ends[(i + d) % len(ends)] for d in range(len(ends)) for i, stem in enumerate(stems)]
    names = [f"{firsts[i % len(firsts)]} {last}" for i, last in enumerate(lasts)]
    count = KNOWN[kind]
    return [
        Entity(name, kind, split, known)
        for known, chosen in ((True, names[:count]), (False, names[count : 2 * count]))
        for split, part in cut(chosen).items()
        for name in part
    ]


def _questions(entity: Entity) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Every question about the entity that its facts would answer, and those that nobody could answer."""
    asks = [text for attribute in attributes_of(entity.type) for text in state(attribute, entity, key="asks")]
    return tuple(asks), tuple(text.format(**entity.slots()) for text in UNKNOWABLE[entity.type])
