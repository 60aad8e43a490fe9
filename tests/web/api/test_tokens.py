"""Operator tokens and the audit record over HTTP."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from urllib.parse import urlencode

import pytest
import sqlalchemy as sa
from flask import Flask

from app import create_app, portal_of
from core.roles import Role
from store.tables import AuditEntry, Token
from tests.support.harness import ON_SQLITE, Api, Clock, api_as, problem_of


def holding(api: Api, token: str) -> Api:
    """The same application, called with another token."""
    return Api(api.client, token)


def test_a_new_token_works_and_its_secret_is_shown_once(api: Api, app: Flask) -> None:
    answer = api.post("/tokens", {"name": "ci", "role": "operator", "expires_in_days": 30})
    assert answer.status_code == 201
    secret = answer.json["token"]
    assert holding(api, secret).get("/devices").status_code == 200
    listed = api.get("/tokens")
    assert {key: value for key, value in answer.json.items() if key != "token"} in listed.json["tokens"]
    assert secret not in listed.text
    with portal_of(app).database.snapshot() as tx:
        rows = [*tx.execute(sa.select(Token.__table__)), *tx.execute(sa.select(AuditEntry.__table__))]
    assert secret.removeprefix("op_") not in str(rows)


WITH_SECRETS = (
    ("/tokens", "tokens", "token", {"name": "ci", "role": "operator"}),
    ("/enrolment-tokens", "enrolment_tokens", "token", {"name": "line 3"}),
    ("/webhooks", "webhooks", "secret", {"name": "events", "url": "https://example.com/events"}),
)


@pytest.mark.parametrize(("path", "many", "secret", "body"), WITH_SECRETS)
def test_requests_with_one_idempotency_key_make_one_with_one_secret(
    api: Api, path: str, many: str, secret: str, body: dict[str, Any]
) -> None:
    before, key = len(api.get(path).json[many]), {"Idempotency-Key": "k" * 16}
    first, second = (api.post(path, body, headers=key) for _ in range(2))
    assert (first.status_code, second.status_code) == (201, 201)
    assert first.json[secret] == second.json[secret]
    assert len(api.get(path).json[many]) == before + 1
    problem_of(api.post(path, {**body, "name": "another"}, headers=key), 409, "idempotency_conflict")
    assert api.post(path, body, headers={"Idempotency-Key": "k" * 17}).json[secret] != first.json[secret]


def test_a_token_expires(api: Api, clock: Clock) -> None:
    short = holding(api, api.post("/tokens", {"name": "ci", "role": "auditor", "expires_in_days": 1}).json["token"])
    clock.advance(hours=23, minutes=59)
    assert short.get("/devices").status_code == 200
    clock.advance(minutes=2)
    problem_of(short.get("/devices"), 401, "unauthenticated")


def test_a_token_is_refused_at_the_next_request_at_a_process_that_had_just_accepted_it(
    api: Api, app: Flask, clock: Clock
) -> None:
    """Nothing remembers tokens: see docs/performance.md."""
    other = create_app(portal_of(app).settings, background=False, clock=clock)
    with contextlib.closing(portal_of(other)):
        made = api.post("/tokens", {"name": "ci", "role": "auditor"}).json
        there = Api(other.test_client(), made["token"])
        assert there.get("/devices").status_code == 200
        assert api.delete(f"/tokens/{made['token_id']}").status_code == 200
        problem_of(there.get("/devices"), 401, "unauthenticated")


def test_a_revoked_token_is_refused_at_once_and_a_repeat_returns_the_same(api: Api, clock: Clock) -> None:
    made = api.post("/tokens", {"name": "ci", "role": "auditor"}).json
    first = api.delete(f"/tokens/{made['token_id']}")
    assert first.status_code == 200
    assert first.json["revoked_at"]
    problem_of(holding(api, made["token"]).get("/devices"), 401, "unauthenticated")
    clock.advance(minutes=1)
    assert api.delete(f"/tokens/{made['token_id']}").json == first.json
    assert len(api.get("/audit?action=token:revoke").json["entries"]) == 1


def test_the_last_admin_token_is_revoked_by_force_only(as_role: Callable[[Role | None], Api]) -> None:
    api = as_role(Role.SYSTEM)
    tokens = api.get("/tokens").json["tokens"]
    own = next(token for token in tokens if token["name"].startswith("a test's"))
    for token in tokens:
        if token is not own:
            assert api.delete(f"/tokens/{token['token_id']}").status_code == 200
    api.post("/tokens", {"name": "ci", "role": "operator"})
    problem_of(api.delete(f"/tokens/{own['token_id']}"), 409, "last_admin_token")
    problem_of(api.delete(f"/tokens/{own['token_id']}?force=1"), 422, "invalid_input")
    assert api.get("/tokens").status_code == 200
    assert api.delete(f"/tokens/{own['token_id']}?force=true").status_code == 200
    problem_of(api.get("/tokens"), 401, "unauthenticated")


def test_an_admin_that_has_expired_does_not_count_as_another(api: Api, clock: Clock) -> None:
    short = api.post("/tokens", {"name": "short", "role": "admin", "expires_in_days": 1}).json["token"]
    own = [token for token in api.get("/tokens").json["tokens"] if token["name"] != "short"]
    clock.advance(days=2)
    statuses = [api.delete(f"/tokens/{token['token_id']}").status_code for token in own]
    assert sorted(statuses) == [200] * (len(own) - 1) + [409]
    problem_of(holding(api, short).get("/devices"), 401, "unauthenticated")


@ON_SQLITE
def test_the_role_above_the_tenants_is_given_and_taken_by_that_role_alone(api: Api, app: Flask) -> None:
    system, wanted = api_as(app, Role.SYSTEM), {"name": "who runs it", "role": "system"}
    made = system.post("/tokens", wanted)
    assert (made.status_code, made.json["role"]) == (201, "system")
    for admin in (api, api_as(app, Role.ADMIN, "acme")):
        problem_of(admin.post("/tokens", wanted), 403, "forbidden")
    for query in ("", "?force=true"):
        problem_of(api.delete(f"/tokens/{made.json['token_id']}{query}"), 403, "forbidden")
    assert holding(api, made.json["token"]).get("/tokens").status_code == 200
    assert system.delete(f"/tokens/{made.json['token_id']}").status_code == 200


@ON_SQLITE
def test_only_in_the_first_tenant_can_a_token_have_the_role_above_the_tenants(app: Flask) -> None:
    with pytest.raises(sa.exc.IntegrityError):
        api_as(app, Role.SYSTEM, "acme")


@ON_SQLITE
@pytest.mark.parametrize("are_several", [False, True])
def test_the_last_token_of_the_role_above_the_tenants_is_revoked_by_force_only_while_there_are_several_tenants(
    api: Api, app: Flask, are_several: bool
) -> None:
    if are_several:
        api_as(app, Role.ADMIN, "acme")
    system = api_as(app, Role.SYSTEM)
    held = [token["token_id"] for token in system.get("/tokens").json["tokens"] if token["role"] == "system"]
    statuses = [system.delete(f"/tokens/{token_id}").status_code for token_id in reversed(held)]
    assert statuses == [200] * (len(held) - 1) + [409 if are_several else 200]
    if are_several:
        assert system.delete(f"/tokens/{held[0]}?force=true").status_code == 200
    assert api.get("/tokens").status_code == 200


@pytest.mark.parametrize("header", ["Bearer {}", "bearer {}", "BEARER   {}", "Bearer {} "])
def test_accepted_forms_of_the_authorization_header(api: Api, header: str) -> None:
    headers = {"Authorization": header.format(api.token)}
    assert Api(api.client, None).get("/devices", headers=headers).status_code == 200


# --- Audit --------------------------------------------------------------------------------------------------------


def test_every_change_is_recorded_with_actor_address_and_request_id(api: Api) -> None:
    answer = api.post("/register", {"name": "pump-1", "type": "pump", "location": "hall 1", "firmware": "1.0"})
    entry = api.get("/audit?limit=1").json["entries"][0]
    assert (entry["action"], entry["object"]) == ("device:register", f"device:{answer.json['device_id']}")
    assert (entry["outcome"], entry["address"]) == ("done", "127.0.0.1")
    assert "a test's admin" in entry["actor"]
    assert entry["request_id"] == answer.headers["X-Request-Id"]


def test_the_record_is_paged_newest_first_without_loss(api: Api) -> None:
    for number in range(5):
        api.register(name=f"pump-{number}")
    whole = api.get("/audit?limit=200").json["entries"]
    seen: list[Any] = []
    cursor: str | None = ""
    while cursor is not None:
        page = api.get(f"/audit?limit=2{cursor and '&cursor=' + cursor}").json
        seen += page["entries"]
        cursor = page["next_cursor"]
        api.register(name="a late one")
    assert seen == whole
    assert [entry["id"] for entry in seen] == sorted((entry["id"] for entry in seen), reverse=True)


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("action=device:register", 2),
        ("action=device:revoke", 1),
        ("outcome=refused", 1),
        ("outcome=refused&action=device:register", 0),
        ("object=device:{device_id}", 2),
        ("actor=anyone", 1),
        ("actor=nobody", 0),
    ],
)
def test_the_record_can_be_filtered(api: Api, query: str, found: int) -> None:
    device_id = api.register()["device_id"]
    api.register()
    api.post(f"/revoke/{device_id}")
    Api(api.client, None).get("/devices")
    assert len(api.get("/audit?" + query.format(device_id=device_id)).json["entries"]) == found


def test_an_actor_is_found_by_the_whole_name_of_its_token(api: Api) -> None:
    for name in ("line 4", "line 4 (old", "line 45"):
        holding(api, api.post("/tokens", {"name": name, "role": "operator"}).json["token"]).register()

    def found(actor: str) -> int:
        return len(api.get("/audit?" + urlencode({"actor": actor})).json["entries"])

    assert [found(name) for name in ("line 4", "line 45", "line", "line %", "line 4 (old")] == [2, 1, 0, 0, 1]
    [entry] = api.get("/audit?" + urlencode({"actor": "line 45"})).json["entries"]
    assert found(entry["actor"]) == 1


def test_the_record_is_listed_by_time_whatever_the_clock_did(
    api: Api, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, before = clock(), 0
    for hour in (1, 3, 2, 4):  # the clock is set back once
        clock.advance(hours=hour - before)
        before = hour
        api.post("/tokens", {"name": f"at {hour}", "role": "auditor"})

    def names(looked_at: int, limit: int, **query: str) -> list[str]:
        monkeypatch.setattr("workflows.operators.LOOKED_AT", looked_at)
        found: list[str] = []
        cursor: str | None = None
        while True:
            more = {} if cursor is None else {"cursor": cursor}
            page = api.get("/audit?" + urlencode({"action": "token:create", "limit": limit, **query, **more})).json
            found += [entry["detail"]["name"] for entry in page["entries"]]
            cursor = page["next_cursor"]
            if cursor is None:
                return found

    def at(hour: float) -> str:
        return f"{start + timedelta(hours=hour):%Y-%m-%dT%H:%M:%SZ}"

    for looked_at, limit in ((1, 50), (2, 1), (1000, 1), (1000, 50)):
        assert names(looked_at, limit, since=at(0.5)) == ["at 4", "at 3", "at 2", "at 1"]
        assert names(looked_at, limit, since=at(1.5), until=at(3.5)) == ["at 3", "at 2"]
        assert names(looked_at, limit, since=at(0.5), until=at(1.5)) == ["at 1"]
        assert names(looked_at, limit, since=at(4.5)) == []


def test_a_cursor_of_another_tenant_s_entry_shows_nothing_of_it(api: Api) -> None:
    answer = api.get("/audit?since=2020-01-01T00:00:00Z&cursor=999999999")
    assert (answer.status_code, answer.json["next_cursor"]) == (200, None)


@pytest.mark.parametrize("looked_at", [1, 3, 1000])
def test_every_matching_entry_is_found_however_few_entries_a_page_looks_at(
    api: Api, monkeypatch: pytest.MonkeyPatch, looked_at: int
) -> None:
    monkeypatch.setattr("workflows.operators.LOOKED_AT", looked_at)
    wanted = []
    for number in range(3):
        token = api.post("/tokens", {"name": f"token {number}", "role": "auditor"}).json
        api.delete(f"/tokens/{token['token_id']}")
        wanted.append(f"token:{token['token_id']}")
    for narrowed in ("action=token:create", "action=token:create&outcome=done"):
        found: list[str] = []
        cursor: str | None = ""
        while cursor is not None:
            page = api.get(f"/audit?{narrowed}&limit=2{cursor and '&cursor=' + cursor}").json
            found += [entry["object"] for entry in page["entries"]]
            cursor = page["next_cursor"]
        assert found[:3] == wanted[::-1]
