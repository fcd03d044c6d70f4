"""Pacing against a deadline: which of the steps that a schedule wants to compute there is time for."""

from __future__ import annotations

import math
from dataclasses import dataclass

from spectrum.seconds import StepSeconds


@dataclass(slots=True)
class Pace:
    """Spreads the computed steps that there is time for evenly over the wanted ones.

    If there is time for all of them, nothing changes. Otherwise every wanted step earns the share of it that
    is affordable, and one is computed whenever the shares add up to a whole step. The share is recomputed at
    each step, so it follows steps that take longer or shorter than before.

    Attributes:
        credit: shares earned and not yet spent.
    """

    credit: float = 0.0

    def allows(self, left: float, typical: StepSeconds, wanted: int, steps_left: int) -> bool:
        """Decide whether there is time to compute a wanted step; called once for each wanted step.

        Args:
            left: seconds until the deadline; infinite without one.
            typical: seconds per step; as 0 for a kind that was never timed.
            wanted: wanted computed steps from this one on, this one included.
            steps_left: all steps from this one on.
        """
        if math.isinf(left) or typical.extra <= 0.0:
            return True
        affordable = typical.affordable(left, steps_left)
        self.credit += min(max(affordable, 0.0) / max(wanted, 1), 1.0)
        if self.credit < 1.0 - 1e-9:
            return False
        self.credit -= 1.0
        return True
