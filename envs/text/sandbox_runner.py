"""The sandbox's own process, started by :mod:`envs.text.sandbox` as ``python -I -S``: one fork per program.

It imports nothing but the standard library and never sees what the right outputs are. Frames (4 bytes of length, then
that many bytes) come in on descriptor 0, first the number of programs and the limits, then one program each; one frame
of output per program goes out on descriptor 1.
"""

from __future__ import annotations

import bisect  # noqa: F401  (a program may import what is loaded here, and nothing else)
import collections  # noqa: F401
import ctypes
import functools  # noqa: F401
import heapq  # noqa: F401
import itertools  # noqa: F401
import json
import math
import operator  # noqa: F401
import os
import platform
import resource
import select
import signal
import string  # noqa: F401
import struct
import sys
import time
from collections.abc import Callable
from typing import Any

NEW_IPC, NEW_USER, NEW_PID, NEW_NET = 0x08000000, 0x10000000, 0x20000000, 0x40000000
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
KILL_PROCESS, ALLOW = 0x80000000, 0x7FFF0000
NOBODY = 65534
# brk, clock_gettime, close, exit, exit_group, futex, getrandom, gettimeofday, madvise, mmap, mprotect, mremap, munmap,
# read, rt_sigreturn, sched_yield, write. Nothing that opens, forks, signals, waits, connects or changes a handler.
SYSCALLS = {
    "x86_64": (0xC000003E, (12, 228, 3, 60, 231, 202, 318, 96, 28, 9, 10, 25, 11, 0, 15, 24, 1)),
    "aarch64": (0xC00000B7, (214, 113, 57, 93, 94, 98, 278, 169, 233, 222, 226, 216, 215, 63, 139, 124, 64)),
}
"""Per machine: its code in seccomp's data and the system calls that computing needs."""
EVENTS = (
    "builtins.id", "code.__new__", "compile", "exec", "object.__delattr__", "object.__getattr__", "object.__setattr__",
)  # fmt: skip
"""Audit events that computing raises. An ``import`` event means a module that is not loaded yet."""
MOST = 16
"""Programs at once, whether they compute or wait."""
TICK = 0.02
"""Seconds between two looks at who computes."""
IDLE = 0.05
"""Share of a processor below which a program is taken to wait; more than its part on a machine full of others."""
READY = b"r"
"""What a process says once it has its program."""
OUTPUT = 3
"""Descriptor of a program's output."""
libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    count, limits = json.loads(read_frame(0))
    call(libc.prctl, PR_SET_PDEATHSIG, signal.SIGKILL)
    if isolate():
        # The first process of a process namespace: when it ends, everything in the namespace does.
        child = os.fork()
        if child:
            os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0)
        call(libc.prctl, PR_SET_PDEATHSIG, signal.SIGKILL)
    for output in run_all(count, limits):
        write_frame(1, output)


def isolate() -> bool:
    """Namespaces of our own for network, processes and shared memory, where the kernel allows it."""
    flags = NEW_IPC | NEW_PID | NEW_NET | (0 if os.geteuid() == 0 else NEW_USER)
    return bool(libc.unshare(flags) == 0)


class Program:
    """A program that runs: its process, where its output comes from, and when its time is over."""

    def __init__(self, number: int, limits: dict[str, Any]) -> None:
        self.number, self.output = number, b""
        self.source, sink = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                program = json.loads(read_frame(0))
                os.write(sink, READY)
                os.dup2(sink, OUTPUT)
                lock_in(limits)
                compute(*program)
            finally:
                os._exit(1)
        os.close(sink)
        if os.read(self.source, 1) != READY:  # until then the frame of the next one is not to be read
            raise EOFError(f"program {number} could not be read")
        self.end = time.monotonic() + limits["wall_seconds"]
        self.computes, self._looked, self._used = True, time.monotonic(), self._cpu()

    def _cpu(self) -> float:
        """Seconds of computing so far: the clock of another process, as ``clock_getcpuclockid`` numbers it."""
        try:
            return time.clock_gettime((~self.pid << 3) | 2)
        except OSError:
            return math.inf  # it has ended, which its output will say

    def look(self, now: float) -> None:
        """Whether it has computed of late. One that waits for itself takes nobody's place."""
        if now - self._looked >= TICK:
            used = self._cpu()
            self.computes = used - self._used > IDLE * (now - self._looked)
            self._looked, self._used = now, used

    def stop(self) -> None:
        os.close(self.source)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def run_all(count: int, limits: dict[str, Any]) -> list[bytes]:
    """The outputs of the next programs, as far as they came within the limits. As many compute at once as there are
    processors; those that wait run beside them."""
    outputs, running, started = [b""] * count, dict[int, Program](), 0
    cores = len(os.sched_getaffinity(0))
    poll = select.poll()
    while started < count or running:
        while started < count and len(running) < MOST and sum(p.computes for p in running.values()) < cores:
            program = Program(started, limits)
            running[program.source], started = program, started + 1
            poll.register(program.source, select.POLLIN)
        over = set[int]()
        for source, _ in poll.poll(TICK * 1000):
            received = os.read(source, 65536)
            running[source].output += received
            if not received or len(running[source].output) > limits["output"]:
                over.add(source)
        now = time.monotonic()
        for source, program in running.items():
            program.look(now)
            if now > program.end:
                over.add(source)
        for source in over:
            program = running.pop(source)
            poll.unregister(source)
            program.stop()
            if len(program.output) <= limits["output"]:
                outputs[program.number] = program.output
        if not running and os.getpid() == 1:
            # No program can fork; should one have found a way, nothing of it outlives this line, whatever its session.
            while kill_all():
                os.waitpid(-1, 0)
    return outputs


def kill_all() -> bool:
    """Kill every process of the namespace but this one; whether there was one."""
    try:
        os.kill(-1, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def lock_in(limits: dict[str, Any]) -> None:
    """Give up everything that computing does not need. Descriptor 3 stays, for the output."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    os.closerange(OUTPUT + 1, 256)
    os.setsid()
    cpu = math.ceil(limits["cpu_seconds"]) + 1
    for name, value in (("AS", limits["memory"]), ("CPU", cpu), ("FSIZE", 0), ("CORE", 0), ("NOFILE", OUTPUT + 1)):
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    # It binds no root, hence after the change of user, which also forgets the signal at the parent's death.
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    call(libc.prctl, PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, limits["cpu_seconds"])
    lock_syscalls()
    sys.addaudithook(hook(frozenset(EVENTS), os._exit))
    for name in [name for name in sys.modules if "ctypes" in name or name == "__main__"]:
        del sys.modules[name]
    for name in ("ctypes", "libc", "hook"):
        del globals()[name]


def lock_syscalls() -> None:
    """Kill this process at any system call that computing does not need: seccomp, for good.

    Raises:
        OSError: the kernel or the machine has no such filter.
    """
    if platform.machine() not in SYSCALLS:
        raise OSError(f"expected a machine out of {list(SYSCALLS)}, got {platform.machine()!r}")
    architecture, allowed = SYSCALLS[platform.machine()]
    load, equal, give = 0x20, 0x15, 0x06
    # Each instruction: code, jump if true, jump if false, operand. Numbers of another architecture mean other calls.
    program = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, KILL_PROCESS), (load, 0, 0, 0)]
    program += [(equal, len(allowed) - i, 0, number) for i, number in enumerate(allowed)]
    program += [(give, 0, 0, KILL_PROCESS), (give, 0, 0, ALLOW)]
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code)
    header = ctypes.create_string_buffer(struct.pack("HP", len(program), ctypes.addressof(buffer)))
    call(libc.prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    call(libc.prctl, PR_SET_SECCOMP, 2, header, 0, 0)


def hook(allowed: frozenset[str], leave: Callable[[int], Any]) -> Callable[[str, Any], None]:
    """An audit hook that ends the process at once, since an exception could be caught. Nothing that a program can name
    refers to it or to what it reads. It is no wall all the same: native code gets around it, and what it does then is
    for the system-call filter to stop."""

    def refuse(event: str, arguments: Any) -> None:
        if event not in allowed:
            leave(1)

    return refuse


def compute(source: str, inputs: list[Any]) -> None:
    """One line of JSON per input: what the program makes of it, an empty one if it raises or that is no JSON."""
    names: dict[str, Any] = {"__name__": "program"}
    try:
        code = compile(f"lambda x: ({source}\n)", "program", "eval")
        function: Callable[[Any], Any] = eval(code, names)
    except SyntaxError:
        exec(compile(source, "program", "exec"), names)
        function = names["f"]
    for value in inputs:
        try:
            line = json.dumps(function(value))
        except BaseException:
            line = ""
        os.write(OUTPUT, line.encode() + b"\n")


def read_frame(descriptor: int) -> bytes:
    """Unbuffered, so that no process holds the program of another."""
    (length,) = struct.unpack("I", read_exactly(descriptor, 4))
    return read_exactly(descriptor, length)


def read_exactly(descriptor: int, length: int) -> bytes:
    parts = b""
    while len(parts) < length:
        received = os.read(descriptor, length - len(parts))
        if not received:
            raise EOFError("the frames ended early")
        parts += received
    return parts


def write_frame(descriptor: int, data: bytes) -> None:
    data = struct.pack("I", len(data)) + data
    while data:
        data = data[os.write(descriptor, data) :]


def call(function: Callable[..., int], *arguments: Any) -> None:
    """A function of the C library.

    Raises:
        OSError: it failed.
    """
    if function(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


if __name__ == "__main__":
    main()
