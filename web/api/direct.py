"""Answers for documents that anyone may fetch, with no web framework in between."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from io import BytesIO
from typing import TYPE_CHECKING, Any

from flask import Response
from werkzeug.datastructures import EnvironHeaders

from core.errors import PortalError
from web.api.fields import PATH_PARAMETERS
from web.api.routing import Call, Route, response_of
from workflows.audit import Actor

if TYPE_CHECKING:
    from operations.wiring import Portal

Environ = dict[str, Any]
WsgiApp = Callable[[Environ, Any], Iterable[bytes]]

_HOST = re.compile(r"[A-Za-z0-9.:\[\]-]{1,255}")


class DirectAnswers:
    """A WSGI application in front of ``framework``, which gets every request that is not as plain as can be.

    The framework would take a fifth of the time of such a request, for its contexts, its own objects, and the choice
    among all routes. What is answered here is answered by the same handler, with the same headers, and is counted and
    logged as there. Whatever is out of the ordinary, an error of the handler too, is left to the framework: another
    method, a query, a body that is not wanted, a path that fits nothing.
    """

    def __init__(
        self,
        routes: Iterable[Route],
        framework: WsgiApp,
        portal: Callable[[], Portal],
        ended: Callable[..., Response],
    ) -> None:
        """``ended`` is told of each answer what is to be counted and logged, as keyword arguments."""
        direct = [route for route in routes if route.direct]
        self._routes = [(route, _pattern_of(route.path)) for route in direct]
        self._framework = framework
        self._portal = portal
        self._ended = ended

    def __call__(self, environ: Environ, start_response: Any) -> Iterable[bytes]:
        """Answer as PEP 3333 has it."""
        started = time.perf_counter()
        method, path = environ["REQUEST_METHOD"], environ.get("PATH_INFO", "")
        found = self._route(method, path) if _is_plain(environ) else None
        if found is None:
            return self._framework(environ, start_response)
        route, parts = found
        body = None
        if route.octets is not None:
            body = _read(environ, route.octets.media_type, route.octets.max_bytes)
            if body is None:
                return self._framework(environ, start_response)
        elif "CONTENT_TYPE" in environ or environ.get("CONTENT_LENGTH", "0") != "0":
            return self._framework(environ, start_response)
        try:
            portal, request_id = self._portal(), secrets.token_hex(8)
            actor = Actor(portal.tenant_id, "anyone", "none", request_id, environ.get("REMOTE_ADDR", ""))
            headers = EnvironHeaders(environ)
            arguments = parts if body is None else {**parts, "body": body}
            reply = route.handler(Call(portal, actor, method, headers, environ), **arguments)
        except PortalError:
            if body is not None:
                environ["wsgi.input"] = BytesIO(body)
            return self._framework(environ, start_response)
        response = self._ended(
            response_of(reply),
            route=route.path,
            method=method,
            started=started,
            request_id=request_id,
            actor=actor.name,
            address=actor.address,
        )
        answer: Iterable[bytes] = response(environ, start_response)
        return answer

    def _route(self, method: str, path: str) -> tuple[Route, Mapping[str, str]] | None:
        for route, pattern in self._routes:
            if method == route.method or (method == "HEAD" and route.method == "GET"):
                fits = pattern.fullmatch(path)
                if fits:
                    return route, fits.groupdict()
        return None


def _pattern_of(path: str) -> re.Pattern[str]:
    """What the paths of a route look like whose parts are as they must be, such as ``/crl/{issuer}.crl``."""
    pieces = re.split(r"\{(\w+)\}", path)
    pieces[::2] = map(re.escape, pieces[::2])
    pieces[1::2] = [f"(?P<{name}>{PATH_PARAMETERS[name].strip('^$')})" for name in pieces[1::2]]
    return re.compile("".join(pieces), re.ASCII)


def _is_plain(environ: Environ) -> bool:
    """Whether nothing but its path says what a request asks for."""
    return (
        not environ.get("QUERY_STRING")
        and not environ.get("SCRIPT_NAME")
        and "HTTP_TRANSFER_ENCODING" not in environ
        and _HOST.fullmatch(environ.get("HTTP_HOST", "")) is not None
    )


def _read(environ: Environ, media_type: str, most: int) -> bytes | None:
    """The body where it is of the kind and the length that is wanted."""
    length: str = environ.get("CONTENT_LENGTH") or ""
    if environ.get("CONTENT_TYPE") != media_type or not re.fullmatch("[0-9]{1,9}", length) or int(length) > most:
        return None
    content: bytes = environ["wsgi.input"].read(int(length))
    return content
