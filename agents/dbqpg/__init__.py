"""Deep Bayesian quadrature policy gradient: the agent (``agent``), its learnt kernel (``kernel``), the posterior by
products with the scores (``quadrature``), and UAPG's shaping of a step by its uncertainty (``uncertainty``)."""

from agents.dbqpg.agent import DBQPG, DBQPGConfig, DBQPGEstimator

__all__ = ["DBQPG", "DBQPGConfig", "DBQPGEstimator"]
