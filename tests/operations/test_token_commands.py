"""The lives of tokens that the server's own command makes."""

from __future__ import annotations

from datetime import timedelta

import click
import pytest

from operations.token_commands import Life


@pytest.mark.parametrize(
    ("text", "life"),
    [
        ("90d", timedelta(days=90)),
        ("90", timedelta(days=90)),
        ("12h", timedelta(hours=12)),
        ("3650d", timedelta(days=3650)),
    ],
)
def test_a_life_is_in_days_or_hours(text: str, life: timedelta) -> None:
    assert Life().convert(text, None, None) == life


@pytest.mark.parametrize("text", ["0", "0h", "3651d", "99999h", "-1d", "1.5d", "12m", "d", "", "١d"])
def test_anything_else_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(click.BadParameter, match="such as 90d or 12h"):
        Life().convert(text, None, None)
