"""Brokers with the guard, as fixtures of the tests that command it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.guard import GuardedBroker, guarded_broker


@pytest.fixture(scope="module")
def broker() -> Iterator[GuardedBroker]:
    """A broker whose journal is good at the beginning and the end of each test."""
    with guarded_broker() as running:
        yield running


@pytest.fixture
def own_broker() -> Iterator[GuardedBroker]:
    """A broker for a test that damages or replaces the journal, or restarts it."""
    with guarded_broker() as running:
        yield running
