"""A part at work: its seconds, and its file, which holds all that was found so far."""

import json
import math
import os
import re
import signal
import sys
import time
import traceback

# The exit status of a part whose device answers no more: what is left of it goes on in another.
BROKEN = 3


class Wrong(Exception):
    """What was to be measured is not right."""


class Job:
    """What a part's `measure` is given.

    miniature: there is no GPU: see that everything runs, and keep it short.
    device:    "cuda", or "cpu" in miniature.
    """

    def __init__(self, path, seconds, miniature):
        self.miniature = miniature
        self.device = "cpu" if miniature else "cuda"
        self._path = path
        self._until = time.monotonic() + seconds
        self._content = read(path)

    def left(self):
        """Seconds in which something new may begin."""
        return self._until - time.monotonic()

    def run(self, cases, limit=25):
        """Call what gives a row, or raises, while there is time.

        Args:
            cases: pairs of a name and a function without arguments, which returns a dict.
            limit: seconds that one may take, in miniature four times that. Then the process is
                ended, whatever it waits for.
        """
        if self.miniature:  # processors differ more, and may have others to serve
            limit *= 4
        content = self._content
        # A part that goes on in another process does not begin again.
        done = {one["what"] for one in content["rows"] + content["problems"]}
        cases = [(what, function) for what, function in cases if what not in done]
        for number, (what, function) in enumerate(cases):
            if self.left() <= 0:
                content["not_reached"] += [name for name, _ in cases[number:]]
                write(self._path, content)
                say(f"no time for {len(cases) - number} more")
                break
            say(what)
            content["now"] = what
            write(self._path, content)
            signal.setitimer(signal.ITIMER_REAL, limit)  # nothing handles it: it ends the process
            try:
                content["rows"].append({"what": what, **function()})
            except Exception as error:
                traceback.print_exc()
                content["problems"].append({"what": what, "problem": words(error)})
                say(f"FAILED: {what}: {words(error)}")
            signal.setitimer(signal.ITIMER_REAL, 0)
            content["now"] = None
            write(self._path, content)
            if not self._device_answers():
                sys.exit(BROKEN)

    def _device_answers(self):
        """After an illegal access nothing runs any more in a process."""
        if self.miniature:
            return True
        import torch

        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return False
        return True


def say(text):
    print(f"    {text}", file=sys.stderr, flush=True)


def words(error):
    """One short line without paths.

    Example:
        >>> words(OSError("no file /home/me/x.py: lost"))
        'OSError: no file x.py: lost'
    """
    name = "" if isinstance(error, Wrong) else f"{type(error).__name__}: "
    text = " ".join(f"{name}{error}".split())
    return re.sub(r"(?<![\w.])/(?:[^\s/:'\"]+/)+", "", text)[:300]


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def write(path, content):
    """Whole, or as it was; numbers to six digits."""
    beside = path.with_suffix(".part")
    text = json.dumps(_rounded(content), indent=1, allow_nan=False)
    beside.write_text(text + "\n", encoding="utf-8")
    os.replace(beside, path)


def _rounded(value):
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    return value
