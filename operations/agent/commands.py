"""``portal-server agent``: joins a portal from beside a Mosquitto elsewhere, and has that obey it."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
import signal
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from typing import NoReturn, ParamSpec

import click

from config import LogFormat, Settings
from core import logs
from core.errors import LockUnavailable, PortalError, StartupError
from core.files import FileLock, private_folder
from onboarding_portal import VERSION, streams
from operations.agent.folder import AgentFolder, remove_leftovers_of_agent, settings_of, utc_seconds

P = ParamSpec("P")
LOCK = ".agent.lock"
ALONE_SECONDS = 0.5  # for which agent status may have the lock
SILENT_SECONDS = 60.0  # an agent hears of its portal every few seconds


def _without_traceback(function: Callable[P, None]) -> Callable[P, None]:
    @functools.wraps(function)
    def run(*arguments: P.args, **options: P.kwargs) -> None:
        with streams.guarded():
            try:
                function(*arguments, **options)
            except PortalError as error:
                raise click.ClickException(error.detail) from error

    return run


class _Fingerprint(click.ParamType[str]):
    """The SHA-256 fingerprint of a certificate: 64 hexadecimal digits, with colons or without."""

    name = "sha256"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        digits = value.replace(":", "").lower()
        if not re.fullmatch("[0-9a-f]{64}", digits):
            self.fail("a fingerprint has 64 hexadecimal digits.", param, ctx)
        return digits


@click.group("agent")
def agent_group() -> None:
    """A broker elsewhere: join a portal, run, show the state.

    Settings are those of the portal that concern the broker, such as PORTAL_DATA_DIR and PORTAL_BROKER_DIR.
    """


@agent_group.command("join")
@click.argument("code")
@click.option("--url", required=True, metavar="URL", help="The portal's address, https://…")
@click.option("--fingerprint", type=_Fingerprint(), metavar="SHA256", help="Trust the portal by its root certificate.")
@click.option("--again", is_flag=True, help="Also if it has joined before; its broker goes on meanwhile.")
@_without_traceback
def join_portal(code: str, url: str, fingerprint: str | None, again: bool) -> None:
    """Join a portal by the CODE that portal broker add has shown.

    The code works once. The agent's key is made here, and stays here.
    """
    from operations.agent.joining import join  # here, since every start of the portal imports this module

    settings, folder = _opened()
    with FileLock(settings.data_dir / LOCK).try_hold() as alone:
        if not alone:
            raise StartupError(f"An agent runs on {settings.data_dir}; stop it, or set PORTAL_DATA_DIR.")
        if folder.has_joined and not again:
            raise StartupError(
                f"{folder.path} is that of an agent already; add --again to replace it, or set PORTAL_DATA_DIR."
            )
        identity = join(folder, url, fingerprint, code)
    click.echo(f"Joined as the agent of the broker {identity.name}")
    click.echo(f"It is followed by: {os.environ.get('PORTAL_SERVER_COMMAND') or 'portal-server'} agent run")


@agent_group.command("run")
@_without_traceback
def run_agent() -> None:
    """Follow the portal until stopped, and have the broker obey."""
    from operations.agent.agent import Agent

    settings, folder = _opened()
    logs.set_up(level=settings.log_level, as_json=settings.log_format is LogFormat.JSON)
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(FileLock(settings.data_dir / LOCK).hold(ALONE_SECONDS))
        except LockUnavailable:
            raise StartupError(f"Another agent runs on {settings.data_dir}; stop it, or set PORTAL_DATA_DIR.") from None
        remove_leftovers_of_agent(settings, folder)
        while not stopping.is_set():
            Agent(settings, folder).run(stopping)
            settings, folder = settings_of(os.environ)


@agent_group.command("status")
@_without_traceback
def show_status() -> None:
    """Show how far the broker obeys, and when that was known.

    The exit status is 1 if something is wrong, also if the agent does not run.
    """
    settings, folder = _opened()
    identity, state = folder.identity(), folder.state()
    heard = datetime.fromtimestamp(state.heard_at, UTC) if state.heard_at else None
    seconds = state.age(utc_seconds())
    age = "by a clock that was set back since" if seconds == math.inf else f"{seconds:.0f} s ago"
    with FileLock(settings.data_dir / LOCK).try_share() as is_free:
        missing = "does not run; start it by portal-server agent run" if is_free else ""
    if not missing and seconds > SILENT_SECONDS:
        missing = "hears nothing of the portal; see its link and its log"
    rows = {
        "Broker": identity.name,
        "Portal": identity.url,
        "Generation": f"{state.mark.generation}",
        "Heard of portal": f"{heard:%Y-%m-%d %H:%M:%S} UTC, {age}" if heard else "never",
        "Devices": "all denied, since the portal was not heard for long" if state.denies_all else "",
        "Problem": state.problem,
        "Agent": missing,
    }
    for title, text in rows.items():
        if text:
            click.echo(f"{title:<16} {text}")
    if state.problem or state.denies_all or missing:
        raise SystemExit(1)


def _opened() -> tuple[Settings, AgentFolder]:
    settings, folder = settings_of(os.environ)
    private_folder(settings.data_dir, mode=0o711)  # the broker, as another user, passes through it
    return settings, folder


def main() -> NoReturn:
    """Run ``portal-server agent …`` without what only the portal needs: no database is opened, no web server made."""
    from onboarding_portal.server_group import ServerGroup  # which the portal's own program has, not the portal

    @click.group(
        "portal-server",
        cls=ServerGroup,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )
    @click.version_option(VERSION, prog_name="portal-server")
    def program() -> None:
        """Run the portal's agent; all other commands need the portal's own packages."""

    program.add_command(agent_group)
    program(prog_name="portal-server")
    raise SystemExit(0)
