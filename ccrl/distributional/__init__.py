"""Return distributions: objectives with a stock, an exact finite-horizon oracle, distributional value and policy
iteration on a grid of stocks. docs/distributional.md has the equations."""

from ccrl.distributional.dynamic_programming import StockGrid, reachable_stocks, shortfall_range
from ccrl.distributional.exact import ExactOracle, Solution, best_stock_free, law_of, scalar_value
from ccrl.distributional.laws import Law, compress, cvar, quantile, wasserstein
from ccrl.distributional.mdp import FiniteMDP
from ccrl.distributional.objectives import (
    OCE,
    Custom,
    CVaR,
    Entropic,
    Expected,
    Homeostasis,
    MeanCVaR,
    Objective,
    OptimisticTail,
    SoftConstraints,
    TargetReturn,
    outer_search,
)

__all__ = [
    "OCE", "CVaR", "Custom", "Entropic", "ExactOracle", "Expected", "FiniteMDP", "Homeostasis", "Law", "MeanCVaR",
    "Objective", "OptimisticTail", "SoftConstraints", "Solution", "StockGrid", "TargetReturn", "best_stock_free",
    "compress", "cvar", "law_of", "outer_search", "quantile", "reachable_stocks", "scalar_value", "shortfall_range",
    "wasserstein",
]  # fmt: skip
