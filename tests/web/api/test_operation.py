"""Health, readiness and the description of the interface."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
from html.parser import HTMLParser

import pytest
import sqlalchemy as sa
from flask import Flask

from app import ROUTES, portal_of
from core.errors import DatabaseUnavailable
from core.roles import Role
from db import next_generation
from operations.monitoring import Readiness
from store.database import Database
from tests.support.brokers import enforce_all
from tests.support.harness import ON_SQLITE, Api, Clock, api_as, problem_of
from web.api.operation import FOR_OPERATORS
from workflows.reconciliation import Reconciler


@pytest.fixture
def anyone(app: Flask) -> Api:
    return api_as(app, None)


@pytest.fixture
def auditor(app: Flask) -> Api:
    return api_as(app, Role.AUDITOR)


def problems_of(asking: Api, told: str = "problem") -> dict[str, str]:
    """The problems that ``/readyz`` reports, by the name of the check."""
    answer = asking.get("/readyz")
    problems = {check["name"]: check[told] for check in answer.json["checks"] if not check["ok"]}
    assert answer.content_type == "application/json"
    assert (answer.status_code, answer.json["status"]) == ((503, "not ready") if problems else (200, "ready"))
    return problems


def fail(*_: object, **__: object) -> None:
    raise DatabaseUnavailable("The database does not answer, is read-only or full; try again shortly.")


def test_healthz_reports_ok(anyone: Api) -> None:
    answer = anyone.get("/healthz")
    assert (answer.status_code, answer.json) == (200, {"status": "ok"})


def test_healthz_uses_neither_database_nor_broker(anyone: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    assert anyone.get("/healthz").status_code == 200
    for way in ("snapshot", "answer", "transaction"):
        monkeypatch.setattr(Database, way, fail)
    assert anyone.get("/healthz").status_code == 200


def test_readyz_names_the_broker_that_does_not_run_and_nothing_else(auditor: Api) -> None:
    assert list(problems_of(auditor)) == ["broker"]
    assert "start it" in problems_of(auditor)["broker"]


def test_readyz_is_ready_if_all_checks_pass(auditor: Api, app: Flask, monkeypatch: pytest.MonkeyPatch) -> None:
    portal = portal_of(app)
    monkeypatch.setattr(Reconciler, "broker_answers", lambda _: True)
    assert "generation" in problems_of(auditor)["broker"]
    with portal.database.transaction() as tx:
        enforce_all(tx)
    assert problems_of(auditor) == {}


def test_readyz_is_ready_while_changes_are_enforced_one_after_the_other(
    auditor: Api, app: Flask, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    portal = portal_of(app)
    seconds = portal.settings.enforce_timeout

    def change() -> None:
        with portal.database.transaction() as tx:
            next_generation(tx, at=clock())

    monkeypatch.setattr(Reconciler, "broker_answers", lambda _: True)
    assert "keeps trying" in problems_of(auditor)["broker"], "nothing was enforced since the start"
    with portal.database.transaction() as tx:
        enforce_all(tx, at=clock())
    change()
    assert "broker" not in problems_of(auditor)
    clock.advance(seconds=seconds)
    assert "keeps trying" in problems_of(auditor)["broker"]
    with portal.database.transaction() as tx:
        enforce_all(tx, at=clock())
    assert "broker" not in problems_of(auditor)
    clock.advance(hours=1)
    change()
    assert "broker" not in problems_of(auditor), "nobody has waited for it for long"
    clock.advance(hours=-2)
    assert "keeps trying" in problems_of(auditor)["broker"], "of a time to come nobody knows how long it is"


def test_readyz_names_a_damaged_file_of_the_broker(auditor: Api, app: Flask) -> None:
    portal_of(app).settings.broker_file("acl").write_text("topic readwrite #\n")
    assert "acl" in problems_of(auditor)["broker files"]


def test_readyz_names_an_expired_crl(auditor: Api, clock: Clock) -> None:
    clock.advance(days=5)
    assert "issuing-1" in problems_of(auditor)["crl"]


def test_readyz_names_an_expired_ca(auditor: Api, clock: Clock) -> None:
    clock.advance(days=1826)
    assert "expired" in problems_of(auditor)["ca"]


def test_readyz_names_a_ca_that_is_not_valid_yet(auditor: Api, clock: Clock) -> None:
    clock.advance(hours=-2)
    assert "not valid before" in problems_of(auditor)["ca"]


@ON_SQLITE
def test_readyz_names_a_database_that_another_program_has_locked(
    auditor: Api, app: Flask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("store.database.PING_SECONDS", 0.1)
    monkeypatch.setattr("store.database.SECONDS_BETWEEN_TEST_WRITES", -1)
    assert "database" not in problems_of(auditor)
    path = portal_of(app).database.engine.url.database
    assert path is not None
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert "cannot be written" in problems_of(auditor)["database"]
    assert "database" not in problems_of(auditor)


def test_readyz_writes_at_most_every_ten_seconds(auditor: Api, app: Flask) -> None:
    problems_of(auditor)
    written: list[str] = []

    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        written.append(statement)

    engine = portal_of(app).database.engine
    sa.event.listen(engine, "before_cursor_execute", note)
    problems_of(auditor)
    sa.event.remove(engine, "before_cursor_execute", note)
    assert written
    assert not [statement for statement in written if "UPDATE" in statement]


def test_readyz_names_a_database_that_does_not_answer(auditor: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    assert auditor.get("/healthz").status_code == 200
    for way in ("snapshot", "answer"):  # so that nobody's token can be looked up either
        monkeypatch.setattr(Database, way, fail)
    assert problems_of(auditor, "code")["database"] == "database_unavailable"


def test_readyz_does_not_tell_anyone_the_exception_of_a_failed_check(
    auditor: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: object) -> None:
        raise RuntimeError("secret inner workings")

    monkeypatch.setattr(Readiness, "_files_problem", broken)
    problems = problems_of(auditor)
    assert set(problems) == {"broker files", "broker"}
    assert "secret" not in str(problems)


def test_readyz_survives_a_broker_folder_that_is_gone(auditor: Api, app: Flask) -> None:
    assert auditor.get("/readyz").status_code == 503
    shutil.rmtree(portal_of(app).settings.broker_dir)
    assert {"broker", "broker files"} <= set(problems_of(auditor))


def test_readyz_tells_anyone_codes_without_reasons(anyone: Api, app: Flask, clock: Clock) -> None:
    settings = portal_of(app).settings
    settings.broker_file("acl").write_text("topic readwrite #\n")
    clock.advance(days=5)
    assert problems_of(anyone, "code") == {
        "crl": "crl_not_renewed",
        "broker files": "broker_files_damaged",
        "broker": "broker_not_enforcing",
    }
    assert set(problems_of(anyone).values()) == {FOR_OPERATORS}
    answer = anyone.get("/readyz").text
    for told in (str(settings.data_dir), "issuing-1", "generation"):
        assert told not in answer


def test_a_bad_token_at_readyz_is_a_failed_login(app: Flask) -> None:
    problem_of(Api(app.test_client(), "op_a-token-of-nobody").get("/readyz"), 401, "unauthenticated")
    entry = portal_of(app).operators.audit("default", limit=1, before=None, filters={})[0][0]
    assert (entry.action, entry.outcome) == ("GET /readyz", "refused")


# --- Described ----------------------------------------------------------------------------------------------------


def test_the_openapi_text_names_every_route_with_who_may_call_it(anyone: Api) -> None:
    text = anyone.get("/openapi.json")
    assert text.content_type == "application/json"
    assert text.json["openapi"].startswith("3.1")
    described = {
        f"{method.upper()} {path}": bool(operation["security"]) and {} not in operation["security"]
        for path, methods in text.json["paths"].items()
        for method, operation in methods.items()
    }
    declared = {f"{route.method} {route.path}": route.permission is not None for route in ROUTES}
    assert described == {**declared, "HEAD /download/{token}": False}


def test_every_operation_has_a_name_a_summary_and_the_request_id_on_every_answer(anyone: Api) -> None:
    paths = anyone.get("/openapi.json").json["paths"]
    operations = [operation for methods in paths.values() for operation in methods.values()]
    names = [operation["operationId"] for operation in operations]
    assert len(names) == len(set(names))
    for operation in operations:
        assert operation["summary"].endswith(".")
        for answer in operation["responses"].values():
            assert "X-Request-Id" in answer["headers"]
            assert answer["description"]


def test_every_reference_in_the_openapi_text_resolves(anyone: Api) -> None:
    text = anyone.get("/openapi.json")
    for reference in {line.split('"')[3] for line in json.dumps(text.json, indent=1).splitlines() if '"$ref"' in line}:
        found = text.json
        for name in reference.removeprefix("#/").split("/"):
            found = found[name]


def test_the_columns_of_an_upload_in_csv_are_described_as_the_server_reads_them(api: Api) -> None:
    paths = api.get("/openapi.json").json["paths"]
    csv = paths["/register/bulk"]["post"]["requestBody"]["content"]["text/csv"]
    columns = csv["x-columns"]
    needed = [name for name, column in columns.items() if column["required"]]
    assert all(name in csv["schema"]["description"] for name in needed)
    refused = api.call("POST", "/register/bulk", data=b"serial\n", content_type="text/csv").json["detail"]
    assert refused.split("there may be ")[1].rstrip(".").split(", ") == sorted(columns)
    for name in needed:
        header = ",".join({*needed} - {name}).encode()
        problem_of(api.call("POST", "/register/bulk", data=header, content_type="text/csv"), 422, "invalid_input")
    is_json = {name for name, column in columns.items() if column["content"] == "application/json"}
    for name in {*columns} - {*needed}:
        row = ",".join([*needed, name]) + "\n" + ",".join(["a"] * len(needed)) + ',"{"'
        answer = api.call("POST", "/register/bulk?dry_run=true", data=row.encode(), content_type="text/csv")
        assert ("must be JSON" in answer.text) == (name in is_json), answer.text


class Page(HTMLParser):
    """What a page loads, links to and shows."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.addresses: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses |= {value or "" for name, value in attrs if name in ("src", "href", "action", "data", "poster")}
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_shows_every_route_and_loads_nothing_from_elsewhere(anyone: Api) -> None:
    answer = anyone.get("/docs")
    assert (answer.status_code, answer.content_type) == (200, "text/html; charset=utf-8")
    page = Page()
    page.feed(answer.text)
    for route in ROUTES:
        assert route.path in page.text
        assert route.summary in page.text
    assert page.addresses == {"openapi.json"}  # below the path of PORTAL_PUBLIC_URL, whatever it is
    assert page.tags.isdisjoint({"script", "link", "img", "iframe", "object", "embed", "form"})
    assert "url(" not in answer.text
    assert "@import" not in answer.text
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
