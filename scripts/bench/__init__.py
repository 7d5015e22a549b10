"""Speed, as ratios to a baseline measured in the same run: ``python scripts/bench env``."""
