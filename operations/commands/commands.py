"""The server's own commands, for the machine it runs on."""

from __future__ import annotations

import functools
import logging
import resource
import shlex
from collections.abc import Callable
from typing import Any

import click
from flask import Flask

from config import LogFormat, Settings
from core import logs, metrics
from core.files import own_until_exit, replace_file
from operations import data_folder
from operations.commands import backup, ca, doctor
from operations.commands.plain import plainly, settings_here
from operations.wiring import first_token, open_portal, prepare
from workflows import audit
from workflows.enrolment.clients import CLIENT_CAS

log = logging.getLogger("portal.admin")


def commands(
    create_app: Callable[..., Flask], portal_of: Callable[[Flask], Any], serve_app: Callable[..., int]
) -> list[click.Command]:
    """The commands of ``flask --app app``; two functions are the application's, ``serve_app`` is the HTTP server."""

    @click.command("init")
    @plainly
    def init() -> None:
        """Make what is missing: data folder, database, CA, broker files, first operator token."""
        settings = settings_here()
        portal = open_portal(settings)
        try:
            prepare(portal)
            first_token(portal)
            root = portal.authority.root.issuer.certificate
        finally:
            portal.close()
        click.echo(f"Data folder    {settings.data_dir}")
        click.echo(f"Trust anchor   {settings.data_dir / 'ca.pem'} ({root.subject.rfc4514_string()})")
        click.echo(f"Broker files   {settings.broker_dir}")

    @click.command("serve")
    @plainly
    def serve() -> None:
        """Serve the portal over HTTPS until it is told to stop."""
        raise SystemExit(_serve(settings_here(), create_app, portal_of, serve_app))

    @click.command("settings")
    @plainly
    def show_settings() -> None:
        """Print the effective paths and ports as shell lines."""
        settings = settings_here()
        for name, value in (
            ("PORTAL_DATA_DIR", settings.data_dir),
            ("PORTAL_BROKER_DIR", settings.broker_dir),
            ("PORTAL_BROKER_SOCKET", settings.broker_socket),
            ("PORTAL_BROKER_PID_FILE", settings.broker_pid_file),
            ("PORTAL_MQTT_PORT", settings.mqtt_port),
            ("PORTAL_BIND", settings.bind),
            ("PORTAL_PUBLIC_URL", settings.public_url),
        ):
            click.echo(f"{name}={shlex.quote(str(value))}")

    @click.group("audit")
    def audit_group() -> None:
        """Look after the audit record."""

    @audit_group.command("verify")
    @plainly
    def verify_audit() -> None:
        """Check the chain of hashes from the first entry to the last."""
        portal = open_portal(settings_here())
        try:
            with portal.database.snapshot() as tx:
                verdict = audit.verify(tx, portal.tenant_id)
        finally:
            portal.close()
        if verdict.problem is not None:
            raise click.ClickException(f"{verdict.problem} The {verdict.entries} entries before it are sound.")
        click.echo(f"All {verdict.entries} entries are sound. Hash of the last: {verdict.head}")

    return [
        init,
        serve,
        show_settings,
        audit_group,
        ca.ca_group,
        backup.backup,
        backup.restore,
        doctor.doctor,
    ]


def _serve(
    settings: Settings,
    create_app: Callable[..., Flask],
    portal_of: Callable[[Flask], Any],
    serve_app: Callable[..., int],
) -> int:
    logs.set_up(level=settings.log_level, as_json=settings.log_format is LogFormat.JSON)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # no core: it would hold the issuing key
    environment = settings.data_dir / "operator.env"
    counts = settings.data_dir / "metrics"
    portal = open_portal(settings)
    try:
        prepare(portal)
        token = first_token(portal)
    finally:
        portal.close()
    # Of several portals on one data folder the first keeps operator.env and the counts while it lives.
    first = own_until_exit(settings.data_dir / ".serving.lock")
    if first:
        metrics.forget(counts)

    def on_listening() -> None:
        if first:
            environment.unlink(missing_ok=True)  # until this portal answers

    def on_ready() -> None:
        if first:
            replace_file(environment, _operator_environment(settings, token).encode())
        log.info("serving", extra={"url": settings.public_url, "pki_url": settings.pki_url})

    def on_worker_start(app: Flask) -> None:
        metrics.share(counts)  # first: nothing may have been counted yet
        portal_of(app)

    with data_folder.shared(settings):
        return serve_app(
            settings,
            functools.partial(create_app, settings),
            certificate=settings.tls_dir / "server.pem",
            key=settings.tls_dir / "server.key",
            client_cas=settings.tls_dir / CLIENT_CAS,
            on_ready=on_ready,
            on_listening=on_listening,
            on_worker_start=on_worker_start,
        )


def _operator_environment(settings: Settings, token: str) -> str:
    values = {
        "PORTAL_URL": settings.public_url,
        "PORTAL_CA": str(settings.data_dir / "ca.pem"),
        "PORTAL_TOKEN": token,
        "PORTAL_MQTT_PORT": str(settings.mqtt_port),
    }
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in values.items())
