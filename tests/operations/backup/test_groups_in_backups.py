"""Groups in a backup, of the whole or of one tenant: they come back with their members, topics and filters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from config import Settings
from operations.backup.backup import back_up
from operations.backup.tenant_restore import restore_tenant
from operations.wiring import Portal, prepare
from store.audit import Actor
from store.groups import GroupRecord
from tests.support.backups import copied, opened, put_back
from tests.support.harness import Clock
from tests.support.tenants import add_tenant
from tests.workflows.test_registration import OPERATOR, PUMP

ACME = dataclasses.replace(OPERATOR, tenant_id="acme")


@pytest.fixture
def settings(make_settings: Callable[..., Settings]) -> Settings:
    return make_settings(PORTAL_BROKER_CONTROL="guard", PORTAL_ENFORCE_TIMEOUT="1")


def add(portal: Portal, actor: Actor) -> str:
    """Three groups, and a device in two of them."""
    nothing: dict[str, Any] = {"saved": None, "topics": None, "validity_days": None}
    portal.groups.add(actor, "short", "", **{**nothing, "validity_days": 9})
    prefix = "acme" if actor is ACME else "devices"
    topics = [(f"{prefix}/{{id}}/#", "readwrite"), (f"{prefix}/news", "read")]
    portal.groups.add(actor, "readers", "", **{**nothing, "topics": topics})
    portal.groups.add(actor, "hall-2", "", **{**nothing, "saved": {"location": "hall 2"}})
    device_id = portal.registrations.register(actor, PUMP).device_id
    for name in ("readers", "short"):
        portal.groups.change_members(actor, name, [device_id])
    return device_id


def state(portal: Portal, actor: Actor, device_id: str) -> tuple[Sequence[GroupRecord], Sequence[str], Any, Any]:
    device = portal.inventory.device(actor.tenant_id, device_id)
    return portal.groups.groups(actor.tenant_id), device.groups, device.topics_group, device.topics


@pytest.mark.parametrize("actor", [OPERATOR, ACME], ids=["whole", "tenant"])
def test_groups_come_back_with_their_members(settings: Settings, file: Path, clock: Clock, actor: Actor) -> None:
    with opened(settings, clock) as portal:
        prepare(portal)
        add_tenant(portal, "acme")
        device_id = add(portal, actor)
        before = state(portal, actor, device_id)
        if actor is ACME:
            back_up(settings, file, now=clock(), tenant_id="acme")
        else:
            copied(settings, file, clock)
        portal.groups.change_members(actor, "short", [], [device_id])
        for name in ("short", "hall-2"):
            portal.groups.remove(actor, name)
        assert state(portal, actor, device_id) != before
    if actor is ACME:
        restore_tenant(settings, file, "acme", replace=True, keep_links=False, now=clock(), crl_files=())
    else:
        put_back(settings, file, clock)
    with opened(settings, clock) as portal:
        assert state(portal, actor, device_id) == before


@pytest.mark.parametrize("actor", [OPERATOR, ACME], ids=["whole", "tenant"])
def test_a_member_that_lost_topics_of_its_group_since_does_not_have_them_back(
    settings: Settings, file: Path, clock: Clock, actor: Actor
) -> None:
    with opened(settings, clock) as portal:
        prepare(portal)
        add_tenant(portal, "acme")
        device_id = add(portal, actor)
        if actor is ACME:
            back_up(settings, file, now=clock(), tenant_id="acme")
        else:
            copied(settings, file, clock)
        clock.advance(minutes=5)
        portal.groups.change_members(actor, "readers", [], [device_id])
        now = portal.inventory.device(actor.tenant_id, device_id).topics
    if actor is ACME:
        done = restore_tenant(settings, file, "acme", replace=True, keep_links=False, now=clock(), crl_files=())
    else:
        done = put_back(settings, file, clock)
    assert f"topics of device {device_id} ({PUMP.name})" in [one.what for one in done.kept]
    with opened(settings, clock) as portal:
        device = portal.inventory.device(actor.tenant_id, device_id)
        assert (device.topics, device.topics_group) == (now, None)
