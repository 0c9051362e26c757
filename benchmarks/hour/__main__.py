"""One part, in a process of its own: `python -m hour PART FILE SECONDS [miniature]`."""

import importlib
import sys
from pathlib import Path

from hour.job import Job
from hour.parts import PARTS

if __name__ == "__main__":
    letter, path, seconds, *miniature = sys.argv[1:]
    # Its seconds begin before torch is imported.
    job = Job(Path(path), float(seconds), bool(miniature))
    importlib.import_module(f"hour.{PARTS[letter].module}").measure(job)
