"""Measure this machine: `scripts/benchmark.py ARGS` is `vecpg benchmark ARGS`. See `--help`."""

import sys

from vecpg.__main__ import main

if __name__ == "__main__":
    main(["benchmark", *sys.argv[1:]])
