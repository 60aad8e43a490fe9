"""Pages of the web console: what each declares, what its handler is given, and what it may return.

    PAGES = Pages()

    @PAGES.add("GET", "/ui/devices/{device_id}", Permission.READ)
    def device(visit: Visit, device_id: str) -> Shown:
        details = visit.portal.inventory.device(visit.actor.tenant_id, device_id)
        return Shown("device.html", {"details": details})

A handler calls the same use cases as ``web/api`` does, and raises the same errors, which become pages of the console
(``web/console/serving.py``). Every page but those declared ``without_session`` has an operator.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

from flask import Request
from pydantic import BaseModel
from werkzeug.datastructures import MultiDict

from core.roles import MAY, Permission
from store.audit import Actor
from web.api.origins import parts_of
from web.api.routing import read_fields
from workflows.sessions import LiveSession, form_token

if TYPE_CHECKING:
    from operations.wiring import Portal

HOME = "/ui"
LOGIN = "/ui/login"
FORM_TOKEN = "form_token"  # noqa: S105 - the name of a form's field
FORM_TOKEN_HEADER = "X-Form-Token"  # noqa: S105 - the name of a header
# A path of the console with a query: what a login may lead to. No dots in the path, so that it stays below /ui.
_LOCAL = re.compile(r"/ui(/[A-Za-z0-9_~-]+)*/?(\?[!-~]*)?")
MAX_LOCAL = 2048
_M = TypeVar("_M", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Shown:
    """A page: ``template`` is a file of ``templates/console``, rendered with ``values``.

    A request of htmx for a part of the page gets ``fragment`` in its place, if there is one.
    """

    template: str
    values: Mapping[str, Any] = field(default_factory=dict)
    status: int = 200
    fragment: str | None = None


@dataclass(frozen=True, slots=True)
class Moved:
    """After a change: the browser is to load ``to``, a path of the console, with GET.

    ``session_secret`` is put into the browser's cookie until ``until``; an empty one deletes the cookie.
    """

    to: str
    session_secret: str | None = None
    until: datetime | None = None


@dataclass(frozen=True, slots=True)
class ToProvider:
    """The browser is to go to the identity provider at ``url``, and to bring ``login_cookie`` along from there."""

    url: str
    login_cookie: str


@dataclass(frozen=True, slots=True)
class Arrived:
    """After a login elsewhere: the session begins, and a page of ours leads to ``to``.

    A redirect would not do: the browser takes it for a part of the way from the other site, on which it sends no cookie
    that is ``SameSite=Strict``.
    """

    to: str
    session_secret: str
    until: datetime


@dataclass(frozen=True, slots=True)
class Sent:
    """A file to save: bytes, or an iterator of them, of ``media_type``."""

    content: bytes | Iterator[bytes]
    media_type: str
    filename: str


Answer = Shown | Moved | ToProvider | Arrived | Sent
Handler = Callable[..., Answer]
_H = TypeVar("_H", bound=Handler)


@dataclass(frozen=True, slots=True)
class Page:
    """One method of one path. ``permission`` is ``None`` for what every operator may do, as to log out.

    ``handler`` gets the ``Visit``, and each ``{part}`` of the path as a string under its own name.
    """

    method: str
    path: str
    handler: Handler
    permission: Permission | None
    without_session: bool = False

    @property
    def name(self) -> str:
        """The name of Flask's endpoint."""
        return f"console.{self.handler.__module__.rpartition('.')[2]}.{self.handler.__name__}"

    @property
    def action(self) -> str:
        """What the audit record calls a request that is refused."""
        return f"{self.method} {self.path}"


class Pages(list[Page]):
    """The pages of one screen."""

    def add(
        self, method: str, path: str, permission: Permission | None, *, without_session: bool = False
    ) -> Callable[[_H], _H]:
        """Add the decorated handler as a page, whose fields the arguments are."""

        def decorate(handler: _H) -> _H:
            self.append(Page(method, path, handler, permission, without_session))
            return handler

        return decorate


@dataclass(frozen=True, slots=True)
class Visit:
    """A request for a page: by ``actor``, an operator unless the page is shown ``without_session``.

    ``login_cookie`` is that of a login by the identity provider which this browser has begun.
    """

    portal: Portal
    request: Request
    request_id: str
    actor: Actor
    now: datetime
    session: LiveSession | None = None
    session_secret: str = ""
    login_cookie: str | None = None

    def may(self, permission: Permission | str) -> bool:
        """Return whether the actor's role has a permission, for what a page shows; the handler's page checks it."""
        return permission in MAY.get(self.actor.role, ())

    @property
    def form_token(self) -> str:
        """What each form has to send back."""
        return form_token(self.session_secret) if self.session is not None else ""

    @property
    def wants_fragment(self) -> bool:
        """Whether htmx asks for a part of the page."""
        return is_htmx(self.request) and self.request.headers.get("HX-Request-Type") == "partial"

    def query(self, model: type[_M]) -> _M:
        """Return the query as a model; a field that is empty is one that is left out. Raises ``InputInvalid``."""
        return _read(model, self.request.args)

    def form(self, model: type[_M], *, many: Collection[str] = ()) -> _M:
        """Return the form as a model, in the same way; the fields ``many`` are lists. Raises ``InputInvalid``."""
        return _read(model, self.request.form, many)


def _read(model: type[_M], fields: MultiDict[str, str], many: Collection[str] = ()) -> _M:
    given = [(name, value) for name, value in fields.items(multi=True) if value.strip() and name != FORM_TOKEN]
    lists = {name: [value for one, value in given if one == name] for name, _ in given if name in many}
    single = MultiDict([pair for pair in given if pair[0] not in many])
    found = read_fields(model, single, lists)
    if not isinstance(found, model):
        raise TypeError("a model validates to itself")
    return found


def is_htmx(request: Request) -> bool:
    """Return whether htmx has made the request."""
    return request.headers.get("HX-Request") == "true"


def local_path(text: str | None) -> str | None:
    """Return a path of the console that somebody has sent, ``None`` if a redirect to it could lead elsewhere."""
    if text is None or len(text) > MAX_LOCAL or not _LOCAL.fullmatch(text):
        return None
    return None if text.startswith(LOGIN) else text


def page_of(request: Request) -> str:
    """Return the path of the page that the reader is at, to come back to after a login."""
    if is_htmx(request):
        parts = parts_of(request.headers.get("HX-Current-URL", ""))
        here = HOME if parts is None else f"{parts.path}?{parts.query}" if parts.query else parts.path
    elif request.method in ("GET", "HEAD"):
        here = request.full_path.removesuffix("?")
    else:
        here = HOME
    return local_path(here) or HOME
