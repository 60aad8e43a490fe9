"""A further tenant's lost key, dates or stale CRL: told to whom it concerns, and nobody else is answered 503."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import pytest
import sqlalchemy as sa
from flask import Flask

from app import create_app, portal_of
from config import Settings
from core.roles import Role
from operations.monitoring import Readiness
from operations.wiring import Portal
from store import tenants
from store.tables import Crl
from tests.support.harness import ON_SQLITE, Api, Clock, api_as, key_path
from tests.support.tenants import add_tenant
from tests.workflows.authority.test_crls import statements
from workflows.operators import new_token

pytestmark = ON_SQLITE
WELL = {"database", "disk", "token", "ca", "crl", "broker files", "broker"}


@dataclass
class Seen:
    """The portal, and who asks it."""

    portal: Portal
    system: Api
    anyone: Api
    acme: Api
    globex: Api

    def readiness(self) -> dict[str, tuple[int, dict[str, str]]]:
        """What each is answered: the status, and the problems by the name of the check."""
        found = {}
        for name in ("system", "anyone", "acme", "globex"):
            answer = getattr(self, name).get("/readyz")
            assert {check["name"] for check in answer.json["checks"] if check["ok"]} == WELL
            problems = {check["name"]: check["problem"] for check in answer.json["checks"] if not check["ok"]}
            found[name] = answer.status_code, problems
        return found


@pytest.fixture
def app(make_settings: Callable[..., Settings], clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Iterator[Flask]:
    monkeypatch.setattr(Readiness, "_broker_problem", lambda _: None)
    monkeypatch.setattr(Readiness, "_files_problem", lambda _: None)
    built = create_app(make_settings(PORTAL_BROKER_CONTROL="guard"), background=False, clock=clock)
    yield built
    portal_of(built).close()


@pytest.fixture
def seen(app: Flask, clock: Clock) -> Seen:
    portal, admins = portal_of(app), {}
    for name in ("acme", "globex"):
        add_tenant(portal, name)
        secret, record = new_token(name, "an admin", Role.ADMIN, None, now=clock())
        with portal.database.transaction() as tx:
            tenants.add_token(tx, record, secret=secret)
        admins[name] = Api(app.test_client(), secret)
    portal.tenant_terms.refresh()
    portal.reconciler.crls.sign_due()
    return Seen(portal, api_as(app, Role.SYSTEM), api_as(app, None), **admins)


def lose_the_key(portal: Portal, _clock: Clock) -> str:
    key_path(portal.settings, "acme-issuing-1").unlink()
    return "The key of acme-issuing-1 is not here"


def let_the_crl_run_out(portal: Portal, clock: Clock) -> str:
    issuer = portal.authority.issuing_of("acme")
    with portal.database.transaction() as tx:
        values = {"this_update": clock() - timedelta(days=9), "next_update": clock() + timedelta(days=2)}
        tx.execute(sa.update(Crl).where(Crl.issuer_id == issuer.id).values(values))
    return "has not been renewed"


@pytest.mark.parametrize("harm", [lose_the_key, let_the_crl_run_out])
def test_one_tenants_trouble_is_told_to_it_and_to_the_role_system_and_concerns_no_other(
    seen: Seen, clock: Clock, harm: Callable[[Portal, Clock], str]
) -> None:
    assert seen.readiness() == dict.fromkeys(("system", "anyone", "acme", "globex"), (200, {}))
    said = harm(seen.portal, clock)
    found = seen.readiness()
    assert found["anyone"] == found["globex"] == (200, {})
    assert [status for status, _ in (found["system"], found["acme"])] == [200, 503]
    assert found["system"][1] == found["acme"][1]
    assert found["acme"][1].keys() == {"tenant acme"}
    assert said in found["acme"][1]["tenant acme"]


@pytest.mark.parametrize(
    ("end", "hours", "said"), [("not_after", -1, "has expired"), ("not_before", 1, "is not valid before")]
)
def test_a_ca_that_is_not_valid_concerns_its_own_tenant(
    seen: Seen, clock: Clock, end: str, hours: int, said: str
) -> None:
    issuer = seen.portal.authority.issuing_of("acme").issuer
    object.__setattr__(issuer, end, clock() + timedelta(hours=hours))
    found = seen.portal.tenant_readiness.failed()
    assert {name: check.code for name, check in found.items()} == {"acme": "ca_cannot_sign"}
    assert f"acme-issuing-1 {said}" in (found["acme"].problem or "")


def test_the_metrics_tell_it_by_tenant_and_each_its_own(seen: Seen, clock: Clock) -> None:
    lose_the_key(seen.portal, clock)
    told = seen.system.get("/metrics").text
    assert 'portal_tenants_not_ready{tenant="acme"} 1' in told
    assert 'portal_tenants_not_ready{tenant="globex"} 0' in told
    assert "portal_tenants_not_ready 1" in seen.acme.get("/metrics").text
    assert "portal_tenants_not_ready 0" in seen.globex.get("/metrics").text


def test_all_tenants_are_looked_at_by_one_query(seen: Seen) -> None:
    assert seen.portal.authority.current
    with statements(seen.portal) as asked:
        seen.portal.tenant_readiness.failed()
    assert len([one for one in asked if one.startswith("SELECT")]) == 1
