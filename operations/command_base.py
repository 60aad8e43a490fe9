"""What every command of ``portal-server`` begins with: the settings, the open portal, errors as one sentence."""

from __future__ import annotations

import contextlib
import functools
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import ParamSpec

import click
from flask import current_app

from config import Settings
from core import logs
from core.errors import PortalError
from core.server_command import server_command
from onboarding_portal import streams
from operations.wiring import Portal, open_portal

P = ParamSpec("P")


def settings_of_app() -> Settings:
    """Return the settings that the application was created with."""
    settings: Settings = current_app.config["PORTAL_SETTINGS"]
    return settings


def opened_portal() -> contextlib.closing[Portal]:
    """Open the portal for the body of a ``with``."""
    return contextlib.closing(open_portal(settings_of_app()))


def without_traceback(function: Callable[P, None]) -> Callable[P, None]:
    """Report a portal's error as one sentence, and output that cannot be written likewise."""

    @functools.wraps(function)
    def run(*arguments: P.args, **options: P.kwargs) -> None:
        with streams.guarded():
            logs.show_fields_in_commands()
            try:
                function(*arguments, **options)
            except PortalError as error:
                by = f"list them by: {server_command('token list')}"
                raise click.ClickException(error.detail.replace("list them with GET /tokens", by)) from error

    return run


def print_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows below their titles; on a terminal that is too narrow for a line, a row is a block of lines.

    A column in which no row has anything is left out.
    """
    if not rows:
        click.echo("There are none.", err=True)
        return
    kept = [i for i in range(len(titles)) if any(row[i] for row in rows)]
    lines = [[row[i] for i in kept] for row in ([title.upper() for title in titles], *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(kept))]
    if sys.stdout.isatty() and sum(widths) + 2 * (len(widths) - 1) > shutil.get_terminal_size().columns:
        longest = max(len(titles[i]) for i in kept)
        blocks = (
            "\n".join(f"{titles[i][:1].upper() + titles[i][1:]:<{longest}}  {row[i]}".rstrip() for i in kept if row[i])
            for row in rows
        )
        click.echo("\n\n".join(blocks))
        return
    for line in lines:
        click.echo("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())
