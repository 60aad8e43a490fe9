"""What tests of several resources begin with."""

from __future__ import annotations

import pytest
from flask import Flask

from app import portal_of
from workflows.reconciliation import Outcome


@pytest.fixture
def generations(app: Flask, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The generations that the broker was asked to reach; it obeys at once."""
    asked: list[int] = []

    def apply(generation: int) -> Outcome:
        asked.append(generation)
        return Outcome(generation, generation)

    monkeypatch.setattr(portal_of(app).reconciler, "apply", apply)
    return asked
