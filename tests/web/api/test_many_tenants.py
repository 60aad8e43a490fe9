"""What one tenant costs does not grow with the number of those that are there: counted, not timed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from flask import Flask

from app import portal_of
from broker import ca_certificates, capath, crl
from config import Settings
from core import files
from core.roles import Role
from pki import client_certificates
from store import audit
from tests.support.guarded import guarded_app
from tests.support.harness import ON_SQLITE, Api, Clock, api_as
from tests.support.statements import noting
from workflows.enrolment.clients import CLIENT_CAS
from workflows.tenant_life import NewTenant

pytestmark = ON_SQLITE
FEW, MORE = 2, 12


@pytest.fixture
def app(make_settings: Callable[..., Settings], clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Iterator[Flask]:
    """A portal under the control of a guard that knows tenants."""
    with guarded_app(make_settings(PORTAL_BROKER_CONTROL="guard"), clock, monkeypatch) as built:
        yield built


@pytest.fixture
def system(app: Flask) -> Api:
    return api_as(app, Role.SYSTEM)


@pytest.fixture
def done(app: Flask, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], Counter[str]]:
    """Counts what a call does: statements, files written and read, signatures of CAs verified, CRLs parsed."""
    counts: Counter[str] = Counter()

    def counting(module: Any, name: str, what: str) -> None:
        original = getattr(module, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            counts[what] += 1
            return original(*arguments, **options)

        monkeypatch.setattr(module, name, counted)

    for module in (capath, files):
        counting(module, "replace_file", "files written")
    for module in (crl, capath):
        counting(module, "read_crl", "CRLs parsed")
    counting(crl, "is_signed_by", "CRLs verified")
    counting(capath.CaFolder, "_digest", "files read")

    def of(call: Callable[[], Any]) -> Counter[str]:
        counts.clear()
        before = ca_certificates.is_issued_by.cache_info().misses
        with noting(portal_of(app).database.engine, lambda *_: counts.update(["statements"])):
            call()
        counts["CAs verified"] = ca_certificates.is_issued_by.cache_info().misses - before
        return Counter(counts)

    return of


@contextmanager
def tenants_of(system: Api, numbers: range) -> Iterator[list[Api]]:
    """Tenants with a name each, and their first admins."""
    added = [system.post("/tenants", {"name": f"tenant-{number}"}) for number in numbers]
    assert {one.status_code for one in added} == {201}
    yield [Api(system.client, one.json["token"]) for one in added]


def test_to_add_a_tenant_costs_no_more_beside_many(
    app: Flask, system: Api, done: Callable[[Callable[[], Any]], Counter[str]]
) -> None:
    actor = audit.system_actor("default")

    def add(name: str) -> None:
        assert portal_of(app).tenants.add(actor, NewTenant(name)).state.enforced

    with tenants_of(system, range(FEW)):
        beside_few = done(lambda: add("beside-few"))
    with tenants_of(system, range(FEW, MORE)):
        beside_many = done(lambda: add("beside-many"))
    assert beside_many == beside_few
    assert beside_few["CAs verified"] == 1
    assert beside_few["CRLs verified"] == 1


def test_a_crl_that_is_published_costs_no_more_beside_many(
    app: Flask, system: Api, done: Callable[[Callable[[], Any]], Counter[str]]
) -> None:
    def publish(admin: Api) -> Counter[str]:
        assert admin.post(f"/revoke/{admin.register()['device_id']}", {}).status_code == 200
        return done(lambda: portal_of(app).reconciler.crls.publish(at_once=True))

    with tenants_of(system, range(FEW)) as few:
        publish(few[0])
        with_few = publish(few[0])
    with tenants_of(system, range(FEW, MORE)) as many:
        publish(many[0])
        with_many = publish(many[0])
    assert with_many == with_few
    assert with_few["CRLs verified"] == 1


def test_the_list_of_cas_for_tls_is_encoded_again_only_when_a_ca_has_changed(
    app: Flask, system: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    portal, encoded, encode = portal_of(app), list[int](), client_certificates.pem_bundle

    def noting(certificates: list[bytes]) -> bytes:
        encoded.append(len(certificates))
        return encode(certificates)

    monkeypatch.setattr(client_certificates, "pem_bundle", noting)
    path = portal.settings.tls_dir / CLIENT_CAS
    portal.clients.write_authorities()
    listed = path.read_bytes().count(b"BEGIN")
    path.unlink()
    encoded.clear()
    portal.clients.write_authorities()
    assert path.exists()
    assert encoded == []
    with tenants_of(system, range(1)):
        portal.clients.write_authorities()
    assert path.read_bytes().count(b"BEGIN") == listed + 1
    assert encoded == [listed + 1]
