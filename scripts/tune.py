"""Search settings: `scripts/tune.py ARGS` is `vecpg tune ARGS`. See `--help`."""

import sys

from vecpg.__main__ import main

if __name__ == "__main__":
    main(["tune", *sys.argv[1:]])
