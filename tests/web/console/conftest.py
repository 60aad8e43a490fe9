"""Browsers for tests of the console."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from flask import Flask

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
