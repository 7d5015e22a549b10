"""Losses, penalties and critics against numbers by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from ccrl.data import Batching, Data
from ccrl.estimators import aggregates, losses, ratios
from ccrl.estimators.base import Phase
from ccrl.estimators.stages import Standardise
from ccrl.estimators.terms import Ratio, Term, no_ratio, surrogate
from ccrl.policies import CATEGORICAL, GAUSSIAN
from ccrl.updaters import FlatUpdater

F64 = torch.float64


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


def batch(**columns: Tensor) -> Data:
    """Rows ``[B]`` as one shuffled batch ``[1, B]``."""
    size = next(iter(columns.values())).shape[0]
    rows = {k: v.unsqueeze(0) for k, v in columns.items()} | {"valid": torch.ones(1, size, dtype=F64)}
    return Data(rows).epoch(Batching("transition", "full"), None)[0]


def gradient(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, inputs, retain_graph=True))


# -- MDPO ------------------------------------------------------------------------------------------------------------

PI_K, Q = tensor(0.5, 0.3, 0.2), tensor(1.0, 0.0, -1.0)


def mdpo_terms(inverse_step: float | Tensor, distribution: object) -> tuple[Term, ...]:
    kl = losses.closed_form_kl(distribution)  # type: ignore[arg-type]
    pg = Term("pg", losses.weighted_ratio, aggregates.mean, ratios.token)
    penalty = Term("kl", kl, aggregates.mean, None, frozenset({"dist"}), None, coef=inverse_step)
    return pg, penalty


def exact_step(t: float) -> tuple[Tensor, float]:
    """Maximise the surrogate over three logits; the batch holds every action, weighted by its probability."""
    advantage = Q - PI_K @ Q
    data = batch(
        action=torch.arange(3),
        log_prob=PI_K.log(),
        advantage=3.0 * PI_K * advantage,  # the aggregation divides by three rows
        old_logits=PI_K.log().expand(3, 3),
    )
    logits = torch.zeros(3, dtype=F64, requires_grad=True)
    optimiser = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-16)

    def closure() -> Tensor:
        optimiser.zero_grad()
        params = {"logits": logits.expand(1, 3, 3)}
        evaluation = {"log_prob": CATEGORICAL.log_prob(params, data["action"]), **params}
        loss, _ = surrogate(mdpo_terms(1.0 / t, CATEGORICAL), evaluation, data)
        loss.backward()
        return loss

    for _ in range(5):
        loss = optimiser.step(closure)
    return logits.detach().softmax(-1), -float(loss.detach())


@pytest.mark.parametrize(
    ("t", "expected"), [(1.0, [0.784399, 0.173139, 0.042463]), (0.5, [0.661783, 0.240835, 0.097382])]
)
def test_mdpo_1_exact_step(t: float, expected: list[float]) -> None:
    pi, value = exact_step(t)
    assert pi.tolist() == pytest.approx(expected, abs=1e-5)
    if t == 1.0:
        assert value == pytest.approx(0.249691, abs=1e-6)


def test_mdpo_8_limits_of_the_step_size() -> None:
    pi, _ = exact_step(1e-6)
    assert pi.tolist() == pytest.approx(PI_K.tolist(), abs=1e-5)
    mean, log_std, evaluation, data = mdpo_4_inputs(shift=0.3)
    free, _ = surrogate(mdpo_terms(0.0, GAUSSIAN)[:1], evaluation, data)
    far, _ = surrogate(mdpo_terms(1e-9, GAUSSIAN), evaluation, data)
    for a, b in zip(gradient(free, mean, log_std), gradient(far, mean, log_std)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def mdpo_4_inputs(shift: float = 0.0) -> tuple[Tensor, Tensor, dict[str, Tensor], Data]:
    """``shift`` moves the current mean off the old one."""
    old_mean, old_log_std = tensor(0.1, -0.2), tensor(-0.1, 0.2)
    action = torch.tensor([[0.5, 0.1], [-0.3, 0.4], [0.2, -1.0]], dtype=F64)
    old = {"mean": old_mean.expand(3, 2), "log_std": old_log_std.expand(3, 2)}
    data = batch(
        action=action,
        log_prob=GAUSSIAN.log_prob(old, action),
        advantage=tensor(1, -2, 0.5),
        old_mean=old["mean"],
        old_log_std=old["log_std"],
    )
    mean, log_std = (old_mean + shift).requires_grad_(), old_log_std.clone().requires_grad_()
    params = {"mean": mean.expand(1, 3, 2), "log_std": log_std.expand(1, 3, 2)}
    return mean, log_std, {"log_prob": GAUSSIAN.log_prob(params, data["action"]), **params}, data


@pytest.mark.parametrize("inverse_step", [1e-3, 1.0, 244.0])
def test_mdpo_4_gradient_at_the_old_policy_is_the_policy_gradient(inverse_step: float) -> None:
    mean, log_std, evaluation, data = mdpo_4_inputs()
    loss, _ = surrogate(mdpo_terms(torch.tensor(inverse_step, dtype=F64), GAUSSIAN), evaluation, data)
    d_mean, d_log_std = gradient(-loss, mean, log_std)
    assert d_mean.tolist() == pytest.approx([0.508918, -0.290472], abs=1e-6)
    assert d_log_std.tolist() == pytest.approx([0.103561, 0.097400], abs=1e-6)


@pytest.mark.parametrize(
    ("old_mean", "mean", "variance", "value"),
    [
        (0.0, 0.35, 1.0, lambda mu, var: 0.7 * mu),  # A(a) = .7 a
        (1.0, 0.5, 0.5, lambda mu, var: -(mu**2 + var)),  # A(a) = -2 a^2 / 2
    ],
)
def test_mdpo_5_gaussian_closed_forms_are_stationary(
    old_mean: float, mean: float, variance: float, value: object
) -> None:
    mu, log_std = tensor(mean).requires_grad_(), tensor(variance).log().div(2).requires_grad_()
    old = {"mean": tensor(old_mean), "log_std": tensor(0.0)}
    objective = value(mu, (2 * log_std).exp()).sum() - GAUSSIAN.kl({"mean": mu, "log_std": log_std}, old) / 0.5  # type: ignore[operator]
    for g in gradient(objective, mu, log_std):
        assert float(g) == pytest.approx(0.0, abs=1e-12)


def test_mdpo_9_standardised_advantages_ignore_shift_and_scale() -> None:
    torch.manual_seed(0)
    x, valid = torch.randn(6, 2, dtype=F64), torch.ones(6, 2, dtype=F64)
    valid[3, 1] = 0.0
    stage = Standardise(ddof=1, eps=0.0)
    first = stage(Data({"valid": valid}).derive(advantage=x))["advantage"]
    poisoned = torch.where(valid > 0, 3.0 * x + 7.0, torch.nan)  # invalid rows are never read
    second = stage(Data({"valid": valid}).derive(advantage=poisoned))["advantage"]
    torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)
    kept = first[valid > 0]
    assert float(kept.mean()) == pytest.approx(0.0, abs=1e-12)
    assert float(kept.std()) == pytest.approx(1.0)
    assert float(first[3, 1]) == 0.0
    constant = Standardise()(Data({"valid": valid}).derive(advantage=torch.full((6, 2), 3.0, dtype=F64)))
    assert constant["advantage"].eq(0).all()


# -- penalties, critics, plumbing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [float, lambda x: torch.tensor(x, dtype=F64)])
def test_asymmetric_bounds(kind: Callable[[float], float | Tensor]) -> None:
    """Low below 1, high above: .7 and 1.4 lie outside [.8, 1.3]; as numbers and as the tensors of a schedule."""
    low, high = kind(0.2), kind(0.3)
    rho, advantage = tensor(0.7, 0.7, 1.4, 1.4, 1.25), tensor(1, -1, 1, -1, 1)
    data = batch(log_prob=torch.zeros(5, dtype=F64))
    level = ratios.token({"log_prob": rho.log().unsqueeze(0)}, data)
    clipped = losses.clip(low, high)(level, advantage, {}, data)
    assert clipped.flatten().tolist() == pytest.approx([-0.7, 0.8, -1.3, 1.4, -1.25])
    cispo = losses.cispo(low, high)(level, advantage, {}, data) / (-advantage * rho.log())
    assert cispo.flatten().tolist() == pytest.approx([0.8, 0.8, 1.3, 1.3, 1.25])
    outside = losses.ratio_stats(low, high)(level, advantage, {}, data)["clip_fraction"]  # type: ignore[call-overload]
    assert outside.flatten().tolist() == [1, 1, 1, 1, 0]
    dual = losses.clip(low, high, dual=kind(1.2))(level, advantage, {}, data)
    assert dual.flatten().tolist() == pytest.approx([-0.7, 0.8, -1.3, 1.2, -1.25]), "1.4 on a bad action counts as 1.2"


def test_cispo_weights_have_no_gradient() -> None:
    """Also inside the bounds, where a clamp would let one through: the slope is ``-weight A``, clipped or not."""
    rho, advantage = tensor(1.1, 1.1, 2.0), tensor(1, -2, 1)
    log_prob = rho.log().requires_grad_()
    data = batch(log_prob=torch.zeros(3, dtype=F64))
    level = ratios.token({"log_prob": log_prob.unsqueeze(0)}, data)
    (slope,) = gradient(losses.cispo(0.2, 0.3)(level, advantage, {}, data).sum(), log_prob)
    assert slope.tolist() == pytest.approx([-1.1, 2.2, -1.3])


def test_the_reference_level_is_the_reference_over_the_policy() -> None:
    """k3 of it is ``exp(ref - pi) - 1 - (ref - pi)``, the estimate of KL(pi || ref) from the policy's samples."""
    data = batch(ref_log_prob=tensor(-1.0))
    level = ratios.reference({"log_prob": tensor(-0.5).unsqueeze(0)}, data)
    assert float(losses.k1(level, level.valid, {}, data)) == 0.5
    assert float(losses.k3(level, level.valid, {}, data)) == pytest.approx(0.1065307)  # e^-.5 - .5


def test_k1_of_the_kl_to_the_reference_is_refused_as_a_loss() -> None:
    """Its gradient is the score. As a statistic, and as the forward KL to the old policy, it is what it says."""
    updater = FlatUpdater(nn.Linear(1, 1), lr=0.1)

    def phase(ratio: Ratio, coef: float) -> Phase:
        return Phase("policy", (Term("kl", losses.k1, aggregates.mean, ratio, coef=coef),), Batching(), updater)

    with pytest.raises(ValueError, match=r"term 'kl': .*got k1.*0 in expectation.*losses\.k3.*coef=0\.0"):
        phase(ratios.reference, 0.1)
    assert phase(ratios.reference, 0.0).terms[0].coef == 0.0
    assert phase(ratios.token, 0.1).terms[0].coef == 0.1


def test_sequence_ratios_of_ragged_columns() -> None:
    """Columns of two tokens, of one, and of none; garbage where nothing counts."""
    valid = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]], dtype=F64)
    old = torch.tensor([[-1.0, -2.0, -torch.inf], [-1.0, torch.nan, 5.0]], dtype=F64)
    new = torch.tensor([[-0.8, -1.5, 3.0], [-0.6, torch.inf, torch.nan]], dtype=F64)
    data = Data({"log_prob": old, "valid": valid})
    for ratio, expected in ((ratios.sequence, [0.3, 0.5, 0.0]), (ratios.sequence_product, [0.6, 0.5, 0.0])):
        level = ratio({"log_prob": new}, data)
        assert level.log_ratio.tolist() == [pytest.approx(expected)]
        assert level.valid.tolist() == [[1, 1, 0]]
    token = ratios.sequence_token({"log_prob": new}, data)
    assert token.log_ratio.flatten().tolist() == pytest.approx([0.3, 0.5, 0.0, 0.3, 0.0, 0.0])


def test_sampled_kl_estimators_by_hand() -> None:
    data = batch(log_prob=tensor(0.0, 0.0))
    level = ratios.token({"log_prob": tensor(0.5, -0.5).unsqueeze(0)}, data)
    rows = [f(level, level.valid, {}, data).flatten().tolist() for f in (losses.k1, losses.k2, losses.k3)]
    assert rows[0] == [-0.5, 0.5]
    assert rows[1] == [0.125, 0.125]
    assert rows[2] == pytest.approx([0.1487213, 0.1065307])  # e^.5 - 1.5, e^-.5 - .5


def test_heads_and_values_of_losses() -> None:
    """Losses read the head they are told to, and report numbers that mean something beside their gradients."""
    data = batch(value=tensor(1.0), **{"return": tensor(2.0)})
    level = ratios.plain({"log_prob": tensor(-0.7).unsqueeze(0)}, data)
    evaluation = {"value": tensor(9.0).unsqueeze(0), "median": tensor(8.0).unsqueeze(0), "q": tensor(0.0).unsqueeze(0)}
    assert float(losses.neg_log_prob(level, level.valid, evaluation, data)) == 0.7
    assert float(losses.value_loss(head="q")(level, level.valid, evaluation, data)) == 4.0
    # log(1 + e^2) - 2 / 2
    assert float(losses.median_loss(head="q")(level, level.valid, evaluation, data)) == pytest.approx(1.126928)


def test_value_losses_by_hand() -> None:
    data = batch(value=tensor(1.0, 1.0, 1.0), **{"return": tensor(2.0, 2.0, 1.0)})
    evaluation, level = {"value": tensor(1.1, 3.0, 0.9).unsqueeze(0)}, no_ratio(data["valid"])
    plain = losses.value_loss(scale=0.5)(level, level.valid, evaluation, data)
    assert plain.flatten().tolist() == pytest.approx([0.405, 0.5, 0.005])
    # clipped at +-.2: 1.1 -> 1.1, 3 -> 1.2, .9 -> .9; the larger error counts: .9^2, max(1, .8^2), .1^2
    clipped = losses.value_loss(clip_range=torch.tensor(0.2))(level, level.valid, evaluation, data)
    assert clipped.flatten().tolist() == pytest.approx([0.81, 1.0, 0.01])
    far = losses.value_loss(clip_range=0.2)(level, level.valid, {"value": tensor(1.9, 2, 1).unsqueeze(0)}, data)
    assert float(far[0, 0]) == pytest.approx(0.64)  # (1.2 - 2)^2 beats (1.9 - 2)^2


def test_canonical_batch_aggregations() -> None:
    # the batch C0 of docs/llm/baselines.md with PPO-clip .2
    old = torch.tensor([[-1.2, -0.5, -1.9], [-0.3, -1.6, 0], [-0.7, -0.9, -0.3], [-1.1, 0, 0]], dtype=F64).T
    new = torch.tensor([[-1.0, -0.5, -2.0], [-0.3, -1.2, 0], [-0.7, -0.7, -0.7], [-1.5, 0, 0]], dtype=F64).T
    valid = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]], dtype=F64).T
    advantage = tensor(1, -1, -1, 1)
    columns = {"log_prob": old, "valid": valid, "advantage": advantage.expand(3, 4)}
    data = Data(columns).epoch(Batching("sequence", "full"), None)[0]

    def loss(aggregate: object) -> float:
        term = Term("pg", losses.clip(0.2, 0.2), aggregate, ratios.token, stats=losses.ratio_stats(0.2, 0.2))  # type: ignore[arg-type]
        return float(surrogate((term,), {"log_prob": new}, data)[0])

    # |log-ratio| .2, .4, .2, .4, .4 lie outside exp(log-ratio) in [.8, 1.2], 0, -.1, 0, 0 inside: 5 of the 9 tokens
    term = Term("pg", losses.clip(0.2, 0.2), aggregates.mean, ratios.token, stats=losses.ratio_stats(0.2, 0.2))
    stats = surrogate((term,), {"log_prob": new}, data)[1]
    assert float(stats["clip_fraction"]) == pytest.approx(5 / 9)
    assert float(stats["approx_kl"]) == pytest.approx(float((valid * ((new - old).exp() - 1 - (new - old))).sum() / 9))
    assert loss(aggregates.mean) == pytest.approx(0.193119, abs=1e-6)
    assert loss(aggregates.sequence_mean) == pytest.approx(0.434517, abs=1e-6)
    assert loss(aggregates.sequence_mean_token_mean) == pytest.approx(0.136945, abs=1e-6)
    assert loss(aggregates.fixed(4 * 3)) == pytest.approx(0.144839, abs=1e-6)
    assert loss(aggregates.fixed(4 * 8)) == pytest.approx(0.054315, abs=1e-6)
    with pytest.raises(ValueError, match="positive count"):
        aggregates.fixed(0)


def test_invalid_rows_may_hold_anything() -> None:
    log_prob = torch.tensor([[-1.0, -torch.inf, 90.0]], dtype=F64, requires_grad=True)
    data = Data(
        {
            "log_prob": torch.tensor([[-1.0, 0.0, -90.0]], dtype=F64),
            "valid": torch.tensor([[1.0, 0.0, 0.0]], dtype=F64),
            "advantage": torch.tensor([[2.0, torch.nan, torch.inf]], dtype=F64),
            "n_valid": torch.tensor(1.0),
        },
        scalars=frozenset({"n_valid"}),
    )
    term = Term("pg", losses.weighted_ratio, aggregates.mean, ratios.token, stats=losses.ratio_stats(0.2, 0.2))
    loss, stats = surrogate((term,), {"log_prob": log_prob}, data)
    assert float(loss.detach()) == -2.0
    assert float(stats["approx_kl"]) == 0.0
    loss.backward()
    assert log_prob.grad is not None
    assert log_prob.grad.tolist() == [[-2.0, 0.0, 0.0]]


def test_coefficients_and_weights_enter_the_sum_but_not_the_statistics() -> None:
    data = batch(log_prob=tensor(0, 0), advantage=tensor(1, 3), w=tensor(1, 0.5))
    pg = Term("pg", losses.weighted_ratio, aggregates.mean, ratios.token, weight="w", coef=torch.tensor(10.0))
    total, stats = surrogate((pg, replace(pg, name="again", coef=1.0)), {"log_prob": tensor(0, 0).unsqueeze(0)}, data)
    assert float(stats["pg"]) == float(stats["again"]) == -1.25
    assert float(total) == float(stats["loss"]) == -13.75
    with pytest.raises(ValueError, match="at least one term"):
        surrogate((), {}, data)


def test_an_advantage_of_steps_beside_a_ratio_of_sequences_is_refused() -> None:
    """Broadcast, every sequence's loss would count once per step."""
    columns = {"valid": torch.ones(3, 2, dtype=F64), "log_prob": torch.zeros(3, 2, dtype=F64)}
    columns |= {"advantage": torch.ones(3, 2, dtype=F64), "sequence_advantage": torch.ones(2, dtype=F64)}
    data = Data(columns, sequence=frozenset({"sequence_advantage"})).epoch(Batching("sequence", "full"), None)[0]
    term = Term("gspo", losses.clip(0.2, 0.2), aggregates.sequence_mean, ratios.sequence)
    with pytest.raises(ValueError, match=r"term 'gspo': expected losses \[1, 2\].* got \[3, 2\].* sequence_advantage"):
        surrogate((term,), {"log_prob": columns["log_prob"]}, data)
    right, _ = surrogate((replace(term, advantage="sequence_advantage"),), {"log_prob": columns["log_prob"]}, data)
    assert float(right) == -1.0


def test_a_coefficient_of_zero_keeps_the_statistic_only() -> None:
    """Not ``0 * x``: a diagnostic that is infinite must not reach the loss."""
    data = batch(log_prob=tensor(0, 0), advantage=tensor(1, 3))
    log_prob = tensor(0, 0).requires_grad_()
    pg = Term("pg", losses.weighted_ratio, aggregates.mean, ratios.token)
    infinite = Term("diagnostic", lambda *_: tensor(torch.inf, 1.0).unsqueeze(0), aggregates.mean, ratios.token, coef=0)
    total, stats = surrogate((pg, infinite), {"log_prob": log_prob.unsqueeze(0)}, data)
    assert float(stats["diagnostic"]) == torch.inf
    assert float(total.detach()) == float(stats["loss"]) == -2.0
    assert gradient(total, log_prob)[0].tolist() == [-0.5, -1.5]
