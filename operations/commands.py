"""The server's own commands, ``portal-server …`` or ``flask --app app …``, for the machine it runs on."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import os
import resource
import shlex
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
from flask import Flask

from config import LogFormat, Settings
from core import logs, metrics
from core.broker_control import ControlKind
from core.errors import StartupError
from core.files import is_owned, own_until_exit, replace_file
from core.given_settings import CONFIG_VARIABLE, config_file, variable_of
from core.server_command import server_command
from operations import data_folder
from operations.agent.commands import agent_group
from operations.backup import backup as backups
from operations.backup import restore as backup_restore
from operations.backup.common import Restored
from operations.backup.tenant_restore import restore_tenant
from operations.ca_commands import ca_group
from operations.command_base import opened_portal, settings_of_app, without_traceback
from operations.config_commands import config_group
from operations.doctor import doctor as doctors
from operations.doctor.base import Finding, State
from operations.installation_files import write_files
from operations.mail_commands import mail_group
from operations.node_commands import invite, join, rabbitmq_group, show_nodes
from operations.owner_tokens import first_token, make_admin_token, make_tenant_admin_token
from operations.token_commands import token_group
from operations.wiring import (
    Portal,
    open_portal,
    prepare,
    utc_now,
)
from store.tenants import tenant_ids
from workflows.audit import problem_of
from workflows.enrolment.clients import CLIENT_CAS

CreateApp = Callable[..., Flask]
PortalOf = Callable[[Flask], Any]
ServeApp = Callable[..., int]
log = logging.getLogger("portal.admin")
NO_FRONT_SERVER = (
    "Slow clients on the network hold up all others; put nginx in front (deploy/README.md), or name the front server"
    " in PORTAL_TRUSTED_PROXIES."
)

# The exit status of a restore that could not read all that was changed since; 1 and 2 are click's.
RESTORED_IN_PART = 3
_SAID_FROM = 31  # the column in which the doctor says what it found
_COLOURS = {State.OK: "green", State.WARNING: "yellow", State.PROBLEM: "red"}


# --- First start and serving --------------------------------------------------------------------------------------


@click.command("init")
@without_traceback
def init() -> None:
    """Create what is missing: data folder, database, CA, token.

    The files of the broker, too, and the token of the first operator.
    """
    settings = settings_of_app()
    with opened_portal() as portal:
        prepare(portal)
        first_token(portal)
        anchors = _anchors(portal)
    click.echo(f"Data folder    {settings.data_dir}")
    click.echo(f"Trust anchor   {settings.data_dir / 'ca.pem'} ({anchors})")
    click.echo(f"Broker files   {settings.broker_dir}")


def _anchors(portal: Portal) -> str:
    """Return the names of the roots that clients are to trust."""
    return " and ".join(one.subject.rfc4514_string() for one in portal.authority.first.anchors)


@click.command("settings")
@without_traceback
def show_settings() -> None:
    """Print the effective paths and ports as shell lines."""
    click.echo(_shell_lines(_effective(settings_of_app())), nl=False)


def _effective(settings: Settings) -> dict[str, object]:
    return {
        "PORTAL_DATA_DIR": settings.data_dir,
        "PORTAL_BROKER_DIR": settings.broker_dir,
        "PORTAL_BROKER_CONTROL": settings.broker_control,
        "PORTAL_MQTT_TLS": settings.mqtt_tls,
        "PORTAL_BROKER_SOCKET": settings.broker_socket,
        "PORTAL_BROKER_PID_FILE": settings.broker_pid_file,
        "PORTAL_MQTT_PORT": settings.mqtt_port,
        "PORTAL_MQTT_BIND": settings.mqtt_bind,
        "PORTAL_BIND": settings.bind,
        "PORTAL_PUBLIC_URL": settings.public_url,
    }


def _shell_lines(values: Mapping[str, object], prefix: str = "") -> str:
    return "".join(f"{prefix}{name}={shlex.quote(str(value))}\n" for name, value in values.items())


def _set_up_logs(settings: Settings) -> None:
    logs.set_up(level=settings.log_level, as_json=settings.log_format is LogFormat.JSON)


def open_log(path: Path) -> int:
    """Open a log, which may be emptied while it is written (logrotate's copytruncate): each line goes to its end.

    Raises ``StartupError`` if it cannot be opened.
    """
    try:
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StartupError(f"{path} cannot be opened ({error.strerror}); check its disk.") from error


def _check_not_running(settings: Settings) -> None:
    """Raise ``StartupError`` if a portal serves on the data folder, with whose broker another one cannot share it."""
    folder = settings.data_dir
    if (folder / data_folder.SERVING_LOCK).exists() and is_owned(folder / data_folder.SERVING_LOCK):
        raise StartupError(
            f"The portal of {folder} is running already. In this terminal use it after: source"
            f" {shlex.quote(str(folder / 'operator.env'))}; to start another one, stop it first or set another"
            " PORTAL_DATA_DIR."
        )


def _wait_for_broker(settings: Settings, trust_anchor: str) -> None:
    """Print what scripts/run needs, log to portal.log from then on, and wait until it has started the broker.

    Standard output then ends; a line of standard input says that the broker has been started, its end that
    scripts/run is gone, with which this process ends. Raises ``StartupError`` if portal.log cannot be opened.
    """
    descriptor = open_log(settings.data_dir / "portal.log")
    size = os.fstat(descriptor).st_size
    click.echo(_shell_lines(_effective(settings) | {"trust_anchor": trust_anchor, "portal_log_size": size}), nl=False)
    os.dup2(descriptor, sys.stderr.fileno())
    os.dup2(descriptor, sys.stdout.fileno())
    os.close(descriptor)
    if not sys.stdin.readline():
        raise SystemExit(1)


def _prepare(settings: Settings, *, beside_broker: bool) -> tuple[str | None, bool]:
    """Create what is missing before anything is served, and the broker's files before it starts.

    Return the token of the first operator if it is valid, and whether this is the first of several portals on the
    data folder: it owns operator.env and the counters until it exits.
    """
    if not beside_broker:
        _set_up_logs(settings)
    with contextlib.closing(open_portal(settings)) as portal:
        prepare(portal)
        token = first_token(portal, renew=beside_broker)
        trust_anchor = _anchors(portal)
    first = own_until_exit(settings.data_dir / data_folder.SERVING_LOCK)
    if first:
        metrics.forget(settings.data_dir / "metrics")
    if beside_broker:
        if first:
            (settings.data_dir / "operator.env").unlink(missing_ok=True)  # scripts/run waits for the new one
        _wait_for_broker(settings, trust_anchor)
        _set_up_logs(settings)
    return token, first


def _serve(
    settings: Settings, create_app: CreateApp, portal_of: PortalOf, serve_app: ServeApp, *, beside_broker: bool
) -> int:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold the issuing key
    environment = settings.data_dir / "operator.env"
    token, first = _prepare(settings, beside_broker=beside_broker)

    def on_listening() -> None:
        if first:
            environment.unlink(missing_ok=True)  # written again once this portal answers

    def on_ready() -> None:
        if first:
            replace_file(environment, _operator_environment(settings, token).encode())
        log.info("serving", extra={"url": settings.public_url, "pki_url": settings.pki_url})

    def on_worker_start(app: Flask) -> None:
        metrics.share(settings.data_dir / "metrics")  # before anything is counted
        portal_of(app)

    if settings.faces_network:
        log.warning("no front server", extra={"bind": settings.bind, "advice": NO_FRONT_SERVER})
    with data_folder.shared(settings):
        return serve_app(
            settings,
            lambda listener: create_app(settings, background=listener == "main"),
            certificate=settings.tls_dir / "server.pem",
            key=settings.tls_dir / "server.key",
            client_cas=settings.tls_dir / CLIENT_CAS,
            on_ready=on_ready,
            on_listening=on_listening,
            on_worker_start=on_worker_start,
        )


def _operator_environment(settings: Settings, token: str | None) -> str:
    values = {
        "PORTAL_URL": settings.public_url,
        "PORTAL_CA": str(settings.https_ca_file),
        "PORTAL_TOKEN": token,
        "PORTAL_MQTT_PORT": str(settings.mqtt_port),
        **_given_settings(settings),
    }
    lines = _shell_lines({name: value for name, value in values.items() if value is not None}, "export ")
    return (
        lines
        if token is not None
        else f"# No token: the first one has ended; see {server_command('admin-token')}.\n{lines}"
    )


def _given_settings(settings: Settings) -> dict[str, str]:
    """Return what this process was given, without secrets: the server's other commands need the same settings.

    Without what scripts/run sets for this run alone, too: the next one would take it over.
    """
    left_out = {
        "ca_passphrase",
        "database_url",
        "database_owner_url",
        "broker_restart",
        "broker_reload",
    }
    if settings.broker_control is not ControlKind.RABBITMQ:
        left_out.add("broker_control")
    given = {variable_of(name) for name in settings.model_fields_set - left_out}
    values = {name: os.environ[name] for name in sorted(given) if name in os.environ}
    return values | ({CONFIG_VARIABLE: str(file)} if (file := config_file(os.environ)) else {})


@click.command("admin-token")
@click.option("--tenant", metavar="NAME", help="Make an admin's of this tenant, beside those it has, and print it.")
@without_traceback
def admin_token(tenant: str | None) -> None:
    """Make another token of the role system, valid for a day.

    It takes the place of the one in operator.env, which is revoked: terminals that have read it must read it again.
    Such a token does what an admin's does, and rules over tenants. For the owner of the machine who has no other valid
    one. It is in the audit record. The portal may serve meanwhile.
    """
    settings = settings_of_app()
    environment = settings.data_dir / "operator.env"
    had_one = environment.exists()
    with opened_portal() as portal:
        if tenant not in (None, portal.first_tenant):
            secret, record = make_tenant_admin_token(portal, tenant)
            click.echo(
                f"Token          {record.id}, an admin's of {tenant} until {record.expires_at:%Y-%m-%d %H:%M} UTC"
            )
            click.echo(f"To use it      export PORTAL_TOKEN={secret}")
            return
        secret, record = make_admin_token(portal)
    replace_file(environment, _operator_environment(settings, secret).encode())
    click.echo(f"Token          {record.id}, of the role {record.role} until {record.expires_at:%Y-%m-%d %H:%M} UTC")
    click.echo(f"To use it      . {shlex.quote(str(environment))}")
    if had_one:
        click.echo("Not valid      the one that was in this file: terminals that have read it must read it again")


# --- The audit record -------------------------------------------------------------------------------------------------


@click.group("audit")
def audit_group() -> None:
    """Look after the audit record."""


@audit_group.command("verify")
@without_traceback
def verify_audit() -> None:
    """Check the audit record and its newest checkpoint.

    That is the chain of hashes from the first entry to the last, of each tenant if there are several, and the newest
    checkpoint in the data folder.
    """
    damaged = []
    with opened_portal() as portal, portal.database.snapshot() as tx:
        names = tenant_ids(tx)
        for name in names:
            problem, verdict = problem_of(tx, name, portal.settings, whole=True)
            whose = "" if len(names) == 1 else f"Tenant {name}: "
            if problem is None:
                click.echo(f"{whose}All {verdict.entries} entries are sound. Hash of the last: {verdict.head}")
            else:
                before = f" The {verdict.entries} entries before it are sound." if problem == verdict.problem else ""
                damaged.append(whose + problem + before)
    if damaged:
        raise click.ClickException("\n".join(damaged))


@audit_group.command("key")
@without_traceback
@click.option("--tenant", metavar="NAME", help="Of this tenant's record; else of the first one's.")
def show_audit_key(tenant: str | None) -> None:
    """Print the public key of the checkpoints.

    It is for portal audit verify, and for witnesses.
    """
    with opened_portal() as portal:
        click.echo(str(portal.audit_logs.of(tenant or portal.first_tenant).verifier))


# --- Backups ----------------------------------------------------------------------------------------------------------


@click.command("backup")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--tenant", metavar="NAME", help="Of this tenant alone, without the secrets of the installation.")
@without_traceback
def backup(file: Path, tenant: str | None) -> None:
    """Write a backup to FILE while the portal keeps serving.

    FILE must not exist. It holds the database, the encrypted CA keys and the secrets, but not the passphrase of the CA
    keys, which you keep elsewhere, nor keys that are in a token.
    """
    made = backups.back_up(settings_of_app(), file.absolute(), now=utc_now(), tenant_id=tenant)
    counts = made.manifest.counts
    click.echo(f"Backup         {file} ({made.size} bytes, mode 0600)")
    click.echo(
        f"Holds          {counts['devices']} devices and applications, {counts['certificates']} certificates,"
        f" {counts['audit_entries']} audit entries, of {made.manifest.made_at}"
    )
    click.echo(f"Not in it      the passphrase of the CA keys ({made.passphrase_at}): keep a copy of it, but elsewhere")
    for name, token in made.in_tokens:
        click.echo(f"Not in it      the key of {name}, which stays in the token {token!r}: a restore needs that token")


@click.command("restore")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--tenant", metavar="NAME", help="Restore this tenant alone; all others stay as they are.")
@click.option("--replace", is_flag=True, help="Replace a database that has devices, or the tenant; the old is kept.")
@click.option("--keep-links", is_flag=True, help="Keep download links that have not been used since.")
@click.option(
    "--crl",
    "crls",
    multiple=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="A saved CRL (PEM or DER) of a CA in the backup: what it lists stays revoked. May be given several times.",
)
@without_traceback
def restore(file: Path, tenant: str | None, replace: bool, keep_links: bool, crls: tuple[Path, ...]) -> None:
    """Restore the backup FILE; the portal must be stopped.

    A token with keys of the CAs must be here: they sign, and are compared with the certificates, before anything is
    changed.

    Whatever was revoked since the backup stays revoked, if a CRL (the broker's, or one given with --crl) or the
    database being replaced lists it. The exit status is 3 if the backup was restored, but not all that was changed
    since could be read: the lines "Not known" say what.
    """
    restoring = backup_restore.restore
    if tenant is not None:
        restoring = functools.partial(restore_tenant, tenant_id=tenant)
    done = restoring(
        settings_of_app(),
        file.absolute(),
        replace=replace,
        keep_links=keep_links,
        now=utc_now(),
        crl_files=[path.absolute() for path in crls],
    )
    _show_restored(done)
    if done.unknown:
        sys.exit(RESTORED_IN_PART)


def _show_restored(done: Restored) -> None:
    click.echo(f"Restored       {done.counts['devices']} devices and applications, as of {done.made_at}")
    if done.before is not None:
        click.echo(f"Before         {done.before} holds what was there")
    if done.links_expired:
        click.echo(f"Links          {done.links_expired} bundles that waited for their download were destroyed")
    for kept in done.kept:
        why = f"{kept.reason}, " if kept.reason else ""
        unknown = ", which is not in the backup" if kept.unknown else ""
        click.echo(f"Kept revoked   {kept.what}{unknown} ({why}{kept.at:%Y-%m-%d %H:%M:%S} UTC)")
    if not done.kept:
        click.echo("Kept revoked   nothing: all that is known here as revoked is revoked in the backup")
    for older in done.older:
        click.echo(f"As it was      {older}")
    for note in done.notes:
        click.echo(f"Note           {note}")
    for unknown in done.unknown:
        click.echo(f"Not known      {unknown}")
    click.echo(f"Next           start the portal: it brings the broker to generation {done.generation} and proves it")
    if any(kept.unknown for kept in done.kept):
        click.echo("               and restart the broker, to end sessions of devices that are not in the backup")


# --- The doctor -------------------------------------------------------------------------------------------------------


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print a list of {name, state, detail, advice}.")
@click.option(
    "--broker-config",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The broker's configuration file (default: the running broker's).",
)
@without_traceback
def doctor(as_json: bool, broker_config: Path | None) -> None:
    """Check this installation, a line for each check.

    Nothing is changed. Run it as the portal's user. The exit status is 0 if all is well, 1 if there is a problem, 2 if
    there are only warnings.
    """
    findings: list[Finding] = []
    for finding in doctors.examine(
        settings_of_app(), utc_now, broker_config=broker_config.absolute() if broker_config else None
    ):
        findings.append(finding)
        if not as_json:
            click.echo(line_of(finding, shutil.get_terminal_size().columns if sys.stdout.isatty() else None))
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1))
    sys.exit(doctors.exit_status(findings))


def line_of(finding: Finding, width: int | None) -> str:
    """Return a finding as one line, or for a terminal of ``width`` columns as several, each below the last.

    Advice with a command is not broken, since the command has to be copied whole.
    """
    state = click.style(f"{finding.state:<7}", fg=_COLOURS[finding.state])
    advice = f"-> {finding.advice}" if finding.advice else ""
    if width is None or _SAID_FROM + len(finding.detail) + 1 + len(advice) <= width:
        said = [f"{finding.detail} {advice}".rstrip()]
    else:
        said = [*_broken(finding.detail, width), *([advice] if "run: " in advice else _broken(advice, width))]
    return f"{state}  {finding.name:<20}  " + f"\n{' ' * _SAID_FROM}".join(said)


def _broken(sentence: str, width: int) -> list[str]:
    return textwrap.wrap(sentence, max(width - _SAID_FROM, 20), break_long_words=False, break_on_hyphens=False)


# --- All of them ------------------------------------------------------------------------------------------------------


def commands(
    create_app: CreateApp, portal_of: PortalOf, serve_app: ServeApp, check_addresses: Callable[[Settings], None]
) -> list[click.Command]:
    """Return the commands of ``portal-server``; ``serve_app`` is the HTTP server."""

    @click.command("serve")
    @click.option(
        "--beside-broker",
        is_flag=True,
        help="For scripts/run: print the settings, then wait for a line and log to portal.log.",
    )
    @without_traceback
    def serve(beside_broker: bool) -> None:
        """Serve the portal over HTTPS until it is stopped."""
        settings = settings_of_app()
        if beside_broker:
            _check_not_running(settings)  # at once: an address in use is waited for
        check_addresses(settings)  # before anything is made: a port is written into the CA's first certificates
        raise SystemExit(_serve(settings, create_app, portal_of, serve_app, beside_broker=beside_broker))

    on_this_machine = [init, serve, config_group, show_settings, admin_token, token_group]
    looked_after = [
        audit_group,
        ca_group,
        mail_group,
        rabbitmq_group,
        invite,
        join,
        show_nodes,
        backup,
        restore,
        doctor,
    ]
    return [*on_this_machine, *looked_after, write_files, agent_group]
