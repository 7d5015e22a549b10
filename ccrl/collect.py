"""The collector: serves rollout requests from batched environments into the shared buffer."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from gymnasium import Space
from gymnasium.spaces import Dict, Discrete
from torch import Tensor

from ccrl.batched_env import AutoresetMode, BatchedEnv, Tree, resume_note
from ccrl.buffer import RolloutBuffer
from ccrl.data import Data, Field, tree_map
from ccrl.returns import forward_scan

__all__ = ["Actor", "Collector", "EpisodeStats", "Request"]


@dataclass(frozen=True)
class Request:
    """One rollout that an estimator asks for, in one of three forms: ``steps`` of the running streams, fresh
    ``episodes``, or completions of prompts (``counts``).

    :raises ValueError: unless exactly one form is asked for, and for settings of another form than that one.
    """

    tag: str = "on"
    params: Tensor | str = "live"
    """A bank version or a flat parameter vector ``[n]``: who acts."""
    steps: int | None = None
    """Continue the streams for this many steps."""
    episodes: int | None = None
    """Or: so many fresh episodes on environments and random numbers of their own."""
    horizon: int | None = None
    groups: int | None = None
    """Of fresh episodes: columns ``i`` and ``i + groups`` are one group (from one start, with ``StackedEnv``)."""
    counts: Tensor | None = None
    """Or: completions per prompt ``[Q]`` int64 (language models)."""
    prompts: Any = None
    """Of completions: the prompts (``ccrl.llm.task.Prompts``) that ``counts`` counts, such as some of ``ctx.prompts``.
    None: those drawn for this iteration if no request has taken them yet, else ``Q`` new ones of the same source."""
    source: str | None = None
    """Of completions: the prompts of the rollout with this tag, instead of new ones."""
    demonstrations: bool = False
    """Of completions: the prompts' demonstrations in place of samples."""

    def __post_init__(self) -> None:
        forms = [name for name in ("steps", "episodes", "counts") if getattr(self, name) is not None]
        if len(forms) != 1:
            raise ValueError(f"Request: expected one of steps, episodes and counts, got {forms or 'none of them'}")
        if self.episodes is not None and self.horizon is None:
            raise ValueError("Request: fresh episodes need a horizon (the longest episode, in steps)")
        if self.counts is None and (self.prompts is not None or self.source is not None or self.demonstrations):
            raise ValueError(f"Request: prompts, source and demonstrations belong to counts, got {forms[0]}")
        if self.prompts is not None and self.source is not None:
            raise ValueError(f"Request: expected prompts or a source of prompts, got both (source={self.source!r})")


class Actor(Protocol):
    """What collection needs of a policy."""

    def draw_noise(self, n: int, generator: torch.Generator | None, device: torch.device) -> Tensor: ...
    def act(self, obs: Tree, noise: Tensor | None) -> dict[str, Tensor]: ...
    def to_env(self, action: Tensor) -> Tensor: ...
    def behaviour_fields(self) -> tuple[Field, ...]: ...
    def behaviour(self, columns: dict[str, Tensor], action: Tensor) -> dict[str, Tensor]: ...


@dataclass
class EpisodeStats:
    """Episodes that ended in a rollout: undiscounted raw return and length, ``[E]`` on the host. The horizon ends fresh
    episodes."""

    returns: Tensor
    lengths: Tensor


class _Stream:
    """One environment with its buffer and the facts that cross rollout borders."""

    def __init__(self, env: BatchedEnv) -> None:
        self.env = env
        self.obs: Tree | None = None
        n, device = env.num_envs, env.device
        self.step = torch.zeros(n, dtype=torch.int64, device=device)
        self.ended = torch.zeros(n, dtype=torch.bool, device=device)
        self.returns = torch.zeros(n, dtype=torch.float64, device=device)
        self.buffers: dict[tuple[Any, ...], RolloutBuffer] = {}


class Collector:
    """Collects with ``env`` (continued streams) and, on request, with ``make_env(n)`` (fresh episodes).

    :param env: the training environments; reset on first use with ``seed``.
    :param make_env: builds ``n`` environments for fresh episodes; they and their random numbers never touch training's.
    :param seed: seeds the environments and the two noise generators.
    :param fields: extra raw columns to allocate (filled by the estimator's owner).
    """

    def __init__(
        self,
        env: BatchedEnv,
        *,
        seed: int = 0,
        make_env: Callable[[int], BatchedEnv] | None = None,
        fields: tuple[Field, ...] = (),
    ) -> None:
        self.env, self.make_env, self.seed, self.fields = env, make_env, seed, fields
        self.device = torch.device(env.device)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.fresh_generator = torch.Generator(self.device).manual_seed(seed + 1_000_003)
        self.total_steps = 0
        """Valid environment steps of continued streams."""
        self.fresh_steps = 0
        """Valid environment steps of fresh episodes; with ``total_steps`` the agent's clock."""
        self.stats = EpisodeStats(torch.zeros(0), torch.zeros(0))
        self.log: dict[str, Any] = {}
        self._told = False
        self.env_seconds = 0.0
        """Wall time spent in environments; the owner resets it."""
        self._stream = _Stream(env)
        self._fresh: _Stream | None = None

    # -- requests -----------------------------------------------------------------------------------------------------

    def collect(self, request: Request, policy: Actor) -> Data:
        """Run ``policy`` as asked; the returned columns are views of the buffer, valid until the next request of this
        tag."""
        if request.counts is not None:
            raise ValueError(f"Collector: environments have no completions of prompts; ask for steps or episodes, got "
                             f"{request}")  # fmt: skip
        if request.steps is not None:
            if self._stream.obs is None:
                self._stream.obs = self.env.reset(seed=self.seed)
            data = self._roll(self._stream, policy, request.steps, self.generator, request.tag)
            self.total_steps += int(data["valid"].sum())
            return data
        if request.episodes is None or request.horizon is None:
            raise ValueError(f"Collector: expected a request with steps or episodes, got {request}")
        data = self._episodes(request.episodes, request.horizon, policy, request.tag)
        if request.groups is None:
            return data
        if request.episodes % request.groups:
            raise ValueError(f"Request: expected episodes to be a multiple of groups, got {request}")
        columns = {k: data[k] for k in data} | {"group": data["group"] % request.groups}
        return Data(columns, sequence=data.sequence, successors=data._successors)

    def _episodes(self, episodes: int, horizon: int, policy: Actor, tag: str) -> Data:
        """``[horizon, episodes]``: one fresh episode per column, ``valid = 0`` after its end."""
        if self._fresh is None or self._fresh.env.num_envs != episodes:
            if self.make_env is None:
                raise ValueError("Collector: fresh episodes need make_env, a function that builds n environments")
            self._fresh = _Stream(self.make_env(episodes))
        stream = self._fresh
        draw = torch.randint(2**31 - 1, (), generator=self.fresh_generator, device=self.device)
        stream.obs = stream.env.reset(seed=int(draw))
        for fact in (stream.step, stream.ended, stream.returns):
            fact.zero_()
        data = self._roll(stream, policy, horizon, self.fresh_generator, tag, fresh=True)
        first = torch.cat([torch.ones_like(data["carry"][:1]), data["carry"][:-1]]).cumprod(0) * data["valid"]
        self.fresh_steps += int(first.sum())
        # not those of _roll: it also counts what the columns went on with after their episodes
        returns = torch.where(first > 0, data["reward"], 0.0).double().sum(0)
        self.stats = EpisodeStats(returns.cpu(), first.sum(0).long().cpu())
        columns = {k: data[k] for k in data} | {"valid": first, "carry": data["carry"] * first}
        return Data(columns, sequence=data.sequence, successors=data._successors)

    # -- the loop -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _roll(
        self, stream: _Stream, policy: Actor, steps: int, generator: torch.Generator, tag: str, fresh: bool = False
    ) -> Data:
        env, n = stream.env, stream.env.num_envs
        manual = env.autoreset_mode == AutoresetMode.DISABLED
        # of every tag its own: rollouts of one iteration (a probe, a second trajectory) are read together
        key = (tag, steps, policy.behaviour_fields())
        if key not in stream.buffers:
            stream.buffers[key] = RolloutBuffer(
                steps, n, env.single_observation_space, env.single_action_space,
                fields=(*policy.behaviour_fields(), *self.fields), device=self.device,
                keep_final_obs=env.autoreset_mode != AutoresetMode.NEXT_STEP,
            )  # fmt: skip
        buffer = stream.buffers[key]
        assert stream.obs is not None
        buffer.begin(stream.obs)
        # one draw for the whole rollout: per-step draws cost a kernel each and tie the numbers to the step count
        noise = policy.draw_noise(steps * n, generator, self.device)
        noise_rows = noise.view(steps, n, *noise.shape[1:]).unbind()
        fields = (f.name for f in policy.behaviour_fields() if f.per == "step" and f.name != "log_prob")
        names = {name: name.removeprefix("old_") for name in fields}
        # asked after every step only where that costs nothing: elsewhere the host would wait for the device
        running = torch.ones(n, dtype=torch.bool, device=self.device) if fresh and self.device.type == "cpu" else None
        for t in range(steps):
            out = policy.act(buffer.row(t), noise_rows[t])
            executed = policy.to_env(out["action"])
            start = time.perf_counter()
            result = env.step(executed)
            self.env_seconds += time.perf_counter() - start
            if manual:
                result = result._replace(final_obs=result.obs)
            buffer.write(t, out["action"], result, {k: out[name] for k, name in names.items()})
            if result.log:
                self.log |= result.log
            if not manual and running is None:
                continue
            # read back from the buffer: a reset may clear the flags in the tensors that step returned
            done = buffer.terminated[t] | buffer.truncated[t]
            if manual and bool(done.any()):
                buffer.write_obs(t + 1, env.reset(mask=done))
            if running is not None:
                running &= ~done
                if not bool(running.any()):
                    buffer.clear(t + 1)
                    break
        stream.obs = buffer.row(steps)
        return self._finish(stream, buffer, policy)

    def _finish(self, stream: _Stream, buffer: RolloutBuffer, policy: Actor) -> Data:
        env = stream.env
        for name, value in policy.behaviour(buffer.extra, buffer.action).items():
            buffer.extra[name].copy_(value)
        data = buffer.data(
            step=stream.step,
            ended=stream.ended,
            next_step_reset=env.autoreset_mode == AutoresetMode.NEXT_STEP,
            hidden_final=not env.provides_final_obs and env.autoreset_mode == AutoresetMode.SAME_STEP,
        )
        _check_finite(buffer)
        _check_states(buffer.obs, env.single_observation_space)
        done = buffer.terminated | buffer.truncated
        going = torch.cat([(~stream.ended).unsqueeze(0), ~done[:-1]]).double()
        returns = forward_scan(buffer.reward.double(), going, stream.returns)
        lengths = torch.where(data["valid"] > 0, data["t"] + 1, 0)
        self.stats = EpisodeStats(returns[done].cpu(), lengths[done].cpu())
        stream.returns.copy_(returns[-1])
        stream.step.copy_(lengths[-1])
        stream.ended.copy_(done[-1])
        return data

    # -- state --------------------------------------------------------------------------------------------------------

    @property
    def exact(self) -> bool:
        """Whether the environments can be saved, so that a resumed run continues bit for bit."""
        return self.resume_note is None

    @property
    def resume_note(self) -> str | None:
        """Why the environments cannot be saved, so that a resumed run starts fresh episodes; ``None``: they can."""
        return resume_note(self.env)

    def _tell(self, note: str) -> None:
        """Once: a run is saved many times."""
        if not self._told:
            warnings.warn(
                f"{note}: a resumed run starts fresh episodes here, and differs from one that was not interrupted",
                stacklevel=3,
            )
        self._told = True

    def state_dict(self) -> dict[str, Any]:
        stream = self._stream
        state: dict[str, Any] = {
            "generator": self.generator.get_state(),
            "fresh_generator": self.fresh_generator.get_state(),
            "total_steps": self.total_steps,
            "fresh_steps": self.fresh_steps,
            "step": stream.step.clone(),
            "ended": stream.ended.clone(),
            "returns": stream.returns.clone(),
        }
        note = self.resume_note if stream.obs is not None else None
        if note is not None:
            self._tell(note)
        elif stream.obs is not None:
            state |= {"env": self.env.state_dict(), "obs": tree_map(torch.clone, stream.obs)}  # type: ignore[attr-defined]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken; environments without state start fresh episodes instead."""
        self.generator.set_state(state["generator"].cpu())
        self.fresh_generator.set_state(state["fresh_generator"].cpu())
        self.total_steps, self.fresh_steps = state["total_steps"], state.get("fresh_steps", 0)
        stream = self._stream
        note = self.resume_note
        if note is not None:
            self._tell(note)
        if "env" not in state or note is not None:
            # a seed that depends on progress: restarting from the first seed would replay the first episodes
            stream.obs = self.env.reset(seed=self.seed + self.total_steps)
            for fact in (stream.step, stream.ended, stream.returns):
                fact.zero_()
            return
        for name in ("step", "ended", "returns"):
            getattr(stream, name).copy_(state[name])
        self.env.load_state_dict(state["env"])  # type: ignore[attr-defined]
        stream.obs = tree_map(torch.clone, state["obs"])

    def close(self) -> None:
        self.env.close()
        if self._fresh is not None:
            self._fresh.env.close()


def _check_finite(buffer: RolloutBuffer) -> None:
    """One check per rollout, before anything is learnt from it.

    Reports the first bad number in time: a NaN observation makes the next action NaN and that the next reward, and
    naming one of those would lead astray.
    """
    ended = buffer.terminated | buffer.truncated
    columns: list[tuple[int, str, Tensor, Tensor | None]] = [
        (0, name, value, None) for name, value in _named(buffer.obs)
    ]
    columns += [(1, "action", buffer.action, None), (2, "reward", buffer.reward, None)]
    if buffer.final_obs is not None:
        columns += [(2, f"final {name}", value, ended) for name, value in _named(buffer.final_obs)]
    found: list[tuple[int, str, str, list[float]]] = []
    for place, name, value, where in columns:
        if not value.is_floating_point():
            continue
        bad = (~value.isfinite()).reshape(*value.shape[:2], -1).any(-1)
        bad = bad if where is None else bad & where
        if bool(bad.any()):
            row, env = bad.nonzero()[0].tolist()
            # observation t + 1 is what step t returned
            step = row - 1 if place == 0 else row
            when = f"environment {env}, " + (f"step {step} of the rollout" if step >= 0 else "at its first reset")
            found.append((3 * row + place, name, when, value[row, env].flatten()[:8].tolist()))
    if found:
        _, name, when, numbers = min(found)
        raise FloatingPointError(f"{name} is not finite: {when} (value {numbers})")


def _check_states(obs: Tree, space: Space[Any]) -> None:
    """Discrete observations that their space does not have: policies would take all of them for one state."""
    for name, value in _named(obs):
        leaf = space[name] if isinstance(space, Dict) else space
        if not isinstance(leaf, Discrete):
            continue
        bad = ((value < 0) | (value >= leaf.n)).nonzero()
        if len(bad):
            row, env = bad[0].tolist()
            raise ValueError(
                f"{name}: expected one of {leaf}, got {int(value[row, env])} from environment {env} (observation {row} "
                "of the rollout); mend the environment or its observation space"
            )


def _named(tree: Tree) -> list[tuple[str, Tensor]]:
    return list(tree.items()) if isinstance(tree, dict) else [("obs", tree)]
