"""Failed logins counted by address, in a file, at times that the tests choose."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from core.errors import Unavailable
from core.pages import PageFile
from core.throttle import (
    LAYOUT,
    RECORDED_IN_ALL,
    RECORDED_OF_AN_ADDRESS,
    SETS,
    WAYS,
    WINDOW_SECONDS,
    Throttle,
    network_of,
    shown,
)

NOW = 1_800_000_000.0
HERE = "192.0.2.7"


@pytest.fixture
def throttle(tmp_path: Path) -> Throttle:
    return Throttle(PageFile(tmp_path / "attempts", LAYOUT), limit=3)


def waits(throttle: Throttle, *moments: tuple[str, float]) -> list[int]:
    """How long each failure has to wait, by its address and its time after ``NOW``."""
    return [throttle.failed(address, NOW + after).wait for address, after in moments]


@pytest.mark.parametrize(
    ("moments", "expected"),
    [
        pytest.param([(HERE, 0)] * 5, [0, 0, 0, 60, 60], id="the fourth of three must wait"),
        pytest.param([(HERE, 0), (HERE, 1), (HERE, 2), (HERE, 10.5)], [0, 0, 0, 50], id="until its minute has passed"),
        pytest.param([(HERE, 0)] * 4 + [(HERE, 59.99)], [0, 0, 0, 60, 1], id="a second at least"),
        pytest.param([(HERE, 0)] * 4 + [(HERE, 60)] * 4, [0, 0, 0, 60] * 2, id="and begins again afterwards"),
        pytest.param([(HERE, n) for n in range(0, 600, 20)], [0] * 30, id="three a minute may continue"),
        pytest.param([(HERE, 0)] * 4 + [("192.0.2.8", 0)], [0, 0, 0, 60, 0], id="another address need not"),
        pytest.param([(HERE, 0)] * 4 + [(HERE, -3600)], [0, 0, 0, 60, 0], id="a clock that is set back frees all"),
        pytest.param([(HERE, 0)] * 4 + [(HERE, 1e9)], [0, 0, 0, 60, 0], id="a clock that is set ahead, too"),
        pytest.param([("2001:db8::1", 0), ("2001:db8::2", 0), ("2001:db8::3", 0), ("2001:db8::ffff:0:0:4", 0)],
                     [0, 0, 0, 60], id="IPv6 counts by its /64"),
        pytest.param([("2001:db8::1", 0)] * 4 + [("2001:db8:0:1::1", 0)], [0, 0, 0, 60, 0], id="another /64 need not"),
        pytest.param([("::ffff:192.0.2.7", 0)] * 3 + [(HERE, 0)], [0, 0, 0, 60], id="IPv4 in IPv6 is IPv4"),
        pytest.param([("", 0), ("unix:", 0), ("nonsense", 0), ("", 0)], [0, 0, 0, 60], id="what has no address is one"),
    ],
)  # fmt: skip
def test_too_many_failures_of_an_address_in_a_minute_must_wait(
    throttle: Throttle, moments: list[tuple[str, float]], expected: list[int]
) -> None:
    assert waits(throttle, *moments) == expected


@pytest.mark.parametrize(
    ("address", "text"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::1", "::/64"),
    ],
)
def test_a_network_is_shown_as_people_write_it(address: str, text: str) -> None:
    assert shown(network_of(address)) == text


def test_one_that_came_too_late_never_waits_nor_makes_others_wait(throttle: Throttle) -> None:
    assert [throttle.failed(HERE, NOW, counts=False).wait for _ in range(10)] == [0] * 10
    assert waits(throttle, (HERE, 0)) == [0]


def test_the_first_few_of_an_address_are_recorded_and_the_others_counted(throttle: Throttle) -> None:
    recorded = [throttle.failed(HERE, NOW).recorded for _ in range(100)]
    assert recorded == [True] * RECORDED_OF_AN_ADDRESS + [False] * (100 - RECORDED_OF_AN_ADDRESS)
    rest = throttle.take_unrecorded()
    assert (rest.count, rest.networks) == (95, ((HERE, 95),))
    assert throttle.take_unrecorded().count == 0
    assert throttle.failed(HERE, NOW + WINDOW_SECONDS).recorded


def test_a_flood_from_many_addresses_is_recorded_a_few_times_a_minute_in_all(throttle: Throttle) -> None:
    flood = [throttle.failed(f"2001:db8:{n:x}::1", NOW).recorded for n in range(1000)]
    assert sum(flood) == RECORDED_IN_ALL
    rest = throttle.take_unrecorded()
    assert rest.count == 1000 - RECORDED_IN_ALL
    assert len(rest.networks) == 10


def test_the_table_never_grows_and_forgets_who_began_first(throttle: Throttle, tmp_path: Path) -> None:
    waits(throttle, *[(HERE, 0)] * 4)
    size = (tmp_path / "attempts").stat().st_size
    for number in range(3 * SETS * WAYS):
        throttle.failed(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}", NOW + 1)
    assert (tmp_path / "attempts").stat().st_size == size < 1 << 18
    assert waits(throttle, (HERE, 2)) == [0]
    assert throttle.take_unrecorded().count >= 3 * SETS * WAYS - RECORDED_IN_ALL


def test_addresses_that_replace_another_in_one_file_do_not_in_the_next(throttle: Throttle, tmp_path: Path) -> None:
    waits(throttle, (HERE, 0))
    content = (tmp_path / "attempts").read_bytes()
    slot_bytes = len(content) // (SETS * WAYS)
    start = content.index(network_of(HERE))
    chosen = []
    for number in range(100 * SETS):  # an attacker's way to find addresses in the set of another, were there no salt
        address = f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"
        throttle.failed(address, NOW)
        place = (tmp_path / "attempts").read_bytes().find(network_of(address), start, start + WAYS * slot_bytes)
        if place >= 0:
            chosen.append(address)
        if len(chosen) == WAYS:
            break
    assert waits(throttle, *[(HERE, 1)] * 4) == [0, 0, 0, 60], "they have replaced it here"
    other = Throttle(PageFile(tmp_path / "other", LAYOUT), limit=3)
    waits(other, *[(HERE, 0)] * 4)
    for address in chosen:
        other.failed(address, NOW)
    assert waits(other, (HERE, 1)) == [59]


def test_all_who_use_the_table_count_together(tmp_path: Path) -> None:
    program = f"""
from pathlib import Path
from core.pages import PageFile
from core.throttle import LAYOUT, Throttle
throttle = Throttle(PageFile(Path({str(tmp_path / "attempts")!r}), LAYOUT), 1000)
print(*(throttle.failed("{HERE}", {NOW}).wait for _ in range(200)))
"""
    command = [sys.executable, "-c", program]
    root = Path(__file__).parents[2]
    processes = [subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    throttle = Throttle(PageFile(tmp_path / "attempts", LAYOUT), limit=1000)
    with ThreadPoolExecutor(4) as threads:
        mine = [*threads.map(lambda _: throttle.failed(HERE, NOW).wait, range(600))]
    theirs = [int(wait) for process in processes for wait in process.communicate()[0].split()]
    assert mine.count(0) + theirs.count(0) == 1000
    assert throttle.failed(HERE, NOW).wait == 60


@pytest.mark.parametrize("content", [b"", b"nonsense", bytes(200_000)])
def test_a_damaged_table_is_replaced(throttle: Throttle, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "attempts").write_bytes(content)
    assert waits(throttle, *[(HERE, 0)] * 4) == [0, 0, 0, 60]


def test_a_table_that_cannot_be_kept_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(Unavailable):
        Throttle(PageFile(tmp_path / "gone" / "attempts", LAYOUT), limit=3).failed(HERE, NOW)
