"""Tenants in the guard's journal: which lines they get, and when the portal refuses to write them."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from broker.control import Draft
from broker.crl import Trust
from broker.files.acl import Acl
from broker.guard.journal import issuer_hashes, read_access, read_position
from broker.guard.told import read_told
from broker_provisioning import BrokerProvisioning, add_device_acl, remove_device_acl
from config import Settings
from core.broker_control import AclStyle
from core.errors import BrokerNotEnforcing, BrokerUnavailable, ProjectionInvalid
from core.tenants import TenantOnBroker
from core.topics import Access, Topic
from tests.broker.guard.test_control import ONE, TWO, Place, soon
from tests.support.guard_stub import journal_lines
from tests.support.mosquitto import short_folder
from tests.support.pki import PEM, Authority, Pki

B = TenantOnBroker("b", "plant/b", suspended=False)
SUSPENDED = TenantOnBroker("b", "plant/b", suspended=True)
C = TenantOnBroker("c", "c", suspended=False)


@pytest.fixture(scope="module")
def pki() -> Pki:
    return Pki()


@pytest.fixture(scope="module")
def theirs(pki: Pki) -> Authority:
    """The issuing CA of the tenant b."""
    return Authority("b Issuing CA 1", issuer=pki.root)


@pytest.fixture
def place(pki: Pki) -> Iterator[Place]:
    folder = short_folder(in_memory=True)
    yield Place(folder, pki, datetime.now(UTC))
    shutil.rmtree(folder)


def added(place: Place) -> list[str]:
    """What the last lines say, from the last but one generation on."""
    lines = journal_lines(place.journal)
    ends = [at for at, line in enumerate(lines) if line.startswith("generation")]
    return lines[ends[-2] + 1 : -1]


def trust(place: Place, theirs: Authority, tenant: str = "b") -> Trust:
    """What the broker is given with a second tenant's CA."""
    digest = hashlib.sha256(theirs.certificate.public_bytes(Encoding.DER)).hexdigest()
    bundle = theirs.certificate.public_bytes(PEM) + place.pki.ca_bundle
    return Trust(place.pki.issuing.crl() + theirs.crl(), bundle, {digest: tenant})


# --- The lines ------------------------------------------------------------------------------------------------------


def test_an_identity_of_a_tenant_is_told_with_it_after_the_tenant_itself(place: Place) -> None:
    own = (Topic("plant/b/{id}/up", Access.WRITE),)
    place.install()
    place.append(lambda draft: add_device_acl(draft, ONE, None, B))
    assert added(place) == ["tenant b plant/b", f"allow {ONE} in:b"]
    place.append(lambda draft: add_device_acl(draft, TWO, own, B))
    place.append(lambda draft: remove_device_acl(draft, ONE, B))
    assert journal_lines(place.journal)[-4:] == [
        f"allow {TWO} in:b w:plant/b/{TWO}/up",
        "generation 3",
        f"deny {ONE} in:b",
        "generation 4",
    ]
    assert read_access(place.journal) == {ONE: f"deny {ONE} in:b", TWO: f"allow {TWO} in:b w:plant/b/{TWO}/up"}


def test_a_suspension_is_one_line_and_so_is_its_end(place: Place) -> None:
    place.install(lambda draft: add_device_acl(draft, ONE, None, B))
    place.append(lambda draft: draft.tell_tenant(SUSPENDED))
    assert added(place) == ["suspend b"]
    place.append(lambda draft: draft.tell_tenant(SUSPENDED))
    assert added(place) == []
    assert read_told(place.journal).tenants == {"b": SUSPENDED}
    place.append(lambda draft: draft.tell_tenant(B))
    assert added(place) == ["tenant b plant/b"]


def test_a_new_journal_begins_with_the_tenants_and_says_who_is_suspended(place: Place) -> None:
    def tell(draft: Draft) -> None:
        for each in (SUSPENDED, C):
            draft.tell_tenant(each)

    place.install(tell)
    place.control.distrust()
    place.install(tell)
    lines = journal_lines(place.journal)
    assert lines[3:6] == ["tenant b plant/b", "suspend b", "tenant c c"]


def test_what_another_process_has_told_is_not_told_again(place: Place) -> None:
    place.install()
    other = Place(place.folder, place.pki, place.now, generation=1)
    place.append(lambda draft: draft.tell_tenant(B))
    other.generation = 2
    other.append(lambda draft: draft.tell_tenant(SUSPENDED))
    place.generation = 3
    place.append(lambda draft: draft.tell_tenant(SUSPENDED))
    assert added(place) == []


def test_what_a_dropped_draft_would_have_told_is_told_by_the_next_one(place: Place) -> None:
    place.install()
    draft = place.control.draft()
    draft.tell_tenant(B)
    draft.discard()
    place.append(lambda draft: draft.tell_tenant(B))
    assert added(place) == ["tenant b plant/b"]


def test_the_ca_of_a_tenant_is_told_as_that_tenants_and_put_off_afterwards(place: Place, theirs: Authority) -> None:
    place.install()
    given = trust(place, theirs)
    draft = place.control.draft()
    assert draft.unknown_tenants(["b"]) == {"b"}
    assert not draft.puts_off_crls(given.ca, given.tenants)
    draft.discard()
    assert place.install(lambda draft: draft.tell_tenant(B), given)
    hashes = issuer_hashes(theirs.certificate)
    assert added(place) == ["tenant b plant/b", *(f"issuer {each} in:b" for each in hashes)]
    assert read_told(place.journal).issuers.items() >= dict.fromkeys(hashes, "b").items()
    for _ in range(2):  # by a process that has written it, and by one that has not
        draft = place.control.draft()
        assert draft.puts_off_crls(given.ca, given.tenants)
        draft.discard()
        place.open()


def test_without_a_second_tenant_the_journal_has_no_line_of_tenants(place: Place) -> None:
    place.install(lambda draft: add_device_acl(draft, ONE, None))
    place.append(lambda draft: remove_device_acl(draft, ONE))
    text = place.journal.read_text()
    assert " in:" not in text
    assert [line.split(" ")[0] for line in journal_lines(place.journal)] == [
        *("portal-guard", "portal", "prefix", "allow", "issuer", "issuer", "issuer", "generation", "deny", "generation")
    ]


# --- What is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outside", ["devices/#", "plant/#", "plant/+/x", "plant/c/x", "c/#", "plant/bb/x"])
def test_what_lies_outside_a_tenants_prefix_is_granted_to_none_of_it(place: Place, outside: str) -> None:
    place.install()
    draft = place.control.draft()
    draft.grant_application(ONE, [Topic(outside, Access.READ)], B)
    add_device_acl(draft, TWO, [Topic(outside, Access.READ)], B)
    assert set(draft.closed) == {ONE, TWO}
    draft.install(2, None)
    assert added(place) == ["tenant b plant/b", f"deny {ONE} in:b", f"deny {TWO} in:b"]


def test_an_application_of_the_first_tenant_gets_nothing_below_another_tenants_prefix(place: Place) -> None:
    place.install()
    draft = place.control.draft()
    draft.grant_application(ONE, [Topic("plant/b/#", Access.READ)])
    assert set(draft.closed) == {ONE}
    draft.discard()


@pytest.mark.parametrize("prefix", ["devices", "devices/b", "sites", "plant", "plant/b", "plant/b/c"])
def test_topics_that_are_not_apart_from_those_of_others_are_refused_before_a_line(place: Place, prefix: str) -> None:
    place.open(PORTAL_TOPIC_PREFIXES="sites/x")
    place.install(lambda draft: draft.tell_tenant(B))
    before = place.journal.read_bytes()
    draft = place.control.draft()
    with pytest.raises(ProjectionInvalid, match="not apart"):
        draft.tell_tenant(TenantOnBroker("d", prefix, suspended=False))
    draft.discard()
    assert place.journal.read_bytes() == before


def test_another_tenant_of_a_name_that_was_removed_begins_a_new_journal(place: Place) -> None:
    place.install(lambda draft: draft.tell_tenant(B))
    epoch = read_position(place.journal).epoch
    draft = place.control.draft()
    with pytest.raises(ProjectionInvalid, match="another tenant of the name b"):
        draft.tell_tenant(TenantOnBroker("b", "other", suspended=False))
    draft.discard()
    place.install(lambda draft: draft.tell_tenant(TenantOnBroker("b", "other", suspended=False)))
    assert read_position(place.journal).epoch > epoch


def test_a_ca_of_a_tenant_that_was_added_meanwhile_is_told_by_the_next_draft(place: Place, theirs: Authority) -> None:
    place.install()
    given = trust(place, theirs)
    place.install(trust=given)
    assert added(place) == []
    draft = place.control.draft()
    assert not draft.puts_off_crls(given.ca, given.tenants)
    draft.discard()
    place.install(lambda draft: draft.tell_tenant(B), given)
    assert added(place) == ["tenant b plant/b", *(f"issuer {each} in:b" for each in issuer_hashes(theirs.certificate))]


def test_a_ca_with_the_name_of_another_tenants_admits_nobody_and_keeps_nobody_from_being_denied(
    place: Place, theirs: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    place.install(lambda draft: draft.tell_tenant(B), trust(place, theirs))

    def deny(draft: Draft) -> None:
        draft.tell_tenant(C)
        remove_device_acl(draft, ONE)

    place.install(deny, trust(place, theirs, "c"))
    assert added(place) == ["tenant c c", f"deny {ONE}"]
    assert "has the name of another tenant's" in caplog.text


def test_a_journal_that_names_too_many_cas_is_begun_again(
    place: Place, theirs: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.install(lambda draft: draft.tell_tenant(B), trust(place, theirs))
    epoch = read_position(place.journal).epoch
    renewed = Authority("b Issuing CA 2", issuer=place.pki.root)
    monkeypatch.setattr("broker.guard.draft.MAX_ISSUERS", 8)  # three of each of two CAs, and of a third
    with pytest.raises(ProjectionInvalid, match="written again"):
        place.install(trust=trust(place, renewed))
    assert place.install(lambda draft: draft.tell_tenant(B), trust(place, renewed))
    assert read_position(place.journal).epoch > epoch
    assert set(read_told(place.journal).issuers) == {
        *issuer_hashes(place.pki.issuing.certificate),
        *issuer_hashes(renewed.certificate),
    }


# --- The guard in the broker ----------------------------------------------------------------------------------------


def test_an_older_guard_is_told_nothing_of_tenants(place: Place) -> None:
    place.install()
    before = place.journal.read_bytes()
    with place.stub() as guard:
        guard.versions = {2}
        assert not place.broker.knows_tenants(soon())
        draft = place.control.draft()
        with pytest.raises(BrokerNotEnforcing, match="version, 3: install the plugin again"):
            add_device_acl(draft, ONE, None, B)
        draft.discard()
        place.append(lambda draft: add_device_acl(draft, ONE, None))
        guard.versions = {2, 3}
        assert place.broker.knows_tenants(soon())
        place.append(lambda draft: add_device_acl(draft, TWO, None, B))
        assert place.broker.enforce(place.generation, soon()) == 3
    assert place.journal.read_bytes().startswith(before)


def test_a_guard_that_is_older_than_the_journal_is_named(place: Place) -> None:
    place.install(lambda draft: draft.tell_tenant(B))  # while no broker runs
    with place.stub() as guard:
        guard.versions, guard.stopped = {2}, True
        with pytest.raises(BrokerNotEnforcing, match="not of the portal's version, 3"):
            place.control.check(soon())
        with pytest.raises(BrokerNotEnforcing, match="not of the portal's version, 3"):
            place.broker.enforce(1, soon(0.3))


def test_whether_tenants_are_known_is_not_known_of_a_broker_that_does_not_run(place: Place) -> None:
    with pytest.raises(BrokerUnavailable):
        place.broker.knows_tenants(soon())


def test_files_know_no_second_tenant_and_grant_it_nothing(place: Place) -> None:
    settings = Settings.from_env({"PORTAL_DATA_DIR": str(place.folder), "PORTAL_BROKER_CONTROL": "files"})
    assert not BrokerProvisioning(settings).knows_tenants(soon())
    for style in AclStyle:
        acl = Acl(style, "devices")
        add_device_acl(acl, ONE, None, B)
        assert set(acl.closed) == {ONE}
        assert f"{ONE}/#".encode() not in acl.render(1)
