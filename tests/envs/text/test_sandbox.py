"""Programs that attack: reward 0, nothing left behind, and the next program is still judged right."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ccrl.llm.task import Prompts, pad_right
from envs.text import make_task
from envs.text.code import INPUTS, Code
from envs.text.sandbox import MISSING, RUNNER, Sandbox

SWALLOWED = {
    "fork": "import os; os.fork()",
    "fork bomb": "import os\n  while True: os.fork()",
    "new session": "import os; os.setsid()",
    "start a program": "import subprocess; subprocess.Popen(['sleep', '60'])",
    "posix_spawn": "import os; os.posix_spawn('/bin/sleep', ['sleep', '60'], {})",
    "exec": "import os; os.execv('/bin/true', ['true'])",
    "write a file": "open('FOLDER/left', 'w').write('x')",
    "write a file by number": "import os; os.open('FOLDER/left', os.O_CREAT | os.O_WRONLY)",
    "make a folder": "import os; os.mkdir('FOLDER/left')",
    "remove a file": "import os; os.remove('FOLDER/kept')",
    "list a folder": "import os; os.listdir('/')",
    "read a file": "open('/etc/passwd').read()",
    "read the parent's environment": "import os; open(f'/proc/{os.getppid()}/environ').read()",
    "network": "import socket; socket.create_connection(('127.0.0.1', 9), 1)",
    "network without the module": "import _socket; _socket.socket()",
    "ctypes": "import ctypes",
    "_ctypes": "import _ctypes",
    "a module that is not loaded": "import decimal",
    "kill the parent": "import os; os.kill(os.getppid(), 9)",
    "kill everything": "import os; os.kill(-1, 9)",
    "ignore the clock": "import signal; signal.signal(signal.SIGPROF, signal.SIG_IGN)",
    "stop the clock": "import signal; signal.setitimer(signal.ITIMER_PROF, 0)",
    "raise a limit": "import resource; resource.setrlimit(resource.RLIMIT_NPROC, (9, 9))",
    "become root": "import os; os.setuid(0)",
    "the main module": "import __main__; __main__.EVENTS",
    "an emptied hook": "1 / 0\n except ZeroDivisionError as e:\n  f = e.__traceback__.tb_frame.f_back\n"
    "  f.f_globals['EVENTS'] = f.f_globals['refuse'] = ['os.fork']; import os; os.fork()",
    "ctypes of the main module": "1 / 0\n except ZeroDivisionError as e:\n"
    "  e.__traceback__.tb_frame.f_back.f_globals['ctypes'].CDLL(None).fork(); import os; os.fork()",
    "native code": "n = next(c for c in object.__subclasses__() if c.__name__ == '_CData')\n"
    "  p = next(c for c in n.__subclasses__() if c.__name__ == 'CFuncPtr')\n"
    "  type('P', (p,), {'_flags_': 1, '_restype_': None})(8)()",
    "frames": "import sys; sys._getframe(1).f_globals",
    "objects": "import gc; gc.get_objects()",
    "a thread": "import _thread; _thread.start_new_thread(print, ())",
    "sleep": "import time; time.sleep(60)",
    "a forged verdict": "import os; os.write(3, b'1.0\\n' * 6)",
    "a forged frame": "import os; os.write(3, b'\\x04\\0\\0\\0true')",
}
"""Attacks in a program that would go on and give the right answer, whatever comes of them."""
PLAIN = {
    "endless loop": "def f(x):\n while True: pass",
    "endless loop outside": "while True: pass",
    "wait for itself": "import _thread\nlock = _thread.allocate_lock()\nlock.acquire()\nlock.acquire()",
    "memory": "def f(x):\n hog = []\n while True: hog.append(bytearray(10**7))",
    "memory at once": "def f(x):\n return len(bytearray(10**12))",
    "recursion": "def f(x):\n return f(x)",
    "recursion without a limit": "import sys\nsys.setrecursionlimit(10**9)\ndef f(x):\n return f([x])",
    "nested source": "(" * 5000 + "x" + ")" * 5000,
    "much output": "def f(x):\n while True: print('x' * 10**6)",
    "a long answer": "def f(x):\n return 'x' * 10**6",
    "a deep answer": "import os\nos.write(3, b'[' * 10**4 + b'\\n')",
    "a long number": "import os\nos.write(3, b'1' * 10**4 + b'\\n')",
    "no text": "import os\nos.write(3, b'\\xff\\xfe\\n')",
    "too many lines": "import os\ndef f(x):\n os.write(3, b'%d\\n' % x)\n return x",
    "leave": "import os\nos._exit(0)",
    "exit": "raise SystemExit(0)",
    "print a verdict": "print('{\"accuracy\": 1.0}')",
    "true and 1": "def f(x):\n return x == 1 or float(x)",
    "no syntax": "def f(x) return x",
    "no function": "g = 1",
    "no text at all": "",
    "escape": "x\n) + (1",
}


def attacks(folder: Path) -> dict[str, str]:
    swallowed = {
        name: f"def f(x):\n try:\n  {attack.replace('FOLDER', str(folder))}\n except BaseException: pass\n return x"
        for name, attack in SWALLOWED.items()
    }
    return swallowed | PLAIN


def processes(folder: Path) -> set[str]:
    """Those that work in ``folder`` (no program can leave it), in whatever session, and children of this process, even
    dead ones."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
                if parent == str(os.getpid()) or os.readlink(entry / "cwd").startswith(str(folder)):
                    found.add(entry.name)
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
    return found


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Where temporary files go, writable for everybody; in the end there is what was there and no process."""
    tmp_path.chmod(0o777)
    (tmp_path / "kept").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = processes(tmp_path)
    yield tmp_path
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert processes(tmp_path) <= before


def test_processes_would_be_seen(folder: Path) -> None:
    """What the checks of the other tests rest on: a process of its own session, not our child, is found."""
    away = f"os.fork() and os._exit(0); os.setsid(); os.chdir({str(folder)!r})"
    code = f"import os, time; {away}; print(1, flush=True); time.sleep(60)"
    before = processes(folder)  # of other tests, perhaps dead and never waited for
    with subprocess.Popen([sys.executable, "-I", "-S", "-c", code], stdout=subprocess.PIPE) as started:
        assert started.stdout is not None
        assert started.stdout.readline() == b"1\n"
        found = processes(folder) - before - {str(started.pid)}
        assert found
        for pid in found:
            os.kill(int(pid), 9)
        while found & processes(folder):
            time.sleep(0.01)


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return Sandbox(cpu_seconds=0.2, wall_seconds=2.0)


@pytest.mark.parametrize("name", [*SWALLOWED, *PLAIN])
def test_an_attack_gets_nothing_and_the_next_program_its_due(sandbox: Sandbox, folder: Path, name: str) -> None:
    attack, fair = sandbox.run([(attacks(folder)[name], INPUTS), ("x * 2", [1, 2])])
    assert fair == [2, 4]
    assert [(type(output), output) for output in attack] != [(int, x) for x in INPUTS]


def test_rewards_of_attacks(folder: Path) -> None:
    """All of them in one batch, between two right answers to f(x) = x."""
    task = make_task("code", cpu_seconds=0.2, wall_seconds=2.0, max_new_tokens=11_000)
    programs = ["x", *attacks(folder).values(), "x*1"]
    n = len(programs)
    rows = [[*task.vocab.encode(program), task.vocab.eos] for program in programs]
    prompts = Prompts(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1), torch.zeros(1), (INPUTS,))
    length = torch.tensor([len(row) for row in rows])
    score = task.score(prompts, torch.zeros(n, dtype=torch.int64), pad_right(rows, task.vocab.pad).t(), length)
    assert score.components[:, 0].tolist() == [1.0] + [0.0] * (n - 2) + [1.0]
    assert score.answer[0] == score.answer[-1] >= 0


def test_system_calls_alone_stop_what_the_audit_hook_would() -> None:
    """Without the hook, as for native code: killed by SIGSYS (31)."""
    calls = [
        "os.fork()",
        "os.open('/etc/passwd', 0)",
        "os.setsid()",
        "os.kill(1, 0)",
        "socket.socket()",
        "os.getppid()",
    ]
    path = f"import os, socket, sys; sys.path.insert(0, {str(RUNNER.parent)!r})"
    for attack in calls:
        code = f"{path}; from sandbox_runner import lock_syscalls; lock_syscalls(); {attack}"
        done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, timeout=60)
        assert done.returncode == -31, (attack, done)


def test_programs_that_wait_run_side_by_side(folder: Path) -> None:
    """All of them have begun before the first one's time is over."""
    waits = "import time, _thread\ndef f(x):\n if x == 0: return time.monotonic()\n lock = _thread.allocate_lock()\n"
    waits += " lock.acquire()\n lock.acquire()"
    seconds = 3.0
    found = Sandbox(cpu_seconds=0.2, wall_seconds=seconds).run([(waits, [0, 1])] * 8 + [("x", [5])])
    assert found[-1] == [5]
    assert all(last is MISSING for _, last in found[:-1])
    begun = [first for first, _ in found[:-1]]
    assert max(begun) - min(begun) < seconds


def test_many_programs_come_back_in_order(sandbox: Sandbox, folder: Path) -> None:
    """More than run at once, some of which end before others that began earlier."""
    slow = "def f(x):\n return sum(range(100_000)) * 0 + x"
    programs = [(slow if i % 3 else "x", [i]) for i in range(40)]
    assert sandbox.run(programs) == [[i] for i in range(40)]


def test_the_runner_knows_nothing_of_the_environment(
    sandbox: Sandbox, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_OF_THE_PARENT", "1")
    (names,) = sandbox.run([("sorted(__import__('os').environ)", [0])])
    assert set(names[0]) <= {"LC_CTYPE"}  # which Python itself sets


def test_results(sandbox: Sandbox, folder: Path) -> None:
    """An expression, a program, a loaded module, an input without output, an output that is not JSON."""
    outputs = sandbox.run(
        [
            ("x + 3", [1, 2]),
            ("def f(x):\n return [x, 'a', None, 1.5]", [1]),
            ("import math\nf = math.factorial", [5, -1, 3]),
            ("{x}", [1]),
            ("x", []),
        ]
    )
    assert outputs == [[4, 5], [[1, "a", None, 1.5]], [120, MISSING, 6], [MISSING], []]


def test_a_machine_without_the_filter_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = RUNNER.read_text()
    broken = tmp_path / "runner.py"
    monkeypatch.setattr("envs.text.sandbox.RUNNER", broken)
    broken.write_text(source.replace('"x86_64"', '"another"').replace('"aarch64"', '"yet another"'))
    with pytest.raises(RuntimeError, match=r"needs Linux with seccomp .* a harmless program gave \[MISSING\]"):
        Sandbox()
    unlocked = source.replace("    lock_syscalls()\n    sys.addaudithook(hook(frozenset(EVENTS), os._exit))\n", "")
    assert unlocked != source
    broken.write_text(unlocked)
    with pytest.raises(RuntimeError, match=r"a forbidden one \[1?0?\d*\] \(expected \[MISSING\]\)"):
        Sandbox()
    broken.write_text("raise OSError('no prctl')")
    with pytest.raises(RuntimeError, match="OSError: no prctl"):
        Sandbox()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cpu_seconds": "1"}, "cpu_seconds: expected a number from 0.01 to 86400, got '1'"),
        ({"cpu_seconds": float("nan")}, "cpu_seconds: expected a number from 0.01"),
        ({"wall_seconds": 2**63}, "wall_seconds: expected a number from 0.01 to 86400"),
        ({"cpu_seconds": 9.0}, "wall_seconds: expected at least cpu_seconds = 9.0, got 5.0"),
        ({"memory": 1e9}, "memory: expected a whole number"),
        ({"memory": 2**63}, "memory: expected a whole number <= 1099511627776"),
        ({"output": 0}, "output: expected a whole number >= 1"),
    ],
)
def test_limits_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sandbox(**options)


def test_equal_programs_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task("code")
    assert isinstance(task, Code)
    ran: list[int] = []
    run = task.sandbox.run
    monkeypatch.setattr(task.sandbox, "run", lambda programs: ran.append(len(programs)) or run(programs))
    completion = [*task.vocab.encode("x+1"), task.vocab.eos]
    right = tuple(x + 1 for x in INPUTS)
    verdicts = task.verdicts([right, INPUTS, right], [completion, completion, completion[:-1]])
    assert [v.components for v in verdicts] == [(1.0,), (0.0,), (0.0,)]
    assert ran == [1]
