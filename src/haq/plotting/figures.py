"""What all pictures share: their sizes, and an empty figure."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Inches, and points: 72 to the inch.
WIDTH = 10.0
TITLE_POINTS = 10
LABEL_POINTS = 8
TICK_POINTS = 7


def check_kind(name: str, value: object, kind: type[object], source: str) -> None:
    """Raise a TypeError where a picture is asked for of something else; ``source`` gives it."""
    if not isinstance(value, kind):
        raise TypeError(
            f"`{name}` must be a {kind.__name__}, got {type(value).__name__}. `{source}` gives it."
        )


def empty_figure(width: float, height: float) -> "Figure":
    """An empty figure of so many inches, of which pyplot knows nothing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "`haq.plotting` needs matplotlib, which is not installed. Run `pip install matplotlib`."
        ) from error
    from haq.plotting.shown import ShownFigure

    return ShownFigure(figsize=(width, height), layout="constrained")
