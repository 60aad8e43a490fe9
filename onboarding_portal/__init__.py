"""The programs ``portal`` and ``portal-server``, and the version: the one name that an installed wheel adds.

In a wheel the folders and modules of the source tree lie in this package. They keep their names: the two programs,
and nothing else in the environment, find them there.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # without typing, whose import Ctrl-C could interrupt
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import NoReturn

    from click import Command
    from flask import Flask

VERSION = "0.1.0"


def portal() -> None:
    """Run the operator's command line."""
    exit_when_interrupted()
    _find_modules()
    from cli import cli

    cli()


def portal_server() -> None:
    """Run a command of the server's own."""
    exit_when_interrupted()
    _find_modules()
    os.environ.setdefault("PORTAL_SERVER_COMMAND", "portal-server")  # for the commands that are suggested
    from importlib.util import find_spec

    try:
        if sys.argv[1:2] == ["agent"]:  # which needs neither database nor web server
            from operations.agent.commands import main

            main()
        if find_spec("flask") is None:  # a help text of commands that do not work would help nobody
            raise ModuleNotFoundError(name="flask")
        from operations.server_program import program
    except ModuleNotFoundError as error:
        _end_without(error)

    program(_commands_of_app)(prog_name="portal-server")


def _commands_of_app() -> tuple[Callable[[], Flask], Iterable[Command]]:
    """Import the application, which takes most of a second; return what makes it, and its commands."""
    try:
        import app
    except ModuleNotFoundError as error:
        _end_without(error)

    return app.create_app, app.server_commands()


def _end_without(error: ModuleNotFoundError) -> NoReturn:
    sys.exit(
        f"Error: The server needs the package {error.name}, which is not installed;"
        " install its packages with: pip install 'device-onboarding-portal[server]'"
    )


def exit_when_interrupted() -> None:
    """Have Ctrl-C end the process at once, from now on until a command runs."""
    try:
        from onboarding_portal.interrupts import exit_at_once

        exit_at_once()
    except KeyboardInterrupt:
        sys.exit(130)


def _find_modules() -> None:
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path.insert(0, here if os.path.exists(os.path.join(here, "cli.py")) else os.path.dirname(here))
