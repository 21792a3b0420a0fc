"""Where the time of something goes, by functions around those of the libraries that do it."""

import functools
import importlib
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any


class Clock:
    """Seconds by step. What a step does inside another one is taken off the outer one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inside = [0.0]  # What was spent in steps inside each step that is under way.
        self._originals: list[tuple[Any, str, Callable[..., Any]]] = []

    def around(self, module: str, name: str, step: str) -> None:
        """Time every call of a function or method from now on."""
        owner: Any = importlib.import_module(module)
        *path, last = name.split(".")
        for part in path:
            owner = getattr(owner, part)
        function: Callable[..., Any] = getattr(owner, last)

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inside.append(0.0)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                taken = time.perf_counter() - start
                self.seconds[step] += taken - self._inside.pop()
                self._inside[-1] += taken

        self._originals.append((owner, last, function))
        setattr(owner, last, timed)

    def start_again(self) -> None:
        """Forget what was measured so far."""
        self.seconds.clear()
        self._inside = [0.0]

    def stop(self) -> None:
        """Put everything back as it was."""
        while self._originals:
            setattr(*self._originals.pop())

    def all(self, total: float) -> dict[str, float]:
        """Every step, and what is in none of them."""
        return {**self.seconds, "other": total - self._inside[0]}
