"""``python -m haq.cli`` where ``haq`` is not on the path."""

from haq.cli import main

if __name__ == "__main__":
    main()
