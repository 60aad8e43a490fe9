"""``portal-server``: the server's own commands as a program, without Flask's."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import click
from flask import Flask

from onboarding_portal import VERSION

OTHER_NAMES = {"serve": "run"}


def program(create_app: Callable[[], Flask], commands: Iterable[click.Command]) -> click.Group:
    """Return the program, whose commands find the settings in the application, as they do under ``flask --app app``."""

    @click.group("portal-server", context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
    @click.version_option(VERSION, prog_name="portal-server")
    @click.pass_context
    def server(context: click.Context) -> None:
        """Run the portal, and look after it on the machine it runs on.

        Settings are PORTAL_ variables of the environment. Run it as the portal's user.
        """
        context.with_resource(create_app().app_context())

    for command in commands:
        server.add_command(command, OTHER_NAMES.get(str(command.name)))
    return server
