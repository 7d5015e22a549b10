"""A progress bar on terminals; silent elsewhere, so that log files stay readable."""

from __future__ import annotations

from tqdm import tqdm

from ccrl.experiment.logger import digits

__all__ = ["ProgressBar"]


class ProgressBar:
    """Counts the agent's clock up to ``total``; shows steps per second, time left and the recent return.

    Args:
        total: steps at the end. initial: steps already done (a resumed run).
        enabled: False shows nothing, also on a terminal.
    """

    def __init__(self, total: int, initial: int = 0, enabled: bool = True) -> None:
        # disable=None is tqdm's "only on a terminal".
        self._bar = tqdm(
            total=total, initial=initial, unit=" steps", unit_scale=True, disable=None if enabled else True
        )

    def update(self, step: int, ep_rew_mean: float | None = None) -> None:
        """Move to ``step``; ``ep_rew_mean`` is shown as ``return``."""
        if self._bar.disable:
            return
        if ep_rew_mean is not None:
            self._bar.set_postfix_str(f"return {digits(ep_rew_mean)}", refresh=False)
        self._bar.update(step - self._bar.n)

    def close(self) -> None:
        """Leave the bar as it is and end the line."""
        self._bar.close()
