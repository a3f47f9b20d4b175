"""Shares of a device align, do not overlap, and add up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.errors import InfeasibleError, UsageError
from toolkit.hardware import Share, catalogue, find_device
from toolkit.hardware.share import check_disjoint, cut_points, split

DEVICES = sorted(catalogue.builtin().devices)


@given(st.sampled_from(DEVICES), st.floats(0.001, 0.999))
def test_a_split_covers_the_device_with_two_aligned_shares(name, fraction):
    device = find_device(name)
    first, second = split(device, fraction)
    check_disjoint([first, second])
    assert first.units + second.units == device.num_units
    assert first.fraction + second.fraction == pytest.approx(1)
    assert first.units % device.unit_granularity[1] == 0
    # No other cut is nearer to what was asked for.
    for cut in cut_points(device):
        other = abs(cut / device.num_units - fraction)
        assert abs(first.fraction - fraction) <= other + 1e-12


def test_h100_slices_step_by_eight_and_leave_four():
    h100 = find_device("h100")
    assert Share(h100, 64).fraction == 64 / 132
    assert Share(h100, 4, start=128).stop == 132  # the remainder
    with pytest.raises(UsageError, match="at least 8 units in multiples of 8"):
        Share(h100, 12)
    with pytest.raises(UsageError, match="do not align"):
        Share(h100, 8, start=4)
    with pytest.raises(UsageError, match="not a slice"):
        Share(h100, 140)


def test_overlap_is_found_whatever_the_order():
    cpu = find_device("generic-cpu")
    shares = [Share(cpu, 2, 4), Share(cpu, 4), Share(cpu, 2, 6)]
    check_disjoint(shares)
    with pytest.raises(UsageError, match="overlap: units 0 to 4 and 3 to 5"):
        check_disjoint([*shares[:0], Share(cpu, 2, 3), Share(cpu, 4)])
    # The same units of another device are other units.
    assert not Share(cpu, 4).overlaps(Share(find_device("l4"), 4))


def test_one_core_cannot_be_divided():
    with pytest.raises(InfeasibleError, match="cannot be divided"):
        split(find_device("generic-cpu").sliced(1), 0.5)
    assert Share.whole(find_device("l4")).fraction == 1
