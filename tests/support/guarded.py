"""A portal with a guard that knows tenants, for tests of what it answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from flask import Flask

from app import create_app, portal_of
from config import Settings
from core.broker_control import JOURNAL_FILE
from operations.wiring import prepare
from tests.support.guard_stub import GuardStub
from tests.support.harness import Clock, derived_quickly


@contextmanager
def guarded_app(settings: Settings, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Iterator[Flask]:
    """A portal under the control of a guard, which is the extension ``guard``."""
    built = create_app(settings, background=False, clock=clock)
    portal = portal_of(built)
    monkeypatch.setattr(portal.broker, "probe", lambda *_arguments, **_options: None)  # it asks the broker itself
    prepare(portal)
    with derived_quickly(), GuardStub(settings.broker_socket, settings.broker_file(JOURNAL_FILE)) as guard:
        built.extensions["guard"] = guard
        yield built
    portal.close()
