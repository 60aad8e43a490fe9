"""What a text may mean: an id, the beginning of one, a name, an external id."""

from __future__ import annotations

import pytest

import db
from core.states import ClientKind, DeviceStatus
from operations.wiring import Portal
from store import references
from tests.test_db import NOW

FIRST = "01939bfa-0000-7000-8000-000000000001"
SECOND = "01939bfa-0000-7000-8000-000000000002"
THIRD = "01939bff-0000-7000-8000-000000000003"
APPLICATION = "01939bff-0000-7000-8000-000000000004"


@pytest.fixture
def known(portal: Portal) -> Portal:
    rows = (
        (FIRST, "pump", "line-4/1", ClientKind.DEVICE),
        (SECOND, "pump", None, ClientKind.DEVICE),
        (THIRD, "line-4/1", "0193", ClientKind.DEVICE),
        (APPLICATION, "store", None, ClientKind.APPLICATION),
    )
    with portal.database.transaction() as tx:
        for device_id, name, external_id, kind in rows:
            db.add_device(
                tx, tenant_id="default", device_id=device_id, name=name, external_id=external_id, kind=kind, type="t",
                location="l", firmware="1", metadata={}, status=DeviceStatus.PENDING, topics=[("a/{id}", "read")],
                created_at=NOW, generation=0,
            )  # fmt: skip
    return portal


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        (FIRST, [FIRST]),
        (FIRST.upper(), [FIRST]),
        (FIRST[:-1], [FIRST, SECOND]),
        ("01939bff-0", [THIRD]),
        ("01939BFF", [THIRD]),
        ("0193", [FIRST, SECOND, THIRD]),  # an external id, and the beginning of ids
        ("019", []),
        ("pump", [FIRST, SECOND]),
        ("Pump", []),
        ("line-4/1", [FIRST, THIRD]),  # the external id of one, the name of another
        ("store", []),
        (APPLICATION, []),
        ("%", []),
        ("", []),
    ],
)
def test_a_text_means_every_device_that_it_fits(known: Portal, text: str, meant: list[str]) -> None:
    with known.database.snapshot() as tx:
        assert [one.id for one in references.candidates(tx, "default", text)] == meant
        assert references.candidates(tx, "another", text) == []
