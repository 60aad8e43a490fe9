"""With 300 tenants a registration and a revocation ask and sign as much as with one."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import ca
from broker_provisioning import BrokerProvisioning
from config import Settings
from core.broker_control import JOURNAL_FILE
from operations.wiring import Portal, open_portal, prepare
from pki import algorithms, crl
from store.audit import Actor
from tests.support.guard_stub import GuardStub
from tests.support.harness import Clock, derived_quickly
from tests.support.tenants import add_tenant
from tests.workflows.authority.test_crls import statements
from tests.workflows.test_admission import OPERATOR, request_of
from workflows import tenants as workflow_tenants
from workflows.authority import issuers as authority_issuers

MANY = 300
ACTORS = OPERATOR, Actor("tenant-1", "an operator", "operator", "request-2", "192.0.2.2")


@pytest.fixture
def portal(make_settings: Callable[..., Settings], clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Iterator[Portal]:
    monkeypatch.setattr(BrokerProvisioning, "probe", lambda *_: None)  # the stub has no TLS
    for module in (authority_issuers, workflow_tenants):  # which look once a second whether something has changed
        monkeypatch.setattr(module, "SECONDS_BETWEEN_LOOKS", math.inf)
    settings = make_settings(PORTAL_BROKER_CONTROL="guard")
    built = open_portal(settings, clock)
    prepare(built)
    with GuardStub(settings.broker_socket, settings.broker_file(JOURNAL_FILE)):
        yield built
    built.close()


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is signed with a CA's key, and which keys are opened."""
    done: list[str] = []

    def noted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            done.append(name)
            return real(*arguments, **named)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(ca, "_signed", noted("certificate", ca._signed))
        patch.setattr(crl, "signed", noted("crl", algorithms.signed))
        yield done


def cost(portal: Portal, actor: Actor, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[str]]:
    """The queries and signatures of a registration, its revocation and the CRL after it."""
    with statements(portal) as asked, counted(monkeypatch) as signed:
        device_id = portal.registrations.register(actor, request_of(1, csr=True)).device_id
        assert portal.revocations.revoke(actor, device_id, "key_compromise").enforced
        portal.reconciler.crls.publish()
    # The steps of a revocation are kept of one that takes long.
    return [re.sub(r"\s+", " ", one) for one in asked if "enforcement_steps" not in one], signed


@pytest.mark.long
def test_a_registration_and_a_revocation_cost_the_same_with_many_tenants(
    portal: Portal, monkeypatch: pytest.MonkeyPatch
) -> None:
    with derived_quickly():
        add_tenant(portal, "tenant-1")
        for actor in ACTORS:
            cost(portal, actor, monkeypatch)  # what is read once
        before = [cost(portal, actor, monkeypatch) for actor in ACTORS]
        for number in range(2, MANY + 1):
            add_tenant(portal, f"tenant-{number}")
    portal.reconciler.install()  # the broker learns of the new CAs
    for actor in ACTORS:
        cost(portal, actor, monkeypatch)
    assert [cost(portal, actor, monkeypatch) for actor in ACTORS] == before
    assert before[0][1] == ["certificate", "crl"]


@pytest.mark.long
def test_a_start_with_many_tenants_opens_no_key_of_theirs_and_signs_for_none(
    portal: Portal, make_settings: Callable[..., Settings], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    with derived_quickly():
        for number in range(1, MANY + 1):
            add_tenant(portal, f"tenant-{number}")
    portal.reconciler.install()
    loaded: list[str] = []
    real = type(portal.keys).load

    def load(keys: Any, name: str) -> Any:
        loaded.append(name)
        return real(keys, name)

    monkeypatch.setattr(type(portal.keys), "load", load)
    with counted(monkeypatch) as signed:
        again = open_portal(portal.settings, clock)
        prepare(again)
        again.responder.certificates.renew()
    again.close()
    assert sorted(set(loaded)) == ["issuing-1", "root"]
    assert signed == []
