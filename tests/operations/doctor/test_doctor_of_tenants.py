"""What the doctor says of the CAs of several tenants."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from config import Settings
from operations import jobs
from operations.doctor import authority, data, keys
from operations.doctor.base import Installation, State
from operations.wiring import Portal, open_portal, prepare
from tests.support.harness import ON_SQLITE, Clock, key_path
from tests.support.tenants import add_tenant
from workflows.audit import KEY_FOLDER

pytestmark = ON_SQLITE


@pytest.fixture
def portal(make_settings: Callable[..., Settings], clock: Clock) -> Iterator[Portal]:
    built = open_portal(make_settings(PORTAL_BROKER_CONTROL="guard"), clock)
    add_tenant(built, "acme")
    add_tenant(built, "globex", own_root=True)
    prepare(built)
    yield built
    built.close()


def test_the_cas_of_all_tenants_are_as_they_should_be(portal: Portal, clock: Clock) -> None:
    installation = Installation(portal.settings, clock)
    jobs.write_lists_of_cas(portal)
    for check in (authority.ca_chain, authority.crl, authority.ocsp_responders):
        found = check(installation)
        assert found.state is State.OK, found
    said = keys.ca_keys(installation)
    assert "globex-issuing-1 is in a file" in said.detail
    assert said.state is State.OK


def test_a_tenants_key_that_is_lost_is_named(portal: Portal, clock: Clock) -> None:
    key_path(portal.settings, "acme-issuing-1").unlink()
    found = keys.ca_keys(Installation(portal.settings, clock))
    assert found.state is State.PROBLEM
    assert "acme-issuing-1" in str(found)


def test_the_keys_of_the_tenants_audit_records_are_looked_at_as_other_secrets_are(portal: Portal, clock: Clock) -> None:
    jobs.sign_audit_record(portal)
    folder = portal.settings.secrets_dir / KEY_FOLDER
    key = next(folder.iterdir())
    installation = Installation(portal.settings, clock)
    assert data.secret_files(installation).state is State.OK
    assert data.data_folder(installation).state is State.OK
    key.chmod(0o644)
    assert f"{key} has mode 644" in data.secret_files(installation).detail
    folder.chmod(0o755)
    assert f"{folder} has mode 755" in data.data_folder(installation).detail
