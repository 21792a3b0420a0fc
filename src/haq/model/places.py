"""Where modules hold their parts, looked up for each token."""

from collections.abc import Sequence
from operator import is_
from typing import Any

_GET: Any = dict.get


class Places:
    """Entries of dictionaries, all of them looked up at once: a loop in Python takes longer.

    Args:
        places: dictionaries and names. An entry may be missing.

    Attributes:
        values: what is there now, None where nothing is.
        kinds: their classes.

    Examples:
        >>> held = {"a": "left"}
        >>> places = Places([(held, "a"), (held, "b")])
        >>> places.values
        ['left', None]
        >>> held["b"] = "right"
        >>> places.are_as_before()
        False
    """

    def __init__(self, places: Sequence[tuple[dict[str, Any], str]]) -> None:
        self._held, self._names = ([place[part] for place in places] for part in (0, 1))
        self.values = self.now()
        self.kinds = list(map(type, self.values))

    def now(self) -> list[Any]:
        return list(map(_GET, self._held, self._names))

    def are_as_before(self) -> bool:
        """Whether nothing was replaced by another thing, or by one of another class."""
        same = all(map(is_, self.now(), self.values))
        return same and list(map(type, self.values)) == self.kinds
