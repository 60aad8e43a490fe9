"""The moves between a device's states."""

from __future__ import annotations

import itertools

import pytest

from errors import StateConflict
from lifecycle import DeviceStatus, advance

ALLOWED = {
    ("pending", "active"),
    ("pending", "revoked"),
    ("active", "suspended"),
    ("active", "revoked"),
    ("suspended", "active"),
    ("suspended", "revoked"),
}


@pytest.mark.parametrize(("current", "wanted"), list(itertools.product(DeviceStatus, repeat=2)))
def test_a_device_moves_only_as_the_table_says(current: DeviceStatus, wanted: DeviceStatus) -> None:
    if (current, wanted) in ALLOWED:
        assert advance(current, wanted) is wanted
    else:
        with pytest.raises(StateConflict, match=f"{current} cannot become {wanted}"):
            advance(current, wanted)
