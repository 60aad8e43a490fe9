"""What every command of ``portal-server`` begins with: the settings, the open portal, errors as one sentence."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import ParamSpec

import click
from flask import current_app

from config import Settings
from core import logs
from core.errors import PortalError
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
    """Report a portal's error as one sentence."""

    @functools.wraps(function)
    def run(*arguments: P.args, **options: P.kwargs) -> None:
        logs.show_fields_in_commands()
        try:
            function(*arguments, **options)
        except PortalError as error:
            raise click.ClickException(error.detail) from error

    return run
