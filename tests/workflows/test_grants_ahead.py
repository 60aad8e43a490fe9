"""At a broker that asks about each client a grant does not wait until a revocation before it is proven."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from broker.control import Changes
from broker.guard.journal import read_access
from config import Settings
from core.errors import BrokerUnavailable
from operations.wiring import Portal, open_portal, prepare
from tests.support.harness import ON_SQLITE
from tests.support.ports import free_port
from tests.workflows.test_admission import OPERATOR, request_of
from workflows.prompt import Outcome

pytestmark = ON_SQLITE


@pytest.fixture
def portal(make_settings: Callable[..., Settings]) -> Iterator[Portal]:
    """A portal with a cluster of which no node runs, and whose nodes' folders are written."""
    node = {"name": "rabbit@a", "mqtt": f"127.0.0.1:{free_port()}", "management": f"http://127.0.0.1:{free_port()}"}
    settings = make_settings(
        PORTAL_BROKER_CONTROL="rabbitmq",
        PORTAL_RABBITMQ_NODES=json.dumps([node]),
        PORTAL_RABBITMQ_PASSWORD_FILE="/nowhere",
        PORTAL_RABBITMQ_BIND=f"127.0.0.1:{free_port()}",
        PORTAL_RABBITMQ_URL="https://localhost:8445",
        PORTAL_ENFORCE_TIMEOUT="0.3",
    )
    made = open_portal(settings)
    prepare(made)
    yield made
    made.close()


def registered(portal: Portal) -> str:
    return portal.registrations.register(OPERATOR, request_of(1, csr=True)).device_id


def access(portal: Portal, device_id: str) -> str:
    return read_access(portal.broker.control.files.journal)[device_id].partition(" ")[0]  # type: ignore[attr-defined]


@contextmanager
def being_proven(portal: Portal, device_id: str) -> Iterator[None]:
    """Revoke a device; the body runs while the proof of that is under way, which fails afterwards."""
    begun, over = threading.Event(), threading.Event()

    def prove(*_: Any, **__: Any) -> None:
        begun.set()
        over.wait()
        raise BrokerUnavailable("No node answers.")

    with pytest.MonkeyPatch.context() as patched, ThreadPoolExecutor(1) as pool:
        patched.setattr(portal.broker, "bring_into_force", prove)
        revoking = pool.submit(portal.revocations.revoke, OPERATOR, device_id, "key_compromise")
        begun.wait()
        try:
            yield
        finally:
            over.set()
        assert not revoking.result().enforced


def test_a_device_is_registered_while_the_revocation_of_another_one_is_being_proven(portal: Portal) -> None:
    revoked = registered(portal)
    with being_proven(portal, revoked):
        new = registered(portal)
        assert access(portal, new) == "allow"
        assert portal.reconciler.applied_generation() < portal.reconciler.own_state().generation


def test_what_was_written_with_a_grant_is_proven_as_if_it_had_not_been(
    portal: Portal, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = registered(portal), registered(portal)
    with being_proven(portal, first):
        monkeypatch.setattr(portal.reconciler, "apply_soon", lambda _: Outcome(0, 0))
        portal.revocations.revoke(OPERATOR, second, "key_compromise", waits=False)
        registered(portal)
        assert access(portal, second) == "deny"
    proven: list[tuple[Changes, bool]] = []

    def prove(changes: Changes, *_: Any, has_crls: bool) -> None:
        proven.append((changes, has_crls))

    monkeypatch.setattr(portal.broker, "bring_into_force", prove)
    newest = portal.reconciler.own_state().generation
    assert portal.reconciler.apply(newest).covers(newest)
    ((changes, has_crls),) = proven
    assert {*changes.disconnected} == {first, second} == {*changes.revoked}
    assert has_crls


def test_a_grant_waits_if_nodes_lack_a_crl_that_it_needs(portal: Portal) -> None:
    (folder,) = portal.broker.control.files.nodes.values()  # type: ignore[attr-defined]
    for path in (folder.path / "crls").iterdir():
        path.unlink()
    registered(portal)  # which has them written again
    assert [*(folder.path / "crls").iterdir()]
