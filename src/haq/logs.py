"""Messages of haq: under its own name, and as loud as those of `transformers`.

What a user sees: warnings, as lines that begin with ``[haq]`` on standard error, or wherever the
program's own logging goes if it has any (`logging.basicConfig` and the like). The level is that of
`transformers`: ``transformers.logging.set_verbosity_error()`` silences them and
``set_verbosity_info()`` shows more, as TRANSFORMERS_VERBOSITY does in the environment. If
``logging.getLogger("haq")`` is given a level of its own, that one counts.

Bars are those of `transformers`, too: ``transformers.logging.disable_progress_bar()`` and
HF_HUB_DISABLE_PROGRESS_BARS=1 switch them off, and so does ``progress=False`` where it can be
passed. Where standard error is no terminal there are none.
"""

import logging
import sys

import transformers.utils.logging

_NAME = "haq"


class _Handler(logging.Handler):
    """Hands on what it gets to the handlers of the program; without any, to standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        """As `logging` calls it."""
        handlers, ours = logging.getLogger().handlers, logging.getLogger(_NAME).handlers
        for handler in handlers:
            # Pytest puts its own to every logger that does not propagate.
            if handler not in ours and record.levelno >= handler.level:
                handler.handle(record)
        if not handlers and sys.stderr is not None:  # It is where there is no console.
            sys.stderr.write(f"{self.format(record)}\n")


def get_logger(name: str) -> logging.Logger:
    """The logger of a module of haq, which obeys the verbosity of `transformers`.

    Args:
        name: the module's, ``__name__``.

    Examples:
        >>> transformers.utils.logging.set_verbosity_error()
        >>> get_logger("haq.example").isEnabledFor(logging.WARNING)
        False
        >>> transformers.utils.logging.set_verbosity_warning()
        >>> get_logger("haq.example").isEnabledFor(logging.WARNING)
        True
    """
    ours = logging.getLogger(_NAME)
    if not any(isinstance(handler, _Handler) for handler in ours.handlers):
        transformers.utils.logging.get_verbosity()  # Whatever is the first to ask sets it up.
        # Its level is what is asked for along this line; a level of haq's own comes first.
        ours.parent = logging.getLogger("transformers")
        ours.propagate = False  # Handlers there would say that it was `transformers`.
        handler = _Handler()
        handler.setFormatter(logging.Formatter(f"[{_NAME}] %(message)s"))
        ours.addHandler(handler)
    return logging.getLogger(name)
