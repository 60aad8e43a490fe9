"""What is taken of a minute is counted once in all processes, and begins again with the next."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from core.pages import PageFile
from core.rates import LAYOUT, Rates, Taken

NOW = 1_800_000_000.0


@pytest.fixture
def rates(tmp_path: Path) -> Rates:
    return Rates(PageFile(tmp_path / "rates", LAYOUT))


def test_no_more_is_given_than_the_limit_and_the_wait_is_to_the_end_of_the_minute(rates: Rates) -> None:
    assert rates.take("a", 3, 5, NOW) == Taken(3, 0)
    assert rates.take("a", 3, 5, NOW + 20) == Taken(2, 40)
    assert rates.take("a", 1, 5, NOW + 59.5) == Taken(0, 1)
    assert rates.take("b", 1, 5, NOW + 20) == Taken(1, 0)
    assert rates.take("a", 6, 5, NOW + 60) == Taken(5, 60)


def test_a_clock_that_was_set_back_begins_a_new_minute(rates: Rates) -> None:
    assert rates.take("a", 5, 5, NOW).number == 5
    assert rates.take("a", 5, 5, NOW - 3600).number == 5


def test_without_a_limit_nothing_is_counted_and_no_file_is_made(rates: Rates, tmp_path: Path) -> None:
    assert rates.take("a", 1000, None, NOW) == Taken(1000, 0)
    assert not list(tmp_path.iterdir())


def test_the_file_never_grows_and_a_damaged_one_begins_again(rates: Rates, tmp_path: Path) -> None:
    rates.take("a", 1, 1, NOW)
    size = (tmp_path / "rates").stat().st_size
    for number in range(300):
        rates.take(f"tenant-{number}", 1, 1, NOW)
    assert (tmp_path / "rates").stat().st_size == size < 1 << 18
    (tmp_path / "rates").write_bytes(b"nonsense")
    assert rates.take("a", 1, 1, NOW).number == 1


def test_several_processes_together_are_given_no_more_than_the_limit(tmp_path: Path) -> None:
    program = f"""
from pathlib import Path
from core.pages import PageFile
from core.rates import LAYOUT, Rates
rates = Rates(PageFile(Path({str(tmp_path / "rates")!r}), LAYOUT))
print(sum(rates.take("a", 1, 100, {NOW}).number for _ in range(60)))
"""
    runs = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert sum(int(run.communicate(timeout=60)[0]) for run in runs) == 100
