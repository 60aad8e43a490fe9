"""What is answered without the web framework is answered as the framework would."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import pytest
from flask import Flask
from werkzeug.test import Client, TestResponse

from app import ROUTES, portal_of
from core.errors import DatabaseUnavailable
from tests.support.harness import ON_SQLITE
from web.api.direct import DirectAnswers

DOCUMENTS = ("/ca.pem", "/ca/root.cer", "/crl/issuing-1.crl")
OCSP = {"content_type": "application/ocsp-request", "data": b"0"}


class _Framework:
    """The web framework, counting what it is asked."""

    def __init__(self, wsgi_app: Any) -> None:
        self.wsgi_app = wsgi_app
        self.asked = 0

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        self.asked += 1
        return self.wsgi_app(environ, start_response)


@pytest.fixture
def framework(shared_app: Flask) -> Iterator[_Framework]:
    direct: Any = shared_app.wsgi_app
    assert isinstance(direct, DirectAnswers)
    framework = direct._framework = _Framework(direct._framework)
    yield framework
    direct._framework = framework.wsgi_app


def _both(app: Flask, framework: _Framework, method: str, path: str, **options: Any) -> tuple[TestResponse, ...]:
    """The answer to a request as it is given, and as the framework gives it."""
    answers = tuple(Client(wsgi).open(path, method=method, **options) for wsgi in (app, framework.wsgi_app))
    for answer in answers:
        answer.headers.remove("X-Request-Id")
    return answers


@ON_SQLITE
@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("path", [*DOCUMENTS, "/ocsp/" + base64.b64encode(b"0").decode()])
@pytest.mark.parametrize(
    "condition", [{}, {"If-None-Match": "*"}, {"If-Modified-Since": "Mon, 01 Jan 2035 00:00:00 GMT"}]
)
def test_it_is_the_same_answer(
    shared_app: Flask, framework: _Framework, method: str, path: str, condition: dict[str, str]
) -> None:
    direct, other = _both(shared_app, framework, method, path, headers=condition)
    assert (direct.status, direct.data, list(direct.headers)) == (other.status, other.data, list(other.headers))
    assert framework.asked == 0


@ON_SQLITE
def test_a_question_in_a_body_has_the_same_answer(shared_app: Flask, framework: _Framework) -> None:
    direct, other = _both(shared_app, framework, "POST", "/ocsp", **OCSP)
    assert (direct.status, direct.data, list(direct.headers)) == (other.status, other.data, list(other.headers))
    assert framework.asked == 0


@ON_SQLITE
@pytest.mark.parametrize(
    ("method", "path", "options", "status"),
    [
        ("POST", "/ca.pem", {}, 405),
        ("GET", "/ca.pem?x=1", {}, 200),
        ("GET", "/ca.pem", {"data": b"x"}, 200),
        ("GET", "/ca.pem", {"headers": {"Host": "a b"}}, 200),
        ("GET", "/crl/nobody.crl", {}, 404),
        ("GET", "/crl/ROOT.crl", {}, 404),
        ("GET", "/crl/root.crl%0a", {}, 404),
        ("POST", "/ocsp", {**OCSP, "content_type": "text/plain"}, 415),
        ("POST", "/ocsp", {**OCSP, "data": bytes(100_000)}, 413),
    ],
)
def test_what_is_out_of_the_ordinary_is_left_to_the_framework(
    shared_app: Flask, framework: _Framework, method: str, path: str, options: dict[str, Any], status: int
) -> None:
    assert Client(shared_app).open(path, method=method, **options).status_code == status
    assert framework.asked == 1


def test_nothing_that_needs_a_permission_is_answered_without_the_framework() -> None:
    for route in ROUTES:
        if route.direct:
            assert (route.permission, route.token_optional, route.query, route.body) == (None, False, None, None)
            assert route.on_pki_listener


@ON_SQLITE
def test_a_body_that_was_read_is_read_again_where_the_answer_is_an_error(
    shared_app: Flask, framework: _Framework, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bytes] = []

    def answer(der: bytes) -> Any:
        seen.append(der)
        raise DatabaseUnavailable("The database does not answer.")

    monkeypatch.setattr(portal_of(shared_app).responder, "answer", answer)
    assert Client(shared_app).post("/ocsp", **OCSP).status_code == 503
    assert (seen, framework.asked) == ([b"0", b"0"], 1)
