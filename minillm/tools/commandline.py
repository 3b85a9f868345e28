"""What a command line needs around tyro: --help in groups, old names of flags, ~ in places.

--help shows the options that people change first on top. Names, kinds and defaults are the fields of the
options' dataclass, the explanations the lines under them.
"""

import ast
import contextlib
import inspect
import itertools
import os
import re
import shutil
import sys
import textwrap
from dataclasses import MISSING, Field, fields, replace
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from minillm.errors import InputError
from minillm.options import PolicyOptions

GROUPS: dict[str, str] = {
    "changed first": "run runs stage algorithm annotator data out init models depth steps iterations prompt "
    "prompt_file system judge resume overwrite",
    "the model": "width heads kv_heads qk_norm tie_embeddings vocab_size objective new_blocks",
    "learning": "block_size batch_tokens batch_sets micro_tokens epochs optimizer matrix_rate embedding_rate "
    "weight_decay warmup decay clip",
    "data and validation": "val_data field encoding text text_share text_bytes errors split val_fraction "
    "val_tokens val_sets val_prompts eval_prompts world_megabytes world_conversations cache workers",
    "sampling": "prompts responses distractors samples show pairs thinking temperature top_k top_p "
    "max_new_tokens",
    "rankings and verdicts": "rankings annotators opinions noise name judge_model principles",
    "the run": "val_every save_every seed device precision compile tracker",
}
"""Titles and the options under them, in the order in which they are shown."""


RENAMED = {
    "inner_epochs": "ppo_epochs", "batch_responses": "rollout_batch", "group": "group_size",
    "unended_score": "missing_eos_score", "average": "ema_decay", "ratio_clip": "clip_range",
    "value_weight": "vf_coef", "stop_kl": "target_kl", "target_kl": "adaptive_kl_target",
}  # fmt: skip
"""Options by their old names, which work for one release where a script has the new one."""
REUSED = {"target_kl": 1.0}
"""Old names that now mean another option, and the value from which only the old meaning makes sense."""
PATHS = frozenset(
    {"out", "init", "cache", "data", "text", "models", "reward", "rankings", "judge", "judge_model",
     "principles", "run", "runs"}
)  # fmt: skip
"""Options whose values are places, in which ~ is the home folder."""


# ---- --help


def print_help(kind: type[Any]) -> None:
    """The description of a script's options and all of them, grouped."""
    program = Path(sys.argv[0])
    name = f"-m minillm.{program.parent.name}" if program.name == "__main__.py" else program.name
    print(f"usage: python {name} [options]\n\n{inspect.getdoc(kind)}")
    explained, kinds = explanations(kind), get_type_hints(kind)
    width = min(110, shutil.get_terminal_size().columns)
    for title, members in grouped(kind).items():
        print(f"\n{title}:")
        for field in members:
            print(textwrap.fill(f"{flag(field, kinds[field.name])}", width, initial_indent="  "))
            text = f"{explained[field.name]} ({default(field)})"
            print(textwrap.fill(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6))


def grouped(kind: type[Any]) -> dict[str, list[Field]]:
    """The fields by title; those of a policy that no group lists have one of their own."""
    left = {field.name: field for field in fields(kind)}
    found = {
        title: [left.pop(name) for name in names.split() if name in left] for title, names in GROUPS.items()
    }
    policy = [field for field in left.values() if field.name in PolicyOptions.__annotations__]
    found["the policy"] = policy
    found["more"] = [field for field in left.values() if field not in policy]
    return {title: members for title, members in found.items() if members}


def explanations(kind: type[Any]) -> dict[str, str]:
    """The string under each field, in one line; a subclass's stands for its base's."""
    found = {}
    for part in reversed([base for base in kind.__mro__ if base is not object]):
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(part))).body
        statements = body.body if isinstance(body, ast.ClassDef) else []
        for field, text in itertools.pairwise(statements):
            match field, text:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(words))):
                    found[name] = " ".join(words.split())
    return found


def flag(field: Field, kind: Any) -> str:
    """How an option is given: "--steps INT", "--no-whiten", "RUN"."""
    if field.name in ("run", "runs"):
        return field.name.upper() if kind is str else "RUN [RUN ...]"
    name = field.name.replace("_", "-")
    if kind is bool:
        return f"--no-{name}" if field.default else f"--{name}"
    return f"--{name} {values(kind)}"


def values(kind: Any) -> str:
    """What can be given: "INT", "{ppo,grpo}", "STR ..."."""
    if get_origin(kind) is Literal:
        return "{" + ",".join(map(str, get_args(kind))) + "}"
    if get_origin(kind) is tuple:
        return f"{values(get_args(kind)[0])} ..."
    options = [option for option in get_args(kind) if option is not NoneType] or [kind]
    return "|".join(values(option) if get_args(option) else option.__name__.upper() for option in options)


def default(field: Field) -> str:
    if field.default is MISSING:
        return "required"
    value = field.default
    return f"default: {' '.join(map(str, value)) or 'none' if isinstance(value, tuple) else value}"


# ---- Words of the command line


def with_new_names(kind: type[Any], arguments: list[str]) -> list[str]:
    """The command line with the new names of renamed options; says so for each."""
    names, words = {field.name for field in fields(kind)}, list(arguments)
    for i, word in enumerate(words):
        flag, equals, value = word.partition("=")
        old = flag.removeprefix("--").replace("-", "_")
        new = RENAMED.get(old)
        if not flag.startswith("--") or new not in names:
            continue
        if old not in names:
            words[i] = f"--{new.replace('_', '-')}{equals}{value}"
            _note(f"{flag} is now --{new.replace('_', '-')}; the old name works for one more release")
        elif old in REUSED:
            _check_meaning(old, new, value if equals else "".join(words[i + 1 : i + 2]))
    return words


def _check_meaning(old: str, new: str, value: str) -> None:
    """Says what a reused name means; InputError where its old meaning must have been meant."""
    before = next(name for name, now in RENAMED.items() if now == old)
    was, now, then = (f"--{name.replace('_', '-')}" for name in (before, old, new))
    meaning = f"{now} is now what {was} was; what it was itself is {then}"
    with contextlib.suppress(ValueError):
        if float(value) >= REUSED[old]:
            raise InputError(f"{now} {value}: {meaning}; give {then} {value}, or less than {REUSED[old]:g}")
    _note(meaning)


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def with_places(options: Any) -> Any:
    """The options with the home folder for ~ where their values are places."""
    places = {f.name: _expanded(getattr(options, f.name)) for f in fields(options) if f.name in PATHS}
    changed = {name: place for name, place in places.items() if place != getattr(options, name)}
    return replace(options, **changed) if changed else options


def _expanded(value: Any) -> Any:
    """A place, or several, each perhaps as NAME=PLACE, with the home folder for ~."""
    if isinstance(value, tuple):
        return tuple(map(_expanded, value))
    home = os.path.expanduser("~")
    return re.sub(r"^([^/~]*=)?~(?=/|$)", lambda m: (m[1] or "") + home, value) if value else value


def first_message(box: str) -> str:
    """What tyro says inside its frame, up to the first ruler, as one line."""
    lines = [line.strip("│╭╮╰╯ ") for line in box.splitlines()[1:]]
    return " ".join(itertools.takewhile(lambda line: not line.startswith("──"), lines))
