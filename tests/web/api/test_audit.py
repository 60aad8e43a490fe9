"""The export and the checkpoints of the audit record, over HTTP."""

from __future__ import annotations

import json

import pytest
from flask import Flask

from app import portal_of
from core.roles import Role
from tests.support.harness import ON_SQLITE, Api, api_as, problem_of

pytestmark = ON_SQLITE


@pytest.fixture
def anyone(app: Flask) -> Api:
    return api_as(app, None)


def test_an_auditor_exports_the_record_line_by_line(app: Flask, api: Api) -> None:
    api.register()
    answer = api_as(app, Role.AUDITOR).get("/audit/export")
    assert (answer.status_code, answer.content_type) == (200, "application/x-ndjson")
    lines = [json.loads(line) for line in answer.data.splitlines()]
    assert [line["number"] for line in lines] == list(range(1, len(lines) + 1))
    assert [line["previous_hash"] for line in lines[1:]] == [line["hash"] for line in lines[:-1]]
    assert lines[-1]["action"] == "device:register"
    assert "Content-Length" not in answer.headers


def test_anyone_gets_the_newest_checkpoint_and_its_key(app: Flask, anyone: Api) -> None:
    problem_of(anyone.get("/audit/checkpoint"), 404, "not_found")
    log = portal_of(app).audit_log
    assert log.make_checkpoint() is None
    answer = anyone.get("/audit/checkpoint")
    assert (answer.status_code, answer.content_type) == (200, "text/plain; charset=utf-8")
    assert log.verifier.open(answer.text).size > 0
    assert anyone.get("/audit/key").text == f"{log.verifier}\n"
    assert anyone.get("/audit/checkpoint", headers={"If-None-Match": answer.headers["ETag"]}).status_code == 304
