"""A language model's run that dies in its first rollout goes on from the end of its supervised phase."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from agents.llm.agent import LLM
from agents.llm.baselines import GRPO
from ccrl.experiment import checkpoint
from ccrl.experiment.callbacks import CheckpointCallback
from ccrl.llm.sampler import TokenCollector
from scripts.train import main

FLAGS = (
    "llm --method grpo --task arithmetic --model-layers 1 --model-width 16 --model-heads 2 --n-prompts 2 "
    "--group-size 4 --max-new-tokens 3 --warm-start-steps 3 --warm-start-batch 4 --kl-coef 0.1 --entropy-coef 0.1 "
    "--total-timesteps 16 --eval-every 0 --no-tensorboard --no-progress --seed 3"
)


class Killed(BaseException):
    """No handler of the suite catches it."""


@pytest.fixture
def dying(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The first rollout that is no demonstration ends the program, until the patch is undone."""
    collect = TokenCollector.collect

    def die(self: Any, request: Any, *rest: Any) -> Any:
        if not request.demonstrations:
            raise Killed
        return collect(self, request, *rest)

    monkeypatch.setattr(TokenCollector, "collect", die)
    return monkeypatch


def the_run(folder: Path) -> Path:
    (found,) = folder.iterdir()
    return found


def states(run: Path) -> dict[str, Any]:
    return {path.name: checkpoint.load(path)["state"] for path in (run / "checkpoints").iterdir()}


def test_a_killed_run_does_not_warm_up_twice(dying: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        main([*FLAGS.split(), "--run-root", str(tmp_path / "killed")])
    dying.undo()
    main([*FLAGS.split(), "--run-root", str(tmp_path / "whole")])
    killed, whole = the_run(tmp_path / "killed"), the_run(tmp_path / "whole")
    assert states(killed).keys() == {"step_000000000000.pt"}
    warm = states(killed)["step_000000000000.pt"]
    assert warm["learner"]["warm"]
    assert warm["learner"]["counters"]["iteration"] == 0

    def again(self: Any, steps: int) -> float:
        raise AssertionError(f"{steps} supervised steps for a second time")

    dying.setattr(LLM, "warm_start", again)
    main(["--resume", str(killed)])
    both = states(killed), states(whole)
    assert both[0].keys() == both[1].keys() == {"step_000000000000.pt", "step_000000000016.pt"}
    for name in both[0]:
        for part in ("policy", "bank"):  # the reference is the policy after the supervised phase
            torch.testing.assert_close(
                both[0][name]["learner"][part], both[1][name]["learner"][part], rtol=0.0, atol=0.0
            )
    moved = both[0]["step_000000000016.pt"]["learner"]["policy"]
    assert any(not torch.equal(value, warm["learner"]["policy"][name]) for name, value in moved.items())


def test_without_a_supervised_phase_nothing_is_saved_before_the_first_iteration(
    dying: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    small = {"model_layers": 1, "model_width": 16, "model_heads": 2, "n_prompts": 2, "group_size": 4}
    for steps, expected in ((0, []), (1, ["step_000000000000.pt"])):
        agent = GRPO("arithmetic", GRPO.Settings(**small, warm_start_steps=steps, warm_start_batch=4))
        with pytest.raises(Killed):
            agent.learn(until=8, callback=CheckpointCallback(tmp_path / str(steps), every=8))
        assert [path.name for path in (tmp_path / str(steps)).glob("*.pt")] == expected


def test_later_calls_of_learn_save_when_they_are_due(tmp_path: Path) -> None:
    small = {"model_layers": 1, "model_width": 16, "model_heads": 2, "n_prompts": 2, "group_size": 4}
    agent = GRPO("arithmetic", GRPO.Settings(**small, warm_start_steps=1, warm_start_batch=4))
    agent.learn(until=8)
    agent.learn(until=16, callback=CheckpointCallback(tmp_path, every=100))
    assert [path.name for path in tmp_path.glob("*.pt")] == ["step_000000000016.pt"]
