"""Play whole episodes with a trained policy: `python scripts/evaluate.py runs/RUN --episodes 100`.

Prints one JSON line: return_mean, return_std, length_mean, episodes, and video where one was asked
for. See `--help`.
"""

from vecpg.cli import evaluate_main

if __name__ == "__main__":
    evaluate_main()
