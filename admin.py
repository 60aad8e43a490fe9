"""The server's own commands, for the machine it runs on."""

from __future__ import annotations

import functools
import logging
import shlex
from collections.abc import Callable
from typing import Any

import click
from flask import Flask, current_app

import audit
import logs
import serving
from config import Settings
from errors import PortalError
from files import replace_file
from installation import first_token, open_portal, prepare

log = logging.getLogger("portal.admin")


def commands(create_app: Callable[..., Flask], portal_of: Callable[[Flask], Any]) -> list[click.Command]:
    """The commands of ``flask --app app``; the two functions are the application's."""

    @click.command("init")
    @_plainly
    def init() -> None:
        """Make what is missing: data folder, database, CA, broker files, first operator token."""
        settings = _settings()
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
    @_plainly
    def serve() -> None:
        """Serve the portal over HTTPS until it is told to stop."""
        settings = _settings()
        logs.set_up(settings)
        environment = settings.data_dir / "operator.env"
        environment.unlink(missing_ok=True)
        portal = open_portal(settings)
        try:
            prepare(portal)
            token = first_token(portal)
        finally:
            portal.close()

        def on_ready() -> None:
            replace_file(environment, _operator_environment(settings, token).encode())
            log.info("serving", extra={"url": settings.public_url, "pki_url": settings.pki_url})

        def on_worker_start(app: Flask) -> None:
            portal_of(app)

        status = serving.serve(
            settings,
            functools.partial(create_app, settings),
            certificate=settings.tls_dir / "server.pem",
            key=settings.tls_dir / "server.key",
            on_ready=on_ready,
            on_worker_start=on_worker_start,
        )
        raise SystemExit(status)

    @click.command("settings")
    @_plainly
    def show_settings() -> None:
        """Print the effective paths and ports as shell lines."""
        settings = _settings()
        for name, value in (
            ("PORTAL_DATA_DIR", settings.data_dir),
            ("PORTAL_BROKER_DIR", settings.broker_dir),
            ("PORTAL_MQTT_PORT", settings.mqtt_port),
            ("PORTAL_BIND", settings.bind),
            ("PORTAL_PUBLIC_URL", settings.public_url),
        ):
            click.echo(f"{name}={shlex.quote(str(value))}")

    @click.group("audit")
    def audit_group() -> None:
        """Look after the audit record."""

    @audit_group.command("verify")
    @_plainly
    def verify_audit() -> None:
        """Check the chain of hashes from the first entry to the last."""
        portal = open_portal(_settings())
        try:
            with portal.database.snapshot() as tx:
                verdict = audit.verify(tx, portal.tenant_id)
        finally:
            portal.close()
        if verdict.problem is not None:
            raise click.ClickException(f"{verdict.problem} The {verdict.entries} entries before it are sound.")
        click.echo(f"All {verdict.entries} entries are sound. Hash of the last: {verdict.head}")

    return [init, serve, show_settings, audit_group]


def _settings() -> Settings:
    settings: Settings = current_app.config["PORTAL_SETTINGS"]
    return settings


def _plainly(function: Callable[[], None]) -> Callable[[], None]:
    """Say what is wrong in one sentence, without a traceback."""

    @functools.wraps(function)
    def run() -> None:
        try:
            function()
        except PortalError as error:
            raise click.ClickException(error.detail) from error

    return run


def _operator_environment(settings: Settings, token: str) -> str:
    values = {
        "PORTAL_URL": settings.public_url,
        "PORTAL_CA": str(settings.data_dir / "ca.pem"),
        "PORTAL_TOKEN": token,
        "PORTAL_MQTT_PORT": str(settings.mqtt_port),
    }
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in values.items())
