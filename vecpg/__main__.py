"""`python -m vecpg` is the command `vecpg`."""

from vecpg.cli import main

if __name__ == "__main__":
    main()
