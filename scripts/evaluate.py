"""Play whole episodes: `scripts/evaluate.py ARGS` is `vecpg evaluate ARGS`. See `--help`."""

import sys

from vecpg.__main__ import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
