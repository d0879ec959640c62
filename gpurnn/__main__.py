"""``python -m gpurnn``: the command line without the console script."""

from gpurnn.cli import main

if __name__ == "__main__":
    main()
