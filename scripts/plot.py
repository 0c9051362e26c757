"""Draw learning curves: `scripts/plot.py ARGS` is `vecpg plot ARGS`. See `--help`."""

import sys

from vecpg.__main__ import main

if __name__ == "__main__":
    main(["plot", *sys.argv[1:]])
