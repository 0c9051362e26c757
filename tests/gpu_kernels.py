"""Triton's kernels without a GPU: interpreted in a process of their own, or compiled for one."""

import os
import re
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction


def interpret(module, function="interpret"):
    """Call a function of a module of tests where kernels are interpreted, slowly, with NumPy.

    That has to be chosen before the kernels are read.
    """
    done = subprocess.run(
        [sys.executable, "-c", f"import {module}; {module}.{function}()"],
        cwd=Path(__file__).parent,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


class Absent:
    """In the place of the driver of a GPU that is not there."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_device(self):
        return self.capability  # so that what is compiled for another one is not taken for it

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)


@contextmanager
def compiling(monkeypatch, capability=90):
    """Launches only compile. Gives what they were compiled to, once for each launch."""
    kept = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kept.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    with monkeypatch.context() as patch:
        if hasattr(driver, "_active"):
            patch.setattr(driver, "_active", Absent(capability))
        else:
            patch.setattr(driver, "active", Absent(capability))
        patch.setattr(JITFunction, "run", compile_only)
        yield kept


def resources(kernel):
    """What a kernel takes, by the compiler's account: LOCAL and STACK hold spilled registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
