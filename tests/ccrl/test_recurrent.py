"""Policies with a memory: states in rollouts, updates and evaluation against a loop over single episodes."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor

from ccrl.batched_env import AutoresetMode
from ccrl.collect import Collector, Request
from ccrl.data import Batching, Data
from ccrl.experiment.evaluation import evaluate
from ccrl.policies import MLPPolicy, RecurrentPolicy
from ccrl.policies.acting import Acting, has_memory, predict
from ccrl.policies.memory import Memory
from ccrl.testing import ClockEnv, Episode

SCRIPT = [
    [Episode(0, 3, "terminate"), Episode(1, 5, "truncate")],
    [Episode(-1, 2, "truncate"), Episode(2, 4, "both")],
]
CPU = torch.device("cpu")


def policy(kind: str = "gru", **settings: object) -> RecurrentPolicy:
    torch.manual_seed(0)
    made = RecurrentPolicy(
        gym.spaces.Box(-np.inf, np.inf, (1,)), gym.spaces.Discrete(2), recurrent=kind, recurrent_size=3, hidden=(4,),
        orthogonal=False, **settings,
    )  # fmt: skip
    with torch.no_grad():  # a policy head near zero would hide what the memory does
        for p in made.parameters():
            p.mul_(2.0)
    return made


def clock(mode: AutoresetMode = AutoresetMode.SAME_STEP, **options: bool) -> ClockEnv:
    return ClockEnv(SCRIPT, autoreset_mode=mode, **options)


def episode(actor: RecurrentPolicy, base: float, length: int) -> tuple[Tensor, Tensor]:
    """One episode of the script played on its own: logits ``[length, 2]``, values ``[length + 1]`` with the last of the
    final observation."""
    logits, values, state = [], [], actor.initial_state(1)
    with torch.no_grad():
        for step in range(length + 1):
            obs = torch.tensor([[base + step]])
            columns = {"obs": obs.unsqueeze(0), "action": torch.zeros(1, 1, dtype=torch.int64)}
            columns |= {"valid": torch.ones(1, 1), "policy_state": state, "first": torch.tensor([[False]])}
            batch = Data(columns, sequence=frozenset({"policy_state"}))
            values.append(actor.evaluate(batch, frozenset({"value"}))["value"][0, 0])
            out = actor.act(obs, None, state)
            logits.append(out["logits"][0])
            state = out["state"]
    return torch.stack(logits[:-1]), torch.stack(values)


Row = tuple[Tensor, Tensor, Tensor] | None


def expected(actor: RecurrentPolicy, env: int, mode: AutoresetMode, rows: int) -> list[Row]:
    """Row by row ``(logits, value, value of the successor)`` of copy ``env``; None on dummy rows."""
    out: list[Row] = []
    while len(out) < rows:
        for base, length, _ in SCRIPT[env]:
            logits, values = episode(actor, base, length)
            out += [(logits[i], values[i], values[i + 1]) for i in range(length)]
            out += [None] * (mode == AutoresetMode.NEXT_STEP)
    return out[:rows]


@pytest.mark.parametrize("kind", ["gru", "lstm"])
@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_rollouts_are_their_episodes_one_by_one(kind: str, mode: AutoresetMode) -> None:
    actor = policy(kind)
    collector, row = Collector(clock(mode)), 0
    reference = [expected(actor, env, mode, 23) for env in range(2)]
    for steps in (4, 1, 1, 9, 8):  # borders in the middle of episodes, at their ends, and single steps
        data = collector.collect(Request(steps=steps), actor)
        with torch.no_grad():
            value, after = actor.state_values(data)
            out = actor.evaluate(data, frozenset({"log_prob", "value", "dist"}))
        for t in range(steps):
            for env in range(2):
                known = reference[env][row + t]
                assert bool(data["valid"][t, env]) == (known is not None)
                if known is None:
                    continue
                logits, v, v_after = known
                torch.testing.assert_close(data["old_logits"][t, env], logits)
                torch.testing.assert_close(out["logits"][t, env], logits)
                torch.testing.assert_close(out["value"][t, env], v)
                torch.testing.assert_close(value[t, env], v)
                if bool(data["alive"][t, env]):
                    torch.testing.assert_close(after[t, env], v_after)
                torch.testing.assert_close(data["log_prob"][t, env], out["log_prob"][t, env])
        row += steps


def test_hidden_final_observations_are_stood_in_for() -> None:
    actor = policy()
    data = Collector(clock(provides_final_obs=False)).collect(Request(steps=8), actor)
    value, after = actor.state_values(data)
    ended = data["terminated"] | data["truncated"]
    torch.testing.assert_close(after[ended], value[ended])
    torch.testing.assert_close(after[:-1][~ended[:-1]], value[1:][~ended[:-1]])


def test_a_loaded_collector_goes_on_from_the_state() -> None:
    actor = policy()
    first = Collector(clock())
    first.collect(Request(steps=4), actor)
    second = Collector(clock())
    second.load_state_dict(first.state_dict())
    for _ in range(2):
        a, b = (c.collect(Request(steps=3), actor) for c in (first, second))
        for name in ("old_logits", "policy_state", "first", "action"):
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=0)


def test_random_steps_in_between_begin_with_an_empty_state() -> None:
    actor = policy()
    collector = Collector(clock())
    collector.collect(Request(steps=4), actor)
    collector.collect(Request(steps=1, params="random"), actor)
    data = collector.collect(Request(steps=2), actor)
    assert data["first"].tolist()[0] == [True, True]
    assert data["policy_state"].eq(0).all()


def test_fresh_episodes_leave_the_training_state_alone() -> None:
    actor = policy()
    collector = Collector(clock(), make_env=lambda n: clock())
    collector.collect(Request(steps=4), actor)
    before = collector.state_dict()["policy_state"]
    data = collector.collect(Request(episodes=2, horizon=4), actor)
    assert data["policy_state"].eq(0).all()
    torch.testing.assert_close(data["old_logits"][:3, 0], episode(actor, 0, 3)[0])
    assert torch.equal(collector.state_dict()["policy_state"], before)


def test_gradients_flow_back_to_the_episodes_start_and_no_further() -> None:
    actor = policy()
    data = Collector(clock()).collect(Request(steps=8), actor)
    obs = data["obs"].clone().requires_grad_()
    columns = {k: data[k] for k in data} | {"obs": obs}
    batch = Data(columns, sequence=data.sequence)
    out = actor.evaluate(batch, frozenset({"log_prob"}))["log_prob"]
    (slope,) = torch.autograd.grad(out[5, 0], obs)  # copy 0: rows 3.. are its second episode
    moved = slope[:, 0, 0] != 0
    assert moved.tolist() == [False, False, False, True, True, True, False, False]


def test_memories_match_torchs_layers() -> None:
    torch.manual_seed(0)
    x, first = torch.randn(5, 3, 2), torch.zeros(5, 3, dtype=torch.bool)
    for kind, layer in (("gru", torch.nn.GRU(2, 4)), ("lstm", torch.nn.LSTM(2, 4))):
        memory = Memory(kind, 2, 4)
        memory.cell.load_state_dict({k.removesuffix("_l0"): v for k, v in layer.state_dict().items()})
        out, states = memory(x, torch.zeros(3, memory.state_size), first)
        theirs, last = layer(x)
        torch.testing.assert_close(out, theirs)
        torch.testing.assert_close(states[-1], torch.cat(last, -1)[0] if kind == "lstm" else last[0])
    with pytest.raises(ValueError, match="gru or lstm"):
        Memory("rnn", 2, 4)


def test_minibatches_are_whole_columns() -> None:
    actor = policy()
    data = Collector(clock()).collect(Request(steps=6), actor)
    whole = actor.evaluate(data, frozenset({"log_prob"}))["log_prob"]
    for batch in data.epoch(Batching("sequence", 1), torch.Generator().manual_seed(0)):
        column = int(batch["group"][0])
        part = actor.evaluate(batch, frozenset({"log_prob"}))["log_prob"]
        torch.testing.assert_close(part[:, 0], whole[:, column])
    rows = data.epoch(Batching("transition", 4), torch.Generator().manual_seed(0))[0]
    with pytest.raises(ValueError, match="unit='sequence'"):
        actor.evaluate(rows, frozenset({"log_prob"}))
    for call in (actor.params, actor.values):
        with pytest.raises(ValueError, match="without its state"):
            call(torch.zeros(2, 1))


# -- acting outside of training --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_evaluation_forgets_where_episodes_begin(mode: AutoresetMode) -> None:
    actor, env = policy(), clock(mode)
    seen: list[Tensor] = []

    class Watched(RecurrentPolicy):
        def act(self, *args: Tensor | None) -> dict[str, Tensor]:
            out = super().act(*args)
            seen.append(out["logits"][0])
            return out

    actor.__class__ = Watched
    evaluate(Acting(actor, CPU), env, episodes=6)
    rows, actor.__class__ = list(seen), RecurrentPolicy
    assert len(rows) > 8, "more than one episode"
    for row, known in zip(rows, expected(actor, 0, mode, len(rows))):
        if known is not None:
            torch.testing.assert_close(row, known[0])


def test_predict_carries_the_state_as_sb3_does() -> None:
    actor = policy("lstm")
    space = gym.spaces.Box(-np.inf, np.inf, (1,))
    observations = np.float32([[[0.0], [5.0]], [[1.0], [6.0]], [[2.0], [0.0]]])
    state, first = None, np.array([True, True])
    states = []
    for t, obs in enumerate(observations):
        action, state = predict(actor, space, obs, state, first, True, CPU)
        assert action.shape == (2,)
        states.append(state)
        first = np.array([False, t == 1])  # the second copy begins anew at its third observation
    one, state = predict(actor, space, np.float32([0.0]), None, None, True, CPU)
    assert one.shape == ()
    np.testing.assert_allclose(state[0][0], states[0][0][0], rtol=1e-6)
    # the same observation after an empty state
    np.testing.assert_allclose(states[2][0][1], state[0][0], rtol=1e-6)
    assert not np.allclose(states[2][0][0], states[0][0][0])
    for wrong in ((np.zeros((2, 5)),), np.zeros((2, 12)), (np.zeros((3, 12)),)):
        with pytest.raises(ValueError, match="state: expected"):
            predict(actor, space, observations[0], wrong, None, True, CPU)
    with pytest.raises(ValueError, match="episode_start: expected 2 rows"):
        predict(actor, space, observations[0], (np.zeros((2, 12)),), np.zeros(3), True, CPU)


def test_policies_without_a_memory_hand_the_state_back() -> None:
    plain = MLPPolicy(gym.spaces.Box(-1, 1, (1,)), gym.spaces.Discrete(2), hidden=(2,))
    token = (np.zeros(3),)
    assert predict(plain, gym.spaces.Box(-1, 1, (1,)), np.zeros(1), token, None, True, CPU)[1] is token
    assert not has_memory(plain)
    assert has_memory(policy(heads={}))
    assert policy(heads={}).initial_state(2).shape == (2, 3)
    assert policy().initial_state(2).shape == (2, 6)
