"""Train a policy: `scripts/train.py ARGS` is `vecpg train ARGS`. See `--help`."""

import sys

from vecpg.__main__ import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
