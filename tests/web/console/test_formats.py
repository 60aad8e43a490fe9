"""How the console writes values."""

from __future__ import annotations

from web.console.formats import duration


def test_times_of_steps_have_three_digits() -> None:
    for seconds, text in (
        (0.0, "0 ms"), (0.00421, "4.21 ms"), (0.1314, "131 ms"), (1.2391, "1.24 s"), (42.0, "42 s"), (600, "10 min"),
        (86400, "24 h"), (864000, "10 d"),
    ):  # fmt: skip
        assert duration(seconds) == text
