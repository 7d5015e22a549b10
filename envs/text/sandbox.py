"""Run programs nobody has read, and get what they compute.

A best-effort sandbox, not a virtual machine. It covers what a language model in training may write:

* Each program runs in a process of its own, forked from a small interpreter (``python -I -S``, empty environment, a
  temporary working directory that is removed), in its own session and, where the kernel allows it, in namespaces
  without network and without other processes. Run by root it becomes ``nobody``.
* seccomp is the wall. It kills the process at any system call beyond those of computing: no file is opened, read or
  written, no process started or signalled, no connection made, no handler or limit changed. That holds for native code
  too. An audit hook ends it before that at the Python calls that lead there, and at the import of a module that is not
  loaded (``bisect collections functools heapq itertools json math operator string`` and what these import are). The
  hook keeps honest mistakes short; a program that gets at native code gets around it, and meets the wall.
* Limits on CPU time, wall-clock time, memory and output, each program's own. As many programs compute at once as there
  are processors; those that wait for themselves run beside them.
* The right outputs are never in its process: it receives inputs and gives outputs, which are compared here. A printed
  verdict goes to ``/dev/null``. It reads no other program.

It does not cover errors in the kernel or its seccomp, side channels (timing, caches), reading the interpreter's own
memory (nothing secret is there), or a program that knows its inputs and lists the outputs: use tests that tell.
Linux on x86_64 or aarch64 alone; where the filter cannot be had, the constructor fails rather than run without it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from envs.text.generated import at_least

__all__ = ["MISSING", "Sandbox"]

RUNNER = Path(__file__).with_name("sandbox_runner.py")
START_SECONDS = 60.0
"""What a busy machine may take to start the interpreter, beside the time of the programs."""
LONGEST_SECONDS = 86_400
MISSING: Any = type("Missing", (), {"__repr__": lambda self: "MISSING"})()
"""Stands for the output of a program that gave none: it raised, was stopped or did not come that far."""


class Sandbox:
    """Runs batches of programs.

    Args:
        cpu_seconds: of computing per program, all its inputs together.
        wall_seconds: per program; only a program that waits for itself comes to it.
        memory: bytes of address space per program.
        output: bytes of output per program; with more it has given none.

    Raises:
        ValueError: a limit out of range.
        RuntimeError: this machine cannot enforce them.
    """

    def __init__(
        self, cpu_seconds: float = 0.5, wall_seconds: float = 5.0, memory: int = 2**28, output: int = 2**16
    ) -> None:
        for name, seconds in (("cpu_seconds", cpu_seconds), ("wall_seconds", wall_seconds)):
            number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
            if not number or not 0.01 <= seconds <= LONGEST_SECONDS:
                raise ValueError(f"{name}: expected a number from 0.01 to {LONGEST_SECONDS}, got {seconds!r}")
        if wall_seconds < cpu_seconds:
            raise ValueError(f"wall_seconds: expected at least cpu_seconds = {cpu_seconds}, got {wall_seconds}")
        at_least("memory", memory, 2**26, 2**40)
        at_least("output", output, 1, 2**30)
        self.limits = {"cpu_seconds": cpu_seconds, "wall_seconds": wall_seconds, "memory": memory, "output": output}
        try:
            fine, refused = self.run([("x + 1", [1]), ("__import__('os').getppid()", [1])])
        except (OSError, RuntimeError) as error:
            raise RuntimeError(f"the sandbox needs Linux with seccomp on x86_64 or aarch64; here: {error}") from error
        if fine != [2] or refused != [MISSING]:
            raise RuntimeError(
                f"the sandbox needs Linux with seccomp on x86_64 or aarch64; here a harmless program gave {fine} "
                f"(expected [2]) and a forbidden one {refused} (expected [MISSING])"
            )

    def run(self, programs: Sequence[tuple[str, Sequence[Any]]]) -> list[list[Any]]:
        """The outputs of each program for each of its inputs, :data:`MISSING` where there is none.

        Args:
            programs: source and inputs. The source is an expression in ``x`` or defines a function ``f`` of one
                argument. Inputs and outputs are what JSON can hold.

        Raises:
            RuntimeError: the sandbox itself failed, not a program.
        """
        frames = [json.dumps([len(programs), self.limits])]
        frames += [json.dumps([source, list(inputs)]) for source, inputs in programs]
        data = b"".join(struct.pack("I", len(frame)) + frame for frame in (f.encode() for f in frames))
        received = self._start(data, START_SECONDS + len(programs) * (self.limits["wall_seconds"] + 1))
        outputs = []
        for _, inputs in programs:
            (length,) = struct.unpack("I", received[:4])
            outputs.append(_parse(received[4 : 4 + length], len(inputs)))
            received = received[4 + length :]
        return outputs

    def _start(self, data: bytes, seconds: float) -> bytes:
        with tempfile.TemporaryDirectory(prefix="ccrl-sandbox-") as folder:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(RUNNER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=folder,
                env={},
                start_new_session=True,
            )
            try:
                received, errors = process.communicate(data, timeout=seconds)
            except subprocess.TimeoutExpired as error:
                raise RuntimeError(f"the sandbox did not end within {seconds} s") from error
            finally:
                # The programs' own sessions go with their parent: PDEATHSIG, and the namespace where there is one.
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if process.returncode != 0:
            raise RuntimeError(f"the sandbox ended with code {process.returncode}: {errors.decode()[-2000:]}")
        return received


def _parse(data: bytes, count: int) -> list[Any]:
    """``count`` outputs of a program, which may have written anything at all."""
    lines = data.split(b"\n")[:-1]
    outputs = [_value(line) for line in lines] if len(lines) <= count else []
    return outputs + [MISSING] * (count - len(outputs))


def _value(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return MISSING
