"""What tests of several resources begin with."""

from __future__ import annotations

import pytest
from flask import Flask

from app import portal_of
from tests.support.brokers import obeys


@pytest.fixture
def generations(app: Flask, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The generations that the broker was asked to reach; it obeys at once."""
    return obeys(portal_of(app), monkeypatch)
