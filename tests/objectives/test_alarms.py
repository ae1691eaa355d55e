# SPDX-License-Identifier: Apache-2.0
"""When the alarms of the training log ring."""

import pytest

from avar_verl.objectives.alarms import RiseAlarm, system_mass_alarm


@pytest.mark.parametrize("mass, floor, rings", [(0.009, 0.01, True), (0.01, 0.01, False), (0.0, 0.0, False)])
def test_system_mass(mass, floor, rings):
    assert system_mass_alarm(mass, floor) is rings


def feed(alarm, steps):
    return [alarm.update(*step) for step in steps]


def test_rings_while_the_statistic_rises_alone():
    """10, 10, 20, 20 against a flat accuracy; then the accuracy follows, then the statistic is flat again."""
    alarm = RiseAlarm(4)
    assert feed(alarm, [(10, 0.5), (10, 0.5), (20, 0.5), (20, 0.5)]) == [False, False, False, True]
    assert feed(alarm, [(30, 0.6), (30, 0.7)]) == [False, False]
    assert feed(alarm, [(30, 0.7), (30, 0.7)]) == [False, False]


def test_a_rise_of_a_tenth_is_no_alarm():
    assert feed(RiseAlarm(2), [(10, 0.5), (11.0, 0.4)]) == [False, False]
    assert feed(RiseAlarm(2), [(10, 0.5), (11.1, 0.4)]) == [False, True]


def test_an_odd_window_leaves_out_its_middle():
    assert feed(RiseAlarm(3), [(10, 0.5), (99, 0.9), (12, 0.5)]) == [False, False, True]


def test_a_window_of_zero_never_rings():
    assert not any(feed(RiseAlarm(0), [(10.0**step, 0.0) for step in range(9)]))


@pytest.mark.parametrize("later, rings", [(-0.9, False), (-0.89, True), (-1.05, False), (0.0, True)])
def test_a_statistic_below_zero_rises_by_a_share_of_its_size(later, rings):
    alarm = RiseAlarm(2)
    alarm.update(-1.0, 0.5)
    assert alarm.update(later, 0.5) is rings
