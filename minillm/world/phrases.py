"""The words of the little world: `phrases.OPENERS` is the entry OPENERS of phrases.toml, and so on."""

from typing import Any

from minillm.tools.streams import tables


def __getattr__(name: str) -> Any:
    raise AttributeError(f"phrases.toml has no {name}")


def _tuples(value: Any) -> Any:
    """Its lists are tuples here, for nobody may change them."""
    if isinstance(value, dict):
        return {key: _tuples(entry) for key, entry in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


globals().update(_tuples(tables(__file__)))
