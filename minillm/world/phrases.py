"""The words of the little world: `phrases.OPENERS` is the entry OPENERS of phrases.toml, and so on."""

from functools import cache
from typing import Any

from minillm.tools.streams import tables


def __getattr__(name: str) -> Any:
    if name not in _tables():
        raise AttributeError(f"phrases.toml has no {name}")
    return _tables()[name]


@cache
def _tables() -> dict[str, Any]:
    """All entries, in the order of the file; its lists are tuples here, for nobody may change them."""
    return _tuples(tables(__file__))


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(entry) for key, entry in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
