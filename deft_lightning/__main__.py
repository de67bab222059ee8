"""``python -m deft_lightning VERB``."""

from deft_lightning.cli import run


def main() -> None:
    """Run the command line; a user's mistake ends with one line and status 2."""
    run()


if __name__ == "__main__":
    main()
