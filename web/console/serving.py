"""Serves the pages of the console: who asks, whether the request is the console's own, and how the answer is sent.

Each answer forbids a browser to load or send anything elsewhere, to be framed, and to keep the page.
"""

from __future__ import annotations

import contextlib
import hmac
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from flask import Flask, Request, Response, current_app, g, render_template, request

from core.errors import Forbidden, NotFound, TenantSuspended, Unauthenticated
from core.roles import Permission
from store import scope
from store.audit import Actor
from web.api import routing
from web.api.origins import parts_of
from web.api.problems import ProblemModel
from web.api.proxies import client_address
from web.console import static_files
from web.console.formats import FILTERS
from web.console.navigation import navigation_of
from web.console.pages import (
    FORM_TOKEN,
    FORM_TOKEN_HEADER,
    HOME,
    LOGIN,
    Answer,
    Arrived,
    Page,
    Sent,
    Shown,
    ToProvider,
    Visit,
    is_htmx,
    page_of,
)
from workflows.oidc.login import LOGIN_SECONDS
from workflows.operators import actor_with
from workflows.sessions import form_token

if TYPE_CHECKING:
    from operations.wiring import Portal

COOKIE, LOGIN_COOKIE = "__Host-portal_session", "__Host-portal_login"
_SECRET = re.compile("[A-Za-z0-9_-]{43}")
HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self';"
    " connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",  # with no-referrer a form's Origin would be null, which older browsers need
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_KEPT_FOR_GOOD = "public, max-age=31536000, immutable"
_HTML = "text/html; charset=utf-8"
PortalOf = Callable[[Flask], "Portal"]


def add_pages(app: Flask, pages: list[Page], portal_of: PortalOf) -> None:
    """Add the routes of the pages, with their static files, and ``/``, which leads to the console."""
    for page in pages:
        rule, view = routing.rule_of(page.path), _view(page, portal_of)
        app.add_url_rule(rule, page.name, view, methods=[page.method], provide_automatic_options=False)
    static = f"{static_files.PREFIX}/<segment:version>/<segment:name>"
    others: Mapping[str, Callable[..., Response]] = {"/": _root, f"{HOME}/": _root, static: _static}
    for rule, view in others.items():
        options: dict[str, Any] = {"methods": ["GET"], "provide_automatic_options": False, "strict_slashes": False}
        app.add_url_rule(rule, f"console{view.__name__}", view, **options)


def register(app: Flask, pages: list[Page]) -> None:
    """Have an application that shares the routes of the pages serve them."""
    app.jinja_env.filters.update(FILTERS)
    app.extensions["console"] = frozenset(page.path for page in pages)


def is_of_console(app: Flask, path: str) -> bool:
    """Return whether an error at a path is to be shown as a page of the console, if the application has one."""
    return "console" in app.extensions and (path == HOME or path.startswith(f"{HOME}/"))


def _root() -> Response:
    g.exchange.route = "/"
    return _redirect(HOME)


def _static(version: str, name: str) -> Response:
    g.exchange.route = f"{static_files.PREFIX}/{{version}}/{{name}}"
    found = static_files.find(version, name)
    if found is None:
        raise NotFound("This file is of another version of the console; load the page again.")
    headers = {**HEADERS, "Cache-Control": _KEPT_FOR_GOOD}
    return Response(found.content, headers=headers, content_type=found.media_type)


def _view(page: Page, portal_of: PortalOf) -> Callable[..., Response]:
    def view(**path: str) -> Response:
        g.exchange.route = page.path
        portal = portal_of(current_app)
        with scope.of_request():
            visit = _visit(portal, page, request)
            if visit.session is None and not page.without_session:
                return _to_login(request)
            return _answer(portal, page, visit, path)

    return view


# --- Who asks -----------------------------------------------------------------------------------------------------


def _visit(portal: Portal, page: Page, request: Request) -> Visit:
    """Return the request with the operator whose session it has; raises ``TenantSuspended``.

    For the login page a session of such a tenant counts as none: who has it may log in for another one.
    """
    address = client_address(request.environ, portal.settings.trusted_proxies)
    anyone = Actor(portal.first_tenant, "anyone", "none", g.exchange.request_id, address)
    secret = request.cookies.get(COOKIE, "")
    session = portal.sessions.find(secret) if _SECRET.fullmatch(secret) else None
    if session is None or (page.without_session and not _is_served(portal, session.token.tenant_id)):
        begun = request.cookies.get(LOGIN_COOKIE)
        return Visit(portal, request, g.exchange.request_id, anyone, portal.clock(), login_cookie=begun)
    scope.enter(session.token.tenant_id)
    g.exchange.actor = actor = actor_with(session.token, request_id=g.exchange.request_id, address=address)
    routing.check_tenant(portal, actor, page.action)
    g.visit = visit = Visit(portal, request, g.exchange.request_id, actor, portal.clock(), session, secret)
    return visit


def _is_served(portal: Portal, tenant_id: str) -> bool:
    try:
        portal.tenant_terms.of(tenant_id).check_served()
    except (NotFound, TenantSuspended):
        return False
    return True


def _to_login(request: Request) -> Response:
    """Return the way to the login page, and from there back.

    A link on another site brings no cookie along, since it is ``SameSite=Strict``: so the browser first loads the page
    once more, from here.
    """
    from_elsewhere = request.headers.get("Sec-Fetch-Site") == "cross-site"
    if from_elsewhere and request.method == "GET" and request.headers.get("Sec-Fetch-Mode") == "navigate":
        return _html(_render("arrival.html", None, {"here": page_of(request)}))
    login = f"{LOGIN}?next={quote(page_of(request), safe='')}"
    if is_htmx(request):
        return _html("", 401, {"HX-Redirect": login})
    return _redirect(login)


def _answer(portal: Portal, page: Page, visit: Visit, path: Mapping[str, str]) -> Response:
    actor = visit.actor
    if page.method != "GET":
        try:
            _check_own(visit)
        except Forbidden as error:
            if visit.session is not None:
                portal.operators.refused(actor, page.action, "access", error.code)
            raise
    routing.check_permission(portal, page.permission, actor, page.action)
    routing.check_path(path)
    with contextlib.nullcontext() if actor.token_id is None else routing.share_of(portal, actor.tenant_id):
        return _response(visit, page.handler(visit, **path))


def _check_own(visit: Visit) -> None:
    """Raise ``Forbidden`` unless a page of the console, shown in this session, has made the request."""
    request = visit.request
    if not _is_same_origin(visit):
        raise Forbidden("This request was made by another site; nothing was changed.")
    if visit.session is None:
        return
    sent = request.headers.get(FORM_TOKEN_HEADER) or request.form.get(FORM_TOKEN) or ""
    if not hmac.compare_digest(sent.encode(), form_token(visit.session_secret).encode()):
        raise Forbidden("This page is of an earlier session; load it again, and repeat what you did.")


def _is_same_origin(visit: Visit) -> bool:
    """Return whether the browser says that a page of this host made the request; one that says nothing is refused."""
    headers = visit.request.headers
    site, origin = headers.get("Sec-Fetch-Site"), headers.get("Origin")
    if site is not None:  # no page can set or change this header
        return site == "same-origin"
    if origin is None or (parts := parts_of(origin)) is None:
        return False
    # Which scheme it was is not known behind a front server, but no other page comes from this host's name.
    return parts.netloc in (visit.request.host, urlsplit(visit.portal.settings.public_url).netloc)


# --- The answer ---------------------------------------------------------------------------------------------------


def _response(visit: Visit, answer: Answer) -> Response:
    if isinstance(answer, Sent):
        content = answer.content
        if not isinstance(content, bytes):
            content = scope.Scoped(routing.in_parts(visit.portal, visit.actor.tenant_id, content))
        saved = {**HEADERS, "Content-Disposition": f'attachment; filename="{answer.filename}"'}
        return Response(content, headers=saved, content_type=answer.media_type)
    if isinstance(answer, Shown):
        template = answer.fragment if answer.fragment and visit.wants_fragment else answer.template
        return _html(_render(template, visit, answer.values), answer.status)
    if isinstance(answer, ToProvider):
        response = _redirect(answer.url)
        _set_login_cookie(response, answer.login_cookie)
        return response
    if isinstance(answer, Arrived):
        response = _html(_render("arrival.html", None, {"here": answer.to}))
        _set_cookie(response, answer.session_secret, answer.until)
        _set_login_cookie(response, "")
        return response
    response = _html("", 200, {"HX-Redirect": answer.to}) if is_htmx(visit.request) else _redirect(answer.to)
    if answer.session_secret is not None:
        _set_cookie(response, answer.session_secret, answer.until)
    return response


def _set_cookie(response: Response, secret: str, until: datetime | None) -> None:
    options: dict[str, Any] = {"path": "/", "secure": True, "httponly": True, "samesite": "Strict"}
    if secret:
        response.set_cookie(COOKIE, secret, expires=until, **options)
    else:
        response.delete_cookie(COOKIE, **options)


def _set_login_cookie(response: Response, content: str) -> None:
    """Set the cookie of a login by the identity provider: ``Lax``, since the browser brings it from there."""
    options: dict[str, Any] = {"path": "/", "secure": True, "httponly": True, "samesite": "Lax"}
    if content:
        response.set_cookie(LOGIN_COOKIE, content, max_age=LOGIN_SECONDS, **options)
    else:
        response.delete_cookie(LOGIN_COOKIE, **options)


def _render(template: str, visit: Visit | None, values: Mapping[str, Any]) -> str:
    shown = navigation_of(visit, current_app.extensions["console"]) if visit and visit.session else ()
    context: dict[str, Any] = {
        "visit": visit,
        "navigation": shown,
        "static": static_files.url_of,
        "Permission": Permission,
    }
    if visit is not None:
        context |= {"now": visit.now, "Permission": Permission}
    return render_template(f"console/{template}", **context, **values)


def error_page(problem: ProblemModel, error: Exception) -> Response:
    """Return an error as a page of the console, or as a notice for a page that htmx changes.

    Its request id leads to the portal's log.
    """
    if isinstance(error, Unauthenticated):
        return _to_login(request)
    visit: Visit | None = g.get("visit")
    retry = getattr(error, "retry_after", 2 if problem.status == 503 else None)
    headers = {} if retry is None else {"Retry-After": str(retry)}
    allowed = getattr(error, "valid_methods", None)
    if allowed:
        headers["Allow"] = ", ".join(sorted(allowed))
    template = "error_notice.html" if is_htmx(request) else "error.html"
    return _html(_render(template, visit, {"problem": problem}), problem.status, headers)


def _html(content: str, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(content, status, {**HEADERS, **(headers or {})}, content_type=_HTML)


def _redirect(to: str) -> Response:
    return _html("", 303, {"Location": to})
