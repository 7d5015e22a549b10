"""EvalResult on a separate env: whole episodes, raw rewards, no bias towards short episodes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ccrl.batched_env import AutoresetMode, BatchedEnv, Tree, resolve_env
from ccrl.experiment.csv_table import CsvTable, read_rows
from ccrl.experiment.files import Owner, write_atomic
from ccrl.seeding import stream_seed
from ccrl.settings import Count, Natural, checked

__all__ = ["EvalLog", "EvalResult", "Predict", "evaluate", "evaluate_agent"]

Predict = Callable[[Tree, bool], Tensor]
"""``(obs [N, ...], deterministic) -> action [N, ...]``, with the observation normaliser frozen. One with a memory has
``restart(first [N] | None)``, called where episodes begin."""


@dataclass(frozen=True)
class EvalResult:
    """Undiscounted returns ``[episodes]`` float64 and lengths ``[episodes]`` int64."""

    returns: NDArray[np.float64]
    lengths: NDArray[np.int64]

    def scalars(self, prefix: str = "eval") -> dict[str, float]:
        """``mean_reward`` and ``mean_ep_length`` as in SB3, and the spread of the returns, under ``prefix/``."""
        return {
            f"{prefix}/mean_reward": float(self.returns.mean()),
            f"{prefix}/std_reward": float(self.returns.std()),
            f"{prefix}/min_reward": float(self.returns.min()),
            f"{prefix}/max_reward": float(self.returns.max()),
            f"{prefix}/mean_ep_length": float(self.lengths.mean()),
        }


@torch.no_grad()
@checked
def evaluate(
    predict: Predict,
    env: BatchedEnv,
    episodes: Count = 10,
    seed: Natural = 0,
    deterministic: bool = True,
    max_steps: Count = 100_000,
) -> EvalResult:
    """Play ``episodes`` episodes from fresh resets with ``seed``.

    Episode ``i`` belongs to slot ``i % num_envs`` before it is played: taking the first ones that end, from any slot,
    would prefer short episodes. The global torch generators are seeded with ``seed`` for the evaluation and put back
    after it, so that evaluating does not change the training that goes on.

    Args:
        max_steps: the longest episode that is accepted.

    Raises:
        RuntimeError: an episode ran past ``max_steps``.
        ValueError: ``episodes`` or ``max_steps`` below 1.
    """
    env = resolve_env(env, 1)
    device, n = env.device, env.num_envs
    rows = -(-episodes // n)
    slot = torch.arange(n, device=device)
    quota = (episodes - slot + n - 1) // n
    # One more row than needed: what a slot plays past its quota is written there and thrown away.
    returns = torch.zeros(rows + 1, n, dtype=torch.float64, device=device)
    lengths = torch.zeros(rows + 1, n, dtype=torch.int64, device=device)
    count = torch.zeros(n, dtype=torch.int64, device=device)
    resetting = torch.zeros(n, dtype=torch.bool, device=device)
    # On an accelerator the test for the end waits for the device: rarely is enough, extra steps are thrown away.
    every = 1 if device.type == "cpu" else 32
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(stream_seed(seed, "evaluation: actions"))
        obs = env.reset(seed=stream_seed(seed, "evaluation"))
        restart = getattr(predict, "restart", None)  # a policy with a memory is told where episodes begin
        if restart is not None:
            restart()
        step = 0
        while True:
            result = env.step(predict(obs, deterministic).to(device))
            obs, step = result.obs, step + 1
            done = (result.terminated | result.truncated) & ~resetting
            row = count.clamp(max=rows)
            returns[row, slot] += result.reward.double().masked_fill(resetting, 0.0)
            lengths[row, slot] += (~resetting).long()
            count += done & (count < quota)
            # The parked row of a slot that has met its quota must not trip the bound on the length.
            running = torch.where(count < quota, lengths[count.clamp(max=rows), slot], 0)
            if restart is not None:
                restart(resetting if env.autoreset_mode == AutoresetMode.NEXT_STEP else done)
            if env.autoreset_mode == AutoresetMode.NEXT_STEP:
                resetting = done
            elif env.autoreset_mode == AutoresetMode.DISABLED and bool(done.any()):
                obs = env.reset(mask=done)
            if step % every == 0:
                longest, left = torch.stack([running.max(), (quota - count).sum()]).tolist()
                if longest >= max_steps:
                    raise RuntimeError(
                        f"evaluate: expected every episode to end within max_steps={max_steps}; received one in slot "
                        f"{int(running.argmax())} that has not. Give the env a time limit, or raise max_steps."
                    )
                if left == 0:
                    break
    order = (torch.arange(episodes, device=device) // n, torch.arange(episodes, device=device) % n)
    return EvalResult(returns[order].cpu().numpy(), lengths[order].cpu().numpy())


@checked
def evaluate_agent(
    agent: Any, env: BatchedEnv | None, episodes: Count = 10, seed: Natural = 0, deterministic: bool = True
) -> EvalResult:
    """``evaluate`` with the agent's ``acting()`` or ``act``; or the agent's own
    ``evaluate(env, episodes, seed, deterministic)``, which agents have that do not play environments step by step."""
    own = getattr(agent, "evaluate", None)
    if own is None:
        if env is None:
            raise ValueError(f"evaluate: expected an environment to play {type(agent).__name__} in, got none")
        acting = agent.acting() if hasattr(agent, "acting") else agent.act
        return evaluate(acting, env, episodes, seed, deterministic)
    found: EvalResult = own(env, episodes, seed, deterministic)
    return found


class EvalLog:
    """``eval.csv`` with every return of every evaluation, and SB3's ``evaluations.npz`` made from it.

    Columns: ``step``, the scalars of :class:`EvalResult` under ``eval/`` (deterministic) and ``eval_stochastic/``,
    and ``.../returns`` and ``.../lengths`` as JSON lists. A file with rows is continued from ``resume_step``; rows past
    it are dropped.

    Raises:
        FileExistsError: the file has rows and ``resume_step`` is None.
        FolderInUseError: another process writes into the folder.
    """

    def __init__(self, folder: str | os.PathLike[str], resume_step: int | None = None) -> None:
        self.folder = Path(folder)
        self._owner = Owner(folder)
        try:
            self._csv = CsvTable(self.folder / "eval.csv", resume_step)
        except BaseException:
            self._owner.release()
            raise
        if resume_step is not None:
            self._write_npz()

    def log(self, step: int, deterministic: EvalResult, stochastic: EvalResult | None = None) -> dict[str, float]:
        """Write one row; returns its scalars, for the logger."""
        scalars: dict[str, float] = {}
        lists: dict[str, str] = {}
        for prefix, evaluation in (("eval", deterministic), ("eval_stochastic", stochastic)):
            if evaluation is not None:
                scalars |= evaluation.scalars(prefix)
                lists[f"{prefix}/returns"] = json.dumps(evaluation.returns.tolist())
                lists[f"{prefix}/lengths"] = json.dumps(evaluation.lengths.tolist())
        self._csv.write(step, {**scalars, **lists})
        self._write_npz()
        return scalars

    def close(self) -> None:
        """Close the file; further ``log`` calls fail."""
        self._csv.close()
        self._owner.release()

    def _write_npz(self) -> None:
        rows = read_rows(self._csv.path) if self._csv.path.exists() else []
        data: dict[str, Any] = {
            "timesteps": np.array([int(row["step"]) for row in rows], dtype=np.int64),
            "results": _matrix([json.loads(row["eval/returns"]) for row in rows], np.float64),
            "ep_lengths": _matrix([json.loads(row["eval/lengths"]) for row in rows], np.int64),
        }
        write_atomic(self.folder / "evaluations.npz", lambda file: np.savez(file, **data))


def _matrix(rows: list[list[float]], dtype: Any) -> NDArray[Any]:
    """``[evaluations, episodes]``; as SB3 does, an array of objects where the number of episodes changed."""
    if len({len(row) for row in rows}) <= 1:
        return np.array(rows, dtype=dtype)
    ragged = np.empty(len(rows), dtype=object)
    ragged[:] = rows
    return ragged
