"""Coverage tasks: the reward is a function of the set of visited states (docs/subpo.md)."""

from __future__ import annotations

from envs.coverage.ant import ant_coverage
from envs.coverage.functions import Coverage, Facility, Groups, LogDet, curvature, submodularity_ratio
from envs.coverage.grid import GridWorld
from envs.coverage.optima import Path, best_path, greedy_path
from envs.coverage.point import PointMass, point_coverage
from envs.coverage.tasks import grid_coverage, grid_design, grid_facility, grid_items, two_rooms

__all__ = [
    "Coverage", "Facility", "GridWorld", "Groups", "LogDet", "Path", "PointMass", "ant_coverage", "best_path",
    "curvature", "greedy_path", "grid_coverage", "grid_design", "grid_facility", "grid_items", "point_coverage",
    "submodularity_ratio", "two_rooms",
]  # fmt: skip
