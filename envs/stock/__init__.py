"""Tasks whose objective is one of the return's distribution, with optima that are exact or computed on fine grids."""

from envs.stock.execution import OrderExecution
from envs.stock.finite import CostBudget, FiniteEnv, Homeostat, RiskGridworld, SABChain

__all__ = ["CostBudget", "FiniteEnv", "Homeostat", "OrderExecution", "RiskGridworld", "SABChain"]
