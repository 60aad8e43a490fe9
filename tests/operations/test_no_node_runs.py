"""A new portal at a RabbitMQ of which no node runs."""

from __future__ import annotations

import json
from collections.abc import Callable

from config import Settings
from operations.wiring import open_portal, prepare
from tests.support.harness import ON_SQLITE
from tests.support.ports import free_port
from tests.workflows.test_admission import OPERATOR, request_of
from workflows.brokers import Standing

pytestmark = ON_SQLITE


def test_nobody_is_denied_anything_yet_and_the_portal_is_not_ready(make_settings: Callable[..., Settings]) -> None:
    node = {"name": "rabbit@a", "mqtt": f"127.0.0.1:{free_port()}", "management": f"http://127.0.0.1:{free_port()}"}
    portal = open_portal(
        make_settings(
            PORTAL_BROKER_CONTROL="rabbitmq",
            PORTAL_RABBITMQ_NODES=json.dumps([node]),
            PORTAL_RABBITMQ_PASSWORD_FILE="/nowhere",
            PORTAL_RABBITMQ_BIND=f"127.0.0.1:{free_port()}",
            PORTAL_RABBITMQ_URL="https://localhost:8445",
            PORTAL_ENFORCE_TIMEOUT="0.3",
        )
    )
    prepare(portal)
    generation = portal.brokers.show("main").generation
    assert portal.reconciler.apply(generation).covers(generation)  # nobody is denied anything
    assert portal.brokers.show("main").standing is Standing.ENFORCED
    problems = {one.name: one.problem for one in [*portal.readiness.checks(), *portal.readiness.brokers()]}
    assert (problems["broker"] or "").startswith("No node of RabbitMQ answers at its management API; start them")
    assert problems["node rabbit@a"] == "Nobody can connect to the node rabbit@a; start it."
    device_id = portal.registrations.register(OPERATOR, request_of(1, csr=True)).device_id
    revoked = portal.revocations.revoke(OPERATOR, device_id, "key_compromise")
    assert not revoked.enforced
    assert portal.reconciler.why_pending(revoked.generation) == "No node of RabbitMQ answers at its management API."
    assert portal.brokers.show("main").standing is Standing.PENDING
    portal.close()
