"""The collector: serves rollout requests from batched environments into the shared buffer."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ccrl.batched_env import AutoresetMode, BatchedEnv, Tree, resume_note, stepper, task_name
from ccrl.buffer import RolloutBuffer
from ccrl.data import Data, Field, tree_map
from ccrl.policies.actions import RandomActor
from ccrl.policies.in_place import InPlaceActor
from ccrl.rollout_checks import check_finite, check_states
from ccrl.seeding import named_generator, restore_generator, stream_seed
from ccrl.settings import Count, convert
from ccrl.stream import EpisodeStats, Stream, finish_rollout, finish_step, note

__all__ = ["Actor", "Collector", "EpisodeStats", "Request"]


@dataclass(frozen=True)
class Request:
    """One rollout that an estimator asks for, in one of three forms: ``steps`` of the running streams, fresh
    ``episodes``, or completions of prompts (``counts``).

    :raises ValueError: unless exactly one form is asked for, and for settings of another form than that one.
    """

    tag: str = "on"
    params: Tensor | str = "live"
    """Who acts: a bank version, a flat parameter vector ``[n]``, or ``"random"``: uniform actions of the space (of
    environments), stored in the coordinates of the policy handed to ``collect``."""
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
        for name in ("steps", "episodes", "horizon", "groups"):
            if getattr(self, name) is not None:
                convert(getattr(self, name), Count, None, name)
        if not isinstance(self.tag, str) or not isinstance(self.params, str | Tensor):
            raise TypeError(
                f"Request: expected a name as tag and a version or a vector as params, got {self.tag!r} and "
                f"{type(self.params).__name__}"
            )
        if self.counts is not None and not (isinstance(self.counts, Tensor) and self.counts.dim() == 1):
            raise TypeError(f"counts: expected a tensor [Q] of int64, got {type(self.counts).__name__}")
        forms = [name for name in ("steps", "episodes", "counts") if getattr(self, name) is not None]
        if len(forms) != 1:
            raise ValueError(f"Request: expected one of steps, episodes and counts, got {forms or 'none of them'}")
        if self.episodes is None and not (self.horizon is None and self.groups is None):
            raise ValueError(f"Request: horizon and groups belong to episodes, got {forms[0]}")
        if self.episodes is not None and self.groups is not None and self.episodes % self.groups:
            raise ValueError(f"Request: expected episodes to be a multiple of groups, got {self.episodes} and "
                             f"{self.groups}")  # fmt: skip
        if self.episodes is not None and self.horizon is None:
            raise ValueError("Request: fresh episodes need a horizon (the longest episode, in steps)")
        if self.counts is None and (self.prompts is not None or self.source is not None or self.demonstrations):
            raise ValueError(f"Request: prompts, source and demonstrations belong to counts, got {forms[0]}")
        if self.prompts is not None and self.source is not None:
            raise ValueError(f"Request: expected prompts or a source of prompts, got both (source={self.source!r})")


class Actor(Protocol):
    """What collection needs of a policy."""

    def draw_noise(self, n: int, generator: torch.Generator | None, device: torch.device) -> Tensor: ...
    def initial_state(self, n: int) -> Tensor | None: ...
    def act(
        self, obs: Tree, noise: Tensor | None, state: Tensor | None = None, first: Tensor | None = None
    ) -> dict[str, Tensor]: ...
    def to_env(self, action: Tensor) -> Tensor: ...
    def behaviour_fields(self) -> tuple[Field, ...]: ...
    def behaviour(self, columns: dict[str, Tensor], action: Tensor) -> dict[str, Tensor]: ...


class Collector:
    """Collects with ``env`` (continued streams) and, on request, with ``make_env(n)`` (fresh episodes).

    :param env: the training environments; reset on first use with ``seed``.
    :param make_env: builds ``n`` environments for fresh episodes; they and their random numbers never touch training's.
    :param seed: of the environments, and of exploration and fresh episodes: streams of their own.
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
        self.generator = named_generator(seed, "exploration", self.device)
        self.fresh_generator = named_generator(seed, "fresh episodes", self.device)
        self.total_steps = 0
        """Valid environment steps of continued streams."""
        self.fresh_steps = 0
        """Valid environment steps of fresh episodes; with ``total_steps`` the agent's clock."""
        self.processes = 1
        """Of the training, each with a collector; their steps are counted together."""
        self.stats = EpisodeStats(torch.zeros(0), torch.zeros(0))
        self.log: dict[str, Any] = {}
        """Scalars that environments gave; the owner takes them away once per iteration."""
        self._noted: dict[str, Any] = {}
        self._told = False
        self.env_seconds = 0.0
        """Wall time spent in environments; the owner resets it."""
        self._stream = Stream(env)
        self._fresh: dict[int, Stream] = {}
        self._random_actor: RandomActor | None = None

    @property
    def clock(self) -> int:
        """Valid environment steps so far, of streams and of fresh episodes."""
        return self.total_steps + self.fresh_steps

    # -- requests -----------------------------------------------------------------------------------------------------

    def collect(self, request: Request, policy: Actor) -> Data:
        """Run ``policy`` as asked; the returned columns are views of the buffer, valid until the next request of this
        tag."""
        if request.counts is not None:
            raise ValueError(f"Collector: environments have no completions of prompts; ask for steps or episodes, got "
                             f"{request}")  # fmt: skip
        if isinstance(request.params, str) and request.params == "random":
            policy = self._random(policy)
        if request.steps is not None:
            self._stream.start(self.seed, resumed=self.total_steps > 0)
            data = self._roll(self._stream, policy, request.steps, self.generator, request.tag)
            dummies = self.env.autoreset_mode == AutoresetMode.NEXT_STEP
            count = int(data["valid"].sum()) if dummies else request.steps * self.env.num_envs
            self.total_steps += count * self.processes
            return data
        if request.episodes is None or request.horizon is None:
            raise ValueError(f"Collector: expected a request with steps or episodes, got {request}")
        data = self._episodes(request.episodes, request.horizon, policy, request.tag)
        if request.groups is None:
            return data
        columns = {k: data[k] for k in data} | {"group": data["group"] % request.groups}
        return Data(columns, sequence=data.sequence, successors=data._successors)

    def _episodes(self, episodes: int, horizon: int, policy: Actor, tag: str) -> Data:
        """``[horizon, episodes]``: one fresh episode per column, ``valid = 0`` after its end."""
        if episodes not in self._fresh:
            if self.make_env is None:
                raise ValueError("Collector: fresh episodes need make_env, a function that builds n environments")
            self._fresh[episodes] = Stream(self.make_env(episodes))
        stream = self._fresh[episodes]
        draw = torch.randint(2**31 - 1, (), generator=self.fresh_generator, device=self.device)
        stream.begin(stream.env.reset(seed=int(draw)))
        data = self._roll(stream, policy, horizon, self.fresh_generator, tag, fresh=True)
        first = torch.cat([torch.ones_like(data["carry"][:1]), data["carry"][:-1]]).cumprod(0) * data["valid"]
        self.fresh_steps += int(first.sum())
        # not those of _roll: it also counts what the columns went on with after their episodes
        returns = torch.where(first > 0, data["reward"], 0.0).double().sum(0)
        self.stats = EpisodeStats(returns.cpu(), first.sum(0).long().cpu())
        columns = {k: data[k] for k in data} | {"valid": first, "carry": data["carry"] * first}
        return Data(columns, sequence=data.sequence, successors=data._successors)

    # -- the loop -----------------------------------------------------------------------------------------------------

    def _random(self, policy: Actor) -> Actor:
        """Random actions in the coordinates of ``policy``."""
        if self._random_actor is None or self._random_actor.policy is not policy:
            self._random_actor = RandomActor(self.env.single_action_space, policy)
        return self._random_actor

    def _buffer(self, stream: Stream, policy: Actor, steps: int, tag: str) -> RolloutBuffer:
        """Of every tag its own: rollouts of one iteration (a probe, a second trajectory) are read together."""
        env, fields = stream.env, policy.behaviour_fields()
        key = (tag, steps, fields)
        if key not in stream.buffers:
            stream.buffers[key] = RolloutBuffer(
                steps, env.num_envs, env.single_observation_space, env.single_action_space,
                fields=(*fields, *self.fields), device=self.device,
                keep_final_obs=env.autoreset_mode != AutoresetMode.NEXT_STEP,
            )  # fmt: skip
            per_step = (f.name for f in fields if f.per == "step" and f.name != "log_prob")
            stream.buffers[key].written = {name: name.removeprefix("old_") for name in per_step}
        return stream.buffers[key]

    @torch.no_grad()
    def _roll(
        self, stream: Stream, policy: Actor, steps: int, generator: torch.Generator, tag: str, fresh: bool = False
    ) -> Data:
        env, n = stream.env, stream.env.num_envs
        manual = env.autoreset_mode == AutoresetMode.DISABLED
        buffer = self._buffer(stream, policy, steps, tag)
        assert stream.obs is not None
        buffer.begin(stream.obs)
        first = self._begin_state(stream, buffer, policy)
        # one draw for the whole rollout: per-step draws cost a kernel each and tie the numbers to the step count
        noise = policy.draw_noise(steps * n, generator, self.device)
        noise = noise.view(steps, n, *noise.shape[1:])
        noise_rows, step = noise.unbind(), stepper(env)
        columns = {name: buffer.extra[k] for k, name in buffer.written.items()}
        in_place = None
        if first is None:
            in_place = InPlaceActor.of(policy, buffer.row(0), noise, buffer.action_rows, columns)
        # asked after every step only where that costs nothing: elsewhere the host would wait for the device
        running = torch.ones(n, dtype=torch.bool, device=self.device) if fresh and self.device.type == "cpu" else None
        for t in range(steps):
            if in_place is not None:
                executed = in_place(t, buffer.row(t))
            else:
                if first is None:
                    out = policy.act(buffer.row(t), noise_rows[t])
                else:
                    out = policy.act(buffer.row(t), noise_rows[t], stream.state, first[t])
                    stream.state = out["state"]
                executed = policy.to_env(out["action"])
                buffer.write_action(t, out["action"], {k: out[name] for k, name in buffer.written.items()})
            start = time.perf_counter()
            log = step(executed, buffer.rows[t])
            self.env_seconds += time.perf_counter() - start
            if log:
                note(log, self.log, self._noted)
            if not manual and running is None and first is None:
                continue
            # read back from the buffer: a reset may clear the flags in the tensors that step returned
            done = buffer.terminated[t] | buffer.truncated[t]
            if first is not None:
                # with NEXT_STEP the dummy row after an end still shows the old episode; the one after it is the first
                late = env.autoreset_mode == AutoresetMode.NEXT_STEP
                first[t + 1].copy_(
                    (buffer.terminated[t - 1] | buffer.truncated[t - 1] if t else stream.ended) if late else done
                )
            if manual and bool(done.any()):
                buffer.keep_final(t)
                buffer.write_obs(t + 1, env.reset(mask=done))
            if running is not None:
                running &= ~done
                if not bool(running.any()):
                    buffer.clear(t + 1)
                    break
        stream.obs = buffer.row(steps)
        return self._finish(stream, buffer, policy, first)

    @staticmethod
    def _begin_state(stream: Stream, buffer: RolloutBuffer, policy: Actor) -> Tensor | None:
        """Store the state before the first row of a policy with a memory; ``first`` ``[T + 1, N]`` to fill, or None."""
        if "policy_state" not in buffer.extra:
            stream.state = None  # what acts in between leaves no state to go on from
            return None
        if stream.state is None:
            stream.state = policy.initial_state(stream.env.num_envs)
            stream.first.fill_(True)
        assert stream.state is not None
        buffer.extra["policy_state"].copy_(stream.state)
        first = torch.zeros((buffer.steps + 1, buffer.num_envs), dtype=torch.bool, device=buffer.device)
        first[0] = stream.first
        return first

    def _finish(self, stream: Stream, buffer: RolloutBuffer, policy: Actor, first: Tensor | None) -> Data:
        env = stream.env
        for name, value in policy.behaviour(buffer.extra, buffer.action).items():
            buffer.extra[name].copy_(value)
        if first is not None:
            stream.first.copy_(first[-1])
        hidden = not env.provides_final_obs and env.autoreset_mode == AutoresetMode.SAME_STEP
        if buffer.steps == 1 and env.autoreset_mode != AutoresetMode.NEXT_STEP:
            data, self.stats = finish_step(stream, buffer, hidden)
        else:
            data, self.stats = finish_rollout(stream, buffer, hidden)
        reads: frozenset[str] | None = getattr(policy, "reads", None)
        check_finite(buffer, data, reads)
        check_states(buffer.obs, env.single_observation_space, reads)
        return data if first is None else data.with_raw(first=first[:-1])

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
            if stream.state is not None:
                state |= {"policy_state": stream.state.clone(), "first": stream.first.clone()}
            state |= {"env": self.env.state_dict(), "obs": tree_map(torch.clone, stream.obs)}  # type: ignore[attr-defined]
            state |= {"backend": type(self.env).__name__, "task": task_name(self.env)}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken; environments without state start fresh episodes instead."""
        restore_generator(self.generator, state["generator"])
        restore_generator(self.fresh_generator, state["fresh_generator"])
        self.total_steps, self.fresh_steps = state["total_steps"], state.get("fresh_steps", 0)
        stream = self._stream
        if not self.total_steps:  # as new, so that the first episodes are those of the seed
            stream.begin(None)
            return
        note = self.resume_note
        # shapes do not tell tasks apart: HalfCheetah's state fits Walker2d
        for name, own in (("backend", type(self.env).__name__), ("task", task_name(self.env))):
            if note is None and "env" in state and state.get(name, own) != own:
                note = f"the saved state is of a {state[name]}, the environment is a {own}"
        if note is not None:
            self._tell(note)
        if "env" not in state or note is not None:
            # a seed that depends on progress: restarting from the first seed would replay the first episodes
            stream.begin(self.env.reset(seed=stream_seed(self.seed, f"resumed at {self.total_steps}")))
            return
        for name in ("step", "ended", "returns"):
            getattr(stream, name).copy_(state[name])
        stream.state, stream.restarts = None, True
        if "policy_state" in state:
            stream.state = state["policy_state"].to(self.device, copy=True)
            stream.first.copy_(state["first"])
        self.env.load_state_dict(state["env"])  # type: ignore[attr-defined]
        stream.obs = tree_map(torch.clone, state["obs"])

    def close(self) -> None:
        """Close the environments, each once."""
        for env in {id(env): env for env in (self.env, *(stream.env for stream in self._fresh.values()))}.values():
            env.close()
