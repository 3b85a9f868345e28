"""Small programs in Python. Each is run here, so what the comments say that it prints is true."""

from collections.abc import Sequence

from minillm.world import phrases
from minillm.world.facts import capitalise
from minillm.world.pen import Pen

Program = tuple[str, Sequence[str]]
"""Statements, and the expressions that are printed after them."""


def code(pen: Pen) -> str:
    """One to three programs; each print is followed by a comment with what it prints."""
    blocks = [_with_results(*pen.pick(PROGRAMS)(pen)) for _ in range(pen.between(1, 3))]
    head = [f"# {pen.say(phrases.CODE_COMMENTS)}"] if pen.chance(0.6) else []
    return "\n".join([*head, *blocks])


def _with_results(statements: str, expressions: Sequence[str]) -> str:
    """The program as text, its results found by running it."""
    scope: dict[str, object] = {}
    exec(statements, scope)
    return "\n".join([statements, *(f"print({text})  # {eval(text, scope)}" for text in expressions)])


def _arithmetic(pen: Pen) -> Program:
    """A function of one number, used twice."""
    (name, sign), k = pen.pick((("add", "+"), ("scale", "*"), ("shift", "-"))), pen.between(2, 12)
    calls = [f"{name}({x})" for x in (pen.between(1, 20), pen.between(20, 60))]
    return f"def {name}(x):\n    return x {sign} {k}\n", calls


def _nested(pen: Pen, depth: int) -> str:
    """A nested sum or product."""
    if depth == 0 or pen.chance(0.3):
        return str(pen.between(1, 9))
    a, b = _nested(pen, depth - 1), _nested(pen, depth - 1)
    return f"({a} {pen.pick('+-*')} {b})"


def _expression(pen: Pen) -> Program:
    return f"total = {_nested(pen, 3)}", ["total"]


def _numbers(pen: Pen) -> Program:
    numbers = [pen.between(1, 99) for _ in range(pen.between(3, 6))]
    calls = [f"{name}(numbers)" for name in ("max", "min", "sum", "len", "sorted")]
    return f"numbers = {numbers}", pen.some(calls, 1, 3)


def _words(pen: Pen) -> Program:
    count = pen.between(2, 4)
    words = " ".join(pen.shuffled(phrases.SIMPLE_WORDS)[:count])
    calls = ["' '.join(reversed(text.split()))", "len(text.split())", "text.split()[0]", "text.split()[-1]"]
    return f"text = '{words}'", pen.some([*calls, "text.upper()"], 1, 3)


def _letters(pen: Pen) -> Program:
    word, count = pen.pick(phrases.SIMPLE_WORDS), pen.between(2, 4)
    calls = ["'-'.join(word)", "word.upper()", "len(word)", f"' '.join([word] * {count})", "word[0]"]
    return f"word = '{word}'", pen.some(calls, 1, 3)


def _lookup(pen: Pen) -> Program:
    """Facts of the world as a dictionary."""
    attribute = pen.pick(tuple(phrases.ATTRIBUTES))
    facts = [fact for group in pen.facts.by_value[attribute].values() for fact in group]
    facts = pen.some(facts, 2, 4)
    entries = "".join(f"    '{fact.entity.name}': '{fact.value}',\n" for fact in facts)
    return f"{attribute} = {{\n{entries}}}", [f"{attribute}['{pen.pick(facts).entity.name}']"]


def _loop(pen: Pen) -> Program:
    start, step, count = pen.between(0, 9), pen.between(1, 5), pen.between(3, 5)
    name = pen["thing"] + "s"
    return f"{name} = []\nfor i in range({count}):\n    {name}.append({start} + {step} * i)", [name]


def _compare(pen: Pen) -> Program:
    a, b = pen.between(1, 99), pen.between(1, 99)
    text = "def larger(a, b):\n    if a > b:\n        return a\n    return b\n"
    return text, [f"larger({a}, {b})", f"larger({b}, {b + 1})"]


def _class(pen: Pen) -> Program:
    kind, name = capitalise(pen["animal"]), pen.anyone("animal")
    sound = pen.pick(("wuff", "miau", "quack", "mooo", "ieek"))
    text = (
        f"class {kind}:\n    def __init__(self, name):\n        self.name = name\n\n"
        f"    def speak(self):\n        return self.name + ': {sound}'\n\npet = {kind}('{name}')"
    )
    return text, ["pet.speak()"]


def _recursion(pen: Pen) -> Program:
    text = "def count_down(n):\n    if n == 0:\n        return [0]\n    return [n] + count_down(n - 1)\n"
    return text, [f"count_down({pen.between(2, 9)})"]


def _filter(pen: Pen) -> Program:
    ages, limit = [pen.between(1, 50) for _ in range(5)], pen.between(10, 40)
    return f"ages = {ages}\nold = [a for a in ages if a > {limit}]", ["old"]


def _opposites(pen: Pen) -> Program:
    pairs = pen.shuffled(phrases.OPPOSITES)[:3]
    return f"opposite = {dict(pairs)}", [f"opposite['{pairs[1][0]}']"]


PROGRAMS = (
    _arithmetic, _expression, _numbers, _words, _letters, _lookup, _lookup, _loop, _compare, _class,
    _recursion, _filter, _opposites,
)  # fmt: skip
