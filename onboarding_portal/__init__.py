"""The programs ``portal`` and ``portal-server``, and the version: the one name that an installed wheel adds.

In a wheel the folders and modules of the source tree lie in this package. They keep their names: the two programs,
and nothing else in the environment, find them there.
"""

import os
import sys

VERSION = "0.1.0"


def portal() -> None:
    """Run the operator's command line."""
    _find_modules()
    from cli import cli

    cli()


def portal_server() -> None:
    """Run a command of the server's own."""
    _find_modules()
    os.environ.setdefault("PORTAL_SERVER_COMMAND", "portal-server")  # for the commands that are suggested
    try:
        if sys.argv[1:2] == ["agent"]:  # which needs neither database nor web server
            from operations.agent.commands import main

            main()
        from app import server
    except ModuleNotFoundError as error:
        sys.exit(
            f"Error: The server needs the package {error.name}, which is not installed;"
            " install its packages with: pip install 'device-onboarding-portal[server]'"
        )

    server(prog_name="portal-server")


def _find_modules() -> None:
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path.insert(0, here if os.path.exists(os.path.join(here, "cli.py")) else os.path.dirname(here))
