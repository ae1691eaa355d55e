# SPDX-License-Identifier: Apache-2.0
"""Alarms of the training log: signs that the attention statistics no longer mean what they should.

VAS has the system mass as its denominator, so starving that mass raises VAS without any more looking: by guidance in
the cold start, and by the policy itself in RL.
"""

from collections import deque


def system_mass_alarm(system_mass: float, floor: float) -> bool:
    """Whether the mean system mass is under the alarm's floor, where ratios are ruled by their denominator.

    >>> system_mass_alarm(0.004, 0.01), system_mass_alarm(0.004, 0.0)
    (True, False)
    """
    return system_mass < floor


class RiseAlarm:
    """Rings while the visual statistic rises and the accuracy does not.

    Over the last `window` steps: the mean of the statistic in the later half is more than 10 % above that of the
    earlier half, and the mean accuracy of the later half is not above that of the earlier one. Silent until the window
    is full; a restarted run starts with an empty one.

    >>> alarm = RiseAlarm(4)
    >>> [alarm.update(vas, 0.5) for vas in (1.0, 1.0, 2.0, 2.0)]
    [False, False, False, True]
    """

    RISE = 1.1

    def __init__(self, window: int):
        self.steps: deque[tuple[float, float]] = deque(maxlen=window)

    def update(self, statistic: float, accuracy: float) -> bool:
        """Take in one step and say whether the alarm rings."""
        self.steps.append((statistic, accuracy))
        window = self.steps.maxlen
        if not window or len(self.steps) < window:
            return False
        half = window // 2
        steps = list(self.steps)
        earlier, later = steps[:half], steps[window - half :]

        def mean(part, index):
            return sum(step[index] for step in part) / half

        rises = mean(later, 0) > self.RISE * mean(earlier, 0)
        return rises and mean(later, 1) <= mean(earlier, 1)
