"""What the server's own commands share: the settings, errors said in one sentence."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec

import click
from flask import current_app

from config import Settings
from core.errors import PortalError

P = ParamSpec("P")


def settings_here() -> Settings:
    """The settings that the application was made with."""
    settings: Settings = current_app.config["PORTAL_SETTINGS"]
    return settings


def plainly(function: Callable[P, None]) -> Callable[P, None]:
    """Say what is wrong in one sentence, without a traceback."""

    @functools.wraps(function)
    def run(*arguments: P.args, **options: P.kwargs) -> None:
        try:
            function(*arguments, **options)
        except PortalError as error:
            raise click.ClickException(error.detail) from error

    return run
