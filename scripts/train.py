"""Train a policy: `python scripts/train.py --num-envs 64`. See `--help` for every flag."""

from vecpg.cli import main

if __name__ == "__main__":
    main()
