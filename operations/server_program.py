"""``portal-server``: the server's own commands as a program, without Flask's."""

from __future__ import annotations

import functools
import os
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from core.server_command import VARIABLE, server_command
from onboarding_portal import VERSION
from onboarding_portal.server_group import ServerGroup

if TYPE_CHECKING:
    from flask import Flask

Load = Callable[[], tuple[Callable[[], "Flask"], Iterable[click.Command]]]

OTHER_NAMES = {"serve": "run"}
WITHOUT_SETTINGS = ("config", "agent")  # commands that work although a setting is wrong, or have others
# The first sentence of the help of each command: to import the commands takes most of a second, and a help text waits.
SUMMARIES = {
    "admin-token": "Make another token of the role system, valid for a day.",
    "agent": "A broker elsewhere: join a portal, run, show the state.",
    "audit": "Look after the audit record.",
    "backup": "Write a backup to FILE while the portal keeps serving.",
    "ca": "Look after the certificate authorities.",
    "config": "Check and show the settings, and where each comes from.",
    "doctor": "Check this installation, a line for each check.",
    "files": "Write the files for broker, services and devices.",
    "init": "Create what is missing: data folder, database, CA, token.",
    "invite": "Print a code with which another machine joins once.",
    "join": "Let this machine be a node of an installation.",
    "mail": "Look after the mail to people.",
    "nodes": "List nodes and settings that differ; or forget one.",
    "rabbitmq": "Look after the nodes of a RabbitMQ cluster.",
    "restore": "Restore the backup FILE; the portal must be stopped.",
    "run": "Serve the portal over HTTPS until it is stopped.",
    "settings": "Print the effective paths and ports as shell lines.",
    "token": "Look after operator tokens, without needing one.",
}


class Program(ServerGroup):
    """Imports its commands when one is looked up."""

    def __init__(self, name: str | None, load: Callable[[], Iterable[click.Command]], **attributes: Any) -> None:
        super().__init__(name, **attributes)
        self._load = load

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands without importing them."""
        return sorted(SUMMARIES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command, or ``None`` if there is none of that name."""
        if not self.commands:
            for command in self._load():
                self.add_command(command, OTHER_NAMES.get(str(command.name)))
        return super().get_command(ctx, cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(sorted(SUMMARIES.items()))


def _with_number(error: click.ClickException) -> click.ClickException:
    """Return an error of the settings that says if it is not the only one."""
    from config import Settings
    from core.given_settings import gathered

    more = len(gathered(os.environ, Settings.model_fields).all_problems(Settings.of_texts)) - 1
    if more < 1:
        return error
    others = "is another problem" if more == 1 else f"are {more} more problems"
    return click.ClickException(f"{error.message}\nThere {others}; see all by: {server_command('config check')}")


def _use(config: Path) -> None:
    """Have this process, those that it starts, and the commands that it suggests use a file of settings."""
    from core.given_settings import CONFIG_VARIABLE

    os.environ[CONFIG_VARIABLE] = str(config)
    os.environ[VARIABLE] = f"{server_command('').strip()} --config {shlex.quote(str(config))}"


def program(load: Load) -> click.Group:
    """Return the program; ``load`` imports what makes the application, and the commands.

    They find the settings in the application, as they do under ``flask --app app``.
    """
    loaded = functools.cache(load)

    @click.command(
        "portal-server",
        cls=Program,
        load=lambda: loaded()[1],
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
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
            app = loaded()[0]()
        except click.ClickException as error:
            raise _with_number(error) from None
        context.with_resource(app.app_context())

    return server
