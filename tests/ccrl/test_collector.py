"""The collector on the scripted clock: borders, statistics, bad numbers, resume."""

from __future__ import annotations

import warnings
from typing import Any

import gymnasium as gym
import pytest
import torch

from ccrl.batched_env import AutoresetMode, StepResult
from ccrl.collect import Collector, Request
from ccrl.data import Data, Field
from ccrl.policies import MLPPolicy
from ccrl.seeding import stream_seed
from ccrl.stream import note
from ccrl.testing import ClockEnv, Episode

SCRIPT = [
    [Episode(0, 3, "terminate"), Episode(100, 5, "truncate")],
    [Episode(10, 2, "truncate"), Episode(200, 4, "both")],
]
FACTS = ("obs", "reward", "terminated", "truncated", "alive", "carry", "valid", "t")


def policy() -> MLPPolicy:
    torch.manual_seed(0)
    return MLPPolicy(gym.spaces.Box(-1, 1, (1,)), gym.spaces.Discrete(2), hidden=(4,))


def snapshot(data: Data, names: tuple[str, ...] = FACTS) -> dict[str, torch.Tensor]:
    return {k: data[k].clone() for k in names} | {"next": data.next_obs().clone()}


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_rollout_borders_lose_nothing(mode: AutoresetMode) -> None:
    actor = policy()
    whole = snapshot(Collector(ClockEnv(SCRIPT, autoreset_mode=mode)).collect(Request(steps=24), actor))
    collector = Collector(ClockEnv(SCRIPT, autoreset_mode=mode))
    pieces, ended = [], 0
    for steps in (1, 5, 2, 9, 7):
        pieces.append(snapshot(collector.collect(Request(steps=steps), actor)))
        ended += len(collector.stats.returns)
    for name, value in whole.items():
        torch.testing.assert_close(torch.cat([p[name] for p in pieces]), value, rtol=0, atol=0)
    assert collector.total_steps == int(whole["valid"].sum())
    assert ended == int((whole["terminated"] | whole["truncated"]).sum())


def test_dict_observations_are_collected() -> None:
    env = ClockEnv(SCRIPT, groups=True)
    actor = MLPPolicy(env.single_observation_space, gym.spaces.Discrete(2), hidden=(4,))
    data = Collector(env).collect(Request(steps=4), actor)
    assert data["obs"]["critic"][:, 0].tolist() == [[0, 0], [1, 1], [2, 2], [100, 0]]
    assert data.next_obs()["critic"][2, 0].tolist() == [3, 3]


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_episode_statistics_by_hand(mode: AutoresetMode) -> None:
    env = ClockEnv([[Episode(0, 3, "terminate")], [Episode(10, 5, "truncate")]], autoreset_mode=mode, reward=2.0)
    collector, actor = Collector(env), policy()
    collector.collect(Request(steps=2), actor)
    assert len(collector.stats.returns) == 0
    collector.collect(Request(steps=3), actor)  # copy 0 ends at its 3rd step, copy 1 at its 5th
    assert collector.stats.returns.tolist() == [6.0, 10.0]
    assert collector.stats.lengths.tolist() == [3, 5]


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_an_episode_that_ends_with_the_rollout_adds_nothing_to_the_next(mode: AutoresetMode) -> None:
    env = ClockEnv([[Episode(0, 3, "terminate")], [Episode(10, 3, "truncate")]], autoreset_mode=mode, reward=2.0)
    collector, actor = Collector(env), policy()
    dummy = int(mode == AutoresetMode.NEXT_STEP)
    for steps in (3, 3 + dummy, 2 + dummy, 1):
        collector.collect(Request(steps=steps), actor)
        if steps != 2 + dummy:
            assert collector.stats.returns.tolist() == [6.0, 6.0]
            assert collector.stats.lengths.tolist() == [3, 3]


@pytest.mark.parametrize(
    ("mode", "hidden"), [*((mode, False) for mode in AutoresetMode), (AutoresetMode.SAME_STEP, True)]
)
def test_single_steps_are_the_rollout_cut_in_pieces(mode: AutoresetMode, hidden: bool) -> None:
    """Rollouts of one step have a path of their own; a checkpoint in between changes nothing."""
    make = lambda: Collector(ClockEnv(SCRIPT, autoreset_mode=mode, provides_final_obs=not hidden))  # noqa: E731
    actor, collector = policy(), make()
    names = (*FACTS, "action", "log_prob", "old_logits")
    whole_data = collector.collect(Request(steps=20), actor)
    whole, stats = snapshot(whole_data, names), collector.stats
    value = whole_data.state_values(lambda obs: obs.sum(-1))
    collector, pieces, values, ended = make(), [], [], []
    for step in range(20):
        if step in (3, 9):  # 3: right after an end
            state, collector = collector.state_dict(), make()
            collector.load_state_dict(state)
        data = collector.collect(Request(steps=1), actor)
        pieces.append(snapshot(data, names))
        values.append(data.state_values(lambda obs: obs.sum(-1)))
        ended += list(zip(collector.stats.returns.tolist(), collector.stats.lengths.tolist()))
    for name, expected in whole.items():
        if name in ("action", "log_prob", "old_logits"):
            continue  # noise is drawn per rollout
        torch.testing.assert_close(torch.cat([p[name] for p in pieces]), expected, rtol=0, atol=0, msg=name)
    for i in range(2):
        torch.testing.assert_close(torch.cat([v[i] for v in values]), value[i], rtol=0, atol=0)
    # the same order: by row, then by environment
    assert ended == list(zip(stats.returns.tolist(), stats.lengths.tolist()))
    assert collector.total_steps == int(whole["valid"].sum())


def test_random_actions_act_in_the_policys_coordinates() -> None:
    space = gym.spaces.Box(-2.0, 6.0, (1,))
    env = ClockEnv(SCRIPT, action_space=space)
    actor = MLPPolicy(env.single_observation_space, space, hidden=(4,), squash=True)
    collector = Collector(env)
    data = collector.collect(Request(steps=400, params="random"), actor)
    executed = actor.to_env(data["action"])
    assert executed.mean().item() == pytest.approx(2.0, abs=0.25)  # deviation 8 / sqrt 12 / sqrt 800 = .08
    assert executed.min().item() < -1.9
    assert executed.max().item() > 5.9
    assert "log_prob" not in data, "random actions do not come from the policy's distribution"
    assert "log_prob" in collector.collect(Request(steps=4), actor)


def test_hidden_final_observations_are_not_read() -> None:
    """An environment that resets in the same step and hides the last observation: the state before stands in."""
    env = ClockEnv(SCRIPT, provides_final_obs=False)
    data = Collector(env).collect(Request(steps=4), policy())
    assert data.next_obs()[:, 0].flatten().tolist() == [1, 2, 2, 101]
    assert data.next_obs()[:, 1].flatten().tolist() == [11, 11, 201, 202]


def test_environment_time_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(1000))  # a clock that moves by one at every look
    monkeypatch.setattr("ccrl.collect.time.perf_counter", lambda: next(ticks))
    collector = Collector(ClockEnv(SCRIPT))
    collector.collect(Request(steps=5), policy())
    collector.collect(Request(steps=2), policy())
    assert collector.env_seconds == 7.0


def test_log_entries_are_means_over_the_steps_that_had_them() -> None:
    class Logging(ClockEnv):
        count = 0

        def step(self, action: torch.Tensor) -> StepResult:
            self.count += 1
            return super().step(action)._replace(log={f"env/{self.count}": float(self.count), "env/every": self.count})

    collector = Collector(Logging(SCRIPT))
    collector.collect(Request(steps=3), policy())
    assert collector.log == {"env/1": 1.0, "env/2": 2.0, "env/3": 3.0, "env/every": 2.0}


def test_policies_with_other_behaviour_columns_have_buffers_of_their_own() -> None:
    class Bare(MLPPolicy):
        def behaviour_fields(self) -> tuple[Field, ...]:
            return (Field("log_prob"), Field("extra"))

        def behaviour(self, columns: Any, action: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"log_prob": torch.zeros(action.shape)}

        def act(self, obs: Any, noise: torch.Tensor | None) -> dict[str, torch.Tensor]:
            out = super().act(obs, noise)
            return out | {"extra": torch.full(out["action"].shape, 7.0)}

    collector = Collector(ClockEnv(SCRIPT))
    data = collector.collect(Request(steps=3), policy())
    assert "old_logits" in data
    data = collector.collect(Request(steps=3), Bare(gym.spaces.Box(-1, 1, (1,)), gym.spaces.Discrete(2)))
    assert "old_logits" not in data
    assert data["extra"].eq(7).all()


def test_behaviour_columns_are_those_of_the_policy_that_acted() -> None:
    actor = policy()
    data = Collector(ClockEnv(SCRIPT)).collect(Request(steps=6), actor)
    again = actor.evaluate(data, frozenset({"log_prob", "dist"}))
    torch.testing.assert_close(data["log_prob"], again["log_prob"])
    torch.testing.assert_close(data["old_logits"], again["logits"])


def test_seeds_decide_the_actions() -> None:
    def actions(seed: int) -> list[list[int]]:
        result: list[list[int]] = (
            Collector(ClockEnv(SCRIPT), seed=seed).collect(Request(steps=30), policy())["action"].tolist()
        )
        return result

    assert actions(3) == actions(3)
    assert actions(3) != actions(4)


class Broken(ClockEnv):
    """Writes a number into copy 1 at one step."""

    def __init__(self, where: str, value: float, at: int) -> None:
        super().__init__(SCRIPT)
        self.where, self.value, self.at, self.steps = where, value, at, 0

    def step(self, action: torch.Tensor) -> StepResult:
        result = super().step(action)
        if self.steps == self.at:
            getattr(result, self.where)[1] = self.value
        self.steps += 1
        return result


@pytest.mark.parametrize(
    ("where", "value", "at", "name"),
    [
        ("reward", float("nan"), 3, "reward"),
        ("reward", float("inf"), 0, "reward"),
        ("obs", float("nan"), 3, "obs"),
        ("final_obs", float("nan"), 1, "final obs"),  # copy 1 ends there; elsewhere the clock itself writes NaN
    ],
)
def test_bad_numbers_name_environment_and_step(where: str, value: float, at: int, name: str) -> None:
    with pytest.raises(FloatingPointError, match=rf"^{name} is not finite: environment 1, step {at} "):
        Collector(Broken(where, value, at)).collect(Request(steps=6), policy())


def test_bad_actions_are_named_before_what_they_lead_to() -> None:
    class Drunk(MLPPolicy):
        step = 0

        def act(self, obs: Any, noise: torch.Tensor | None) -> dict[str, torch.Tensor]:
            out = super().act(obs, noise)
            self.step += 1
            if self.step == 3:
                out["action"] = out["action"].index_fill(0, torch.tensor([1]), torch.nan)
            return out

    box = gym.spaces.Box(-1, 1, (1,))
    collector = Collector(ClockEnv(SCRIPT, action_space=box))
    with pytest.raises(FloatingPointError, match=r"^action is not finite: environment 1, step 2 "):
        collector.collect(Request(steps=6), Drunk(box, box, hidden=(4,)))


@pytest.mark.parametrize(("state", "fine"), [(-1, False), (0, True), (2, True), (3, False)])
def test_discrete_states_stay_in_their_space(state: int, fine: bool) -> None:
    class States(ClockEnv):
        def _tree(self, buffer: torch.Tensor) -> Any:
            return torch.full((self.num_envs,), state)

    env = States(SCRIPT)
    env.single_observation_space = gym.spaces.Discrete(3)  # type: ignore[assignment]
    actor = MLPPolicy(env.single_observation_space, gym.spaces.Discrete(2), hidden=(4,))
    if fine:
        Collector(env).collect(Request(steps=2), actor)
        return
    with pytest.raises(ValueError, match=rf"obs: expected one of Discrete\(3\), got {state} from environment 0"):
        Collector(env).collect(Request(steps=2), actor)


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_resume_equals_an_uninterrupted_run(mode: AutoresetMode) -> None:
    actor, names = policy(), (*FACTS, "action", "log_prob")

    def make() -> Collector:
        return Collector(ClockEnv(SCRIPT, autoreset_mode=mode), seed=7)

    straight = make()
    straight.collect(Request(steps=7), actor)
    state: dict[str, Any] = straight.state_dict()
    expected = snapshot(straight.collect(Request(steps=11), actor), names)
    returns = straight.stats.returns
    resumed = make()
    resumed.load_state_dict(state)
    got = snapshot(resumed.collect(Request(steps=11), actor), names)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=0)
    assert resumed.stats.returns.tolist() == returns.tolist()
    assert resumed.total_steps == straight.total_steps


class Forgetful(ClockEnv):
    """An environment without state: resuming starts fresh episodes, not the very first ones again."""

    state_dict = property()  # type: ignore[assignment]

    def reset(self, seed: int | None = None, mask: torch.Tensor | None = None) -> Any:
        if mask is None:
            self.seed = seed
        return super().reset(seed, mask)


def test_resume_without_environment_state_uses_another_seed() -> None:
    first, actor = Collector(Forgetful(SCRIPT), seed=5), policy()
    first.collect(Request(steps=4), actor)
    assert first.env.seed == 5  # type: ignore[attr-defined]
    assert not first.exact
    second = Collector(Forgetful(SCRIPT), seed=5)
    second.load_state_dict(first.state_dict())
    assert second.env.seed == stream_seed(5, f"resumed at {first.total_steps}")  # type: ignore[attr-defined]
    assert second.collect(Request(steps=1), actor)["t"].tolist() == [[0, 0]]
    first.collect(Request(steps=2), actor)  # in the middle of an episode
    first.load_state_dict(first.state_dict())
    assert first.collect(Request(steps=1), actor)["t"].tolist() == [[0, 0]]
    first.collect(Request(steps=2), actor)
    assert first.stats.returns.tolist() == [2.0, 3.0], "rewards of the dropped episodes are not counted"


def test_requests_are_checked() -> None:
    with pytest.raises(ValueError, match="expected one of steps, episodes and counts, got none of them"):
        Request()
    with pytest.raises(ValueError, match=r"expected one of .*, got \['steps', 'episodes'\]"):
        Request(steps=4, episodes=2, horizon=3)
    with pytest.raises(ValueError, match=r"expected one of .*, got \['episodes', 'counts'\]"):
        Request(episodes=2, horizon=3, counts=torch.ones(1))
    with pytest.raises(ValueError, match="source and demonstrations belong to counts, got steps"):
        Request(steps=4, source="on")
    with pytest.raises(ValueError, match="expected prompts or a source of prompts, got both"):
        Request(counts=torch.ones(1), prompts=object(), source="on")
    with pytest.raises(ValueError, match="horizon"):
        Request(episodes=2)
    for what in ({"horizon": 3}, {"groups": 2}):
        with pytest.raises(ValueError, match="horizon and groups belong to episodes, got steps"):
            Request(steps=4, **what)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="make_env"):
        Collector(ClockEnv(SCRIPT)).collect(Request(episodes=2, horizon=3), policy())


@pytest.mark.parametrize("what", [{}, {"source": "on"}, {"demonstrations": True}])
def test_what_only_language_models_have_is_refused(what: dict[str, Any]) -> None:
    collector = Collector(ClockEnv(SCRIPT), make_env=lambda n: ClockEnv([SCRIPT[0]] * n))
    with pytest.raises(ValueError, match="no completions of prompts"):
        collector.collect(Request(counts=torch.ones(2)), policy())
    with pytest.raises(ValueError, match="belong to counts, got episodes"):
        Request(episodes=2, horizon=3, **what or {"prompts": object()})


def test_steps_with_nothing_to_tell_are_left_out_of_a_logged_mean():
    log, counts, nan = {}, {}, float("nan")
    for value in (nan, 2.0, nan, 4.0, 6.0):
        note({"ended": torch.tensor(value), "every": 1.0}, log, counts)
    assert float(log["ended"]) == 4.0
    assert log["every"] == 1.0
    log.clear()  # read by the learner; the next mean starts anew
    note({"ended": torch.tensor(3)}, log, counts)
    note({"ended": torch.tensor(5)}, log, counts)
    assert float(log["ended"]) == 4.0
    log.clear()
    note({"ended": torch.tensor(nan)}, log, counts)
    assert log["ended"].isnan()


def test_a_number_that_the_environment_overwrites_is_logged_as_it_was():
    log, counts, own = {}, {}, torch.tensor(1.0)
    for value in (1.0, 3.0):
        note({"own": own.fill_(value)}, log, counts)
    assert float(log["own"]) == 2.0  # of 1 and 3


def test_a_state_from_before_the_first_step_begins_as_a_new_collector():
    actor, new, loaded = policy(), Collector(ClockEnv(SCRIPT), seed=3), Collector(Forgetful(SCRIPT), seed=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is lost: nothing was there
        loaded.load_state_dict(new.state_dict())
    loaded.collect(Request(steps=1), actor)
    assert loaded.env.seed == 3  # type: ignore[attr-defined]


def test_factors_of_states_stay_in_their_space() -> None:
    """Out of it all would be one state: no indicator is 1."""

    class States(ClockEnv):
        def _tree(self, buffer: torch.Tensor) -> Any:
            return torch.tensor([[1, 2]]).expand(self.num_envs, -1)

    env = States(SCRIPT)
    env.single_observation_space = gym.spaces.MultiDiscrete([3, 2])  # type: ignore[assignment]
    actor = MLPPolicy(env.single_observation_space, gym.spaces.Discrete(2), hidden=(4,))
    with pytest.raises(ValueError, match=r"obs: expected one of MultiDiscrete\(\[3 2\]\), got \[1, 2\] from env"):
        Collector(env).collect(Request(steps=2), actor)


def test_observations_that_no_network_reads_may_be_anything() -> None:
    class Camera(ClockEnv):
        def _tree(self, buffer: torch.Tensor) -> Any:
            return {"clock": buffer[:, :1], "depth": torch.full((self.num_envs, 2), torch.inf),
                    "room": torch.full((self.num_envs,), 9)}  # fmt: skip

    env = Camera(SCRIPT)
    box, three = gym.spaces.Box, gym.spaces.Discrete(3)
    leaves = {"clock": box(-1, 1, (1,)), "depth": box(-1, 1, (2,)), "room": three}
    env.single_observation_space = gym.spaces.Dict(leaves)  # type: ignore[assignment]
    whole = gym.spaces.Dict(leaves | {"room": gym.spaces.Discrete(3, start=1)})
    only = {"actor": ("clock",), "critic": ("clock",)}
    two = gym.spaces.Discrete(2)
    for space in (env.single_observation_space, whole):
        actor = MLPPolicy(space, two, hidden=(4,), groups=only, normalise_obs=True)  # type: ignore[arg-type]
        data = Collector(env).collect(Request(steps=2), actor)
        actor.update_normaliser(data["obs"], data["valid"])
        assert all(bool(x.isfinite().all()) for x in actor.state_dict().values())
    for groups, name in (({"actor": ("clock", "depth")}, "depth"), ({"actor": ("clock", "room")}, "room")):
        reader = MLPPolicy(env.single_observation_space, two, hidden=(4,), groups=only | groups)  # type: ignore[arg-type]
        with pytest.raises((FloatingPointError, ValueError), match=name):
            Collector(env).collect(Request(steps=2), reader)
