"""From the words of a command line to a script's options, by tyro: --resume, errors in one line, --help in
groups, old flags, ~ for home.

--help shows the options that people change first on top. Names, kinds and defaults are the fields of the
options' dataclass, the explanations the lines under them.
"""

import ast
import inspect
import io
import itertools
import os
import re
import sys
import textwrap
from contextlib import redirect_stderr
from dataclasses import MISSING, Field, fields, make_dataclass, replace
from dataclasses import field as new_field
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import tyro

from minillm.errors import InputError
from minillm.io.disk import read_json, typed
from minillm.tools.streams import tables

GROWING = frozenset({"steps", "iterations"})
"""Options that a resumed run may raise, so that a finished one continues."""


def parse_options(kind: type[Any], arguments: list[str]) -> Any:
    """The options of a script; InputError for a flag or a value that does not fit.

    With `--resume`, where a script has it, every option not given is the stored run's; one given with
    another value is refused by name, unless it changes no weight or asks for more steps.
    """
    if {"-h", "--help"} & set(arguments):
        print_help(kind)
    words = words_as_meant(kind, arguments)
    given = options_of(kind, words)
    if idle := unread(given, words):
        say(f"{', '.join(idle)}: not read by this stage, see --help")
    if not getattr(given, "resume", False):
        return given
    stored = stored_options(kind, given.folder / "run.json")
    resumed = options_of(kind, words, default=replace(stored, out=given.out, resume=False, overwrite=False))
    changed = []
    for name in {field.name for field in fields(kind)} - kind.free_to_change:
        value, before = getattr(resumed, name), getattr(stored, name)
        if value != before and not (name in GROWING and value and value > (before or 0)):
            changed.append(f"--{name.replace('_', '-')} {value} (was {before})")
    if changed:
        found = ", ".join(sorted(changed))
        raise InputError(f"{given.folder}: cannot resume with other options: {found}")
    return resumed


# ---- Words of the command line

TABLES: dict[str, Any] = tables(__file__)
RENAMED, GROUPS = TABLES["renamed"], TABLES["groups"]
TEXTS = ("prompt", "system", "name")
"""Options whose values are no places: there ~ stays as it is."""


def words_as_meant(kind: type[Any], arguments: list[str]) -> list[str]:
    """The words with the new names of renamed options, saying so for each, and the home folder for ~."""
    names, words, flag = {field.name for field in fields(kind)}, [], ""
    for word in arguments:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            name = flag.removeprefix("--").replace("-", "_")
            if (new := RENAMED.get(name)) in names:
                now = f"--{new.replace('_', '-')}"
                if name in names:
                    was = next(f"--{old.replace('_', '-')}" for old in RENAMED if RENAMED[old] == name)
                    note = f"{flag} is now what {was} was; what it was itself is {now}"
                else:
                    note = f"{flag} is now {now}; the old name works for one more release"
                    word = f"{now}{equals}{value}"
                say(note, file=sys.stderr)
            flag = name
        if flag not in TEXTS:
            # A place may stand behind --flag= or NAME=.
            word = re.sub(r"^(--[^=/]*=)?([^/~]*=)?~(?=/|$)", rf"\1\2{os.path.expanduser('~')}", word)
        words.append(word)
    lists = {name for name, kind in get_type_hints(kind).items() if "tuple" in str(kind)}
    for word, after in itertools.pairwise([*words, "--"]):
        if word[:2] == "--" and word[2:].replace("-", "_") in lists and after[:2] == "--":
            raise InputError(f"{word}: names nothing; give one value or more, or leave it out")
    return words


# ---- Words, and what run.json holds, as options


def options_of(kind: type[Any], words: list[str], **how: Any) -> Any:
    """The options of a command line, with the defaults of the class or of an instance."""
    printed = io.StringIO()
    try:
        with redirect_stderr(printed):
            return tyro.cli(kind, args=words, **how)
    except SystemExit:
        # What tyro says inside its frame, up to the first ruler; in ASCII one stands in front, too.
        lines = [line.strip("│╭╮╰╯ ") for line in printed.getvalue().splitlines()[1:]]
        said = next(filter(None, re.split("(?:──|-----)[─-]*", " ".join(lines))))
        raise InputError(f"{said.replace('(required)', '').strip()}; see --help") from None


def stored_options(kind: type[Any], path: Path) -> Any:
    """The options that a run.json holds, perhaps by their names in the release before."""
    if not path.exists():
        raise InputError(f"{path.parent}: holds no run to resume; leave --resume out to start one")
    stored, kinds = read_json(path).get("options"), get_type_hints(kind)
    names = {field.name for field in fields(kind)}
    if isinstance(stored, dict) and not stored.keys() <= names:
        stored = {RENAMED.get(name, name): value for name, value in stored.items()}
    if not isinstance(stored, dict) or not stored.keys() <= names:
        raise InputError(f"{path}: does not hold the options of this script; was it another stage's run?")
    if isinstance(stored.get("field"), str):  # one name in the release before
        stored["field"] = [stored["field"]]
    try:
        return kind(**{name: typed(name, value, kinds[name]) for name, value in stored.items()})
    except (InputError, TypeError, OverflowError) as error:
        raise InputError(f"{path}: holds an option that does not fit ({error})") from None


def unread(options: Any, words: list[str]) -> list[str]:
    """The flags among the words that the options' stage does not read. Of an option that is not for all, the
    explanation begins with the stages, algorithms or annotators that read it: "sample, policy: ..."."""
    kinds = get_type_hints(type(options))
    if not (choices := [name for name in ("stage", "algorithm", "annotator") if name in kinds]):
        return []
    explained = explanations(type(options))
    names, active = {choice for name in choices for choice in get_args(kinds[name])}, set[str]()

    def is_read(name: str) -> bool:
        some = explained[name].split(": ")[0].split(",")
        readers = [[word for word in one.split() if word[:2] != "--"] for one in some]
        return not names.issuperset(itertools.chain(*readers)) or any(map(active.issuperset, readers))

    for name in filter(is_read, choices):
        active.add(getattr(options, name))
    flags = {word: match[1] for word in words if (match := re.match(r"--(?:no[-_])?([^=]*)", word))}
    given = {word: name.replace("-", "_") for word, name in flags.items()}
    return [word for word, name in given.items() if name in explained and not is_read(name)]


def say(note: str, **where: Any) -> None:
    """A line about the command line; under torchrun one process says it."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {note}", **where)


# ---- --help


def print_help(kind: type[Any]) -> None:
    """What tyro says of a class with a part for each group of a script's options; it ends the script."""
    program, house = Path(sys.argv[0]).resolve(), Path(__file__).parents[2]
    command = program.name
    if program.is_relative_to(house / "minillm"):
        module = ".".join(program.relative_to(house).with_suffix("").parts)
        command = f"-m {module.removesuffix('.__main__')}"
    explained, parts, hints = explanations(kind), [], {None: "", (): "", MISSING: "(required)"}
    plain, kinds = get_type_hints(kind), get_type_hints(kind, include_extras=True)
    for title, members in grouped(kind).items():
        own: list[Any] = []
        for name, one in members.items():
            how: dict[str, Any] = {"help": explained[name]}
            if one.default is None:  # what that means, the explanation says
                given = get_args(plain[name])[0]
                how["metavar"] = "STR ..." if get_origin(given) is tuple else given.__name__.upper()
            how |= {"help_behavior_hint": hints[one.default]} if one.default in hints else {}
            marks = (tyro.conf.arg(**how), *[tyro.conf.FlagCreatePairsOff] * (one.default is False))
            own.append((name, Annotated[(kinds[name], *marks)], new_field(default=one.default)))
        parts.append((title, make_dataclass(title, own, kw_only=True)))
    shown, form = make_dataclass("Options", parts), (tyro.conf.OmitArgPrefixes,)
    tyro.cli(shown, args=["--help"], prog=f"python {command}", description=inspect.getdoc(kind), config=form)


def grouped(kind: type[Any]) -> dict[str, dict[str, Field]]:
    """The fields by title and name."""
    known, found = {field.name: field for field in fields(kind)}, {}
    for title, names in GROUPS.items():
        if members := {name: known.pop(name) for name in names.split() if name in known}:
            found[title] = members
    return found | ({"more": known} if known else {})


def explanations(kind: type[Any]) -> dict[str, str]:
    """The string under each field, in one line; a subclass's stands for its base's."""
    found = {}
    for part in reversed(kind.__mro__[:-1]):
        body: Any = ast.parse(textwrap.dedent(inspect.getsource(part))).body[0]
        for field, text in itertools.pairwise(body.body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                found[ast.unparse(field.target)] = " ".join(ast.literal_eval(text.value).split())
    return found
