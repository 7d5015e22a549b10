"""GPTD, batch and recursive, sparsification, and the chain of episodes (bpg sheet, section 7, oracles 4, 5 and 9)."""

from __future__ import annotations

import gymnasium as gym
import pytest
import torch
from torch import Tensor

from ccrl.batched_env import AutoresetMode
from ccrl.collect import Collector, Request
from ccrl.gp.episodes import chain_rows
from ccrl.gp.gptd import Chain, gptd, recursive_gptd
from ccrl.gp.solve import Cholesky
from ccrl.gp.sparsify import Dictionary, ald
from ccrl.policies import MLPPolicy
from ccrl.testing import ClockEnv, Episode

DOUBLE = torch.float64


def gram(z: list[float] | Tensor, other: list[float] | None = None) -> Tensor:
    z = torch.as_tensor(z, dtype=DOUBLE)
    other = z if other is None else torch.tensor(other, dtype=DOUBLE)
    return torch.exp(-0.5 * (z[:, None] - other).square())


def chain(reward: list[float], rewarded: list[int], follows: list[int], gamma: float = 0.5) -> Chain:
    flags = [torch.tensor(x, dtype=torch.bool) for x in (rewarded, follows)]
    return Chain(torch.tensor(reward, dtype=DOUBLE), *flags, gamma)


def close(x: Tensor, expected: object) -> bool:
    return torch.allclose(x, torch.tensor(expected, dtype=DOUBLE), atol=1e-6, rtol=0)


def recursion(k: Tensor, steps: Chain, noise: float, nu: float):
    return recursive_gptd(lambda i: k[:, i], k.diagonal(), steps, noise, nu)


# -- hand numbers -----------------------------------------------------------------------------------------------------


def test_a_terminated_episode() -> None:
    """Oracle 4: regression on the returns (2, 2)."""
    k, steps = gram([0.0, 1.0]), chain([1, 2], [1, 1], [1, 0])
    assert steps.returns().tolist() == [2.0, 2.0]
    for posterior in (gptd(k, steps, 0.5), recursion(k, steps, 0.5, 1e-12)):
        assert close(posterior.alpha, [0.949428, 0.949428])
        assert close(k @ posterior.alpha, [1.525286, 1.525286])
        precision = posterior.precision(torch.eye(2, dtype=DOUBLE))
        assert close(precision, [[0.796973, -0.322259], [-0.322259, 0.796973]])


def test_a_truncated_episode() -> None:
    """Oracle 5: the last point has no reward."""
    k, steps = gram([0.0, 1.0, 2.0]), chain([1, 2, 99], [1, 1, 0], [1, 1, 0])
    for posterior in (gptd(k, steps, 0.5), recursion(k, steps, 0.5, 1e-12)):
        assert close(posterior.alpha, [0.864217, 1.185136, -0.808622])
        assert close(k @ posterior.alpha, [1.473603, 1.218856, 0.027158])


@pytest.mark.parametrize(
    ("nu", "index", "alpha", "mean", "variance"),
    [
        (1e-12, [0, 1, 2, 3], [1.754969, 1.152872, -1.364464, 0.191772], 1.368861, 0.194416),
        (0.05, [0, 1, 3], [0.478575, 1.006176, 0.216637], 1.380620, 0.200133),
    ],
)
def test_a_second_episode(nu: float, index: list[int], alpha: list[float], mean: float, variance: float) -> None:
    """Oracle 5: z = (0, 1), r = (1, 2), then z = (.1, 2), r = (0, 1)."""
    z = [0.0, 1.0, 0.1, 2.0]
    posterior = recursion(gram(z), chain([1, 2, 0, 1], [1] * 4, [1, 0, 1, 0]), 0.5, nu)
    assert posterior.index.tolist() == index
    assert close(posterior.alpha, alpha)
    at = gram([z[i] for i in index], [0.5])[:, 0]
    assert float(at @ posterior.alpha) == pytest.approx(mean, abs=1e-6)
    assert float(1.0 - at @ posterior.precision(at)) == pytest.approx(variance, abs=1e-6)


# -- identities -------------------------------------------------------------------------------------------------------


def random_chain(truncate: bool) -> tuple[Tensor, Chain]:
    """Three episodes of 4, 1 and 6 steps; the second and the last are cut if ``truncate``."""
    rewarded, follows = [], []
    for length, cut in ((4, False), (1, truncate), (6, truncate)):
        rewarded += [1] * length + [0] * cut
        follows += [1] * (length - 1) + [int(cut)] + [0] * cut
    z = torch.randperm(len(rewarded)).double()  # apart: no point is a combination of the others
    return gram(z), chain(torch.randn(len(rewarded)).tolist(), rewarded, follows, 0.9)


@pytest.mark.parametrize("truncate", [False, True])
def test_batch_recursion_and_conjugate_gradients_agree(truncate: bool) -> None:
    k, steps = random_chain(truncate)
    batch = gptd(k, steps, 0.3)
    others = [recursion(k, steps, 0.3, 1e-13), gptd(lambda x: k @ x, steps, 0.3, tolerance=1e-12)]
    v = torch.randn(len(k), 2, dtype=DOUBLE)
    for other in others:
        assert torch.allclose(other.alpha, batch.alpha, atol=1e-7)
        assert torch.allclose(other.precision(v), batch.precision(v), atol=1e-7)


@pytest.mark.parametrize("truncate", [False, True])
def test_the_definition(truncate: bool) -> None:
    """H^T (H K H^T + s H H^T)^-1 r with an H written out row by row."""
    k, steps = random_chain(truncate)
    rows = []
    for i in range(len(k)):
        if steps.rewarded[i]:
            row = torch.zeros(len(k), dtype=DOUBLE)
            row[i] = 1.0
            if steps.follows[i]:
                row[i + 1] = -0.9
            rows.append(row)
    h = torch.stack(rows)
    inner = torch.linalg.inv(h @ k @ h.T + 0.3 * h @ h.T)
    posterior = gptd(k, steps, 0.3)
    assert torch.allclose(posterior.alpha, h.T @ inner @ steps.reward[steps.rewarded])
    assert torch.allclose(posterior.precision(torch.eye(len(k), dtype=DOUBLE)), h.T @ inner @ h)
    x, y = torch.randn(len(k), dtype=DOUBLE), torch.randn(len(h), dtype=DOUBLE)
    # to the last digits: a discount that passes through float32 is off by 1e-8
    assert torch.allclose(steps.apply(x), h @ x, rtol=0, atol=1e-14)
    assert torch.allclose(steps.adjoint(y), h.T @ y, rtol=0, atol=1e-14)


@pytest.mark.parametrize("truncate", [False, True])
def test_the_recursion_is_exact_where_the_dictionary_spans(truncate: bool) -> None:
    """A kernel of rank 3: after three points no other joins, and nothing is lost."""
    k, steps = random_chain(truncate)
    features = torch.randn(len(k), 3, dtype=DOUBLE)
    k = features @ features.T
    batch, sparse = gptd(k, steps, 0.3), recursion(k, steps, 0.3, 1e-9)
    assert len(sparse.index) == 3
    part = k[:, sparse.index]
    assert torch.allclose(part @ sparse.alpha, k @ batch.alpha, atol=1e-8)
    assert torch.allclose(part @ sparse.precision(part.T), k @ batch.precision(k), atol=1e-8)


@pytest.mark.parametrize("truncate", [False, True])
def test_a_preconditioner_saves_products_where_every_episode_terminates(truncate: bool) -> None:
    """Elsewhere it does not fit the system that is solved, and is left out."""
    k, steps = random_chain(truncate)
    calls: list[int] = []

    def product(x: Tensor) -> Tensor:
        calls.append(1)
        return k @ x

    expected, counts = gptd(k, steps, 0.3), []
    for preconditioner in (None, Cholesky(k + 0.3 * torch.eye(len(k), dtype=DOUBLE))):
        calls.clear()
        found = gptd(product, steps, 0.3, tolerance=1e-10, preconditioner=preconditioner)
        assert torch.allclose(found.alpha, expected.alpha, atol=1e-7)
        counts.append(len(calls))
    assert (counts[1] < counts[0]) == (not truncate)


def test_the_threshold_is_in_the_unit_of_the_kernel() -> None:
    """delta of the second point is 100 (1 - 0.9^2) = 19: above a threshold of 18, below one of 20."""
    k = 100.0 * torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=DOUBLE)
    sizes = [len(ald(lambda i: k[:, i], k.diagonal(), nu).index) for nu in (18.0, 20.0)]
    assert sizes == [2, 1]


def test_sparsity_bounds_the_dictionary_and_the_error() -> None:
    z = torch.rand(80, dtype=DOUBLE)
    k = gram(z)
    steps = chain([1.0] * 80, [1] * 80, [1] * 79 + [0], 0.9)
    exact = k @ gptd(k, steps, 0.1).alpha
    errors, sizes = [], []
    for nu in (1e-1, 1e-3, 1e-6):
        sparse = recursion(k, steps, 0.1, nu)
        sizes.append(len(sparse.index))
        errors.append(float((k[:, sparse.index] @ sparse.alpha - exact).abs().max()))
    assert sizes[0] < sizes[1] < sizes[2] < 20
    assert errors[0] > errors[2]
    assert errors[2] < 1e-2 * float(exact.abs().max())


def test_every_point_is_near_the_span_of_the_dictionary() -> None:
    k = gram(torch.rand(40, dtype=DOUBLE) * 4.0)
    found = ald(lambda i: k[:, i], k.diagonal(), 1e-2)
    a = found.coefficients
    assert torch.equal(a[found.index, torch.arange(len(found.index))], torch.ones(len(found.index), dtype=DOUBLE))
    assert torch.equal(found.gram, k[found.index][:, found.index])
    residual = (k - a @ found.gram @ a.T).diagonal()
    assert float(residual.max()) <= 1e-2 + 1e-9
    assert float(residual.min()) >= -1e-9


def test_the_inverse_of_the_dictionary_survives_growth() -> None:
    k = torch.eye(40, dtype=DOUBLE) + 0.5
    dictionary = Dictionary(lambda i: k[:, i], k.diagonal(), 1e-6)
    for i in range(40):  # more than the first allocation holds
        a, joins = dictionary.test(i)
        assert joins
        dictionary.add(i, a)
    assert torch.allclose(dictionary.inverse, torch.linalg.inv(k))
    assert torch.equal(dictionary.gram, k)


def test_an_empty_and_a_single_point() -> None:
    nothing = chain([], [], [])
    assert gptd(torch.zeros(0, 0, dtype=DOUBLE), nothing, 0.1).alpha.shape == (0,)
    assert recursion(torch.zeros(0, 0, dtype=DOUBLE), nothing, 0.1, 1e-3).alpha.shape == (0,)
    single = chain([3], [1], [0])
    for posterior in (gptd(torch.ones(1, 1, dtype=DOUBLE), single, 0.5), recursion(gram([0.0]), single, 0.5, 1e-9)):
        assert posterior.alpha.tolist() == pytest.approx([2.0])


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="shapes"):
        chain([1, 2], [1], [0])
    with pytest.raises(ValueError, match="gamma"):
        chain([1], [1], [0], gamma=1.5)
    with pytest.raises(ValueError, match="last point"):
        chain([1], [1], [1])
    with pytest.raises(ValueError, match="without reward"):
        chain([1, 2], [0, 1], [1, 0])
    steps = chain([1], [1], [0])
    with pytest.raises(ValueError, match="noise"):
        gptd(gram([0.0]), steps, 0.0)
    with pytest.raises(ValueError, match="noise"):
        recursion(gram([0.0]), steps, 0.0, 0.1)
    with pytest.raises(ValueError, match=r"\[1, 1\]"):
        gptd(gram([0.0, 1.0]), steps, 0.1)
    with pytest.raises(ValueError, match="nu"):
        recursion(gram([0.0]), steps, 0.1, 0.0)


# -- from a rollout ---------------------------------------------------------------------------------------------------

SCRIPT = [[Episode(0, 3, "terminate"), Episode(100, 2, "truncate")], [Episode(10, 4, "truncate")]]


def policy(groups: bool = False) -> MLPPolicy:
    space: gym.Space = gym.spaces.Box(-1, 1, (1,))
    if groups:
        space = gym.spaces.Dict({"policy": space, "critic": gym.spaces.Box(-1, 1, (2,))})
    return MLPPolicy(space, gym.spaces.Discrete(2), hidden=(4,))


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.DISABLED, AutoresetMode.NEXT_STEP])
def test_the_chain_of_a_stream(mode: AutoresetMode) -> None:
    """Terminated, truncated and unfinished episodes; dummy rows of NEXT_STEP are left out."""
    steps = 8 if mode == AutoresetMode.NEXT_STEP else 6
    data = Collector(ClockEnv(SCRIPT, autoreset_mode=mode)).collect(Request(steps=steps), policy())
    rows = chain_rows(data, policy(), torch.Generator().manual_seed(0))
    first = [0, 1, 2, 100, 101, 102, 0]  # 102 is the truncated episode's last observation, not the reset that follows
    rewarded, follows = [1, 1, 1, 1, 1, 0, 1], [1, 1, 0, 1, 1, 0, 1]
    if mode == AutoresetMode.NEXT_STEP:  # two of the eight rows of the first environment are dummies
        first, rewarded, follows = [*first[:6], 0, 1], [*rewarded[:6], 1, 0], [*follows[:6], 1, 0]
    else:
        first, rewarded, follows = [*first, 1], [*rewarded, 0], [*follows, 0]
    n = len(first)
    assert rows["obs"][0, :n, 0].tolist() == first
    assert rows["rewarded"][0, :n].tolist() == [bool(x) for x in rewarded]
    assert rows["follows"][0, :n].tolist() == [bool(x) for x in follows]
    assert rows["obs"][0, n : n + 5, 0].tolist() == [10, 11, 12, 13, 14]
    assert rows["t"][0, n : n + 5].tolist() == [0, 1, 2, 3, 4]
    assert bool((rows["reward"][0][rows["rewarded"][0]] == 1.0).all())
    assert bool((rows["reward"][0][~rows["rewarded"][0]] == 0.0).all())


def test_actions_of_bootstrap_pairs_are_drawn_from_the_policy() -> None:
    """Not its mode, and with the generator that is given: Q of the closing point stands for V there."""
    data = Collector(ClockEnv(SCRIPT)).collect(Request(steps=6), policy())
    acting = policy()
    rows = chain_rows(data, acting, torch.Generator().manual_seed(1))
    closing = ~rows["rewarded"][0]
    noise = acting.draw_noise(int(closing.sum()), torch.Generator().manual_seed(1), torch.device("cpu"))
    with torch.no_grad():
        expected = acting.act(rows["obs"][0, closing], noise)["action"]
    assert torch.equal(rows["action"][0, closing], expected)
    assert not torch.equal(expected, acting.act(rows["obs"][0, closing], None)["action"])
    played = data["action"].T[data["valid"].T > 0]
    assert torch.equal(rows["action"][0, ~closing], played)


def test_time_limits_may_count_as_terminations() -> None:
    data = Collector(ClockEnv(SCRIPT)).collect(Request(steps=6), policy())
    rows = chain_rows(data, policy(), torch.Generator().manual_seed(0), "terminal")
    # the truncated episodes of both environments have no tail, the rollout's end still cuts
    assert rows["obs"][0, :, 0].tolist() == [0, 1, 2, 100, 101, 0, 1, 10, 11, 12, 13, 10, 11, 12]


def test_fresh_episodes_and_dict_observations() -> None:
    script = [[Episode(0, 2)], [Episode(5, 9)]]
    collector = Collector(ClockEnv(script, groups=True), make_env=lambda n: ClockEnv(script, groups=True))
    data = collector.collect(Request(episodes=2, horizon=4), policy(groups=True))
    rows = chain_rows(data, policy(groups=True), torch.Generator().manual_seed(0))
    assert rows["obs"]["policy"][0, :, 0].tolist() == [0, 1, 5, 6, 7, 8, 9]
    assert rows["rewarded"][0].tolist() == [True] * 6 + [False]
    assert rows["follows"][0].tolist() == [True, False, True, True, True, True, False]
