"""A figure that a notebook shows. This file alone imports matplotlib when it is imported."""

from io import BytesIO

from matplotlib.figure import Figure


class ShownFigure(Figure):
    """A figure that is its own picture in a notebook.

    matplotlib's figures are shown only after ``%matplotlib inline`` or an import of pyplot.
    """

    def _repr_png_(self) -> bytes:
        picture = BytesIO()
        self.savefig(picture, format="png", dpi=100)
        return picture.getvalue()
