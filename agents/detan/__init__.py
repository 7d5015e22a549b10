"""D-eta-N: a quantile agent on stock-augmented states (Avila Pires et al. 2025, arXiv 2501.13028).

With the stock ``c_{t+1} = (c_t + R_{t+1}) / gamma`` and a utility ``f``, the agent acts greedily for the expected
utility of stock plus return, and learns the LAW of the return, not of the utility:

    a*(s, c) = argmax_a  1/N sum_i f(c + theta_i(s, c, a))
    y_j      = r + gamma alive theta'_j(s', c', a*'(s', c')),    c' = (c + r) / gamma     (target network chooses)
    loss     = sum_i 1/N sum_j |tau_i - 1{y_j < theta_i}| H_kappa(y_j - theta_i),         tau_i = (2 i + 1) / (2 N)

with ``H_0(u) = |u|`` and Huber's loss divided by kappa above 0.

What the paper adds to QR-DQN (Dabney et al. 2018): the stock in the input and in the greedy rule, and stocks drawn anew
for every replayed transition (:class:`StockReplay`), as rewards and successors do not depend on them. One network then
serves every level of CVaR, or every target, by the choice of ``c_0`` alone. docs/detan.md has the derivation.

The paper's network and replay settings are not known to us; the defaults are ours. Vector returns are N particles of m
numbers, fitted by the energy distance, in place of quantiles, which vectors do not have.
"""

from agents.detan.agent import DetaN
from agents.detan.config import DetaNConfig
from agents.detan.learning import DetaNCycle, StockReplay, energy_loss
from agents.detan.policy import StockPolicy

__all__ = ["DetaN", "DetaNConfig", "DetaNCycle", "StockPolicy", "StockReplay", "energy_loss"]
