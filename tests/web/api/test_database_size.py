"""What a device takes of the database, in pages: backups, and the disk of a large fleet, are made of it."""

from __future__ import annotations

import uuid

import pytest
import sqlalchemy as sa
from flask import Flask

from app import portal_of
from core.roles import Role
from tests.support.harness import ON_SQLITE, Api, api_as

MEASURED = 120  # devices: with fewer, a page that has just been divided counts too much
WAITING, KEPT_ANSWER = 4096, 1228  # bytes


@pytest.fixture
def operator(app: Flask) -> Api:
    """An operator of a portal whose tables have their first pages."""
    api = api_as(app, Role.OPERATOR)
    for _ in range(60):
        api.register()
    return api


def used(app: Flask) -> int:
    with portal_of(app).database.snapshot() as tx:
        pages, free, size = (
            tx.execute(sa.text(f"PRAGMA {name}")).scalar_one() for name in ("page_count", "freelist_count", "page_size")
        )
    return int((pages - free) * size)


@ON_SQLITE
def test_a_device_whose_bundle_waits_takes_less_than_a_page(app: Flask, operator: Api) -> None:
    before = used(app)
    for _ in range(MEASURED):
        operator.register()
    assert (used(app) - before) / MEASURED <= WAITING


@ON_SQLITE
def test_an_answer_kept_for_a_repeat_takes_a_third_of_that(app: Flask, operator: Api) -> None:
    body = {"name": "pump-1", "type": "pump", "location": "hall 1", "firmware": "1.0"}
    before = used(app)
    for _ in range(MEASURED):
        assert operator.post("/register", body, headers={"Idempotency-Key": str(uuid.uuid4())}).status_code == 201
    assert (used(app) - before) / MEASURED <= WAITING + KEPT_ANSWER
