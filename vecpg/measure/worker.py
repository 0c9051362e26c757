"""One commit's process in a comparison: it runs one round when it is told to.

Run as a script, with PYTHONPATH set to the commit. Lines of JSON come in and go out:

    {"open": [thing, device, vectorization, num_envs]}   ->  {"ready": true} or {"problem": words}
    {"calibrate": seconds}                               ->  {"calls": number}
    {"round": calls}                                     ->  {"seconds": of one call}
"""

import importlib.util
import json
import os
import signal
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from types import ModuleType
from typing import Any


def work() -> None:
    """Answer lines from stdin until there are no more."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever an environment prints is no answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal; who asked ends this

    def answer(content: dict[str, Any]) -> None:
        print(json.dumps(content), file=answers, flush=True)

    try:
        cells = _load_cells()
    except Exception as error:
        answer({"problem": f"{type(error).__name__}: {error}"})
        return
    import vecpg

    answer({"vecpg": str(Path(vecpg.__file__).parent)})
    with ExitStack() as opened:
        for line in sys.stdin:
            asked = json.loads(line)
            if "open" in asked:
                opened.close()
                case = cells.Case(*asked["open"])
                try:
                    cell = opened.enter_context(cells.prepared(case))
                # The commit may be of a time when this did not exist, or was another thing.
                except Exception as error:
                    answer({"problem": f"{type(error).__name__}: {error}"})
                    continue
                answer({"ready": True})
            elif "calibrate" in asked:
                calls = cells.calls_for(asked["calibrate"], cell.run, case.device)
                answer({"calls": calls})
            else:
                seconds = cells.seconds_of(cell.run, asked["round"], case.device)
                answer({"seconds": seconds})


def _load_cells() -> ModuleType:
    """The file beside this one, whatever commit `vecpg` is of."""
    path = Path(__file__).with_name("cells.py")
    spec = importlib.util.spec_from_file_location("benchmark_cells", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    with suppress(BrokenPipeError):  # who asked has gone
        work()
