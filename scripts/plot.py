"""Draw curves of runs: `python scripts/plot.py runs --out curves.png`. See `--help`.

Prints one JSON line: out, runs, groups.
"""

from vecpg.cli import plot_main

if __name__ == "__main__":
    plot_main()
