"""What a training waits for: who hears of it, where its seconds go, and how a terminal shows it."""

from __future__ import annotations

import io
import sys

import pytest

from ccrl.experiment import progress
from ccrl.experiment.progress import ProgressBar, shares
from ccrl.learn.base import Times
from ccrl.waiting import listening, waiting


class Heard(list):
    def begins(self, what):
        self.append(f"+{what}")

    def ends(self, what, seconds):
        assert seconds >= 0
        self.append(f"-{what}")


def test_a_wait_is_heard_of_once_also_where_it_fails():
    heard = Heard()
    with waiting("nobody listens"):
        pass
    with listening(heard):
        with waiting("checkpoint"), waiting("compilation"):  # inside another: part of it
            pass
        with pytest.raises(RuntimeError), waiting("evaluation"):
            raise RuntimeError
    with waiting("nobody listens"):
        pass
    assert heard == ["+checkpoint", "-checkpoint", "+evaluation", "-evaluation"]


def test_seconds_by_hand():
    times = Times()
    times.ends("evaluation", 2.0)  # between iterations
    for compiling in (3.0, 0.0):
        times.begin_iteration()
        if compiling:
            times.ends("compilation", compiling)
        times.end_iteration({"env": 1.0, "update": compiling + 1.5})
    assert times == {"evaluation": 2.0, "compilation": 3.0, "env": 2.0, "update": 3.0}
    assert list(shares(times)) == ["compilation", "update", "evaluation", "env"]
    assert shares(times)["update"] == pytest.approx(0.3)
    assert shares({"env": 0.0}) == {}


def test_a_terminal_shows_it(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "_REFRESH", 0.0)
    seconds = {"env": 1.0, "update": 3.0, "estimate": 0.0}
    bar = ProgressBar(10, seconds=seconds)
    with listening(bar):
        bar.update(5)
        with waiting("evaluation"):
            during = terminal.getvalue().split("\r")[-1]
        after = terminal.getvalue().split("\r")[-1]
    bar.close()
    assert "waiting for   env  update" in terminal.getvalue()
    assert during.split()[:5] == ["evaluation", "25", "%", "75", "%\x1b[A\x1b[A"]
    assert after.split()[0] == "nothing"
    monkeypatch.setattr(sys, "stderr", io.StringIO())  # not a terminal
    with listening(ProgressBar(10, seconds=seconds)), waiting("evaluation"):
        assert sys.stderr.getvalue() == ""
