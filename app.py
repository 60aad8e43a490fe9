"""Builds the Flask application: its parts, its routes, and what is done for every request and error."""

from __future__ import annotations

import gc

gc.disable()  # until all is imported, which stays: to look through it for garbage takes a sixth of the start

import contextlib
import functools
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from datetime import datetime

import click
from flask import Flask, Response, current_app, g, request

from config import Settings
from core import errors, logs, metrics
from core.errors import StartupError
from core.served_tenants import ServedTenants
from operations import commands, jobs
from operations.wiring import Portal, open_portal, utc_now
from store import scope
from web.api import (
    agents,
    applications,
    attestation,
    audit,
    brokers,
    bulk,
    device_configuration,
    devices,
    downloads,
    enrolment,
    est,
    groups,
    lifecycle,
    naming,
    operation,
    pki,
    problems,
    profiles,
    routing,
    sign_on,
    tenants,
    tokens,
    webhooks,
)
from web.api.routing import Call, Exchange, Route
from web.console import screens
from web.console.serving import add_pages, error_page, is_of_console, register
from web.serving import check_addresses, serve

gc.freeze()
gc.enable()

log = logging.getLogger("portal.request")

_UNLESS_SET = (("X-Content-Type-Options", "nosniff"), ("Cache-Control", "no-store"))  # headers of every response

_RESOURCES = (
    devices,
    downloads,
    bulk,
    lifecycle,
    groups,
    applications,
    pki,
    profiles,
    enrolment,
    est,
    device_configuration,
    attestation,
    tokens,
    sign_on,
    tenants,
    brokers,
    agents,
    audit,
    webhooks,
    operation,
)
_DESCRIBED = [route for resource in _RESOURCES for route in resource.ROUTES]
ROUTES = (*_DESCRIBED, *operation.description_of(_DESCRIBED))
_ON_PKI_LISTENER = frozenset(route.name for route in ROUTES if route.on_pki_listener)


def create_app(
    settings: Settings | None = None, *, background: bool = True, clock: Callable[[], datetime] = utc_now
) -> Flask:
    """Return the application, the same for ``flask --app app`` and ``portal-server``.

    ``portal_of`` builds its parts, and with ``background`` starts the jobs: at the first request at the latest, so that
    commands which do not need them open no data folder. Raises ``click.ClickException`` if a setting is invalid.
    """
    app = Flask("portal", root_path=os.path.dirname(__file__), static_folder=None)
    for command in server_commands():
        app.cli.add_command(command)
    if settings is None:
        try:
            settings = Settings.from_env(os.environ)
        except StartupError as error:
            raise click.ClickException(error.detail) from error
    app.config["PORTAL_SETTINGS"] = settings
    app.config["MAX_CONTENT_LENGTH"] = settings.max_body_bytes
    app.extensions["portal"] = _LazyPortal(settings, background=background, clock=clock)
    with_console = settings.console == "on"
    routes = _routes(with_console=with_console)
    app.url_map = routes.url_map
    app.view_functions |= routes.view_functions
    if with_console:
        register(app, screens.PAGES)
    app.before_request(_begin)
    app.after_request(_end)
    app.register_error_handler(Exception, _failed)
    logs.hide_links()
    return app


@functools.cache
def _routes(*, with_console: bool) -> Flask:
    """Return an application with the routes alone, which all applications of a process share.

    To compile their rules takes as long as to import Flask, and the start makes three applications.
    """
    app = Flask("routes", static_folder=None)
    app.url_map.converters.update(routing.CONVERTERS)
    app.url_map.merge_slashes = False  # no redirects for paths that are almost right
    for route in ROUTES:
        view = _view(route)
        for path in map(routing.rule_of, route.paths):
            app.add_url_rule(path, route.name, view, methods=[route.method], provide_automatic_options=False)
    if with_console:
        add_pages(app, screens.PAGES, portal_of)
    app.url_map.update()  # sorts the rules, once for all
    return app


def server_commands() -> list[click.Command]:
    """Return the server's own commands."""
    return commands.commands(create_app, portal_of, serve, check_addresses)


class _LazyPortal:
    """Builds the parts once, when they are first needed."""

    def __init__(self, settings: Settings, *, background: bool, clock: Callable[[], datetime]) -> None:
        self._settings = settings
        self._clock = clock
        self._background = background
        self._served = ServedTenants()  # here, because workers are forked before they need a portal
        self._lock = threading.Lock()
        self._portal: Portal | None = None

    def get(self) -> Portal:
        if self._portal is None:
            with self._lock:
                if self._portal is None:
                    portal = open_portal(self._settings, self._clock, self._served)
                    if self._background:
                        _start_listeners(portal, jobs.start(portal))
                    self._portal = portal
        return self._portal


def _start_listeners(portal: Portal, stopping: threading.Event) -> None:
    """Serve agents, and nodes of RabbitMQ, in threads of this process, if the settings have addresses for them."""
    if portal.settings.agents_bind is not None:
        from web import agent_listener

        threading.Thread(target=agent_listener.run, args=(portal, stopping), name="agents", daemon=True).start()
    if portal.settings.rabbitmq_bind is not None:
        from web import rabbitmq_listener

        of = portal.settings, portal.questioners, stopping
        threading.Thread(target=rabbitmq_listener.run, args=of, name="rabbitmq", daemon=True).start()


def portal_of(app: Flask) -> Portal:
    """Return the parts of an application; raise ``StartupError`` if they cannot be built."""
    portal: Portal = app.extensions["portal"].get()
    return portal


# --- Every request ------------------------------------------------------------------------------------------------


def _begin() -> None:
    g.exchange = Exchange(secrets.token_hex(8), time.perf_counter())
    if request.environ.get("portal.listener") == "pki" and not _is_on_pki_listener():
        raise errors.NotFound(
            "Only CRLs, OCSP and CA certificates are served at this address; use the portal's HTTPS address."
        )


def _is_on_pki_listener() -> bool:
    """Return whether the plain listener serves the path, be it by another method than the one of the request."""
    if request.url_rule is not None and request.url_rule.endpoint in _ON_PKI_LISTENER:
        return True
    adapter = current_app.create_url_adapter(request)
    if adapter is None:
        return False
    return any(adapter.match(method=method)[0] in _ON_PKI_LISTENER for method in adapter.allowed_methods())


def _view(route: Route) -> Callable[..., Response]:
    def view(**path: str) -> Response:
        exchange: Exchange = g.exchange
        exchange.route = route.path
        portal = portal_of(current_app)
        with scope.of_request():
            return _answer(portal, route, exchange, path)

    return view


def _answer(portal: Portal, route: Route, exchange: Exchange, path: Mapping[str, str]) -> Response:
    exchange.actor = actor = routing.actor_of(portal, route, request, exchange.request_id)
    routing.check_permission(portal, route.permission, actor, f"{route.method} {route.path}")
    arguments = routing.read_arguments(route, request, path)
    arguments |= naming.identify(portal, actor, request, path)
    call = Call(
        portal=portal,
        actor=actor,
        method=request.method,
        headers=request.headers,  # case-insensitive
        idempotency_key=routing.read_idempotency_key(route, request),
        environ=request.environ,
    )
    # Whose the requests of devices are only their handlers know.
    with contextlib.nullcontext() if actor.token_id is None else routing.share_of(portal, actor.tenant_id):
        return routing.response_of(route, route.handler(call, **arguments))


def _end(response: Response) -> Response:
    headers, method, exchange = response.headers, request.method, g.exchange
    actor = exchange.actor
    headers.add("X-Request-Id", exchange.request_id)
    for name, value in _UNLESS_SET:
        if name not in headers:
            headers.add(name, value)
    seconds = time.perf_counter() - exchange.started
    counted = exchange.route or "none", method if method in metrics.METHODS else "other", str(response.status_code)
    metrics.counts.requests.labels(*counted).inc()
    metrics.counts.request_seconds.labels(counted[0]).observe(seconds)
    facts = {
        "request_id": exchange.request_id,
        "method": method,
        "route": exchange.route,  # the rule, not the path: a path can hold a link's token
        "status": response.status_code,
        "ms": round(seconds * 1000, 1),
        "device_id": (request.view_args or {}).get("device_id"),
        "actor": actor.name if actor else None,
        "address": actor.address if actor else request.remote_addr,
    }
    log.info("request", extra=facts)
    return response


def _failed(error: Exception) -> Response:
    path, request_id = routing.without_version(request.path), g.exchange.request_id
    problem = problems.of_error(error, request_id=request_id, path=path)
    told = error.detail if isinstance(error, errors.PortalError) else problem.detail
    metrics.counts.refusals.labels(problem.code).inc()
    if problem.status == 500:
        log.error("failed", exc_info=error, extra={"request_id": request_id})
    elif problem.status == 503:
        cause = {"problem": told, "cause": error.__cause__}
        log.warning("unavailable", extra={"request_id": request_id, **cause})
    elif told != problem.detail:
        log.info("refused", extra={"request_id": request_id, "problem": told})
    if is_of_console(current_app, path) and request.environ.get("portal.listener") != "pki":
        return error_page(problem, error)
    response = problems.response_of(problem, error, path=path)
    if downloads.is_for_person(request):
        return downloads.page_of_problem(response, problem, error)
    return response
