"""How commands are typed in this shell, for hints that can be copied."""

import shlex
import shutil
import sys
from pathlib import Path


def how_to_call(command: str, module: str) -> str:
    """How to call a command of this environment from this shell, as short as it can be.

    Args:
        command: the name that installing gives it.
        module: what `python -m` runs instead, where it was not installed.
    """
    beside = Path(sys.executable).with_name(command)
    if shutil.which(command) == str(beside):
        return command
    found = beside if beside.exists() else Path(sys.executable)
    if Path.cwd() in found.parents[1:]:  # a name without a / would be looked for on the path
        found = found.relative_to(Path.cwd())
    name = shlex.quote(str(found))
    return name if beside.exists() else f"{name} -m {module}"
