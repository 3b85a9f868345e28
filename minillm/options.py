"""From the command line to one frozen dataclass of options.

tyro reads the dataclass: its fields are the flags, the line under each field is its help. Here stands
only what tyro does not do: errors in one line, and `--resume`, which reads the stored options of the
run as a command line before the new one; an option given again is compared with the run's.
"""

import contextlib
import io
import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import tyro

from minillm.errors import InputError
from minillm.files import read_json

FREE_TO_CHANGE = frozenset({"resume", "overwrite", "out", "device", "tracker", "cache", "workers"})
"""Options that may differ between a run and its continuation: none of them changes a result."""


def parse_options(kind: type[Any], arguments: list[str]) -> Any:
    """The options of a script; InputError for a flag or a value that does not fit.

    With `--resume`, where a script has it, every option not given is the stored run's; one given with
    another value is refused by name.
    """
    given = _parse(kind, arguments)
    if not getattr(given, "resume", False):
        return given
    path = Path(given.out) / "run.json"
    earlier = _stored_arguments(kind, path)
    try:
        stored = _parse(kind, earlier)
    except InputError as error:
        raise InputError(f"{path}: holds an option that does not fit ({error})") from None
    resumed = _parse(kind, [*earlier, *arguments])  # of a flag given twice, the second counts
    changed = [
        f"--{name.replace('_', '-')} {value} (was {getattr(stored, name)})"
        for name, value in asdict(resumed).items()
        if name not in FREE_TO_CHANGE and value != getattr(stored, name)
    ]
    if changed:
        raise InputError(f"{given.out}: cannot resume with other options: {', '.join(changed)}")
    return resumed


def options_json(options: Any) -> dict[str, Any]:
    """The options as run.json holds them."""
    return json.loads(json.dumps(asdict(options), default=str))


def _parse(kind: type[Any], arguments: list[str]) -> Any:
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(kind, args=arguments, config=(tyro.conf.FlagCreatePairsOff,))
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise InputError(f"{_first_message(printed.getvalue())}; see --help") from None


def _first_message(box: str) -> str:
    """What tyro says inside its frame, up to the first ruler, as one line."""
    lines = [line.strip("│╭╮╰╯ ") for line in box.splitlines()[1:]]
    body = []
    for line in lines:
        if line.startswith("──"):
            break
        body.append(line)
    return " ".join(body)


def _stored_arguments(kind: type[Any], path: Path) -> list[str]:
    """The command line that gives the options of a run, without what is said anew at each sitting."""
    if not path.exists():
        raise InputError(f"{path.parent}: holds no run to resume; leave --resume out to start one")
    stored = read_json(path).get("options")
    if not isinstance(stored, dict) or not stored.keys() <= {field.name for field in fields(kind)}:
        raise InputError(f"{path}: does not hold the options of this script; was it another stage's run?")
    arguments = []
    for field in fields(kind):
        value, flag = stored.get(field.name, field.default), field.name.replace("_", "-")
        if value == field.default or field.name in ("resume", "overwrite"):
            continue
        if field.type is bool:
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list):
            arguments += [f"--{flag}", *map(str, value)]
        else:
            arguments.append(f"--{flag}={value}")
    return arguments
