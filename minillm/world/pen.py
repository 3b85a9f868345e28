"""The Pen that writes every text of the little world: random words from tables, and facts in their
phrasings.

A slot in a table that nobody has bound is filled from the table of that name, so tables that name
each other make a grammar, with recursion.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from minillm.world import phrases
from minillm.world.facts import ACTS, Entity, Fact, Facts, capitalise, pick, shuffled, state

NAME_SLOTS = {"person": "person", "pet": "animal", "town": "town", "tool": "tool"}


class Pen(dict[str, str]):
    """Writes one document: holds its random generator, the facts, and the slots bound so far."""

    def __init__(self, rng: random.Random, facts: Facts) -> None:
        super().__init__()
        self.rng = rng
        self.facts = facts

    def __missing__(self, name: str) -> str:
        """An unbound slot: a random entry of the table of that name, with its slots filled."""
        if name in NAME_SLOTS:
            return self.anyone(NAME_SLOTS[name])
        return self.pick(ACTS.get(name) or phrases.WORDS[name]).format_map(self)

    def say(self, table: Sequence[str], **slots: str) -> str:
        """A random entry of the table, filled, as a sentence. Bound slots stay bound."""
        self.update(slots)
        return capitalise(self.pick(table).format_map(self))

    def word(self, name: str) -> str:
        """A random entry of WORDS[name] as a sentence."""
        return capitalise(self[name])

    def chance(self, share: float) -> bool:
        """True with this probability."""
        return self.rng.random() < share

    def between(self, low: int, high: int) -> int:
        """A whole number from low to high, both possible."""
        return low + int(self.rng.random() * (high - low + 1))

    def pick(self, table: Sequence[Any]) -> Any:
        """A random entry of any sequence."""
        return pick(self.rng, table)

    def shuffled(self, items: Sequence[Any]) -> list[Any]:
        """The items in random order."""
        return shuffled(self.rng, items)

    def some(self, items: Sequence[Any], low: int, high: int) -> list[Any]:
        """From low to high of the items, in random order."""
        return self.shuffled(items)[: self.between(low, high)]

    def choose(self, shares: Mapping[Any, float]) -> Any:
        """A key drawn by its share; the shares add to one."""
        left = self.rng.random()
        for key, share in shares.items():
            left -= share
            if left < 0:
                return key
        return key  # the shares fell short of one by rounding

    def entity(self) -> Entity:
        """Somebody or something known."""
        return self.pick(self.facts.entities)

    def anyone(self, kind: str = "person") -> str:
        """A name of this type, known or not: whom a text may mention without telling a fact."""
        return self.pick(self.facts.names[kind])

    def subject(self) -> Entity:
        """Somebody to ask about, more often unknown: of the others there is enough text already."""
        return self.pick(self.facts.entities if self.chance(0.3) else self.facts.unknown)

    def question(self) -> str:
        """A question about anybody, known or not, or one that nobody could answer."""
        questions, unknowable = self.facts.asks[self.subject().name]
        return self.pick(unknowable) if self.chance(0.05) else self.pick(questions)

    def fact(self, fact: Fact, named: bool = True) -> str:
        """The fact in one of its phrasings."""
        return self.pick(state(fact.attribute, fact.entity, fact.value, pronoun=not named))

    def asked(self, fact: Fact) -> tuple[str, str]:
        """A question that the fact answers, and the answer."""
        named, unnamed = (state(fact.attribute, fact.entity, fact.value, "answers", p) for p in (False, True))
        return self.pick(fact.asks), self.pick(named + unnamed)

    def wrong(self, fact: Fact) -> str:
        """The same sentence with a value that is not true."""
        value = self.other_value(fact.attribute, fact.value, fact.entity.name)
        return self.pick(state(fact.attribute, fact.entity, value))

    def other_value(self, attribute: str, *not_these: str) -> str:
        """A value that the attribute may have, but none of these."""
        return self.pick([value for value in self.facts.values[attribute] if value not in not_these])

    def describe(self, facts: list[Fact]) -> list[str]:
        """Sentences about one entity: the first says its name, later ones often a pronoun."""
        return [self.fact(f, named=i == 0 or self.chance(0.5)) for i, f in enumerate(facts)]
