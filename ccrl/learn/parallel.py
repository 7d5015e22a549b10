"""One training in several processes: each collects with its own environments, all take the same gradient steps.

    torchrun --nproc-per-node 2 scripts/train.py ppo --env HalfCheetah-v5 --num-envs 8

Every process has the whole policy and ``num_envs`` environments of its own, seeded apart. Gradients are averaged before
every step, so with equal minibatches a step is the step on the union of them; observation and reward statistics merge
the rows of all. What is counted (the clock) is the sum over processes. Advantages are standardised by each process over
its own rows, as rsl_rl does.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ccrl.batched_env import AutoresetMode
from ccrl.estimators.recipe import Recipe
from ccrl.estimators.updates import GradientEstimate
from ccrl.learn.base import Learner
from ccrl.learn.rollout import RolloutLearner
from ccrl.policies.normaliser import RunningNorm
from ccrl.seeding import stream_seed

__all__ = ["Processes", "distribute"]


class Processes:
    """This process among those that ``torchrun`` started.

    :param device: tensors that are exchanged are there; NCCL on CUDA, Gloo elsewhere.
    """

    def __init__(self, device: torch.device | str = "cpu", timeout: timedelta = timedelta(hours=2)) -> None:
        self.device = torch.device(device)
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        if not dist.is_initialized():
            # while the first one evaluates the others wait
            dist.init_process_group(backend, timeout=timeout)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    @staticmethod
    def started() -> int:
        """How many processes ``torchrun`` started; 1 without it."""
        return int(os.environ.get("WORLD_SIZE", "1"))

    def seed(self, seed: int) -> int:
        """Of this process: the first one's is ``seed``."""
        return stream_seed(seed, f"process {self.rank}") if self.rank else seed

    def mean(self, estimate: GradientEstimate) -> GradientEstimate:
        """The gradient and its statistics averaged over processes, in one message. A hook of ``FlatUpdater``."""
        names = list(estimate.stats)
        parts = [estimate.mean, *(estimate.stats[k].reshape(1).to(estimate.mean) for k in names)]
        message = torch.cat(parts)
        dist.all_reduce(message)
        message /= self.size
        gradient, stats = message[: len(estimate.mean)], message[len(estimate.mean) :]
        return GradientEstimate(gradient, dict(zip(names, stats.unbind())))

    def sum(self, x: Tensor) -> Tensor:
        """``x`` summed over processes."""
        total = x.clone()
        dist.all_reduce(total)
        return total

    def any(self, flag: bool) -> bool:
        """Whether one of them says so: all stop after the same iteration."""
        return bool(self.sum(torch.tensor([float(flag)], device=self.device))[0] > 0)

    def same_text(self, text: str | None) -> str:
        """What the first process says."""
        said: list[str | None] = [text]
        dist.broadcast_object_list(said, src=0)
        assert said[0] is not None
        return said[0]

    def share(self, module: nn.Module) -> None:
        """Everybody's parameters and buffers become the first one's, in place."""
        for x in module.state_dict().values():
            dist.broadcast(x, src=0)

    def close(self) -> None:
        """Leave the group."""
        dist.destroy_process_group()


def distribute(learner: Learner, processes: Processes, share: bool = True) -> None:
    """Make ``learner`` one of several. Call it on a new one, or (``share=False``) on one that was restored in every
    process.

    :raises ValueError: a learner whose processes would drift apart or wait for each other for ever.
    """
    if not isinstance(learner, RolloutLearner) or learner.direction is not None:
        raise ValueError("several processes: expected surrogates on rollouts (PPO); this agent trains in one process")
    if any(phase.skip is not None for phase in learner.phases()):
        raise ValueError("several processes: this agent leaves out updates that others take; it trains in one process")
    if any(all(phase.updater is not u for u in learner.updaters.values()) for phase in learner.phases()):
        raise ValueError("several processes: this agent steps by a rule of its own; it trains in one process")
    env = getattr(learner.source, "env", None)
    if env is None or env.autoreset_mode == AutoresetMode.NEXT_STEP:
        raise ValueError(
            "several processes: expected environments without dummy rows (SAME_STEP or DISABLED): clocks must agree"
        )
    if isinstance(learner.estimator, Recipe):
        # a process with shorter episodes would go on when the others have ended, and wait for them
        raise ValueError("several processes: expected rollouts of equal numbers of steps; this agent plays whole "
                         "episodes, and trains in one process")  # fmt: skip
    if learner.compile == "on":
        raise ValueError("several processes: averaged steps are uncompiled; expected compile='auto' or 'off'")
    lacking = [name for name, updater in learner.updaters.items() if not hasattr(updater, "hooks")]
    if lacking:
        raise ValueError(
            f"several processes: expected updaters with gradient hooks (FlatUpdater), got {lacking} without"
        )
    learner.processes = processes
    learner.source.processes = processes.size  # type: ignore[attr-defined]
    if share:
        processes.share(learner.policy)
    for updater in learner.updaters.values():
        updater.hooks.insert(0, processes.mean)  # type: ignore[attr-defined]
    for norm in _norms([learner.policy, learner.estimator]):
        norm.merge = processes.sum


def _norms(modules: Sequence[nn.Module]) -> list[RunningNorm]:
    return [m for module in modules for m in module.modules() if isinstance(m, RunningNorm)]
