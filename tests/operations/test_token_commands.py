"""The lives of tokens that the server's own command makes."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import click
import pytest

from app import create_app, portal_of
from config import Settings
from operations.token_commands import Life
from operations.wiring import prepare


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


@pytest.mark.parametrize(("options", "said"), [((), True), (("--expires-in", "90d"), False)])
def test_who_makes_a_token_that_never_expires_is_told(
    make_settings: Callable[..., Settings], options: tuple[str, ...], said: bool
) -> None:
    app = create_app(make_settings(), background=False)
    prepare(portal_of(app))
    with app.app_context():
        done = app.test_cli_runner().invoke(args=["token", "create", "ci", "--role", "auditor", *options])
    assert done.exit_code == 0
    assert ("without end; for one that expires, add --expires-in 90d" in done.stderr) is said
    portal_of(app).close()
