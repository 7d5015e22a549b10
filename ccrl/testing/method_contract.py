"""What every method's contract begins with: its settings are checked, and its defaults are the published ones."""

from __future__ import annotations

import unittest
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields
from typing import Any, ClassVar

from ccrl.estimators.recipe import MethodConfig
from ccrl.testing.settings_contract import settings_faults

__all__ = ["MethodContract"]


class MethodContract:
    """Base of ``RecipeContract`` and ``FlowContract``, which say what a rollout is.

    Every test of a method that promises something else is left out by name in ``exceptions``, with the reason.
    """

    method: ClassVar[Any]
    """A method that can be called: ``method(task, seed=..., **settings)`` is an agent with ``estimator``,
    ``collector``, ``policy``, ``ctx``, ``learn``, ``save``; ``method.load(path)`` restores one."""
    published: ClassVar[Mapping[str, Any]] = {}
    """The numbers of the paper (or released code) as the defaults must have them: every setting of its own, and those
    of model, optimiser and rollout that it brings."""
    options: ClassVar[Mapping[str, Any]] = {}
    """Settings of the tests, on top of ``SMALL``."""
    matters: ClassVar[Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]] = ()
    """Pairs of settings, the usual and others: another gradient on the same rollout."""
    texts: ClassVar[Collection[str]] = ()
    """Settings that may hold any text, as names of reward components do; others of type ``str`` are choices."""
    exceptions: ClassVar[Mapping[str, str]] = {}
    """Name of a test -> why it does not hold for this method."""

    def setup_method(self, method: Callable[..., None]) -> None:
        if method.__name__ in self.exceptions:
            raise unittest.SkipTest(self.exceptions[method.__name__])

    def test_settings_are_checked_and_say_what_they_do(self) -> None:
        """Wrong types, NaN and numbers outside a range are refused; every flag has a sentence."""
        assert settings_faults(self.method.Config(), self.texts) == []

    def test_defaults_are_the_published_ones(self) -> None:
        """Every setting that the method adds or changes says here where its default comes from."""
        shared = {f.name: f.default for f in fields(MethodConfig)}
        config = self.method.Config()
        found = {f.name: getattr(config, f.name) for f in fields(config)} | dict(self.method.defaults)
        own = {name for name in found if name not in shared or found[name] != shared[name]}
        assert own <= self.published.keys(), f"published: say the number of {sorted(own - self.published.keys())}"
        assert {name: found.get(name) for name in self.published} == dict(self.published)
