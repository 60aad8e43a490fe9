"""Builds the Flask application: the parts once, every route, the answer to every error."""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections.abc import Callable
from datetime import datetime

import click
from flask import Flask, Response, current_app, g, request

from config import Settings
from core import errors, logs, metrics
from core.errors import PortalError, StartupError
from operations.commands import commands
from operations.jobs import jobs
from operations.wiring import Portal, open_portal, utc_now
from web.api import problems, routing
from web.api.bulk import bulk
from web.api.devices import devices
from web.api.direct import DirectAnswers
from web.api.downloads import downloads
from web.api.enrolment import enrolment, manufacturers
from web.api.est import est
from web.api.lifecycle import lifecycle
from web.api.openapi import description_of
from web.api.operation import operation
from web.api.pki import pki
from web.api.routing import Call, Route
from web.api.tokens import tokens
from web.api.webhooks import webhooks
from web.serving import serve

log = logging.getLogger("portal.request")

GROUPS = (
    devices,
    bulk,
    lifecycle,
    downloads,
    pki,
    enrolment,
    manufacturers,
    est,
    tokens,
    webhooks,
    operation,
)
ROUTES: tuple[Route, ...] = tuple(route for group in GROUPS for route in group.routes)
ROUTES += tuple(description_of(ROUTES).routes)
_ROUTE_OF = {route.name: route for route in ROUTES}

# The nearest class in an error's ancestry decides.
STATUS_OF: dict[type[PortalError], int] = {
    errors.RequestMalformed: 400,
    errors.Unauthenticated: 401,
    errors.Forbidden: 403,
    errors.NotFound: 404,
    errors.BodyTooSlow: 408,
    errors.Conflict: 409,
    errors.Gone: 410,
    errors.BodyTooLarge: 413,
    errors.MediaTypeUnsupported: 415,
    errors.InputInvalid: 422,
    errors.TooManyAttempts: 429,
    errors.Unavailable: 503,
    PortalError: 500,
}


def create_app(
    settings: Settings | None = None, *, background: bool = True, clock: Callable[[], datetime] = utc_now
) -> Flask:
    """Build the application on its data folder; the same one runs under ``flask --app app run`` and the server.

    The parts are built, and with ``background`` the jobs started, by ``portal_of`` at the latest at the first
    request, so that a command which needs none of them makes none.
    """
    app = Flask("portal", root_path=os.path.dirname(__file__), static_folder=None)
    for command in commands.commands(create_app, portal_of, serve):
        app.cli.add_command(command)
    if settings is None:
        try:
            settings = Settings.from_env(os.environ)
        except StartupError as error:
            raise click.ClickException(error.detail) from error
    app.config["PORTAL_SETTINGS"] = settings
    app.config["MAX_CONTENT_LENGTH"] = settings.max_body_bytes
    app.extensions["portal"] = _LazyPortal(settings, background=background, clock=clock)
    app.url_map.converters.update(routing.CONVERTERS)
    app.url_map.merge_slashes = False  # a path that is almost one is none: no redirects
    for route in ROUTES:
        app.add_url_rule(
            routing.rule_of(route.path),
            route.name,
            _view(route),
            methods=[route.method],
            provide_automatic_options=False,
        )
    app.before_request(_begin)
    app.after_request(_end)
    app.register_error_handler(Exception, _failed)
    setattr(app, "wsgi_app", DirectAnswers(ROUTES, app.wsgi_app, lambda: portal_of(app), _ended))  # noqa: B010
    logs.hide_links()
    return app


class _LazyPortal:
    """The parts, built once, by whoever needs them first."""

    def __init__(self, settings: Settings, *, background: bool, clock: Callable[[], datetime]) -> None:
        self._settings = settings
        self._clock = clock
        self._background = background
        self._lock = threading.Lock()
        self._portal: Portal | None = None

    def get(self) -> Portal:
        if self._portal is None:
            with self._lock:
                if self._portal is None:
                    portal = open_portal(self._settings, self._clock)
                    if self._background:
                        jobs.start(portal)
                    self._portal = portal
        return self._portal


def portal_of(app: Flask) -> Portal:
    """The parts of an application; raises ``StartupError`` where they cannot be built."""
    portal: Portal = app.extensions["portal"].get()
    return portal


# --- A request's way in and out -----------------------------------------------------------------------------------


def _begin() -> None:
    g.request_id = secrets.token_hex(8)
    g.started = time.perf_counter()
    g.actor = g.route = None
    if request.environ.get("portal.listener") == "pki":
        adapter = current_app.create_url_adapter(request)
        if adapter is None or not routing.is_for_anyone_in_the_clear(adapter, _ROUTE_OF):
            raise errors.NotFound(
                "Only CRLs, OCSP and CA certificates are served here; use the portal's HTTPS address."
            )


def _view(route: Route) -> Callable[..., Response]:
    def view(**path: str) -> Response:
        g.route = route.path
        portal = portal_of(current_app)
        g.actor = routing.actor_of(portal, route, request, g.request_id)
        routing.check_permission(portal, route, g.actor)
        call = Call(
            portal=portal,
            actor=g.actor,
            method=request.method,
            path=routing.read_path(path),
            headers=request.headers,  # case-insensitive
            body=routing.read_body(route, request),
            query=routing.read_query(route, request),
            idempotency_key=routing.read_idempotency_key(route, request),
            environ=request.environ,
        )
        return routing.response_of(route.handler(call))

    return view


def _end(response: Response) -> Response:
    return _ended(
        response,
        # The rule, not the path: a path can hold a link's token.
        route=g.route,
        method=request.method,
        started=g.started,
        request_id=g.request_id,
        actor=g.actor.name if g.actor else None,
        address=request.remote_addr,
        device_id=(request.view_args or {}).get("device_id"),
    )


def _ended(
    response: Response, *, route: str | None, method: str, started: float, request_id: str, **logged: str | None
) -> Response:
    response.headers["X-Request-Id"] = request_id
    response.headers.setdefault("X-Content-Type-Options", "nosniff")
    response.headers.setdefault("Cache-Control", "no-store")
    seconds = time.perf_counter() - started
    metrics.answered(route, method, response.status_code, seconds)
    facts = {"request_id": request_id, "method": method, "route": route, "status": response.status_code}
    log.info("request", extra={**facts, "ms": round(seconds * 1000, 1), "device_id": None, **logged})
    return response


def _failed(error: Exception) -> Response:
    problem, headers = problems.of_error(error, STATUS_OF, request_id=g.request_id, path=request.path)
    metrics.refused(problem.code)
    if problem.status == 500:
        log.error("failed", exc_info=error, extra={"request_id": g.request_id})
    elif problem.status == 503:
        cause = {"problem": problem.detail, "cause": error.__cause__}
        log.warning("unavailable", extra={"request_id": g.request_id, **cause})
    body, media_type = problems.as_sent(problem, request.path)
    return Response(body, problem.status, headers, content_type=media_type)
