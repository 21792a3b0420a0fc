"""Which haq this is."""

from importlib.metadata import PackageNotFoundError, version


def own_version() -> str:
    """As pip knows it."""
    try:
        return version("haq")
    except PackageNotFoundError:  # run from a checkout that is not installed: PYTHONPATH=src
        return "0+unknown"
