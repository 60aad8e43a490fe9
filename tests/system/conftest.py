"""Deployments for system tests, one for each ACL style, shared by the tests of a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.deployment import Deployment


@pytest.fixture(scope="module", params=["per-device", "pattern"])
def deployment(request: pytest.FixtureRequest) -> Iterator[Deployment]:
    """A running portal with its broker; tests share it, so each makes devices of its own."""
    with Deployment(PORTAL_ACL_STYLE=request.param) as running:
        yield running
