"""What --help prints: a script's options, those that people change first on top, the rest in groups.

The names, kinds and defaults are the fields of the options' dataclass, the explanations the lines under them.
"""

import ast
import inspect
import shutil
import sys
import textwrap
from dataclasses import MISSING, Field, fields
from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from minillm.options import PolicyOptions

GROUPS: dict[str, str] = {
    "changed first": "run runs stage algorithm annotator data out init models depth steps iterations prompt "
    "system judge resume overwrite",
    "the model": "width heads kv_heads qk_norm tie_embeddings vocab_size objective new_blocks",
    "learning": "block_size batch_tokens batch_sets micro_tokens epochs optimizer matrix_rate embedding_rate "
    "weight_decay warmup decay clip",
    "data and validation": "text text_share text_bytes errors split val_fraction val_tokens val_sets "
    "val_prompts eval_prompts world_megabytes world_conversations cache workers",
    "sampling": "prompts responses distractors samples show pairs temperature top_k top_p max_new_tokens",
    "rankings and verdicts": "rankings annotators opinions noise name judge_model principles",
    "the run": "val_every save_every seed device precision tracker",
}
"""Titles and the options under them, in the order in which they are shown."""


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
        for field, text in pairwise(statements):
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
