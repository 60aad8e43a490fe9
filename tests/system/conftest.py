"""Deployments for system tests, one for each control of the broker, shared by the tests of a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.deployment import Deployment


@pytest.fixture(scope="module", params=["guard", "files"])
def deployment(request: pytest.FixtureRequest) -> Iterator[Deployment]:
    """A running portal with its broker; tests share it, so each makes devices of its own."""
    with Deployment(PORTAL_BROKER_CONTROL=request.param) as running:
        yield running
