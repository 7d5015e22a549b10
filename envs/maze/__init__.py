"""Point masses in mazes, and a corridor beside a hazard: batched, on any device, for offline data without MuJoCo."""

from envs.maze.corridor import HazardCorridor, cautious_action, overconfident_action
from envs.maze.point import MAPS, PointMaze, large, medium, u_maze
from envs.maze.waypoints import Tour, Waypoints

__all__ = [
    "MAPS", "HazardCorridor", "PointMaze", "Tour", "Waypoints", "cautious_action", "large", "medium",
    "overconfident_action", "u_maze",
]  # fmt: skip
