"""Measure this machine: `python scripts/benchmark.py --quick`. See `--help`.

Prints a table of speeds, each beside its limit; writes a JSON file and a picture.
"""

from vecpg.measure.cli import benchmark_main

if __name__ == "__main__":
    benchmark_main()
