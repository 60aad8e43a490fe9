"""What every command has in common: its options, its help, the portal that it talks to."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import click

from commands.client import Client
from commands.errors import CliError, Unreachable
from commands.files import ReservedFile
from commands.output import Output
from commands.settings import STDIN, Given, Settings, resolve

VERSION = "0.1.0"
CONNECTION = tuple(field.name for field in dataclasses.fields(Given))
ROLES = ("admin", "operator", "auditor")

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_TOKEN_ID = re.compile(r"[0-9a-f-]{16,36}")


class Portal:
    """What a command is given: where its output goes, with the portal it was told to talk to."""

    def __init__(self, given: Given, *, as_json: bool) -> None:
        self.given = given
        self.out = Output(as_json=as_json)

    @cached_property
    def settings(self) -> Settings:
        """Where to connect; raises ``Misused``."""
        settings = resolve(self.given, os.environ)
        if self.given.token not in (None, STDIN):
            self.out.note(
                "Note: other users of this machine can see a token on the command line; "
                "PORTAL_TOKEN or --token-file keeps it private."
            )
        return settings

    @cached_property
    def client(self) -> Client:
        """The HTTP client, with the operator's token where there is one."""
        return Client(self.settings, version=VERSION)


def connection_options() -> list[click.Option]:
    """The options that say where to connect; each command takes them, as does ``portal`` itself."""
    return [
        click.Option(["--url"], metavar="URL", help="The portal, such as https://127.0.0.1:8443.  [PORTAL_URL]"),
        click.Option(["--ca-file"], metavar="FILE", help="The portal's ca.pem, which signs for it.  [PORTAL_CA]"),
        click.Option(
            ["--token-file"], metavar="FILE", help="File that holds the operator token; - for standard input."
        ),
        click.Option(["--token"], metavar="TOKEN", help="The token itself; better in the environment.  [PORTAL_TOKEN]"),
    ]


class Command(click.Command):
    """A command with ``--json``, the connection options and examples."""

    def __init__(self, *args: Any, examples: Iterable[str] = (), connects: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = tuple(examples)
        self.connection = connection_options() if connects else []
        self.params += [click.Option(["--json", "as_json"], is_flag=True, help="Print JSON, for programs.")]
        self.params += self.connection

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command with its ``Portal``; an error carries out whether it is to be shown as JSON."""
        as_json = ctx.params.pop("as_json")
        ctx.obj = Portal(_given(ctx), as_json=as_json)
        try:
            return super().invoke(ctx)
        except CliError as error:
            ctx.obj.out.error(error)
            ctx.exit(error.exit_status)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, those of the connection apart."""
        records = [(param, param.get_help_record(ctx)) for param in self.get_params(ctx)]
        options = [(param, record) for param, record in records if record and not isinstance(param, click.Argument)]
        own = [record for param, record in options if param not in self.connection]
        connection = [record for param, record in options if param in self.connection]
        for title, rows in (("Options", own), ("Connection", connection)):
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples."""
        with formatter.section("Examples"):
            for example in self.examples:
                formatter.write(f"{'':{formatter.current_indent}}{example}\n")


def _given(ctx: click.Context) -> Given:
    """The connection options, those after the command winning over those before it."""
    given: Given = ctx.find_root().meta.get("given", Given())
    here = {name: ctx.params.pop(name) for name in CONNECTION if name in ctx.params}
    if here.get("token") is not None or here.get("token_file") is not None:
        given = dataclasses.replace(given, token=None, token_file=None)
    return dataclasses.replace(given, **{name: value for name, value in here.items() if value is not None})


class DeviceId(click.ParamType[str]):
    """A device's id, in full: an abbreviation could name another one tomorrow."""

    name = "id"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the UUID in lower case."""
        text = value.strip().lower()
        if _UUID.fullmatch(text) is None:
            self.fail(
                "an id is given in full, such as 0f9d2c4e-5b1a-4c7d-9e8f-102030405060 (see: portal list).", param, ctx
            )
        return text


class TokenId(click.ParamType[str]):
    """An operator token's id, in full, which is not the token itself."""

    name = "id"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the id, without showing a value that is none: it may be a token."""
        text = value.strip().lower()
        if _TOKEN_ID.fullmatch(text) is None:
            self.fail("an id is given in full, as portal token list shows it; it is not the token.", param, ctx)
        return text


DEVICE_ID = DeviceId()
TOKEN_ID = TokenId()


def confirm(question: str, *, yes: bool) -> None:
    """Ask before something that cannot be undone; raises ``UsageError`` where nobody is there to answer."""
    if yes:
        return
    require_confirmable()
    if not click.confirm(question, err=True):
        raise CliError("Nothing was changed.")


def require_confirmable() -> None:
    """Raise ``UsageError`` where standard input is no terminal."""
    if not sys.stdin.isatty():
        raise click.UsageError("There is no terminal to confirm this on; add --yes.")


def ask_secret(what: str, *, instead: str) -> str:
    """Ask for a secret without showing it; ``instead`` says how to give it where there is no terminal."""
    if not sys.stdin.isatty():
        raise click.UsageError(f"There is no terminal to ask for the {what.lower()} on; {instead}.")
    return str(click.prompt(what, hide_input=True, err=True))


def require(data: dict[str, Any], *names: str) -> None:
    """Raise ``Unreachable`` where an answer lacks what the command lives on."""
    missing = [name for name in names if not isinstance(data.get(name), str)]
    if missing:
        raise Unreachable(f"The portal's answer has no {' and no '.join(missing)}; it may be of another version.")


def new_secret_file(path: str | None, option: str, what: str, *, out: Output) -> Path | None:
    """Where a secret that is shown once is to go; raises ``UsageError`` where it would end up in a pipe or log."""
    if path is not None:
        return Path(path)
    if not out.as_json and not out.for_people:
        raise click.UsageError(
            f"The {what} is shown once, and standard output is no terminal; "
            f"add {option} FILE to keep it in a file, or --json to have it in the answer."
        )
    return None


def make_with_secret(
    portal: Portal, path: str, body: dict[str, Any], *, shown_once: str, into: Path | None, needs: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Have something made with a secret, the field ``shown_once``; returns the answer, without it if it is in a file.

    The file ``into`` is made first, and is gone again where nothing was made. Raises ``Unreachable`` where the answer
    lacks the secret, or one of the fields that the command ``needs``.
    """
    reserved = ReservedFile(into) if into is not None else None
    try:
        # Not repeated where the connection breaks: that would make a second one.
        answer: dict[str, Any] = portal.client.call("POST", path, body=body, repeatable=False).json()
        require(answer, *needs, shown_once)
        if reserved is not None:
            reserved.write(answer.pop(shown_once))
    finally:
        if reserved is not None:
            reserved.discard()
    return answer


def metadata_from(pairs: Iterable[str]) -> dict[str, str]:
    """Parse ``key=value`` texts; raises ``BadParameter``."""
    metadata: dict[str, str] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key or key in metadata:
            raise click.BadParameter("give each as key=value, and each key once.", param_hint="--metadata")
        metadata[key] = value
    return metadata


def topics_from(texts: Iterable[str]) -> list[dict[str, str]]:
    """Parse ``FILTER:ACCESS`` texts; raises ``BadParameter``."""
    topics = []
    for text in texts:
        filter_, separator, access = text.rpartition(":")
        if not separator or not filter_ or access not in ("read", "write", "readwrite"):
            raise click.BadParameter(
                "give each as FILTER:ACCESS, such as 'devices/{id}/#:readwrite' (read, write or readwrite).",
                param_hint="--topic",
            )
        topics.append({"filter": filter_, "access": access})
    return topics
