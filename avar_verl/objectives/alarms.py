# SPDX-License-Identifier: Apache-2.0
"""Alarms of the training log: signs that the attention statistics no longer mean what they should.

VAS has the system mass as its denominator. If that mass shrinks, VAS rises without more attention to the image: through
guidance in the cold start, or through the policy itself in RL.
"""

from collections import deque


def system_mass_alarm(system_mass: float, floor: float) -> bool:
    """Whether the mean system mass is below the alarm's floor, where the denominator dominates the ratio.

    >>> system_mass_alarm(0.004, 0.01), system_mass_alarm(0.004, 0.0)
    (True, False)
    """
    return system_mass < floor


class RiseAlarm:
    """Alarm that is on while the visual statistic rises and the accuracy does not.

    Over the last `window` steps: the mean of the statistic in the later half is above that of the earlier half by more
    than 10 % of that one's absolute value, and the mean accuracy of the later half is not above that of the earlier
    one. Off until the window is full; a restarted run starts with an empty window.

    >>> alarm = RiseAlarm(4)
    >>> [alarm.update(vas, 0.5) for vas in (1.0, 1.0, 2.0, 2.0)]
    [False, False, False, True]
    """

    RISE = 0.1

    def __init__(self, window: int):
        self.steps: deque[tuple[float, float]] = deque(maxlen=window)

    def update(self, statistic: float, accuracy: float) -> bool:
        """Add one step; returns whether the alarm is on."""
        self.steps.append((statistic, accuracy))
        window = self.steps.maxlen
        if not window or len(self.steps) < window:
            return False
        half = window // 2
        steps = list(self.steps)
        earlier, later = steps[:half], steps[window - half :]

        def mean(part, index):
            return sum(step[index] for step in part) / half

        rises = mean(later, 0) - mean(earlier, 0) > self.RISE * abs(mean(earlier, 0))
        return rises and mean(later, 1) <= mean(earlier, 1)
