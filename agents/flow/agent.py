"""One agent for all methods on flow policies: draw conditions, generate, score, prepare, update, log.

AWM("ring2d", group_size=24, learning_rate=1e-3)      # a method builds its agent from settings by keyword
Flow.of(AWM)                                          # or names the agent's class
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from agents.flow.config import FlowModelConfig, FlowRolloutConfig
from agents.llm.config import OptimiserConfig, make_optimiser
from agents.methods import CallableMethod, GroupLearner, MethodAgent
from ccrl.batched_env import BatchedEnv, Tree
from ccrl.collect import Request
from ccrl.data import Data
from ccrl.diffusion.flow import STOCHASTIC, flow_grid, flow_point, make_schedule, matching_error
from ccrl.diffusion.networks import VelocityMLP
from ccrl.estimators import aggregates
from ccrl.estimators.recipe import Parts
from ccrl.estimators.terms import LogRatio, Outputs, Term
from ccrl.experiment.evaluation import EvalResult
from ccrl.flow import ExactTask, FlowCollector, FlowTask, Sampling, resolve_flow_task
from ccrl.learn import Learner
from ccrl.policies.dense import Dense
from ccrl.policies.flow import FlowPolicy
from ccrl.seeding import named_generator
from ccrl.settings import ConfigError
from ccrl.updaters import ModuleUpdater, Stats, linear_decay

__all__ = ["ExactVelocity", "Flow", "FlowLearner", "FlowMethod", "matching_batch", "matching_term"]


class FlowMethod(CallableMethod):
    """A method that can be called: ``AWM(task, group_size=24)`` is the agent that trains a flow policy with it."""

    def agent(self, name: str | None = None) -> type[Flow]:
        return Flow.of(self, name)


class FlowLearner(GroupLearner):
    """Rollouts of denoising steps, all of one shape."""

    _task: FlowTask
    _ema: float

    def _iterate(self) -> tuple[dict[str, Data], Stats, dict[str, float]]:
        found = super()._iterate()
        if self._ema:
            self.ctx.bank.refresh("eval", mix=1.0 - self._ema)
        return found

    def _log(self, data: Mapping[str, Any], stats: Stats, seconds: dict[str, float]) -> None:
        super()._log(data, stats, seconds)
        if not self.watched:
            return
        on = data.get("sampled", data["on"])
        parts, names = on["reward_components"], self._task.components
        measured = self._task.measure(on["clean"], on["label"])
        self.scalars |= {f"rollout/{name}": parts[:, i].mean() for i, name in enumerate(names)}
        self.scalars |= {f"rollout/{name}": value.mean() for name, value in measured.items()}


class Flow(MethodAgent):
    """Trains a flow policy on a generation task with a method; the class for one is ``Flow.of(method)``.

    :param env: a task's name (``"ring2d"``, options in ``env_kwargs``) or a ``FlowTask``.
    :param config: a ``Config`` or one of the parts it is made of; None: the defaults.
    :raises ConfigError: a sampler that has not what the method needs.
    """

    beside = (FlowRolloutConfig, OptimiserConfig, FlowModelConfig)
    steps_env: ClassVar[bool] = False
    example_env: ClassVar[str] = "ring2d"

    def connect(self, env: str | FlowTask) -> None:
        c, recipe = self.config, self.method.Recipe
        needs: str = recipe.needs  # type: ignore[attr-defined]
        if needs == "log_prob" and c.sampler not in STOCHASTIC:
            raise ConfigError(f"sampler: {self.name} needs log-probabilities of transitions, expected one of "
                              f"{', '.join(STOCHASTIC)}, got {c.sampler!r}")  # fmt: skip
        self.task = resolve_flow_task(env, **(self.env_kwargs if isinstance(env, str) else {}))
        schedule = make_schedule(flow_grid(c.steps, c.time_shift), c.sampler, c.noise_level)
        rows = (c.first_step, c.last_step)
        if needs == "log_prob" and not bool((schedule.std[rows[0] : rows[1]] > 0.0).all()):
            raise ConfigError(f"trained_steps: the last step of {c.sampler!r} has no noise and no log-probability; "
                              "train fewer steps")  # fmt: skip
        self.collector = FlowCollector(self.task, Sampling(schedule, *rows), seed=self.seed, device=self.device)

    def build(self) -> Learner:
        c = self.config
        policy = self.make_model().to(self.device)
        updater = ModuleUpdater(
            policy, lambda params: make_optimiser(c, params), max_grad_norm=c.max_grad_norm or None,
            skip_norm=c.skip_grad_norm or None, prefixes=["net"],
        )  # fmt: skip
        counts = torch.full((c.n_prompts,), c.group_size, dtype=torch.int64, device=self.device)
        parts = Parts(policy, updater, Request(counts=counts), self.collector.steps, components=self.task.components)
        learner = FlowLearner(self, policy, self.method.Recipe(c, parts), updater)
        learner._task, learner._ema = self.task, c.eval_ema
        return learner

    def make_model(self) -> FlowPolicy:
        """The policy; override it to train one of your own."""
        c, base = self.config, None
        if c.base == "exact":
            if not isinstance(self.task, ExactTask):
                raise ConfigError(
                    f"base: expected 'none', the velocity of {self.task.name!r} is not known, got 'exact'"
                )
            base = ExactVelocity(self.task)
        net = VelocityMLP(self.task.size, self.task.conditions, c.hidden, zero=base is not None, linear=Dense)
        return FlowPolicy(net, base=base, guidance=c.guidance, reduce=getattr(c, "reduce", "mean"))

    @property
    def spaces(self) -> str:
        """The task, in words."""
        return f"task {self.task.name!r} with samples of {self.task.size} numbers, {self.task.conditions} conditions"

    # -- learning -----------------------------------------------------------------------------------------------------

    def before_learning(self) -> None:
        """The supervised phase, once, and the copies of the policy that the method keeps."""
        warm = self.learner.warm  # type: ignore[attr-defined]
        if bool(warm):
            return
        if self.config.warm_start_steps:
            self.warm_start(self.config.warm_start_steps)
        for version in (*self.estimator.versions, *(("eval",) if self.config.eval_ema else ())):
            self.ctx.bank.refresh(version)
        if hasattr(self.estimator, "begin"):
            self.estimator.begin(self)
        warm.fill_(True)

    @property
    def warm_started(self) -> bool:
        """Whether a supervised phase is all that it has behind it."""
        warm = self.learner.warm  # type: ignore[attr-defined]
        return bool(warm) and self.config.warm_start_steps > 0 and self.iteration == 0

    def warm_start(
        self, steps: int, policy: FlowPolicy | None = None, labels: Tensor | None = None, tilt: bool = False,
        seed: int = 0,
    ) -> float:  # fmt: skip
        """Flow matching on the task's data, drawn from a stream of their own; returns the mean loss of the last tenth.

        :param policy: what is trained; None: the agent's policy.
        :param labels: conditions to draw from; None: all.
        :param tilt: data are drawn in proportion to their reward: the optimum of ``E R p / E R``.
        """
        c = self.config
        policy = self.policy if policy is None else policy
        generator = named_generator(self.seed, f"warm start {seed}", self.device)
        updater = ModuleUpdater(
            policy, lambda params: torch.optim.AdamW(params, lr=c.warm_start_lr, weight_decay=0.0, fused=True),
            max_grad_norm=1.0, prefixes=["net"],
        )  # fmt: skip
        terms, losses = (matching_term(),), list[Tensor]()
        guidance, policy.guidance = policy.guidance, 1.0  # what guidance extrapolates is learned without it
        every = torch.arange(self.task.conditions) if labels is None else labels
        for i in range(steps):
            linear_decay([updater], c.warm_start_lr, i / steps)
            batch = matching_batch(
                self.task, every.to(self.device), c.warm_start_batch, generator, tilt, c.drop_condition
            )
            losses.append(updater.step(terms, batch)["matching_loss"])
        policy.guidance = guidance
        return float(torch.stack(losses[-max(1, steps // 10) :]).mean())

    # -- acting -------------------------------------------------------------------------------------------------------

    def act(self, obs: Tree, deterministic: bool = False) -> Tensor:
        raise TypeError("act: a flow policy generates samples; use predict(label) or samples(labels)")

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[Any, Any]:
        """A condition's number or several -> samples as NumPy arrays, and ``state`` unchanged. ``deterministic`` fixes
        the noise that they start from."""
        labels = torch.as_tensor(observation, dtype=torch.int64).reshape(-1)
        seed = 0 if deterministic else int(torch.randint(2**31 - 1, ()))
        found = self.samples(labels, seed).cpu().numpy()
        return (found[0] if torch.as_tensor(observation).dim() == 0 else found), state

    def samples(self, labels: Tensor, seed: int = 0) -> Tensor:
        """One sample per label ``[N]``, ``[N, D]``: ``eval_steps`` Euler steps, decided by ``seed``."""
        schedule = make_schedule(flow_grid(self.config.eval_steps, self.config.time_shift), "ode")
        policy = self.ctx.bank.policy("eval") if "eval" in self.ctx.bank.names() else self.policy
        return self.collector.samples(policy, labels, seed, Sampling(schedule))  # type: ignore[no-any-return]

    def measure(self, count: int = 256, seed: int = 0) -> dict[str, float]:
        """Means over ``count`` evaluation samples, conditions in turn: ``reward`` and what the task measures."""
        labels = torch.arange(count, device=self.device) % self.task.conditions
        found = self.samples(labels, seed)
        numbers = {"reward": self.task.score(found, labels).sum(1)} | self.task.measure(found, labels)
        return {name: float(value.mean()) for name, value in numbers.items()}

    @torch.no_grad()
    def evaluate(self, env: BatchedEnv | None, episodes: int, seed: int, deterministic: bool = True) -> EvalResult:
        """Rewards of ``episodes`` samples, conditions in turn; ``env`` is not needed."""
        labels = torch.arange(episodes, device=self.device) % self.task.conditions
        found = self.task.score(self.samples(labels, seed), labels).sum(1)
        lengths = torch.full((episodes,), self.config.eval_steps)
        return EvalResult(found.double().cpu().numpy(), lengths.numpy())


class ExactVelocity(nn.Module):
    """The velocity of a task's data as a module of a policy."""

    def __init__(self, task: ExactTask) -> None:
        super().__init__()
        self._task = (task,)

    def forward(self, x: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        lead = x.shape[:-1]
        label = torch.where(condition.sum(-1) > 0.0, condition.argmax(-1), -1).expand(lead).reshape(-1)
        flat = x.reshape(-1, x.shape[-1])
        return self._task[0].velocity(flat, time.expand(lead).reshape(-1), label).view_as(x)


def matching_batch(
    task: FlowTask, labels: Tensor, n: int, generator: torch.Generator, tilt: bool = False, drop: float = 0.0
) -> Data:
    """``[1, n]`` pairs of flow matching on data of ``labels`` in turn.

    :param tilt: of four times as many, ``n`` are drawn in proportion to their rewards.
    :param drop: conditions are left out with this probability.
    """
    device = labels.device
    label = labels[torch.arange(4 * n if tilt else n, device=device) % len(labels)]
    clean = task.data(label, generator)
    if tilt:
        weight = task.score(clean, label).sum(1).clamp_min(0.0) + 1e-12
        chosen = torch.multinomial(weight, n, replacement=True, generator=generator)
        clean, label = clean[chosen], label[chosen]
    time = torch.rand(n, generator=generator, device=device)
    x, target = flow_point(clean, torch.randn(clean.shape, generator=generator, device=device), time)
    condition = torch.nn.functional.one_hot(label, task.conditions).float()
    if drop:
        condition = condition * (torch.rand(n, 1, generator=generator, device=device) >= drop)
    steps = {"obs": x, "target": target, "time": time, "valid": torch.ones_like(time)}
    columns = {name: value.unsqueeze(0) for name, value in steps.items()} | {"condition": condition}
    count = torch.tensor(float(n), device=device)
    return Data(columns, sequence=frozenset({"condition"})).with_scalars(n_valid=count, n_sequences=count)


def matching_term() -> Term:
    """The flow-matching loss."""
    return Term("matching_loss", _matching, aggregates.mean, want=frozenset({"velocity"}), advantage=None)


def _matching(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
    return matching_error(outputs["velocity"], batch["target"])
