import gymnasium as gym
import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode

from ccrl.batched_env import BatchedEnv, StepResult
from ccrl.experiment.csv_table import read_columns
from ccrl.experiment.evaluation import EvalLog, EvalResult, evaluate, evaluate_agent
from ccrl.experiment.video import record_video
from ccrl.seeding import stream_seed
from ccrl.testing.clock import ClockEnv, Episode


class Script:
    """Slot ``n`` plays episodes of ``lengths[n]`` in turn; a step's reward is ``100 n + episode + action``."""

    single_observation_space = Box(-1e6, 1e6, (2,))
    single_action_space = Discrete(2)
    provides_final_obs = False
    device = torch.device("cpu")

    def __init__(self, lengths, mode):
        self.lengths, self.autoreset_mode, self.num_envs = lengths, mode, len(lengths)

    def reset(self, seed=None, mask=None):
        if mask is None:
            self.seed = seed
            self.episode = torch.zeros(self.num_envs, dtype=torch.long)
            self.t = torch.zeros(self.num_envs, dtype=torch.long)
            self.over = torch.zeros(self.num_envs, dtype=torch.bool)
        else:
            assert bool((mask == self.over).all())
            self._next(mask)
        return self._obs()

    def step(self, action):
        if self.autoreset_mode == AutoresetMode.DISABLED:
            assert not bool(self.over.any()), "stepped a finished episode"
        idle = self.over & (self.autoreset_mode == AutoresetMode.NEXT_STEP)
        self._next(idle)
        self.t += ~idle
        reward = torch.where(idle, 0.0, 100.0 * torch.arange(self.num_envs) + self.episode + action)
        limit = torch.tensor([own[int(k) % len(own)] for own, k in zip(self.lengths, self.episode, strict=True)])
        done = (self.t == limit) & ~idle
        terminated, truncated = done & (self.episode % 2 == 0), done & (self.episode % 2 == 1)
        self.over = done.clone()
        if self.autoreset_mode == AutoresetMode.SAME_STEP:
            self._next(done)
        # what a step that only resets returns beside the observation must not count
        return StepResult(self._obs(), torch.where(idle, 1e6, reward), terminated | idle, truncated)

    def render(self, index):
        frame = np.zeros((33, 48, 3), dtype=np.uint8)
        frame[:, : 4 * (1 + int(self.t[index]))] = 255
        return frame

    def close(self):
        pass

    def _next(self, mask):
        self.episode += mask
        self.t[mask] = 0
        self.over = self.over & ~mask

    def _obs(self):
        return torch.stack([self.t, self.episode], dim=1).float()


MODES = list(AutoresetMode)
LENGTHS = [[1, 2], [7, 4], [3]]


def zero(obs, deterministic):
    return torch.zeros(len(obs), dtype=torch.long)


@pytest.mark.parametrize("mode", MODES)
def test_episodes_belong_to_slots(mode):
    env = Script(LENGTHS, mode)
    assert isinstance(env, BatchedEnv)
    evaluation = evaluate(zero, env, episodes=7, seed=11)
    # Slot 0 plays episodes 0, 3, 6, slot 1 plays 1, 4, slot 2 plays 2, 5, however many slot 0 could have finished.
    assert evaluation.lengths.tolist() == [1, 7, 3, 2, 4, 3, 1]
    assert evaluation.returns.tolist() == [0.0, 700.0, 600.0, 2.0, 404.0, 603.0, 2.0]
    assert env.seed == stream_seed(11, "evaluation")


@pytest.mark.parametrize("mode", MODES)
def test_fewer_episodes_than_slots(mode):
    assert evaluate(zero, Script(LENGTHS, mode), episodes=2).lengths.tolist() == [1, 7]


@pytest.mark.parametrize("mode", MODES)
def test_envs_that_write_their_buffers_in_place(mode):
    script = [[Episode(0.0, 2), Episode(10.0, 3, "truncate")], [Episode(20.0, 4, "both")]]
    env = ClockEnv(script, autoreset_mode=mode, reward=0.5, groups=True)
    clocks = []

    def predict(obs, deterministic):
        clocks.append(float(obs["policy"][0]))
        return torch.zeros(2, dtype=torch.long)

    evaluation = evaluate(predict, env, episodes=4)
    assert evaluation.lengths.tolist() == [2, 4, 3, 4]
    assert evaluation.returns.tolist() == [1.0, 2.0, 1.5, 2.0]
    idle = [2.0] if mode == AutoresetMode.NEXT_STEP else []  # the step that only resets still sees the last state
    assert clocks[: 5 + len(idle)] == [0.0, 1.0, *idle, 10.0, 11.0, 12.0]


def test_actions_and_the_flag_reach_the_env():
    seen = []

    def predict(obs, deterministic):
        seen.append(deterministic)
        return (obs[:, 0] % 2).long()  # 0, 1, 0, 1, ... over an episode

    evaluation = evaluate(predict, Script([[5]], AutoresetMode.SAME_STEP), episodes=1, deterministic=False)
    assert evaluation.returns.tolist() == [2.0]
    assert set(seen) == {False}


def test_returns_are_summed_in_double_precision():
    class Large(Script):
        def step(self, action):
            result = super().step(action)
            return result._replace(reward=torch.tensor([2.0**24 if self.t[0] == 1 else 1.0]))

    evaluation = evaluate(zero, Large([[4]], AutoresetMode.NEXT_STEP), episodes=1)
    assert evaluation.returns.tolist() == [2.0**24 + 3]
    assert (evaluation.returns.dtype, evaluation.lengths.dtype) == (np.float64, np.int64)


@pytest.mark.parametrize("deterministic", [True, False])
def test_agents_are_asked_for_the_kind_of_action_that_is_evaluated(deterministic):
    seen = []

    class Acts:
        def act(self, obs, deterministic):
            seen.append(deterministic)
            return zero(obs, deterministic)

    class Evaluates(Acts):
        def evaluate(self, *arguments):
            seen.append(arguments)
            return "its own"

    env = Script([[3]], AutoresetMode.SAME_STEP)
    assert evaluate_agent(Acts(), env, 2, 7, deterministic).lengths.tolist() == [3, 3]
    assert seen == [deterministic] * 6
    assert env.seed == stream_seed(7, "evaluation")
    assert evaluate_agent(Evaluates(), env, 2, 7, deterministic) == "its own"
    assert seen[6:] == [(env, 2, 7, deterministic)]


def test_endless_episodes_stop():
    env = Script([[2], [10**9]], AutoresetMode.SAME_STEP)
    with pytest.raises(RuntimeError, match=r"max_steps=50; received one in slot 1 .*time limit, or raise max_steps"):
        evaluate(zero, env, episodes=2, max_steps=50)
    assert evaluate(zero, env, episodes=1, max_steps=2).lengths.tolist() == [2]  # slot 1 has no episode to play
    assert evaluate(zero, Script([[50]], AutoresetMode.SAME_STEP), episodes=1, max_steps=50).lengths.tolist() == [50]
    with pytest.raises(RuntimeError, match="max_steps=50"):
        evaluate(zero, Script([[51]], AutoresetMode.SAME_STEP), episodes=1, max_steps=50)


@pytest.mark.parametrize("arguments", [{"episodes": 0}, {"max_steps": 0}])
def test_bad_numbers(arguments):
    with pytest.raises(ValueError, match=r"expected >= 1, got 0"):
        evaluate(zero, Script(LENGTHS, AutoresetMode.SAME_STEP), **arguments)


def test_evaluation_does_not_disturb_training():
    def sample(obs, deterministic):
        return torch.randint(2, (len(obs),))

    env = Script(LENGTHS, AutoresetMode.NEXT_STEP)
    torch.manual_seed(0)
    expected = torch.randn(3)
    torch.manual_seed(0)
    first = evaluate(sample, env, episodes=6, seed=5)
    assert torch.equal(torch.randn(3), expected)
    second = evaluate(sample, env, episodes=6, seed=5)
    assert first.returns.tolist() == second.returns.tolist()
    assert first.returns.tolist() != evaluate(sample, env, episodes=6, seed=6).returns.tolist()


def test_scalars():
    evaluation = EvalResult(np.array([1.0, 3.0]), np.array([5, 10]))
    assert evaluation.scalars() == {
        "eval/mean_reward": 2.0,
        "eval/std_reward": 1.0,
        "eval/min_reward": 1.0,
        "eval/max_reward": 3.0,
        "eval/mean_ep_length": 7.5,
    }


def test_eval_log_and_resume(tmp_path):
    log = EvalLog(tmp_path)
    for step in (10, 20, 30):
        evaluation = EvalResult(np.array([step, step + 2.0]), np.array([1, 2]))
        scalars = log.log(step, evaluation, EvalResult(np.array([0.5]), np.array([3])))
    log.close()
    assert scalars["eval/mean_reward"] == 31.0
    assert scalars["eval_stochastic/mean_reward"] == 0.5
    resumed = EvalLog(tmp_path, resume_step=20)
    assert np.load(tmp_path / "evaluations.npz")["timesteps"].tolist() == [10, 20]
    resumed.log(40, EvalResult(np.array([1.0, 1.0]), np.array([1, 1])))
    columns = read_columns(tmp_path / "eval.csv")
    assert columns["step"].tolist() == [10, 20, 40]
    assert columns["eval/mean_reward"].tolist() == [11, 21, 1]
    saved = np.load(tmp_path / "evaluations.npz")
    assert saved["timesteps"].tolist() == [10, 20, 40]
    assert saved["results"].tolist() == [[10, 12], [20, 22], [1, 1]]
    assert saved["ep_lengths"].tolist() == [[1, 2], [1, 2], [1, 1]]


def test_evaluations_of_many_episodes(tmp_path):
    """Beyond the 131,072 characters that Python's reader takes for a cell by default."""
    returns = np.random.default_rng(0).normal(size=7_000)
    log = EvalLog(tmp_path)
    log.log(1, EvalResult(returns, np.ones(7_000, dtype=np.int64)))
    assert np.load(tmp_path / "evaluations.npz")["results"].tolist() == [returns.tolist()]


def test_another_number_of_episodes_gives_ragged_results(tmp_path):
    log = EvalLog(tmp_path)
    for returns in ([1.0, 2.0], [3.0]):
        log.log(len(returns), EvalResult(np.array(returns), np.array([1] * len(returns))))
    results = np.load(tmp_path / "evaluations.npz", allow_pickle=True)["results"]
    assert results.tolist() == [[1.0, 2.0], [3.0]]


def test_npz_is_like_that_of_sb3(tmp_path):
    sb3 = pytest.importorskip("stable_baselines3")
    from stable_baselines3.common.callbacks import EvalCallback
    from stable_baselines3.common.monitor import Monitor

    model = sb3.PPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, n_epochs=1, device="cpu")
    callback = EvalCallback(
        Monitor(gym.make("CartPole-v1")), n_eval_episodes=2, eval_freq=4, log_path=str(tmp_path / "sb3"), verbose=0
    )
    model.learn(8, callback)
    log = EvalLog(tmp_path / "ours")
    for step in (4, 8):
        log.log(step, EvalResult(np.array([1.0, 2.0]), np.array([3, 4])))
    theirs, ours = (np.load(tmp_path / who / "evaluations.npz") for who in ("sb3", "ours"))
    assert set(ours) == set(theirs)
    for key in theirs:
        assert (ours[key].shape, ours[key].dtype) == (theirs[key].shape, theirs[key].dtype)
    assert ours["timesteps"].tolist() == theirs["timesteps"].tolist()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("suffix", ["mp4", "gif"])
def test_video(tmp_path, suffix, mode):
    path = tmp_path / "videos" / f"a.{suffix}"
    mean = record_video(Script([[4, 6], [3]], mode), zero, path, episodes=2, fps=10)
    frames = imageio.mimread(path)
    # A frame before every action: 4 + 6, and one for the step that only resets.
    assert len(frames) == 10 + (mode == AutoresetMode.NEXT_STEP)
    assert frames[0].shape[:2] == (32, 48)
    assert mean == 3.0  # rewards 0 in episode 0 and 1 for six steps in episode 1
    # 0 in four steps; the second episode is cut short and does not count
    assert record_video(Script([[4, 6], [3]], mode), zero, path, episodes=2, fps=10, max_steps=8) == 0.0
    white = [int((frame[10, :, 0] > 128).sum()) for frame in frames[:4]]
    assert white == sorted(white)
    assert white[0] < white[3]


def test_video_refuses(tmp_path):
    env = Script([[2]], AutoresetMode.SAME_STEP)
    with pytest.raises(ValueError, match=r"expected a name ending in .mp4 or .gif; received '.avi'"):
        record_video(env, zero, tmp_path / "a.avi")
    env.render = None
    with pytest.raises(TypeError, match=r"expected an env with render\(index\) -> frame; received Script"):
        record_video(env, zero, tmp_path / "a.gif")
    env.render = lambda index: np.zeros((4, 4), dtype=np.uint8)
    with pytest.raises(ValueError, match=r"expected \[height, width, 3\] uint8; received \(4, 4\) uint8"):
        record_video(env, zero, tmp_path / "a.gif")
