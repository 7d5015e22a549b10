"""Control methods in one matched setting: steps to a threshold, final return, time."""
