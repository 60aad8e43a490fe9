"""The log: one line an event, and never a secret, at whatever level."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stderr
from typing import Any

import pytest
import pyzipper
from flask import Flask

from app import create_app, portal_of
from config import LogFormat, Settings
from core import logs
from core.roles import Role
from tests.support.harness import ON_SQLITE, Api, api_as, csr_pem
from workflows.devices import Inventory

pytestmark = ON_SQLITE

PUMP = {"name": "pump-1", "type": "pump", "location": "hall 1", "firmware": "1.0"}
TEXT_LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (debug|info|warning|error) +\S.*")
NASTY = 'a\nb\r\n2026-01-01T00:00:00.000Z info forged\x1b[2J\u2028\x85 x="y"'


class Logged:
    """A portal that logs everything it can, with what it has logged."""

    def __init__(self, settings: Settings, output: io.StringIO) -> None:
        self.settings = settings
        self.app = create_app(settings, background=False)
        self._output = output

    def lines(self) -> list[str]:
        """What was logged, each line of which is seen to be an event."""
        found = self._output.getvalue().removesuffix("\n").split("\n")
        for line in found:
            if self.settings.log_format is LogFormat.JSON:
                assert {"time", "level", "logger", "event"} <= set(json.loads(line))
            else:
                assert TEXT_LINE.fullmatch(line), line
            assert line.isprintable()
            assert line.isascii()
        return found


Log = Callable[[], AbstractContextManager[Logged]]


@contextmanager
def logging_to(output: io.StringIO) -> Iterator[None]:
    """Let a test set logging up, without closing the handlers that pytest has there."""
    root = logging.getLogger()
    kept = root.handlers, root.level
    root.handlers = []
    try:
        with redirect_stderr(output):
            yield
    finally:
        root.handlers, root.level = kept


@pytest.fixture(params=list(LogFormat))
def log(request: pytest.FixtureRequest, make_settings: Callable[..., Settings]) -> Log:
    @contextmanager
    def make() -> Iterator[Logged]:
        output = io.StringIO()
        with logging_to(output):
            settings = make_settings(PORTAL_LOG_FORMAT=request.param, PORTAL_LOG_LEVEL="debug")
            logs.set_up(level=settings.log_level, as_json=settings.log_format is LogFormat.JSON)
            logged = Logged(settings, output)
            yield logged
            portal_of(logged.app).close()

    return make


def test_nothing_that_is_secret_reaches_the_log(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    with log() as logged:
        secrets, device_id = everything_that_has_secrets(logged.app, monkeypatch)
        written = "\n".join(logged.lines())
    assert device_id in written
    assert [secret for secret in secrets if secret in written] == []


def everything_that_has_secrets(app: Flask, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], str]:
    """Do all that a secret goes into or comes out of; returns the secrets, and the id of a device."""
    settings = portal_of(app).settings
    api, anyone = api_as(app, Role.ADMIN), api_as(app, None)
    chosen, key = "a password of my own", "an-idempotency-key-of-mine"
    registered = api.post("/register", PUMP, headers={"Idempotency-Key": key}).json
    api.post("/register", PUMP, headers={"Idempotency-Key": key})
    with_own_password = api.register(bundle_password=chosen)
    api.register(csr=csr_pem())
    link = registered["download_url"].rpartition("/")[2]
    anyone.call("HEAD", f"/download/{link}")
    fetched = anyone.get(f"/download/{link}")
    with pyzipper.AESZipFile(io.BytesIO(fetched.data)) as bundle:
        bundle.setpassword(registered["bundle_password"].encode())
        device_key = bundle.read("device.key").decode().splitlines()[1]
    fetched.close()
    anyone.get(f"/download/{link}")  # used
    anyone.get(f"/download/{link}x")  # altered
    made = api.post("/tokens", {"name": "ci", "role": "operator"}).json
    api.delete(f"/tokens/{made['token_id']}")
    Api(api.client, made["token"]).get("/devices")  # revoked
    Api(api.client, "op_a-token-of-another-portal").get("/devices")
    api.post("/register", {**PUMP, "bundle_password": "too\nshort"})
    api.post("/register", {**PUMP, "csr": f"-----BEGIN PRIVATE KEY-----\n{device_key}\n-----END PRIVATE KEY-----\n"})
    api.post(f"/revoke/{with_own_password['device_id']}")

    def fails(*_: object) -> None:
        raise RuntimeError(NASTY)

    monkeypatch.setattr(Inventory, "device", fails)
    assert api.get(f"/devices/{registered['device_id']}").status_code == 500
    api.get("/readyz")

    secret_files = [path.read_text() for path in settings.secrets_dir.iterdir()]
    secrets = [
        registered["bundle_password"], chosen, "too\\nshort", key, link, link.split(".")[0],
        with_own_password["download_url"].rpartition("/")[2], made["token"], api.token or "", "op_a-token",
        device_key, "PRIVATE KEY", *(line for text in secret_files for line in text.split()),
    ]  # fmt: skip
    return secrets, registered["device_id"]


def test_what_a_client_sends_begins_no_line(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        try:
            raise ValueError(NASTY)
        except ValueError as error:
            raise RuntimeError(NASTY) from error

    monkeypatch.setattr(Inventory, "devices", fails)
    with log() as logged:
        api = api_as(logged.app, Role.ADMIN)
        api.get("/devices?q=x")
        api.post("/register", {NASTY: 1})
        api.get("/%0aforged/%0d")
        api.call("GET%0a", "/devices")
        logging.getLogger("portal.test").warning(NASTY, extra={"what": NASTY, "nothing": None, "list": [NASTY]})
        written = logged.lines()
    assert not [line for line in written if line.startswith("2026-01-01")]
    [failed] = [line for line in written if "Traceback" in line]
    assert "RuntimeError" in failed
    assert "The above exception was the direct cause" in failed


def test_a_request_is_one_event_with_its_rule_and_not_its_path(log: Log) -> None:
    with log() as logged:
        answer = api_as(logged.app, None).get("/download/a.b.c")
        [line] = [line for line in logged.lines() if "/download/" in line]
    assert "a.b.c" not in line
    expected: dict[str, Any] = {
        "request_id": answer.headers["X-Request-Id"],
        "method": "GET",
        "route": "/download/{token}",
        "status": 404,
        "actor": "anyone",
        "address": "127.0.0.1",
    }
    if logged.settings.log_format is LogFormat.JSON:
        event = json.loads(line)
        assert {name: event[name] for name in expected} == expected
        assert (event["level"], event["logger"], event["event"]) == ("info", "portal.request", "request")
    else:
        assert all(f" {name}={value}" in line for name, value in expected.items())


def test_the_lines_of_flasks_own_server_show_no_link(log: Log) -> None:
    with log() as logged:
        of_flask = logging.getLogger("werkzeug")
        of_flask.warning('127.0.0.1 - - "GET /download/%s HTTP/1.1" 200', "a-secret-link")
        of_flask.warning('127.0.0.1 - - "GET %s HTTP/1.1" 200', "/devices")
        written = "\n".join(logged.lines())
    assert "a-secret-link" not in written
    assert "GET /devices" in written


def test_the_log_level_leaves_out_what_is_below(make_settings: Callable[..., Settings]) -> None:
    output = io.StringIO()
    with logging_to(output):
        logs.set_up(level=make_settings(PORTAL_LOG_LEVEL="warning").log_level, as_json=False)
        logging.getLogger("portal.test").info("quiet")
        logging.getLogger("portal.test").warning("loud")
    assert output.getvalue().endswith("warning loud\n")
    assert "quiet" not in output.getvalue()
