"""Small programs in Python whose printed results, given in comments, are computed here and so are
true.
"""

from collections.abc import Sequence

from minillm.world import phrases
from minillm.world.facts import capitalise, shuffled
from minillm.world.pen import Pen


def code(pen: Pen) -> str:
    """A small program; each print is followed by a comment with what it prints, computed here."""
    blocks = [pen.pick(_PROGRAMS)(pen) for _ in range(pen.between(1, 3))]
    head = [f"# {pen.say(phrases.CODE_COMMENTS)}"] if pen.chance(0.6) else []
    return "\n".join([*head, *(line for block in blocks for line in block)])


def _prints(expression: str, value: object) -> str:
    return f"print({expression})  # {value}"


def _words(pen: Pen, count: int) -> list[str]:
    return shuffled(pen.rng, phrases.SIMPLE_WORDS)[:count]


def _code_arithmetic(pen: Pen) -> list[str]:
    """A function of one number, used twice."""
    (name, sign), k = pen.pick((("add", "+"), ("scale", "*"), ("shift", "-"))), pen.between(2, 12)
    lines = [f"def {name}(x):", f"    return x {sign} {k}", ""]
    for x in (pen.between(1, 20), pen.between(20, 60)):
        lines.append(_prints(f"{name}({x})", {"+": x + k, "*": x * k, "-": x - k}[sign]))
    return lines


def _expression(pen: Pen, depth: int) -> tuple[str, int]:
    """A nested sum or product and its value."""
    if depth == 0 or pen.chance(0.3):
        number = pen.between(1, 9)
        return str(number), number
    (a, x), (b, y) = _expression(pen, depth - 1), _expression(pen, depth - 1)
    sign = pen.pick("+-*")
    return f"({a} {sign} {b})", {"+": x + y, "-": x - y, "*": x * y}[sign]


def _code_expression(pen: Pen) -> list[str]:
    text, value = _expression(pen, 3)
    return [f"total = {text}", _prints("total", value)]


def _some_prints(pen: Pen, head: str, choices: Sequence[tuple[str, object]]) -> list[str]:
    """A line, and one to three of the expressions printed."""
    return [head] + [_prints(*choice) for choice in shuffled(pen.rng, choices)[: pen.between(1, 3)]]


def _code_numbers(pen: Pen) -> list[str]:
    numbers = [pen.between(1, 99) for _ in range(pen.between(3, 6))]
    choices = [(f"{f.__name__}(numbers)", f(numbers)) for f in (max, min, sum, len, sorted)]
    return _some_prints(pen, f"numbers = {numbers}", choices)


def _code_words(pen: Pen) -> list[str]:
    words = _words(pen, pen.between(2, 4))
    text = " ".join(words)
    choices = (
        ("' '.join(reversed(text.split()))", " ".join(reversed(words))), ("len(text.split())", len(words)),
        ("text.split()[0]", words[0]), ("text.split()[-1]", words[-1]), ("text.upper()", text.upper()),
    )  # fmt: skip
    return _some_prints(pen, f"text = '{text}'", choices)


def _code_letters(pen: Pen) -> list[str]:
    word, count = pen.pick(phrases.SIMPLE_WORDS), pen.between(2, 4)
    choices = (
        ("'-'.join(word)", "-".join(word)), ("word.upper()", word.upper()), ("len(word)", len(word)),
        (f"' '.join([word] * {count})", " ".join([word] * count)), ("word[0]", word[0]),
    )  # fmt: skip
    return _some_prints(pen, f"word = '{word}'", choices)


def _code_lookup(pen: Pen) -> list[str]:
    """Facts of the world as a dictionary."""
    attribute = pen.pick(tuple(phrases.ATTRIBUTES))
    facts = shuffled(pen.rng, [f for group in pen.facts.by_value[attribute].values() for f in group])[
        : pen.between(2, 4)
    ]
    lines = [f"{attribute} = {{"] + [f"    '{f.entity.name}': '{f.value}'," for f in facts] + ["}"]
    chosen = pen.pick(facts)
    return [*lines, _prints(f"{attribute}['{chosen.entity.name}']", chosen.value)]


def _code_loop(pen: Pen) -> list[str]:
    start, step, count = pen.between(0, 9), pen.between(1, 5), pen.between(3, 5)
    name = pen["thing"] + "s"
    lines = [f"{name} = []", f"for i in range({count}):", f"    {name}.append({start} + {step} * i)"]
    return [*lines, _prints(name, [start + step * i for i in range(count)])]


def _code_compare(pen: Pen) -> list[str]:
    a, b = pen.between(1, 99), pen.between(1, 99)
    lines = ["def larger(a, b):", "    if a > b:", "        return a", "    return b", ""]
    return [*lines, _prints(f"larger({a}, {b})", max(a, b)), _prints(f"larger({b}, {b + 1})", b + 1)]


def _code_class(pen: Pen) -> list[str]:
    kind, name = capitalise(pen["animal"]), pen.anyone("animal")
    sound = pen.pick(("wuff", "miau", "quack", "mooo", "ieek"))
    lines = [
        f"class {kind}:", "    def __init__(self, name):", "        self.name = name", "",
        "    def speak(self):", f"        return self.name + ': {sound}'", "", f"pet = {kind}('{name}')",
    ]  # fmt: skip
    return [*lines, _prints("pet.speak()", f"{name}: {sound}")]


def _code_recursion(pen: Pen) -> list[str]:
    n = pen.between(2, 9)
    lines = [
        "def count_down(n):", "    if n == 0:", "        return [0]", "    return [n] + count_down(n - 1)",
        "",
    ]  # fmt: skip
    return [*lines, _prints(f"count_down({n})", list(range(n, -1, -1)))]


def _code_filter(pen: Pen) -> list[str]:
    numbers, limit = [pen.between(1, 50) for _ in range(5)], pen.between(10, 40)
    lines = [f"ages = {numbers}", f"old = [a for a in ages if a > {limit}]"]
    return [*lines, _prints("old", [a for a in numbers if a > limit])]


def _code_opposites(pen: Pen) -> list[str]:
    pairs = shuffled(pen.rng, phrases.OPPOSITES)[:3]
    lines = ["opposite = {" + ", ".join(f"'{a}': '{b}'" for a, b in pairs) + "}"]
    return [*lines, _prints(f"opposite['{pairs[1][0]}']", pairs[1][1])]


_PROGRAMS = (
    _code_arithmetic, _code_expression, _code_numbers, _code_words, _code_letters, _code_lookup,
    _code_lookup, _code_loop,
    _code_compare, _code_class, _code_recursion, _code_filter, _code_opposites,
)  # fmt: skip
