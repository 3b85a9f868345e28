"""Small instructions whose answer a program can check: copy, list, reverse, count, spell, compare...

Each is an instruction that a tiny model can learn to carry out by copying or by what pretraining
showed.
"""

import random
from dataclasses import dataclass

from minillm.world.facts import pick, shuffled
from minillm.world.phrases import CATEGORIES, INSTRUCTIONS, NUMBER_WORDS, OPPOSITES, SIMPLE_WORDS

TASKS = tuple(INSTRUCTIONS)


@dataclass(frozen=True)
class Task:
    """One instruction: its name, the slots of its text, a right answer, and the content that decides its
    split."""

    name: str
    slots: dict[str, str]
    answer: str
    key: str

    def asks(self) -> list[str]:
        """Every phrasing of the instruction."""
        return self._worded("asks")

    def answers(self) -> list[str]:
        """Every sentence that carries it out."""
        return self._worded("answers")

    def says(self) -> list[str]:
        """Every way to state instruction and answer at once, as school pages do."""
        return self._worded("says")

    def _worded(self, way: str) -> list[str]:
        return [text.format(answer=self.answer, **self.slots) for text in INSTRUCTIONS[self.name][way]]


def draw(rng: random.Random, name: str) -> Task:
    """A random instance of the named instruction."""
    if name == "list":
        return _list(rng)
    if name == "larger":
        return _larger(rng)
    if name == "opposite":
        pair = pick(rng, OPPOSITES)
        word, answer = shuffled(rng, pair)
        return Task(name, {"word": word}, answer, f"opposite {pair[0]}")
    if name in ("spell", "capitals", "repeat"):
        return _one_word(rng, name)
    return _several_words(rng, name)


def _list(rng: random.Random) -> Task:
    category, count = pick(rng, tuple(CATEGORIES)), 2 + int(rng.random() * 3)
    members = shuffled(rng, CATEGORIES[category])[:count]
    slots = {"count": NUMBER_WORDS[count], "category": category}
    return Task("list", slots, ", ".join(members), f"list {count} {category}")


def _larger(rng: random.Random) -> Task:
    a, b = shuffled(rng, range(len(NUMBER_WORDS)))[:2]
    slots = {"a": NUMBER_WORDS[a], "b": NUMBER_WORDS[b]}
    return Task("larger", slots, NUMBER_WORDS[max(a, b)], f"larger {min(a, b)} {max(a, b)}")


def _one_word(rng: random.Random, name: str) -> Task:
    word, count = pick(rng, SIMPLE_WORDS), 2 + int(rng.random() * 3)
    answer = {"spell": " ".join(word), "capitals": word.upper(), "repeat": " ".join([word] * count)}[name]
    key = f"{name} {word} {count}" if name == "repeat" else f"{name} {word}"
    return Task(name, {"word": word, "count": NUMBER_WORDS[count]}, answer, key)


def _several_words(rng: random.Random, name: str) -> Task:
    longest = 3 if name == "reverse" else 4
    words = shuffled(rng, SIMPLE_WORDS)[: 2 + int(rng.random() * (longest - 1))]
    answer = {
        "copy": " ".join(words), "reverse": " ".join(reversed(words)), "count": NUMBER_WORDS[len(words)],
        "first": words[0], "last": words[-1],
    }[name]  # fmt: skip
    return Task(name, {"words": " ".join(words)}, answer, f"{name} {' '.join(words)}")
