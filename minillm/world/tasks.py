"""Small instructions whose answer a program can check: copy, list, reverse, count, spell, compare...

Each is an instruction that a tiny model can learn to carry out by copying or by what pretraining
showed.
"""

from minillm.world.pen import Pen
from minillm.world.phrases import CATEGORIES, INSTRUCTIONS, NUMBER_WORDS, OPPOSITES, SIMPLE_WORDS
from minillm.world.rubric import Prompt

TASKS = tuple(INSTRUCTIONS)


def wordings(prompt: Prompt, way: str) -> list[str]:
    """All phrasings: "asks" for it, "answers" to that, or "says" both at once, as school pages do."""
    return [text.format(answer=prompt.answer, **prompt.slots) for text in INSTRUCTIONS[prompt.topic][way]]


def draw(pen: Pen, name: str) -> tuple[Prompt, str]:
    """A random instance of the named instruction, not yet worded, and the content that decides its split."""
    wanted: tuple[str, ...] = ()
    count = 0
    match name:
        case "list":
            category, count = pen.pick(tuple(CATEGORIES)), pen.between(2, 4)
            wanted = CATEGORIES[category]
            answer = ", ".join(pen.shuffled(wanted)[:count])
            slots, content = {"count": NUMBER_WORDS[count], "category": category}, f"{count} {category}"
        case "larger":
            a, b = pen.shuffled(range(len(NUMBER_WORDS)))[:2]
            slots, answer = {"a": NUMBER_WORDS[a], "b": NUMBER_WORDS[b]}, NUMBER_WORDS[max(a, b)]
            content = f"{min(a, b)} {max(a, b)}"
        case "opposite":
            pair = pen.pick(OPPOSITES)
            word, answer = pen.shuffled(pair)
            slots, content = {"word": word}, pair[0]
        case "spell" | "capitals" | "repeat":
            word, times = pen.pick(SIMPLE_WORDS), pen.between(2, 4)
            many = " ".join([word] * times)
            answer = {"spell": " ".join(word), "capitals": word.upper(), "repeat": many}[name]
            slots = {"word": word, "count": NUMBER_WORDS[times]}
            content = f"{word} {times}" if name == "repeat" else word
        case _:
            words = pen.some(SIMPLE_WORDS, 2, 3 if name == "reverse" else 4)
            content, number = " ".join(words), NUMBER_WORDS[len(words)]
            answer = {
                "copy": content, "reverse": " ".join(reversed(words)), "count": number, "first": words[0],
                "last": words[-1],
            }[name]  # fmt: skip
            slots, wanted = {"words": content}, (str(len(words)),) if name == "count" else ()
    return Prompt([], "instruction", "", name, "", answer, wanted, count, slots), f"{name} {content}"
