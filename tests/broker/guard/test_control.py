"""The control by the guard: what goes into the journal, when all of it is written again, what counts as a proof."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from broker.control import Draft, RestartReason
from broker.crl import Trust
from broker.guard import journal
from broker.guard.control import CRL_CHANGES, CRL_SECONDS, GUARD_VERSION, NEWS_VERSION, TENANTS_VERSION, GuardControl
from broker.guard.journal import read_position
from broker.session import connect_unix
from broker_provisioning import BrokerProvisioning, add_device_acl, remove_device_acl
from config import Settings
from core.errors import BrokerNotEnforcing, BrokerUnavailable, ProjectionInvalid
from core.topics import Access, Topic
from tests.support.guard import key_hashes_of
from tests.support.guard_stub import GuardStub, journal_lines
from tests.support.mosquitto import short_folder
from tests.support.pki import PEM, Authority, Credentials, Pki

ONE, TWO = "3f2b8c1e-9d4a-4e6b-8a57-1c0d2e3f4a5b", "7a1b8c1e-9d4a-4e6b-8a57-1c0d2e3f4a5b"


@dataclass
class Place:
    """A broker folder under the control of the guard."""

    folder: Path
    pki: Pki
    now: datetime
    generation: int = 0

    def __post_init__(self) -> None:
        self.open()

    def open(self, **environment: str) -> None:
        """Begin as a process of the portal that has just started."""
        environment = {"PORTAL_DATA_DIR": str(self.folder), "PORTAL_BROKER_CONTROL": "guard"} | environment
        self.settings = Settings.from_env(environment)
        self.broker = BrokerProvisioning(self.settings, lambda: self.now)
        assert isinstance(self.broker.control, GuardControl)
        self.control = self.broker.control
        self.journal = self.control.files.journal

    def trust(self, *revoked: Credentials) -> Trust:
        return Trust(self.pki.issuing.crl(*revoked), self.pki.ca_bundle)

    def install(self, fill: Callable[[Draft], object] = lambda draft: None, trust: Trust | None = None) -> bool:
        self.generation += 1
        draft = self.control.draft()
        fill(draft)
        return draft.install(self.generation, trust or self.trust())

    def append(self, fill: Callable[[Draft], object] = lambda draft: None) -> None:
        self.generation += 1
        draft = self.control.draft()
        fill(draft)
        assert draft.puts_off_crls(self.pki.ca_bundle)
        assert not draft.install(self.generation, None)

    def crls(self) -> list[bytes]:
        """The CRLs that the running broker finds, the last one as the newest."""
        return [path.read_bytes() for path in sorted((self.settings.broker_dir / "capath").glob("*.r*"))]

    def stub(self) -> GuardStub:
        return GuardStub(self.settings.broker_socket, self.journal)


@pytest.fixture(scope="module")
def pki() -> Pki:
    return Pki()


@pytest.fixture
def place(pki: Pki) -> Iterator[Place]:
    folder = short_folder(in_memory=True)
    yield Place(folder, pki, datetime.now(UTC))
    shutil.rmtree(folder)


def soon(seconds: float = 10.0) -> float:
    return time.monotonic() + seconds


def deny(times: int) -> Callable[[Draft], None]:
    """Lines for the journal, of which one would do."""

    def fill(draft: Draft) -> None:
        for _ in range(times):
            remove_device_acl(draft, ONE)

    return fill


def since(place: Place, *, enforced: int = 0) -> int:
    """The generation that the next draft continues."""
    draft = place.control.draft(enforced)
    draft.discard()
    return draft.since


def hash_of(authority: Authority) -> str:
    return hashlib.sha256(authority.certificate.subject.public_bytes()).hexdigest()


# --- The journal ---------------------------------------------------------------------------------------------------


def test_the_first_journal_says_all_that_the_guard_has_to_know(place: Place) -> None:
    own = (Topic("devices/{id}/telemetry", Access.WRITE), Topic("devices/shared/a b", Access.READ))

    def fill(draft: Draft) -> None:
        assert (draft.since, draft.lists_every_device, draft.lists_certificates) == (0, True, True)
        add_device_acl(draft, ONE, None)
        add_device_acl(draft, TWO, own)
        draft.revoke_certificate(place.pki.issuing.certificate.subject.public_bytes(), "1f", ONE, is_probe=False)

    assert place.install(fill)
    header, *lines = journal_lines(place.journal)
    assert header == f"portal-guard 1 {int(place.now.timestamp() * 1000)} 0"
    assert lines == [
        f"portal {hashlib.sha256(place.control.files.password().encode()).hexdigest()}",
        "prefix devices",
        f"allow {ONE}",
        f"allow {TWO} w:devices/{TWO}/telemetry r:devices/shared/a%20b",
        f"serial {hash_of(place.pki.issuing)} 1f {ONE}",
        f"issuer {hash_of(place.pki.issuing)}",
        *(f"issuer {each}" for each in key_hashes_of(place.pki.issuing)),
        "generation 1",
    ]
    assert place.control.files.damage() == []
    assert place.control.files.installed_generation() == 1


def test_what_changed_since_is_appended(place: Place) -> None:
    place.install(lambda draft: add_device_acl(draft, ONE, None))
    before = place.journal.read_bytes()
    place.open()  # another process goes on with it

    def fill(draft: Draft) -> None:
        assert draft.since == 1
        remove_device_acl(draft, ONE)
        draft.forget(TWO)

    place.install(fill)
    assert place.journal.read_bytes().startswith(before)
    assert journal_lines(place.journal)[-3:] == [f"deny {ONE}", f"forget {TWO}", "generation 2"]


def test_topics_that_are_not_allowed_are_denied_and_listed(place: Place) -> None:
    draft = place.control.draft()
    add_device_acl(draft, ONE, (Topic("elsewhere/#", Access.READ),))
    assert ONE in draft.closed
    draft.install(1, place.trust())
    assert f"deny {ONE}" in journal_lines(place.journal)


def test_an_application_is_allowed_filters_of_its_own_that_a_device_is_not(place: Place) -> None:
    place.open(PORTAL_TOPIC_PREFIXES="homeassistant")
    topics = (Topic("devices/+/telemetry", Access.READ), Topic("homeassistant/#", Access.READWRITE))
    place.install(lambda draft: draft.grant_application(ONE, topics))
    assert f"allow {ONE} r:devices/+/telemetry rw:homeassistant/#" in journal_lines(place.journal)
    draft = place.control.draft()
    add_device_acl(draft, TWO, topics[:1])
    for outside in ("#", "+/telemetry", "$SYS/#", "$share/g/#", "devices/x\n", "other/#"):
        draft.grant_application(ONE, [Topic(outside, Access.READ)])
        assert ONE in draft.closed, outside
    assert TWO in draft.closed
    draft.install(2, place.trust())
    assert journal_lines(place.journal)[-3:-1] == [f"deny {ONE}"] * 2
    assert f"deny {TWO}" in journal_lines(place.journal)


def test_64_topics_as_long_as_can_be_fit_into_a_line(place: Place) -> None:
    topics = [Topic(f"devices/{number:02}" + "x" * 246, Access.READWRITE) for number in range(64)]
    place.install(lambda draft: draft.grant_application(ONE, topics))
    [line] = [line for line in journal_lines(place.journal) if line.startswith("allow")]
    assert line.count(" rw:devices/") == 64


def test_a_name_that_is_no_device_id_is_never_written(place: Place) -> None:
    draft = place.control.draft()
    with pytest.raises(ValueError, match="UUID"):
        draft.grant("a b", None)
    with pytest.raises(ValueError, match="UUID"):
        draft.deny("portal")
    with pytest.raises(ValueError, match="UUID"):
        draft.forget("x\n1 allow y")
    draft.discard()


def test_a_new_ca_and_a_new_password_are_told_without_a_new_journal(place: Place) -> None:
    place.install()
    epoch = read_position(place.journal).epoch
    second = Authority("Second issuing", issuer=place.pki.root)
    trust = Trust(place.pki.issuing.crl() + second.crl(), second.certificate.public_bytes(PEM) + place.pki.ca_bundle)
    (place.settings.secrets_dir / "broker-password").write_text("p" * 43)
    assert place.install(trust=trust)  # the broker needs the CA and its CRL at once
    assert journal_lines(place.journal)[-5:] == [
        f"issuer {hash_of(second)}",
        *(f"issuer {each}" for each in key_hashes_of(second)),
        f"portal {hashlib.sha256(b'p' * 43).hexdigest()}",
        "generation 2",
    ]
    assert read_position(place.journal).epoch == epoch


def test_the_keys_of_cas_whose_names_a_journal_has_already_are_told_without_a_new_journal(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "issuer_hashes", lambda one: [hashlib.sha256(one.subject.public_bytes()).hexdigest()])
    place.install()
    epoch = read_position(place.journal).epoch
    place.open()
    monkeypatch.undo()
    draft = place.control.draft()
    assert not draft.puts_off_crls(place.pki.ca_bundle)
    draft.discard()
    place.install()
    keys = [f"issuer {each}" for each in key_hashes_of(place.pki.issuing)]
    assert journal_lines(place.journal)[-4:] == ["generation 1", *keys, "generation 2"]
    assert read_position(place.journal).epoch == epoch
    place.append()


def test_an_older_generation_never_follows_a_newer_one(place: Place) -> None:
    place.generation = 5
    place.install()
    before = place.journal.read_bytes()
    place.generation = 3
    with pytest.raises(ProjectionInvalid, match="generation 6, newer than 4"):
        place.install(lambda draft: add_device_acl(draft, ONE, None))
    assert place.journal.read_bytes() == before


def test_a_bad_crl_changes_nothing(place: Place) -> None:
    place.install()
    before = place.journal.read_bytes(), place.crls()
    with pytest.raises(ProjectionInvalid):
        place.install(lambda draft: add_device_acl(draft, ONE, None), Trust(b"\n", place.pki.ca_bundle))
    assert (place.journal.read_bytes(), place.crls()) == before


# --- New epochs ----------------------------------------------------------------------------------------------------


def _flip(place: Place) -> None:
    content = bytearray(place.journal.read_bytes())
    content[-20] ^= 1
    place.journal.write_bytes(content)


def _older(place: Place) -> None:
    lines = place.journal.read_bytes().splitlines(keepends=True)
    while lines[-1].split()[1:3] != [b"generation", b"1"]:
        lines.pop()
    place.journal.write_bytes(b"".join(lines))


def _other_prefix(place: Place) -> None:
    place.open(PORTAL_TOPIC_PREFIX="things")


def _many_issuers(place: Place) -> None:
    record = place.settings.broker_dir / "projection.json"
    stated = json.loads(record.read_bytes())
    assert since(place) == 2
    stated["issuers"] += [f"{number:064x}" for number in range(200)]  # as after 70 rollovers
    record.write_text(json.dumps(stated))


DISCONTINUITIES: dict[str, Callable[[Place], object]] = {
    "the journal is gone": lambda place: place.journal.unlink(),
    "the journal is damaged": _flip,
    "the journal is an older one": _older,
    "the broker may not read it": lambda place: place.journal.chmod(0o600),
    "the record is gone, as after a restore": lambda place: (place.settings.broker_dir / "projection.json").unlink(),
    "the record is damaged": lambda place: (place.settings.broker_dir / "projection.json").write_bytes(b"[]"),
    "the topic prefix is another": _other_prefix,
    "many CAs are named that are retired by now": _many_issuers,
    "another prefix is allowed": lambda place: place.open(PORTAL_TOPIC_PREFIXES="homeassistant"),
}


@pytest.mark.parametrize("kind", DISCONTINUITIES)
def test_a_journal_that_cannot_be_continued_is_written_whole_in_a_higher_epoch(place: Place, kind: str) -> None:
    place.install()
    place.install()
    epoch = read_position(place.journal).epoch
    place.now -= timedelta(days=400)  # a clock that was set back makes no lower epoch
    place.pki.issuing.now = place.now
    DISCONTINUITIES[kind](place)
    draft = place.control.draft()
    assert draft.since == 0
    add_device_acl(draft, ONE, None)
    place.pki.issuing.now = datetime.now(UTC)
    place.now = datetime.now(UTC)
    draft.install(3, place.trust())
    assert read_position(place.journal, whole=True).epoch > epoch
    assert f"allow {ONE}" in journal_lines(place.journal)
    assert place.control.draft().since == 3


@pytest.mark.parametrize("kind", ["the journal is gone", "the journal is damaged", "the journal is an older one"])
def test_damage_of_the_journal_is_told(place: Place, kind: str) -> None:
    place.install()
    place.install()
    assert place.control.files.damage() == []
    DISCONTINUITIES[kind](place)
    (problem,) = place.control.files.damage()
    assert str(place.journal) in problem


def test_a_journal_that_has_grown_long_is_begun_again(place: Place) -> None:
    place.install()
    place.install(deny(40_000))
    assert place.control.draft().since == 2
    place.install(deny(40_000))
    draft = place.control.draft()
    assert draft.since == 0
    draft.discard()


def test_a_dropped_draft_leaves_nothing(place: Place) -> None:
    place.control.draft().discard()
    assert [path for path in place.settings.broker_dir.iterdir() if path.name.endswith(".tmp")] == []


# --- Proof ---------------------------------------------------------------------------------------------------------


def test_a_generation_is_enforced_once_the_guard_has_proven_it(place: Place) -> None:
    place.install()
    with place.stub() as guard:
        assert place.broker.enforce(1, soon()) == 1
        position = read_position(place.journal)
        proof = ["portal/guard/refused", f"portal/guard/prove/{position.epoch}/{position.seq}"]
        versions = [f"portal/guard/version/{version}" for version in (GUARD_VERSION, NEWS_VERSION)]
        assert guard.topics == [*proof, *versions]
        place.broker.enforce(1, soon())  # the versions are asked for once
        assert guard.topics[4:] == proof


def test_a_new_epoch_is_confirmed(place: Place) -> None:
    place.install()
    with place.stub() as guard:
        place.broker.enforce(1, soon())
        place.journal.unlink()
        place.install()
        assert place.broker.enforce(2, soon()) == 2
        assert guard.epoch == read_position(place.journal).epoch


def test_a_broker_without_the_guard_is_never_believed(place: Place) -> None:
    place.install()
    with place.stub() as guard:
        guard.loaded = False
        with pytest.raises(BrokerNotEnforcing, match="runs without the portal's guard"):
            place.broker.enforce(1, soon())


def test_a_guard_that_does_not_follow_is_not_believed_and_gets_a_new_journal(place: Place) -> None:
    place.install()
    begun: list[int] = []
    with place.stub() as guard:
        place.broker.enforce(1, soon())
        guard.stopped = True
        place.install()
        with pytest.raises(BrokerUnavailable, match="has not taken over"):
            place.broker.enforce(2, soon(0.3))
        guard.stopped = False
        place.install(lambda draft: begun.append(draft.since))
        assert begun == [0]
        assert place.broker.enforce(3, soon()) == 3


@pytest.mark.parametrize("follows", [True, False])
def test_a_guard_of_another_version_is_told_at_the_start(place: Place, follows: bool) -> None:
    place.install()
    with place.stub() as guard:
        guard.versions, guard.stopped = {GUARD_VERSION - 1}, not follows
        with pytest.raises(BrokerNotEnforcing, match="not of the portal's version"):
            place.broker.enforce(1, soon(0.3))


def test_a_guard_of_another_version_is_found_by_a_check_even_if_it_follows(place: Place) -> None:
    place.install()
    with place.stub() as guard:
        assert place.control.check(soon()) == 1
        guard.versions = {NEWS_VERSION + 1}
        with pytest.raises(BrokerNotEnforcing, match="not of the portal's version"):
            place.control.check(soon())


def test_a_guard_that_does_not_know_the_portal_is_told(place: Place) -> None:
    place.install()
    with place.stub():
        (place.settings.secrets_dir / "broker-password").write_text("p" * 43)
        with pytest.raises(BrokerNotEnforcing, match="plugin_opt_journal"):
            place.broker.enforce(1, soon())


def test_a_password_that_was_replaced_or_removed_is_read_or_made_again(place: Place) -> None:
    path, first = place.settings.secrets_dir / "broker-password", place.control.files.password()
    assert place.control.files.password() == first == path.read_text()
    path.write_text("p" * 43)
    assert place.control.files.password() == "p" * 43
    path.unlink()
    made = place.control.files.password()
    assert made == path.read_text()
    assert made not in (first, "p" * 43)


def test_a_connection_that_is_reset_is_made_once_more(place: Place) -> None:
    place.install()
    with place.stub() as stub:
        stub.resets = 1
        assert place.control.enforce(place.generation, soon()) == place.generation
        stub.resets = 2
        with pytest.raises(BrokerUnavailable, match="Connection reset by peer"):
            place.control.enforce(place.generation, soon())


def test_a_broker_that_does_not_run_is_told(place: Place) -> None:
    place.install()
    with pytest.raises(BrokerUnavailable, match=r"portal\.sock"):
        place.broker.enforce(1, soon())


def test_a_denied_identity_must_be_refused(place: Place) -> None:
    place.install(lambda draft: add_device_acl(draft, TWO, None))
    place.install(deny(1))
    with place.stub():
        place.control.enforce(2, soon(), refused=ONE)
        with pytest.raises(BrokerNotEnforcing, match=TWO):
            place.control.enforce(2, soon(), refused=TWO)


# --- Who is granted something before the proof ---------------------------------------------------------------------


def grants(place: Place) -> bool:
    """Whether a line is enough, by what this process has seen."""
    return place.control.grants_up_to() == place.generation


@pytest.mark.parametrize(
    ("version", "is_enough"), [(GUARD_VERSION, False), (TENANTS_VERSION, False), (NEWS_VERSION, True)]
)
def test_a_line_is_enough_for_a_guard_that_reads_what_is_new_once_it_has_proven_something(
    place: Place, version: int, is_enough: bool
) -> None:
    place.install()
    with place.stub() as guard:
        guard.versions = {*range(GUARD_VERSION, version + 1)}
        assert not grants(place)
        place.broker.enforce(1, soon())
        assert grants(place) is is_enough
        place.append()
        assert grants(place) is is_enough


def test_a_guard_that_was_installed_while_the_portal_runs_is_seen_at_the_next_proof(place: Place) -> None:
    place.install()
    with place.stub() as guard:
        guard.versions = {GUARD_VERSION, TENANTS_VERSION}
        place.broker.enforce(1, soon())
        guard.versions.add(NEWS_VERSION)
        place.broker.enforce(1, soon())
        assert grants(place)


def test_a_broker_that_was_started_has_to_prove_again_before_a_line_is_enough(place: Place) -> None:
    place.install()
    with place.stub() as guard:
        place.broker.enforce(1, soon())
        os.utime(place.settings.broker_socket, (1, 1))  # as one that was made by another start
        assert not grants(place)
        guard.versions = {GUARD_VERSION}
        place.broker.enforce(1, soon())
        assert not grants(place)
        place.settings.broker_socket.unlink()
        assert not grants(place)


def test_a_line_of_a_new_epoch_is_not_enough_before_the_guard_follows_that(place: Place) -> None:
    place.install()
    with place.stub():
        place.broker.enforce(1, soon())
        place.control.distrust()
        place.install()
        assert not grants(place)
        place.broker.enforce(2, soon())
        assert grants(place)
        place.journal.unlink()
        assert not grants(place)


def test_a_line_is_not_enough_once_a_proof_has_failed(place: Place) -> None:
    place.install()
    with place.stub() as guard:
        for fails in ("resets", "stopped", "loaded"):
            place.broker.enforce(place.generation, soon())
            assert grants(place)
            place.append()
            setattr(guard, fails, {"resets": 2, "stopped": True, "loaded": False}[fails])
            with pytest.raises(BrokerUnavailable):
                place.broker.enforce(place.generation, soon(0.2))
            assert not grants(place)
            setattr(guard, fails, {"resets": 0, "stopped": False, "loaded": True}[fails])
            place.install()  # a new epoch, if it was distrusted


def test_a_grant_is_written_ahead_by_a_draft_that_continues_the_journal(place: Place) -> None:
    def ahead(draft: Draft) -> bool:
        try:
            return draft.grants_ahead(place.pki.ca_bundle)
        finally:
            draft.discard()

    assert not ahead(place.control.draft())
    place.install()
    assert ahead(place.control.draft())
    place.settings.broker_file("crl.pem").write_bytes(b"")
    assert not ahead(place.control.draft())


# --- A change that needs no CRL ------------------------------------------------------------------------------------


def test_a_change_is_appended_and_proven_before_any_crl_is_written(place: Place) -> None:
    place.install()
    before = (place.settings.broker_dir / "projection.json").read_bytes()
    place.append(deny(1))
    assert journal_lines(place.journal)[-2:] == [f"deny {ONE}", "generation 2"]
    assert (place.settings.broker_dir / "projection.json").read_bytes() == before
    with place.stub():
        assert place.control.enforce(2, soon()) == 2
    assert place.control.files.installed_generation() == 2
    assert place.control.files.damage() == []


def test_nothing_is_enforced_before_the_journal_is_durable(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.install()
    place.append(deny(1))

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with place.stub():
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", fail)
            with pytest.raises(BrokerUnavailable, match="cannot be written: Input/output error"):
                place.control.enforce(2, soon())
        assert since(place) == 0  # nobody knows what is on the disk: a new epoch


@dataclass
class Disk:
    """Which files were made durable, and what becomes of it."""

    synced: list[int]
    fails: bool = False

    def sync(self, descriptor: int) -> None:
        if self.fails:
            raise OSError(errno.EIO, "Input/output error")
        self.synced.append(os.fstat(descriptor).st_ino)


def test_a_proof_counts_once_what_another_process_has_appended_is_durable(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.install()
    disk = Disk([])
    monkeypatch.setattr(os, "fsync", disk.sync)
    place.append(deny(1))
    assert disk.synced == []  # who is granted something does not wait for the disk
    place.open()
    with place.stub():
        disk.fails = True
        with pytest.raises(BrokerUnavailable, match="cannot be written: Input/output error"):
            place.control.enforce(2, soon())
        disk.fails = False
        assert place.control.enforce(2, soon()) == 2
    assert disk.synced == [place.journal.stat().st_ino]


def test_a_change_never_waits_behind_a_newer_generation(place: Place) -> None:
    place.install()
    place.generation = 4
    place.append(deny(1))
    place.generation = 3
    with pytest.raises(ProjectionInvalid, match="newer than 4"):
        place.append()


def test_what_needs_the_crl_is_not_put_off(place: Place) -> None:
    first = place.control.draft()
    assert not first.puts_off_crls(place.pki.ca_bundle)  # the guard knows nothing yet
    first.discard()
    place.install()
    probe = place.control.draft()
    probe.revoke_certificate(place.pki.issuing.certificate.subject.public_bytes(), "1f", ONE, is_probe=True)
    assert not probe.puts_off_crls(place.pki.ca_bundle)
    other = Authority("Other issuing", issuer=place.pki.root)
    assert not place.control.draft().puts_off_crls(other.certificate.public_bytes(PEM) + place.pki.ca_bundle)


@pytest.mark.parametrize("what", ["crl.pem", "ca.pem", "a CRL that has expired"])
def test_a_repair_of_files_is_not_put_off(place: Place, what: str) -> None:
    place.install()
    place.append()
    if what.endswith(".pem"):
        place.settings.broker_file(what).write_bytes(b"")
    else:
        place.now += timedelta(days=3650)
    draft = place.control.draft()
    assert not draft.puts_off_crls(place.pki.ca_bundle)
    draft.discard()


def test_a_journal_older_than_what_was_in_force_is_not_continued(place: Place) -> None:
    place.install()
    older = place.journal.read_bytes()
    place.append(deny(1))
    place.journal.write_bytes(older)
    assert since(place, enforced=1) == 1
    assert since(place, enforced=2) == 0


# --- CRLs in batches -----------------------------------------------------------------------------------------------


def test_the_running_broker_gets_crls_in_batches(place: Place) -> None:
    first = place.trust()
    assert place.install(trust=first)
    assert place.crls() == [first.crl]
    assert not place.install()
    assert place.crls() == [first.crl]
    assert not place.control.publish_crls(first)
    place.now += timedelta(seconds=CRL_SECONDS)
    newest = place.trust()
    assert place.install(trust=newest)
    assert place.crls()[-1] == newest.crl
    assert first.crl not in place.crls()  # what takes its place is small


def test_many_revocations_are_published_at_once(place: Place) -> None:
    place.install()
    assert place.install(deny(CRL_CHANGES))


def test_a_long_crl_is_published_once_it_has_become_a_tenth_longer(place: Place) -> None:
    some = place.pki.issuing.issue("some")
    place.install(trust=place.trust(*[some] * 1000))
    assert not place.install(deny(CRL_CHANGES + 10), trust=place.trust(*[some] * 1055))
    assert place.install(deny(60), trust=place.trust(*[some] * 1085))


def test_a_broker_that_has_read_much_gets_crls_less_often_and_is_restarted_at_last(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = len(place.trust().crl)
    monkeypatch.setattr("broker.guard.control.SOME_CRL_BYTES", size)
    monkeypatch.setattr("broker.guard.control.MORE_CRL_BYTES_A_SECOND", size / (10 * CRL_SECONDS))
    monkeypatch.setattr("broker.guard.control.MAX_CRL_BYTES", 2.5 * size)
    published = [place.install()]
    for pauses in (1, 1, 10):
        place.now += timedelta(seconds=pauses * CRL_SECONDS)
        published.append(place.install())
        assert place.control.waits(soon()) is (RestartReason.CRLS if pauses == 10 else None)
    assert published == [True, True, False, True]
    place.settings.broker_socket.touch()  # as the broker does at its start
    assert place.control.waits(soon()) is None


def test_the_probe_certificate_is_on_the_crl_at_once(place: Place) -> None:
    place.install()
    issuer = place.pki.issuing.certificate.subject.public_bytes()
    assert place.install(lambda draft: draft.revoke_certificate(issuer, "1f", ONE, is_probe=True))


def test_a_crl_that_nothing_followed_is_published_by_the_job(place: Place) -> None:
    place.install()
    newest = place.trust()
    place.install(trust=newest)
    place.now += timedelta(seconds=CRL_SECONDS)
    assert place.control.publish_crls(newest)
    assert place.crls()[-1] == newest.crl
    assert not place.control.publish_crls(newest)
    assert place.control.files.damage() == []


def test_a_short_crl_that_was_put_off_is_due_after_seconds_and_once(place: Place) -> None:
    place.install()
    place.append(deny(1))
    due = [place.control.crls_are_due]
    place.now += timedelta(seconds=10)
    due.append(place.control.crls_are_due)
    place.control.publish_crls(place.trust())
    place.now += timedelta(seconds=10)
    due.append(place.control.crls_are_due)
    assert due == [False, True, False]


def test_a_crl_that_was_put_off_is_there_for_the_next_start(place: Place) -> None:
    place.install()
    place.append(deny(1))
    newest = place.trust()
    assert not place.control.publish_crls(newest)
    assert (place.settings.broker_dir / "crl.pem").read_bytes() == newest.crl
    assert place.control.files.stated()["generation"] == 2


def test_a_crl_beside_a_journal_that_is_damaged_or_older_is_left_to_the_repair(place: Place) -> None:
    place.install()
    older = place.journal.read_bytes()
    place.install(deny(1))
    before = (place.settings.broker_dir / "crl.pem").read_bytes()
    for content in (older, older[:-3]):
        place.journal.write_bytes(content)
        assert not place.control.publish_crls(place.trust())
        assert (place.settings.broker_dir / "crl.pem").read_bytes() == before


@pytest.mark.parametrize("mode", [0o700, 0o755])
def test_a_folder_of_crls_that_the_broker_could_not_read_is_damage(place: Place, mode: int) -> None:
    place.install()
    (place.settings.broker_dir / "capath").chmod(mode)
    (problem,) = place.control.files.damage()
    assert "capath is not a folder with mode 0750" in problem


# --- Who is connected ----------------------------------------------------------------------------------------------


def test_the_guard_is_asked_to_report_who_is_connected(place: Place) -> None:
    place.install()
    with place.stub() as guard:
        reports = place.broker.follow_presence(soon())
        assert reports is not None
        assert reports.is_incomplete
        reports.close()
    assert guard.topics == ["portal/guard/refused", "portal/guard/report"]


@pytest.mark.parametrize(
    ("lacks", "words"),
    [("loaded", "runs without the portal's guard"), ("reports", "not of the portal's version")],
)
def test_a_broker_that_cannot_report_is_named(place: Place, lacks: str, words: str) -> None:
    place.install()
    with place.stub() as guard:
        setattr(guard, lacks, False)
        with pytest.raises(BrokerNotEnforcing, match=words):
            place.broker.follow_presence(soon())


def test_a_broker_that_does_not_run_cannot_report(place: Place) -> None:
    place.install()
    with pytest.raises(BrokerUnavailable):
        place.broker.follow_presence(soon())


def test_the_control_by_files_never_knows_who_is_connected(place: Place) -> None:
    settings = Settings.from_env({"PORTAL_DATA_DIR": str(place.folder), "PORTAL_BROKER_CONTROL": "files"})
    assert BrokerProvisioning(settings).follow_presence(soon()) is None


# --- Sessions of very many devices ---------------------------------------------------------------------------------


def test_a_pass_for_very_many_sessions_goes_on_where_the_one_before_had_no_more_time(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("broker.guard.control._MANY_SESSIONS", 2)
    monkeypatch.setattr("broker.mosquitto._DISCONNECTS_IN_FLIGHT", 1)  # the stub serves one session at a time
    names = [f"{number:08}-0000-4000-8000-000000000000" for number in range(24)]

    def deny_all(draft: Draft) -> None:
        for name in names:
            remove_device_acl(draft, name)

    place.install(deny_all)
    with place.stub() as guard:
        connect, left = connect_unix, [16]

        def slow(path: Path, deadline: float) -> socket.socket:
            left[0] -= 1
            if left[0] < 0:
                raise TimeoutError("no answer in time")
            return connect(path, deadline)

        with monkeypatch.context() as patched:
            patched.setattr("broker.mosquitto.connect_unix", slow)
            with pytest.raises(BrokerUnavailable, match="8 sessions of 24 are still to be ended"):
                place.broker.disconnect(names, soon())
        place.broker.disconnect(names, soon())
        assert sorted(guard.clients) == names  # each once
        place.append(lambda draft: remove_device_acl(draft, names[0]))
        place.broker.disconnect(names, soon())
        assert sorted(guard.clients) == sorted([*names, names[0]])  # of which the journal has said something since
