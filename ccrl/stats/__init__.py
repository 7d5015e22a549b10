"""Statistics of few runs: NumPy in, numbers out; nothing else of this project is needed to use them.

    from ccrl.stats import iqm, stratified_bootstrap
    point, low, high = stratified_bootstrap(scores, iqm)       # scores [runs, tasks]

Definitions agree with those of rliable (a test holds them to 1e-12). What each interval covers with how few runs is
measured in ``docs/statistics.md``.
"""

from ccrl.stats.aggregates import (
    Interval,
    iqm,
    median_of_means,
    optimality_gap,
    performance_profile,
    probability_of_improvement,
    probability_of_improvement_interval,
    sample_efficiency,
    stratified_bootstrap,
)
from ccrl.stats.budget import score_after_evaluations, score_at_budget
from ccrl.stats.differences import Difference, holm, paired_t, sign_flip, welch_t
from ccrl.stats.intervals import iqm_interval, t_interval, tolerance_interval, tolerance_runs, trimmed_t_interval

__all__ = [
    "Difference", "Interval", "holm", "iqm", "iqm_interval", "median_of_means", "optimality_gap", "paired_t",
    "performance_profile", "probability_of_improvement", "probability_of_improvement_interval", "sample_efficiency",
    "score_after_evaluations", "score_at_budget", "sign_flip", "stratified_bootstrap", "t_interval",
    "tolerance_interval", "tolerance_runs", "trimmed_t_interval", "welch_t",
]  # fmt: skip
