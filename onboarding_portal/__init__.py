"""The programs ``portal`` and ``portal-server``, and the version: the one name that an installed wheel adds.

In a wheel the folders and modules of the source tree lie in this package. They keep their names: the two programs,
and nothing else in the environment, find them there.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

VERSION = "0.1.0"


def portal() -> None:
    """Run the operator's command line."""
    _exit_when_interrupted()
    _find_modules()
    from cli import cli

    cli()


def portal_server() -> None:
    """Run a command of the server's own."""
    _exit_when_interrupted()
    _find_modules()
    os.environ.setdefault("PORTAL_SERVER_COMMAND", "portal-server")  # for the commands that are suggested
    with _said_which_package_is_missing():
        if sys.argv[1:2] == ["agent"]:  # which needs neither database nor web server
            from operations.agent.commands import main

            main()
        if find_spec("flask") is None:  # a help text of commands that do not work would help nobody
            raise ModuleNotFoundError(name="flask")
        from operations.server_program import program

    program(_commands_of_app)(prog_name="portal-server")


def _commands_of_app() -> tuple[Any, Any]:
    """Import the application, which takes most of a second; return what makes it, and its commands."""
    with _said_which_package_is_missing():
        import app

        return app.create_app, app.server_commands()


@contextmanager
def _said_which_package_is_missing() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        sys.exit(
            f"Error: The server needs the package {error.name}, which is not installed;"
            " install its packages with: pip install 'device-onboarding-portal[server]'"
        )


def _exit_when_interrupted() -> None:
    from onboarding_portal.interrupts import exit_at_once

    exit_at_once()


def _find_modules() -> None:
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path.insert(0, here if os.path.exists(os.path.join(here, "cli.py")) else os.path.dirname(here))
