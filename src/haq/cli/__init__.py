"""The command line: ``haq quantize | inspect | evaluate | generate | profile | backends``.

Results go to standard output, everything else to standard error. Exit codes: 0 done, 1 it failed
and the message says why, 2 the command was not understood, 130 interrupted.
"""

from haq.cli.commands import app


def main() -> None:
    """Run the command line: the ``haq`` that pip installs."""
    app()
