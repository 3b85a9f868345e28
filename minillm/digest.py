"""What names content: the same digest for the same content, another for any other."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any


def digest(*parts: Any) -> str:
    """32 hex digits that follow from the content of the parts, see `digest_of`."""
    return digest_of(parts)


def digest_of(parts: Iterable[Any]) -> str:
    """The digest of a stream of parts, each JSON or bytes (an array counts as its bytes), in their order."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        is_json = part is None or isinstance(part, str | int | float | list | tuple | dict)
        data = json.dumps(part).encode() if is_json else bytes(part)
        state.update(f"{len(data)} ".encode() + data)
    return state.hexdigest()
