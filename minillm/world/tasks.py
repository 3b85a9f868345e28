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
    """One instruction: its name, the slots of its text, a right answer, the content that decides its split,
    and what else is right, of a list so many."""

    name: str
    slots: dict[str, str]
    answer: str
    key: str = ""
    wanted: tuple[str, ...] = ()
    count: int = 0

    def texts(self, way: str) -> list[str]:
        """All phrasings: "asks" for it, "answers" to that, or "says" both at once, as school pages do."""
        return [text.format(answer=self.answer, **self.slots) for text in INSTRUCTIONS[self.name][way]]


def draw(rng: random.Random, name: str) -> Task:
    """A random instance of the named instruction."""
    match name:
        case "list":
            category, count = pick(rng, tuple(CATEGORIES)), _few(rng)
            answer = ", ".join(shuffled(rng, CATEGORIES[category])[:count])
            slots, key = {"count": NUMBER_WORDS[count], "category": category}, f"list {count} {category}"
            return Task(name, slots, answer, key, CATEGORIES[category], count)
        case "larger":
            a, b = shuffled(rng, range(len(NUMBER_WORDS)))[:2]
            slots = {"a": NUMBER_WORDS[a], "b": NUMBER_WORDS[b]}
            return Task(name, slots, NUMBER_WORDS[max(a, b)], f"larger {min(a, b)} {max(a, b)}")
        case "opposite":
            pair = pick(rng, OPPOSITES)
            word, answer = shuffled(rng, pair)
            return Task(name, {"word": word}, answer, f"opposite {pair[0]}")
        case "spell" | "capitals" | "repeat":
            word, count = pick(rng, SIMPLE_WORDS), _few(rng)
            many = " ".join([word] * count)
            answer = {"spell": " ".join(word), "capitals": word.upper(), "repeat": many}[name]
            key = f"{name} {word} {count}" if name == "repeat" else f"{name} {word}"
            return Task(name, {"word": word, "count": NUMBER_WORDS[count]}, answer, key)
    words = shuffled(rng, SIMPLE_WORDS)[: _few(rng, 3 if name == "reverse" else 4)]
    answer = {
        "copy": " ".join(words), "reverse": " ".join(reversed(words)), "count": NUMBER_WORDS[len(words)],
        "first": words[0], "last": words[-1],
    }[name]  # fmt: skip
    figure = (str(len(words)),) if name == "count" else ()
    return Task(name, {"words": " ".join(words)}, answer, f"{name} {' '.join(words)}", figure)


def _few(rng: random.Random, most: int = 4) -> int:
    return 2 + int(rng.random() * (most - 1))
