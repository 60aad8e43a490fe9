"""Decides whether a request is let in."""

from __future__ import annotations

from flask import Request
from werkzeug.routing import MapAdapter

from core.errors import Forbidden, Unauthenticated, Unavailable
from core.roles import may
from operations.wiring import Portal
from web.api.routing import Route
from workflows.audit import Actor


def actor_of(portal: Portal, route: Route, request: Request, request_id: str) -> Actor:
    """Who asks, where the route is not for anyone, or a token is shown to one that may be asked with it.

    Raises ``Unauthenticated``, recorded as refused, and ``TooManyAttempts``; a valid token is never told to wait.
    """
    stranger = Actor(portal.tenant_id, "anyone", "none", request_id, request.remote_addr or "")
    if route.permission is None and not (route.token_optional and "Authorization" in request.headers):
        return stranger
    scheme, _, secret = request.headers.get("Authorization", "").partition(" ")
    try:
        token = portal.operators.authenticate(secret.strip()) if scheme.lower() == "bearer" and secret else None
    except Unavailable:
        if route.token_optional:
            return stranger  # what is for anyone is answered without a database, too
        raise
    if token is None:
        portal.operators.login_failed(stranger, f"{route.method} {route.path}", "access", "unauthenticated")
        raise Unauthenticated(
            "A valid operator token is needed; send it as Authorization: Bearer <token>, or have an admin make one."
        )
    return Actor(token.tenant_id, f"{token.name} ({token.id})", token.role, request_id, stranger.address)


def check_permission(portal: Portal, route: Route, actor: Actor) -> None:
    """Raise ``Forbidden``, recorded as refused, where the actor's role is not enough."""
    if route.permission is None or may(actor.role, route.permission):
        return
    portal.operators.refused(actor, f"{route.method} {route.path}", "access", "forbidden")
    raise Forbidden(f"The role {actor.role} may not do this; it takes a role with the permission {route.permission}.")


def is_for_anyone_in_the_clear(adapter: MapAdapter, routes: dict[str, Route]) -> bool:
    """Whether the path asked for, by whatever method, is one that the plain HTTP listener serves."""
    endpoints = (adapter.match(method=method)[0] for method in adapter.allowed_methods())
    return any(routes[endpoint].on_pki_listener for endpoint in endpoints)
