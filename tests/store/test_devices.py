"""A page of a list reads at most ``LOOKED_AT`` devices, and no device is lost between the pages."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime, timedelta

import pytest

from core.states import PresenceState
from operations.wiring import Portal
from store import devices
from store.devices import DeviceFilter, Listed
from store.presences import Sighting, record_presences
from store.profiles import add_profile
from tests.test_db import add_certificate, add_device

NOW = datetime(2027, 1, 1, tzinfo=UTC)
RULES = {"name": "named", "dns_names": [], "ip_addresses": [], "key_types": [], "extended_key_usage": ["client_auth"]}
METADATA = {
    2: {"owner": "ops", "rack": 7, "note": 'Größe a "quoted" one'},
    3: {"owner": "ops", "a.b": "c"},
}
SOON = NOW + timedelta(days=2)


@pytest.fixture
def fleet(portal: Portal) -> Portal:
    """Twelve devices: every second one a valve, every third in hall 2; those of hall 2 expire first.

    Of four devices the first was never seen, the second is connected, the others are offline. The pumps of hall 2 have
    a certificate profile.
    """
    with portal.database.transaction() as tx:
        add_profile(tx, "default", "1", RULES, now=NOW)
        for number in range(12):
            kind, hall = ("valve", "pump")[number % 2], ("hall 2", "hall 1")[number % 3 > 0]
            profile = {"profile_id": "1"} if (kind, hall) == ("pump", "hall 2") else {}
            created_at = NOW + timedelta(hours=number)
            more = {"external_id": f"line-4/{number:03}"} if number < 2 else {"metadata": METADATA.get(number, {})}
            device_id = add_device(
                tx, name=f"{kind}-{number:02}", type=kind, location=hall, created_at=created_at, **profile, **more
            )
            add_certificate(tx, device_id, not_after=NOW + timedelta(days=1 if hall == "hall 2" else 3, hours=number))
            if number % 4:
                state = PresenceState.CONNECTED if number % 4 == 1 else PresenceState.OFFLINE
                # who was registered later was seen earlier
                seen = Sighting(state, NOW + timedelta(days=1) - timedelta(hours=number // 4, minutes=-number))
                record_presences(tx, 1, {device_id: seen})
    return portal


def _pages(portal: Portal, wanted: DeviceFilter, limit: int) -> list[Listed]:
    pages: list[Listed] = []
    after = None
    with portal.database.snapshot() as tx:
        while True:
            page = devices.list_devices(tx, "default", wanted, limit=limit, after=after)
            pages.append(page)
            if len(page.devices) == limit:
                after = devices.place_of(page.devices[-1], wanted)
            elif page.end is not None:
                after = page.end
            else:
                return pages


LISTS: tuple[tuple[DeviceFilter, list[str]], ...] = (
    (DeviceFilter(q="VALVE"), ["10", "08", "06", "04", "02", "00"]),
    (DeviceFilter(q="-00"), ["00"]),
    (DeviceFilter(q="nowhere"), []),
    (DeviceFilter(type="valve", location="hall 2"), ["06", "00"]),
    (DeviceFilter(type="valve", location="hall 2", q="-0"), ["06", "00"]),
    (DeviceFilter(type="pump", status="active"), ["11", "09", "07", "05", "03", "01"]),
    (DeviceFilter(type="valve", status="revoked"), []),
    (DeviceFilter(type="valve", expires_before=SOON), ["00", "06"]),
    (DeviceFilter(q="pump", expires_before=SOON), ["03", "09"]),
    (DeviceFilter(connected=PresenceState.OFFLINE, type="pump"), ["03", "07", "11"]),
    (DeviceFilter(connected=PresenceState.CONNECTED, q="-0", expires_before=SOON), ["09"]),
    (DeviceFilter(profile="named", type="pump"), ["09", "03"]),
    (DeviceFilter(profile="default"), ["11", "10", "08", "07", "06", "05", "04", "02", "01", "00"]),
    (DeviceFilter(profile="default", type="pump"), ["11", "07", "05", "01"]),
    (DeviceFilter(profile="named", sort="last_seen"), ["03", "09"]),
    (DeviceFilter(profile="default", expires_before=SOON), ["00", "06"]),
    (DeviceFilter(name="pump-03"), ["03"]),
    (DeviceFilter(name="pump-03", location="hall 1"), []),
    (DeviceFilter(name="Pump-03"), []),
    (DeviceFilter(sort="created", type="pump", status="active"), ["01", "03", "05", "07", "09", "11"]),
    (DeviceFilter(sort="created", type="pump", location="hall 2"), ["03", "09"]),
    (DeviceFilter(sort="name", location="hall 2"), ["03", "09", "00", "06"]),
    (DeviceFilter(sort="-name", location="hall 2"), ["06", "00", "09", "03"]),
    (DeviceFilter(sort="name", location="hall 2", expires_before=SOON), ["03", "09", "00", "06"]),
    (DeviceFilter(sort="expires", location="hall 2"), ["00", "03", "06", "09"]),
    (DeviceFilter(q="LINE-4/0"), ["01", "00"]),
    (DeviceFilter(q="Größe"), ["02"]),
    (DeviceFilter(q='a "quoted'), ["02"]),
    (DeviceFilter(metadata="owner=ops"), ["03", "02"]),
    (DeviceFilter(metadata="owner=ops", type="pump"), ["03"]),
    (DeviceFilter(metadata="owner=op"), []),
    (DeviceFilter(metadata="rack=7"), ["02"]),
    (DeviceFilter(metadata='note=Größe a "quoted" one'), ["02"]),
    (DeviceFilter(metadata="a.b=c"), ["03"]),
    (DeviceFilter(metadata="a=c"), []),
    (DeviceFilter(sort="last_seen", location="hall 2"), ["00", "06", "03", "09"]),
    (DeviceFilter(sort="-last_seen", location="hall 2"), ["09", "03", "06", "00"]),
)


def test_every_device_is_found_once_however_few_devices_a_page_reads(
    fleet: Portal, monkeypatch: pytest.MonkeyPatch
) -> None:
    for looked_at, limit in itertools.product((1, 2, 3, 1000), (1, 2, 50)):
        monkeypatch.setattr(devices, "LOOKED_AT", looked_at)
        monkeypatch.setattr(devices, "LOOKED_AT_BY_OTHERS", looked_at)
        for wanted, found in LISTS:
            pages = _pages(fleet, wanted, limit)
            assert [device.name[-2:] for page in pages for device, *_ in page.devices] == found, (wanted, looked_at)
            assert all(len(page.devices) <= looked_at for page in pages)


@pytest.mark.parametrize("limit", [1, 2, 50])
def test_devices_are_listed_by_their_connection(fleet: Portal, limit: int) -> None:
    for wanted, found in (
        (DeviceFilter(connected=PresenceState.CONNECTED), ["01", "05", "09"]),
        (DeviceFilter(connected=PresenceState.OFFLINE, sort="last_seen"), ["10", "11", "06", "07", "02", "03"]),
        (DeviceFilter(connected=PresenceState.NEVER_SEEN), ["08", "04", "00"]),
        (DeviceFilter(connected=PresenceState.NEVER_SEEN, sort="created"), ["00", "04", "08"]),
        (DeviceFilter(connected=PresenceState.CONNECTED, sort="-name"), ["09", "05", "01"]),
        (DeviceFilter(connected=PresenceState.OFFLINE, sort="name"), ["03", "07", "11", "02", "06", "10"]),
        (DeviceFilter(sort="last_seen"), ["00", "04", "08", "10", "11", "06", "07", "02", "03", "09", "05", "01"]),
        (DeviceFilter(sort="-last_seen"), ["01", "05", "09", "03", "02", "07", "06", "11", "10", "08", "04", "00"]),
    ):
        pages = _pages(fleet, wanted, limit)
        assert [device.name[-2:] for page in pages for device, *_ in page.devices] == found, wanted


def test_devices_are_listed_by_the_name_of_their_profile(fleet: Portal) -> None:
    names = [device.name for page in _pages(fleet, DeviceFilter(profile="named"), 1) for device, *_ in page.devices]
    assert names == ["pump-09", "pump-03"]
    assert _pages(fleet, DeviceFilter(profile="unknown"), 50) == [Listed([], None)]


def test_the_index_of_the_rarest_value_is_read(fleet: Portal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "LOOKED_AT", 5)
    [page] = _pages(fleet, DeviceFilter(status="active", type="pump", location="hall 2"), 50)
    assert [device.name for device, *_ in page.devices] == ["pump-09", "pump-03"]


def test_a_whole_id_is_looked_up(fleet: Portal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "LOOKED_AT", 1)
    [all_of_them] = _pages(fleet, DeviceFilter(), 50)
    oldest = all_of_them.devices[-1][0].id
    [page] = _pages(fleet, DeviceFilter(q=oldest.upper()), 50)
    assert [device.id for device, *_ in page.devices] == [oldest]
