"""What commands share: connection options, help layout, parameter types, questions, secrets shown once."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import sys
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from commands.completing import Listed, saved_names, saved_tenants
from commands.connection import STDIN, ConnectionOptions, ConnectionSettings, resolve
from commands.errors import CheckFailed, CliError, ConnectionLost, Misused, Unreachable
from commands.files import ReservedFile
from commands.logins import saved_profiles
from commands.names import DeviceName, GroupName, ProfileName
from commands.output import Cell, Output
from onboarding_portal import VERSION

if TYPE_CHECKING:
    from commands.client import Client

CONNECTION = tuple(field.name for field in dataclasses.fields(ConnectionOptions))
MAX_OPTION = 40  # characters of an option with its choices in a help text
# What a group has is added and removed; tokens, which the portal makes, are created and revoked.
OTHER_VERBS = {"create": ("add",), "add": ("create",), "delete": ("remove", "revoke"), "remove": ("revoke",)}
ROLES = ("system", "admin", "operator", "auditor")


class Remote:
    """The portal that a command talks to, and where its output goes."""

    def __init__(self, given: ConnectionOptions, *, as_json: bool) -> None:
        self.given = given
        self.out = Output(as_json=as_json, chosen={"--profile": given.login_profile, "--tenant": given.tenant})

    @cached_property
    def settings(self) -> ConnectionSettings:
        """URL, CA file and token to use; raises ``Misused``."""
        settings = resolve(self.given, os.environ)
        if self.given.token not in (None, STDIN):
            self.out.note(
                "Note: other users of this machine can see a token on the command line; "
                "use PORTAL_TOKEN or --token-file to keep it private."
            )
        return settings

    def trust(self, ca_file: Path) -> None:
        """Verify the portal by this file from now on, which is removed at the end of the command."""
        self.settings = dataclasses.replace(self.settings, ca_file=ca_file)
        click.get_current_context().call_on_close(functools.partial(ca_file.unlink, missing_ok=True))

    @cached_property
    def client(self) -> Client:
        """The HTTP client, with the operator's token if there is one."""
        from commands.client import Client  # imported by what makes a call

        return Client(self.settings, version=VERSION)

    def warn_of_unfinished(self) -> None:
        """Say after Ctrl-C that a change may have been made whose answer has not come, and how to see that."""
        client: Client | None = vars(self).get("client")
        if client is None or client.unfinished is None:
            return
        from commands.wording import list_of

        see = f"; see: {lists}" if (lists := list_of(client.unfinished)) else "."
        self.out.warning(f"The portal may have done it all the same{see}")


def connection_options(*, of_command: bool = False) -> list[click.Option]:
    """Return the connection options, which ``portal`` and each of its commands accept.

    The help of each command does not name the tenant, of which most portals have one. The login profile is chosen
    before the name of the command only: after it, ``--profile`` is a certificate profile.
    """
    profile = click.Option(
        ["--profile", "login_profile"],
        metavar="NAME",
        help="Use the login saved under this name.  [PORTAL_PROFILE]",
        shell_complete=saved_names,
    )
    return [
        *([] if of_command else [profile]),
        click.Option(["--url"], metavar="URL", help="Portal URL, such as https://127.0.0.1:8443.  [PORTAL_URL]"),
        click.Option(["--ca-file"], metavar="FILE", help="CA certificate of the portal (its ca.pem).  [PORTAL_CA]"),
        click.Option(["--token-file"], metavar="FILE", help="File with the operator token; - for standard input."),
        click.Option(["--token"], metavar="TOKEN", help="Operator token; better in the environment.  [PORTAL_TOKEN]"),
        click.Option(
            ["--tenant"],
            metavar="NAME",
            help="Use the saved login of this tenant.",
            hidden=of_command,
            shell_complete=saved_tenants,
        ),
    ]


class Command(click.Command):
    """A command with ``--json``, the connection options and examples."""

    def __init__(self, *args: Any, examples: Iterable[str] = (), connects: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = tuple(examples)
        self.connection = connection_options(of_command=True) if connects else []
        self.params += [click.Option(["--json", "as_json"], is_flag=True, help="Print JSON.")]
        self.params += self.connection

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command with its ``Remote``; show an error as text or JSON and exit with its status."""
        as_json = ctx.params.pop("as_json")
        ctx.obj = Remote(_given(ctx), as_json=as_json)
        try:
            for param in self.params:
                text = ctx.params.get(param.name or "")
                if isinstance(param.type, DeviceName) and isinstance(text, str):
                    ctx.params[str(param.name)] = param.type.find(ctx.obj.client, text)
                elif isinstance(param.type, ProfileName) and isinstance(param, click.Option) and text is not None:
                    _refuse_login_profile(ctx.obj, str(text), ctx.command_path.partition(" ")[2])
            return super().invoke(ctx)
        except KeyboardInterrupt:
            ctx.obj.warn_of_unfinished()
            raise
        except CliError as error:
            ctx.obj.out.error(error, options=_options_of_fields(self))
            ctx.exit(error.exit_status)

    def format_arguments(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the arguments, but for those of earlier versions."""
        arguments = [param for param in self.get_params(ctx) if isinstance(param, click.Argument)]
        shown = [param.get_help_record(ctx) for param in arguments if not isinstance(param, _FormerArgument)]
        if shown:
            with formatter.section("Positional arguments"):
                formatter.write_dl(shown)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, the connection options in a section of their own."""
        records = [(param, _help_record(param, ctx)) for param in self.get_params(ctx)]
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


def _refuse_login_profile(portal: Remote, name: str, before: str) -> None:
    """Raise ``Misused`` if a login has this name, and no certificate profile: a list would be empty, without a word."""
    if name not in saved_profiles(os.environ):
        return
    if portal.client.call("GET", f"/profiles/{name}", accept=(404,)).status == 404:
        raise Misused(
            f"There is no certificate profile {name}, but a login of that name.",
            hints=[f"To use the login, put its name before the command: portal --profile {name} {before} …"],
        )


def _help_record(param: click.Parameter, ctx: click.Context) -> tuple[str, str] | None:
    """Return an option with its help; a long list of choices stands in the help, where a line can be broken."""
    record = param.get_help_record(ctx)
    if record is not None and isinstance(param, click.Option):
        _, *former = [name for name in param.opts if name.startswith("--")] or [""]
        for name in former:  # names of earlier versions, and of the API
            record = record[0].replace(f", {name}", "", 1), record[1]
    if record is None or not isinstance(param.type, click.Choice) or len(record[0]) <= MAX_OPTION:
        return record
    names = record[0].partition(" [")[0]
    said, default, value = record[1].partition("  [default")
    choices = f"{said} One of {', '.join(param.type.choices)}.{default}{value}"
    return f"{names} {names.rpartition('--')[2].upper()}", choices


def command(
    name: str, group: click.Group | None = None, *, examples: Iterable[str], connects: bool = True
) -> Callable[[Callable[..., None]], click.Command]:
    """Make a function a command of ``portal``, or of one of its groups; its first argument is the ``Remote``."""
    made_by = group.command if group else click.command
    return lambda function: made_by(name, cls=Command, examples=examples, connects=connects)(click.pass_obj(function))


class Group(click.Group):
    """A group whose commands are found by the verbs of other groups, and of earlier versions, too."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command; for a verb that the group does not have, the one that does the same."""
        names = (cmd_name, *OTHER_VERBS.get(cmd_name, ()))
        return next((found for name in names if (found := super(Group, self).get_command(ctx, name))), None)


def group(name: str) -> Callable[[Callable[..., None]], click.Group]:
    """Make a function a group of commands."""
    return lambda function: click.group(name, cls=Group)(function)


class _FormerArgument(click.Argument):
    """A file that an earlier version took without ``--out``; it is in no help text."""

    def get_usage_pieces(self, ctx: click.Context) -> list[str]:
        """Return nothing."""
        return []


def output_file(what: str) -> Callable[[Any], Any]:
    """Return a decorator that adds ``--out FILE``, which ``saved_in`` reads, with ``file``, the argument of before."""
    path = click.Path(path_type=Path, dir_okay=False)
    return option_group(
        click.option("--out", metavar="FILE", type=path, help=f"{what}  [required]"),
        click.argument("file", cls=_FormerArgument, type=path, required=False),
    )


def saved_in(out: Path | None, file: Path | None, *, force: bool) -> Path:
    """Return where to save an export; raises ``UsageError`` if that was not said once, ``CheckFailed`` if it exists."""
    if (out is None) == (file is None):
        raise click.UsageError("Say once where to save it: --out FILE.")
    path = out or file or Path()
    if not force and path.exists():
        raise CheckFailed(f"{path} already exists; use --force to replace it.")
    return path


def option_group(*added: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a decorator that adds several options to a command."""

    def add(function: Any) -> Any:
        for option in reversed(added):
            function = option(function)
        return function

    return add


def _given(ctx: click.Context) -> ConnectionOptions:
    """Return the connection options; those after the command's name override those before it."""
    given: ConnectionOptions = ctx.find_root().meta.get("given", ConnectionOptions())
    here = {name: ctx.params.pop(name) for name in CONNECTION if name in ctx.params}
    if here.get("token") is not None or here.get("token_file") is not None:
        given = dataclasses.replace(given, token=None, token_file=None)
    return dataclasses.replace(given, **{name: value for name, value in here.items() if value is not None})


def _options_of_fields(of: Command) -> dict[str, str]:
    """Return which option or argument of a command sets which field of its request."""
    from commands.wording import option_for

    own = [param for param in of.params if param.name and param not in of.connection]
    other = {field: option for field, option in option_for.items() if any(option in param.opts for param in own)}
    return other | {
        str(param.name).rstrip("_"): param.opts[0] if isinstance(param, click.Option) else param.human_readable_name
        for param in own
    }


class Number(click.ParamType[int]):
    """A whole number, of which an error says in words how small and large it may be."""

    name = "integer"

    def __init__(self, least: int, most: int | None = None) -> None:
        self._least = least
        self._most = most

    def convert(self, value: str | int, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number."""
        text = str(value).strip()
        number = int(text) if re.fullmatch(r"-?[0-9]{1,18}", text, re.ASCII) else None
        if number is None or number < self._least or (self._most is not None and number > self._most):
            limits = f"of at least {self._least}" if self._most is None else f"from {self._least} to {self._most}"
            self.fail(f"use a whole number {limits}.", param, ctx)
        return number


# The options of a command that lists page by page.
paging_options = option_group(
    click.option("--limit", type=Number(1), default=50, show_default=True, metavar="N", help="List at most N."),
    click.option("--all", "all_", is_flag=True, help="List all of them."),
    click.option("--cursor", metavar="CURSOR", help="Continue after an earlier --json answer (its next_cursor)."),
)


class Id(click.ParamType[str]):
    """A full id: an abbreviation could match another one tomorrow."""

    name = "id"

    def __init__(self, pattern: str, problem: str, listed: Listed) -> None:
        self._pattern = re.compile(pattern)
        self._problem = problem
        self.listed = listed

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the id in lower case; never shows a wrong value, which may be a token."""
        text = value.strip().lower()
        if self._pattern.fullmatch(text) is None:
            self.fail(self._problem, param, ctx)
        return text

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return the ids that the portal lists and that begin so."""
        return self.listed.starting_with(ctx, incomplete.lower())


TOKEN_ID = Id(
    "[0-9a-f-]{16,36}",
    "use the full id (see: portal token list); it is not the token itself.",
    Listed("/tokens", "tokens", "token_id", "name"),
)


def short_id(listed_by: str, listed: Listed) -> Id:
    """Return the type of the other ids, 16 hexadecimal digits, which the command ``listed_by`` lists."""
    return Id("[0-9a-f]{16}", f"use the full id (see: {listed_by}).", listed)


class _YesOrNo(click.ParamType[bool]):
    """An answer to a question; another one is asked for again, with what is allowed."""

    name = "answer"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> bool:
        """Return whether the answer is yes."""
        given = value.strip().lower()
        if given not in ("y", "yes", "n", "no"):
            self.fail("Answer y or yes, n or no; Enter alone is no.", param, ctx)
        return given.startswith("y")


def confirm(question: str, *, yes: bool) -> None:
    """Ask for confirmation; raises ``UsageError`` if there is no terminal, ``CliError`` if the answer is no."""
    if yes:
        return
    require_confirmable()
    if not click.prompt(f"{question} [y/N]", default="n", show_default=False, type=_YesOrNo(), err=True):
        raise CliError("Nothing was changed.")


def require_confirmable() -> None:
    """Raise ``UsageError`` if standard input is not a terminal."""
    if not sys.stdin.isatty():
        raise click.UsageError("There is no terminal to ask for confirmation; add --yes.")


def ask_secret(what: str, *, instead: str) -> str:
    """Ask for a secret without echoing it; ``instead`` says what to do if there is no terminal."""
    if not sys.stdin.isatty():
        raise click.UsageError(f"There is no terminal to ask for the {what.lower()}; {instead}.")
    return str(click.prompt(what, hide_input=True, err=True))


def require(data: dict[str, Any], *names: str) -> None:
    """Raise ``Unreachable`` if an answer lacks one of these fields."""
    missing = [name for name in names if not isinstance(data.get(name), str)]
    if missing:
        raise Unreachable(f"The portal's answer has no {' and no '.join(missing)}; its version may differ.")


def check_secret_seen(path: str | None, option: str, what: str, *, out: Output) -> None:
    """Raise ``UsageError`` if a secret that is shown only once would go into a pipe or a log."""
    if path is None and not out.as_json and not out.for_people:
        raise click.UsageError(
            f"The {what} is shown only once, and standard output is not a terminal; "
            f"add {option} FILE to save it, or --json to get it in the answer."
        )


def create_with_secret(
    portal: Remote,
    path: str,
    body: dict[str, Any],
    *,
    shown_once: str,
    save_in: str | None,
    done: str,
    fields: Callable[[dict[str, Any]], dict[str, Cell]],
    needs: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Create a resource with a secret, the field ``shown_once`` of the answer, and show it; return the answer.

    The file ``save_in`` is created first, and removed if the request fails; the answer is without the secret then.
    Raises ``UsageError`` if nobody would see the secret, ``Unreachable`` if the answer lacks it or one of ``needs``.
    """
    from commands.links import new_idempotency_key

    check_secret_seen(save_in, f"--{shown_once}-out", shown_once, out=portal.out)
    reserved = ReservedFile(Path(save_in)) if save_in is not None else None
    try:
        send = functools.partial(
            portal.client.call, "POST", path, body=body, headers={"Idempotency-Key": new_idempotency_key()}
        )
        try:
            answer: dict[str, Any] = send(repeatable=False).json()
        except ConnectionLost:
            if not portal.client.takes_key(path):  # such as version 0.1.0, which would create a second one
                raise
            answer = send().json()
        require(answer, *needs, shown_once)
        if reserved is not None:
            reserved.write(answer.pop(shown_once))
    finally:
        if reserved is not None:
            reserved.discard()
    shown = {shown_once: Cell(str(answer[shown_once]), style="bold")} if reserved is None else {}
    portal.out.result(answer, fields(answer) | shown, done=done)
    portal.out.note(f"The {shown_once} is in {save_in}." if reserved else f"The {shown_once} is shown only once.")
    return answer


PROFILE = click.option(
    "--profile", type=ProfileName(), metavar="NAME", help="Certificate profile; see portal profile list."
)
GROUPS = click.option(
    "--group",
    "groups",
    type=GroupName(),
    metavar="NAME",
    multiple=True,
    help="Put it into this group. Repeatable.",
)
EXTERNAL_ID = click.option("--external-id", metavar="TEXT", help="Your own id for the device, which no other one has.")
FORCE_HELP = "Replace existing files."
YES = click.option("--yes", "-y", is_flag=True, help="Do not ask for confirmation.")


def trusted_of_broker(portal: Remote) -> bytes:
    """Return the certificates of the CAs to trust of the broker, PEM."""
    anonymous = portal.settings.token is None  # else they are those of the operator's tenant
    answer = portal.client.call("GET", "/broker-ca.pem", anonymous=anonymous, accept=(404,))
    if answer.status != 404:
        return answer.body
    return portal.client.call("GET", "/ca.pem", anonymous=True).body  # an older portal, which certifies the broker


def metadata_from(pairs: Iterable[str]) -> dict[str, str]:
    """Parse ``key=value`` texts; raises ``BadParameter``."""
    metadata: dict[str, str] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key or key in metadata:
            raise click.BadParameter("use KEY=VALUE, and each key only once.", param_hint="--metadata")
        metadata[key] = value
    return metadata


def warn_of_restart(portal: Remote, answer: dict[str, Any]) -> None:
    """Warn if the broker does not have the topics of a device yet that was registered or changed."""
    if answer.get("broker") == "pending":
        portal.out.warning("The broker does not have these topics yet: they may wait for its next restart.")


def topics_from(texts: Iterable[str]) -> list[dict[str, str]]:
    """Parse ``FILTER:ACCESS`` texts; raises ``BadParameter``."""
    topics = []
    for text in texts:
        filter_, separator, access = text.rpartition(":")
        if not separator or not filter_ or access not in ("read", "write", "readwrite"):
            raise click.BadParameter(
                "use FILTER:ACCESS, such as 'devices/{id}/#:readwrite' (read, write or readwrite).",
                param_hint="--topic",
            )
        topics.append({"filter": filter_, "access": access})
    return topics
