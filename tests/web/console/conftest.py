"""Browsers for tests of the console."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from flask import Flask

from app import create_app, portal_of
from config import Settings
from core.roles import Role
from tests.support.browser import Browser, logged_in_as


@pytest.fixture
def browser_of(app: Flask) -> Callable[..., Browser]:
    """Makes a browser that is logged in with a fresh token of the role."""

    def make(role: Role = Role.ADMIN, tenant_id: str = "default") -> Browser:
        return logged_in_as(app, role, tenant_id)

    return make


@pytest.fixture
def browser(browser_of: Callable[..., Browser]) -> Browser:
    """A browser that is logged in as an admin."""
    return browser_of()


@pytest.fixture
def guarded(make_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch) -> Iterator[Flask]:
    """A portal under the guard, which keeps tenants apart and lets applications in."""
    app = create_app(make_settings(PORTAL_BROKER_CONTROL="guard", PORTAL_ENFORCE_TIMEOUT="1"), background=False)
    monkeypatch.setattr(portal_of(app).tenants, "_broker_knows_tenants", lambda: True)
    yield app
    portal_of(app).close()
