"""Tools that a model may call: a calculator, a search over texts; and what runs a call.

    user ──► model ──► a call? ──no──► the reply
               ▲         │ yes
               └─ result ◄─ tool, in at most SECONDS

`Chat.events` (tools/chat.py) is that loop. What a model asks of a tool is never trusted: a name that no tool
has, arguments that are no JSON, a sum that would fill the memory and a tool that fails or takes too long all
become one line, "error: …", which the model reads as the result. Nothing is evaluated: the calculator walks
the syntax tree of an expression and knows numbers and seven operators, with bounds on size.

Where a client runs its own tools, as by OpenAI's API, there is nothing to run here: `ChatTemplate.message`
makes a message with `tool_calls` of a reply's tokens, `with_tools` tells a model of tools (io/messages.py).
Left out: tools that change anything, and calls side by side: they run one after another.
"""

import ast
import ctypes
import json
import math
import operator
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minillm.corpus import Source
from minillm.errors import InputError, reason_of
from minillm.io.text import text_sources
from minillm.tools.folder import read_run

SECONDS = 2.0
"""For a call."""
MOST_CALLS = 4
"""In one reply, over all its turns."""
LONGEST_RESULT = 200
"""Characters of a result: what a small context has room for."""


@dataclass(frozen=True)
class Tool:
    """A function that a model may call."""

    name: str
    description: str
    argument: str
    """The name of its one argument, a text."""
    run: Callable[[str], str]
    """InputError, or any other exception, where it cannot answer."""

    def schema(self) -> dict[str, Any]:
        """What it is, in OpenAI's form."""
        properties = {self.argument: {"type": "string"}}
        parameters = {"type": "object", "properties": properties, "required": [self.argument]}
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}


# ---- Calls → results


def run_call(tools: Mapping[str, Tool], call: Mapping[str, Any], seconds: float = SECONDS) -> str:
    """The result of a call (of a message's `tool_calls`) in one line; it never raises."""
    try:
        tool, argument = _understood(tools, call["function"])
        return _one_line(_in_time(lambda: tool.run(argument), seconds))
    except Exception as error:
        return _one_line(f"error: {reason_of(error)}")


def _understood(tools: Mapping[str, Tool], function: Mapping[str, str]) -> tuple[Tool, str]:
    if function["name"] not in tools:
        raise InputError(f"there is no tool {function['name']!r:.40}; there are: {', '.join(tools)}")
    tool = tools[function["name"]]
    try:
        given = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict) or not isinstance(given.get(tool.argument), str) or len(given) > 1:
        raise InputError(f'arguments are {function["arguments"]!r:.40}; give {{"{tool.argument}": "…"}}')
    return tool, given[tool.argument]


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= LONGEST_RESULT else line[: LONGEST_RESULT - 1] + "…"


def _in_time(run: Callable[[], str], seconds: float) -> str:
    """What it returns or raises; TimeoutError, and its end, where it takes longer."""
    done = Future[str]()

    def work() -> None:
        try:
            done.set_result(run())
        except BaseException as error:
            done.set_exception(error if isinstance(error, Exception) else RuntimeError(error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():  # Python raises this in it, between two of its operations
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(thread.ident or 0), ctypes.py_object(TimeoutError)
        )
        raise TimeoutError(f"took longer than {seconds:g} seconds")
    return done.result()


# ---- The calculator

OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
}  # fmt: skip
LONGEST_SUM = 200
"""Characters of an expression."""
LARGEST = 10**30
"""The size of a number, at any step."""


def calculate(expression: str) -> str:
    """The value of an expression of numbers, + - * / // % ** and brackets. InputError for any other."""
    if len(expression) > LONGEST_SUM:
        raise InputError(f"a sum of {len(expression):,} characters; give at most {LONGEST_SUM}")
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise InputError(f"{expression!r:.40} is no sum of numbers") from None
    except ZeroDivisionError:
        raise InputError("division by zero") from None
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def _value(node: ast.expr) -> int | float:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return _bounded(number)
        case ast.UnaryOp(op=ast.UAdd() | ast.USub() as sign, operand=operand):
            value = _value(operand)
            return value if isinstance(sign, ast.UAdd) else -value
        case ast.BinOp(left=first, op=op, right=second) if type(op) in OPERATORS:
            left, right = _value(first), _value(second)
            if isinstance(op, ast.Pow) and abs(right) * math.log2(max(2, abs(left))) > 128:
                raise InputError("a power beyond 30 digits")
            return _bounded(OPERATORS[type(op)](left, right))
    raise InputError(f"{ast.unparse(node)!r:.40} is not made of numbers and + - * / // % **")


def _bounded(value: Any) -> int | float:
    """The value; InputError unless it is a real number of at most 30 digits."""
    if isinstance(value, complex) or not abs(value) <= LARGEST:
        raise InputError("the value is no real number of at most 30 digits")
    return value


def calculator() -> Tool:
    """The calculator as a tool."""
    return Tool("calculator", "The value of a sum of numbers: + - * / // % **", "expression", calculate)


# ---- The search

WORD = re.compile(r"\w+")
PASSAGE = re.compile(r"[^\n.!?]+[.!?]*")


def search(texts: Iterable[str]) -> Tool:
    """A search over texts: the sentence that shares most words with a query, the rarer the better, of equal
    ones the shortest, then the first."""
    passages = list(dict.fromkeys(found.strip() for text in texts for found in PASSAGE.findall(text)))
    where: dict[str, list[int]] = defaultdict(list)
    for i, passage in enumerate(passages):
        for word in set(WORD.findall(passage.lower())):
            where[word].append(i)

    def find(query: str) -> str:
        scores: dict[int, float] = defaultdict(float)
        for word in set(WORD.findall(query.lower())):
            held = where.get(word, ())
            for i in held:
                scores[i] += math.log(1 + len(passages) / len(held))
        if not scores:
            return "nothing found"
        return passages[min(scores, key=lambda i: (-scores[i], len(passages[i]), i))]

    return Tool("search", "The sentence of the texts that fits a query best", "query", find)


def open_tools(names: Iterable[str], run: Path, files: Sequence[str]) -> dict[str, Tool]:
    """Tools by name; the search is over `files`, or else over the text of a run."""
    kinds = {"calculator": calculator, "search": lambda: search(texts_of_run(run, files))}
    return {name: kinds[name]() for name in names}


def texts_of_run(run: Path, files: Sequence[str] = ()) -> Iterable[str]:
    """The documents of `files`; without any those that a run was trained on, or the one it began with."""
    sources = sources_of({} if files else text_options(run), files)
    return (text for source in sources for text in source.documents())


def sources_of(options: Mapping[str, Any], files: Sequence[str] = ()) -> list[Source]:
    """What a run of train.py with these options reads, or `files` as it would read them."""
    known = {"seed": 0, "world_megabytes": 12.0, "errors": "strict", "encoding": "utf-8", "field": None}
    return text_sources(files or options.get("data", ()), *(options.get(name, known[name]) for name in known))


def text_options(run: Path) -> dict[str, Any]:
    """The options of the run of train.py from which a run comes. InputError where that is not known."""
    stage, options = read_run(run)
    if options.get("init"):
        return text_options(Path(str(options["init"])))
    if stage != "train" or not isinstance(options.get("data"), list):
        what = f"{run / 'run.json'}: does not say on what text the run was trained"
        raise InputError(f"{what}; give files, --search-in")
    return options
