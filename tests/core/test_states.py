"""The moves between a device's states, and when it may renew."""

from __future__ import annotations

import contextlib
import itertools
from datetime import UTC, datetime, timedelta

import pytest

from core.errors import StateConflict
from core.states import DeviceStatus, advance, check_renewal

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


START = datetime(2027, 1, 1, tzinfo=UTC)
END = START + timedelta(days=100)


@pytest.mark.parametrize(
    ("day", "percent", "grace", "refused"),
    [
        (65, 66, 0, "too early to renew this certificate; try again after 2027-03-08 00:00:00 UTC"),
        (66, 66, 0, None),
        (0, 0, 0, None),
        (99, 66, 0, None),
        (100, 66, 0, "has expired; an operator must"),
        (106, 66, 7, None),
        (107, 66, 7, "has expired; an operator must"),
    ],
)
def test_a_device_renews_in_its_window(day: int, percent: int, grace: int, refused: str | None) -> None:
    now = START + timedelta(days=day)
    with contextlib.nullcontext() if refused is None else pytest.raises(StateConflict, match=refused):
        check_renewal(START, END, now, from_percent=percent, grace=timedelta(days=grace))
