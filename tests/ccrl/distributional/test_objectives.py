"""Objectives on laws that are known by hand."""

from __future__ import annotations

import math

import pytest
import torch

from ccrl.distributional import (
    OCE,
    Custom,
    CVaR,
    Entropic,
    Expected,
    Homeostasis,
    Law,
    MeanCVaR,
    OptimisticTail,
    SoftConstraints,
    TargetReturn,
    compress,
    cvar,
    outer_search,
    quantile,
    wasserstein,
)

F = torch.float64


def law(**atoms: float) -> Law:
    return Law(
        torch.tensor([float(k[1:].replace("m", "-")) for k in atoms], dtype=F),
        torch.tensor(list(atoms.values()), dtype=F),
    )


SPLIT = Law(torch.tensor([-2.0, 2.0, 4.0], dtype=F), torch.tensor([0.16, 0.24, 0.60], dtype=F))


def test_cvar_of_a_law_whose_border_splits_an_atom():
    # worst .75: all of -2 (.16) and 2 (.24), .35 of the atom 4: (-.32 + .48 + 1.4) / .75
    expected = (-0.32 + 0.48 + 0.35 * 4.0) / 0.75
    assert math.isclose(expected, 2.08)
    assert math.isclose(float(cvar(SPLIT, 0.75)), expected)
    assert math.isclose(float(CVaR(0.75).value(*SPLIT)), expected)
    # minus c_0* is the .75-quantile
    assert float(CVaR(0.75).best_start(*SPLIT)) == -4.0
    assert float(quantile(SPLIT, torch.tensor([0.16, 0.161, 0.75], dtype=F))[2]) == 4.0
    assert quantile(SPLIT, torch.tensor([0.16, 0.161, 0.4], dtype=F)).tolist() == [-2.0, 2.0, 2.0]


@pytest.mark.parametrize("tau", [0.01, 0.16, 0.3, 0.75, 1.0])
def test_both_forms_of_cvar_agree(tau):
    generator = torch.Generator().manual_seed(0)
    atoms = torch.randn(40, generator=generator, dtype=F)
    weights = torch.rand(40, generator=generator, dtype=F).softmax(0)
    assert torch.isclose(CVaR(tau).value(atoms, weights), cvar(Law(atoms, weights), tau), atol=1e-12)


def test_values_of_the_other_objectives():
    mean = -0.32 + 0.48 + 2.4  # 2.56
    assert math.isclose(float(Expected().value(*SPLIT)), mean)
    assert math.isclose(float(CVaR(1.0).value(*SPLIT)), mean)
    assert math.isclose(float(MeanCVaR(0.25, 0.75).value(*SPLIT)), 0.25 * mean + 0.75 * 2.08)
    assert math.isclose(float(TargetReturn(2.0).value(*SPLIT)), -(0.16 * 4.0 + 0.6 * 2.0))
    assert math.isclose(float(OptimisticTail(3.0).value(*SPLIT)), 0.6)
    # -log(.16 e^4 + .24 e^-4 + .6 e^-8) / 2
    expected = -math.log(0.16 * math.exp(4) + 0.24 * math.exp(-4) + 0.6 * math.exp(-8)) / 2
    assert math.isclose(float(Entropic(2.0).value(*SPLIT)), expected)
    # slopes 2 and .5: kinks at -2, 2, 4; c = -2 gives .16 * 2 * (-4) + .6 * .5 * 2 + 2 = 1.32
    assert math.isclose(float(OCE(below=2.0, above=0.5).value(*SPLIT)), 1.32)
    # no other c_0 is better
    for c in torch.linspace(-5, 3, 200, dtype=F):
        f = OCE(below=2.0, above=0.5)
        assert float(f.from_start(c, (SPLIT.weights * f.utility(c + SPLIT.atoms)).sum())) <= 1.32 + 1e-12


def test_utilities_of_vectors():
    x = torch.tensor([[3.0, -4.0], [1.0, 2.0]], dtype=F)
    assert Homeostasis((0.0, 0.0)).utility(x).tolist() == [-5.0, -math.sqrt(5.0)]
    assert SoftConstraints((1.0, 2.0)).utility(x).tolist() == [-4.0, 0.0]
    assert SoftConstraints((1.0, 2.0)).start == (-1.0, -2.0)
    traded = SoftConstraints((2.0,), trade_off=0.5)
    assert traded.start == (0.0, -2.0)
    assert traded.utility(x).tolist() == [3.0 - 2.0, 1.0]
    assert (traded.dims, SoftConstraints((2.0,)).dims, Homeostasis((1.0,)).dims, Expected().dims) == (2, 1, 1, 0)


@pytest.mark.parametrize(
    "objective", [Expected(), CVaR(0.3), MeanCVaR(0.5, 0.2), TargetReturn(1.0), OptimisticTail(0.0)]
)
def test_utilities_are_homogeneous_of_their_degree(objective):
    x = torch.linspace(-3, 3, 31, dtype=F)
    for a in (0.1, 0.9, 7.0):
        assert torch.allclose(objective.utility(a * x), a**objective.degree * objective.utility(x), atol=1e-14)


def test_why_a_utility_must_be_homogeneous():
    """-exp(-x): against the sure 0 the law {-1: .3, 1: .7} loses, half of it wins."""
    risky = Law(torch.tensor([-1.0, 1.0], dtype=F), torch.tensor([0.3, 0.7], dtype=F))
    cost = lambda scale: float((risky.weights * torch.exp(-scale * risky.atoms)).sum())  # noqa: E731
    assert round(cost(1.0), 5) == 1.07300
    assert round(cost(0.5), 5) == 0.91919
    with pytest.raises(ValueError, match=r"Entropic: expected gamma = 1, got 0.5"):
        Entropic(1.0).check_discount(0.5)
    Entropic(1.0).check_discount(1.0)
    with pytest.raises(ValueError, match="gamma = 1"):
        Custom(f=torch.tanh).check_discount(0.9)
    Custom(f=torch.sign, homogeneous=0.0).check_discount(0.9)


def test_the_outer_search_prefers_the_largest_of_equals():
    starts = torch.tensor([-3.0, -2.0, -1.0], dtype=F)
    start, value = outer_search(CVaR(1.0), starts, torch.tensor([-2.0, -1.0, -0.5], dtype=F))
    assert (float(start), float(value)) == (-2.0, 1.0)  # scores 1, 1, .5


WRONG = [
    lambda: CVaR(0.0), lambda: CVaR(1.5), lambda: CVaR(math.nan), lambda: MeanCVaR(-0.1, 0.5),
    lambda: MeanCVaR(0.5, 2.0), lambda: OCE(below=0.5), lambda: OCE(above=2.0), lambda: Entropic(0.0),
    lambda: Homeostasis(()), lambda: SoftConstraints((), 1.0), lambda: SoftConstraints((1.0,), -1.0),
    lambda: Expected().check_discount(1.5), lambda: TargetReturn(math.inf), lambda: OptimisticTail(math.nan),
    lambda: Homeostasis((0.0, math.nan)), lambda: SoftConstraints((math.inf,)),
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_settings_outside_their_range_are_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        wrong()
    with pytest.raises(ValueError, match="no fixed c_0"):
        _ = CVaR(0.5).start


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: CVaR([0.1]), r"tau: expected a number, got \[0.1\]"),
        (lambda: MeanCVaR("0.5", 0.1), "weight: expected a number, got '0.5'"),
        (lambda: TargetReturn(None), "target: expected a number, got None"),
        (lambda: Homeostasis(1.0), "deviation: expected a list of numbers, got 1.0"),
        (lambda: SoftConstraints([[1.0]]), r"bounds: expected a number, got \[1.0\]"),
    ],
)
def test_settings_of_another_type_are_refused(wrong, message):
    with pytest.raises(TypeError, match=message):
        wrong()


# Laws


def test_compress_merges_equal_atoms_and_ignores_unused_ones():
    x = Law(torch.tensor([[1.0, 5.0, 1.0, 3.0], [2.0, 2.0, 2.0, 0.0]], dtype=F),
            torch.tensor([[0.2, 0.0, 0.3, 0.5], [0.25, 0.25, 0.25, 0.25]], dtype=F))  # fmt: skip
    small = compress(x, 4)
    assert torch.allclose(small.atoms, torch.tensor([[1.0, 3.0], [0.0, 2.0]], dtype=F))
    assert torch.allclose(small.weights, torch.tensor([[0.5, 0.5], [0.25, 0.75]], dtype=F))


def test_compress_takes_quantiles_only_of_laws_that_do_not_fit():
    # 4 equal atoms in 2: levels .25 and .75 are reached by the first and the third
    x = Law(
        torch.tensor([[1.0, 2.0, 3.0, 4.0], [7.0, 7.0, 8.0, 8.0]], dtype=F),
        torch.tensor([[0.25] * 4, [0.1, 0.2, 0.3, 0.4]], dtype=F),
    )
    small = compress(x, 2)
    assert small.atoms.tolist() == [[1.0, 3.0], [7.0, 8.0]]
    assert torch.allclose(small.weights, torch.tensor([[0.5, 0.5], [0.3, 0.7]], dtype=F))


def test_wasserstein():
    one, other = law(x0=1.0), law(x5=1.0)
    assert float(wasserstein(one, other)) == 5.0
    # half of the mass moves by 2, half by 1
    first, second = law(x0=0.5, x4=0.5), law(x2=0.5, x3=0.5)
    assert float(wasserstein(first, second)) == 1.5
    assert float(wasserstein(SPLIT, SPLIT)) == 0.0
