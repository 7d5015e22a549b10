"""Offline data: files of D4RL, Minari, OGBench and your own as flat transitions; rings, windows, normalised scores."""

from ccrl.offline.arrays import from_arrays, load_npz, load_parquet
from ccrl.offline.d4rl import load_d4rl, qlearning_rows
from ccrl.offline.dataset import DataError, Dataset
from ccrl.offline.load import load_dataset
from ccrl.offline.minari import load_minari, write_minari
from ccrl.offline.ogbench import load_ogbench, make_ogbench, navigate_ogbench
from ccrl.offline.scores import D4RL_SCORES, normalised_score, reference_scores, tail_mean, value_at_risk
from ccrl.offline.windows import Windows, select_windows, valid_windows

__all__ = [
    "D4RL_SCORES",
    "DataError",
    "Dataset",
    "Windows",
    "from_arrays",
    "load_d4rl",
    "load_dataset",
    "load_minari",
    "load_npz",
    "load_ogbench",
    "load_parquet",
    "make_ogbench",
    "navigate_ogbench",
    "normalised_score",
    "qlearning_rows",
    "reference_scores",
    "select_windows",
    "tail_mean",
    "valid_windows",
    "value_at_risk",
    "write_minari",
]
