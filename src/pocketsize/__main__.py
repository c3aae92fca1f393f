"""`python -m pocketsize`: the command, where no script is on the path."""

from pocketsize.cli.main import entry

if __name__ == "__main__":
    entry()
