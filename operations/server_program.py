"""``portal-server``: the server's own commands as a program, without Flask's."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

import click
from flask import Flask

from config import Settings
from core.given_settings import CONFIG_VARIABLE, gathered
from core.server_command import VARIABLE, server_command
from onboarding_portal import VERSION, streams

OTHER_NAMES = {"serve": "run"}
WITHOUT_SETTINGS = ("config", "agent")  # commands that work although a setting is wrong, or have others


class Program(click.Group):
    """Ends with a sentence if standard output cannot be written to, be it with a help text."""

    def main(self, *args: Any, **extra: Any) -> NoReturn:
        """Run the command, then exit."""
        with streams.guarded():
            super().main(*args, **extra)
        raise SystemExit(0)


def _with_number(error: click.ClickException) -> click.ClickException:
    """Return an error of the settings that says if it is not the only one."""
    more = len(gathered(os.environ, Settings.model_fields).all_problems(Settings.of_texts)) - 1
    if more < 1:
        return error
    others = "is another problem" if more == 1 else f"are {more} more problems"
    return click.ClickException(f"{error.message}\nThere {others}; see all by: {server_command('config check')}")


def _use(config: Path) -> None:
    """Have this process, those that it starts, and the commands that it suggests use a file of settings."""
    os.environ[CONFIG_VARIABLE] = str(config)
    os.environ[VARIABLE] = f"{server_command('').strip()} --config {shlex.quote(str(config))}"


def program(create_app: Callable[[], Flask], commands: Iterable[click.Command]) -> click.Group:
    """Return the program, whose commands find the settings in the application, as they do under ``flask --app app``."""

    @click.group(
        "portal-server", cls=Program, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
    )
    @click.version_option(VERSION, prog_name="portal-server")
    @click.option("--config", type=click.Path(path_type=Path), metavar="FILE", help="Settings (TOML).  [PORTAL_CONFIG]")
    @click.pass_context
    def server(context: click.Context, config: Path | None) -> None:
        """Run the portal, and look after it on the machine it runs on.

        Settings are PORTAL_ variables of the environment, and keys of the file that --config or PORTAL_CONFIG names.
        The environment wins. Run it as the portal's user.
        """
        if config is not None:
            _use(config.expanduser().absolute())
        if context.invoked_subcommand in WITHOUT_SETTINGS:
            return
        try:
            app = create_app()
        except click.ClickException as error:
            raise _with_number(error) from None
        context.with_resource(app.app_context())

    for command in commands:
        server.add_command(command, OTHER_NAMES.get(str(command.name)))
    return server
