"""What happens with nobody asking, tried with a clock that is moved."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from datetime import timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

import db
from broker.control import RestartReason
from broker.probe import ACCEPTS_REVOKED, Probe, ProbeResult
from broker_provisioning import BrokerProvisioning
from config import Settings
from core import boot
from core.broker_control import ControlKind
from core.errors import BrokerNotEnforcing, BrokerUnavailable
from core.files import FileLock
from operations import authority, jobs
from operations.jobs import CLOCK_TRUSTED_SECONDS, LEADER_LOCK, Job
from operations.leadership import SILENT_SECONDS
from operations.own_certificates import probe_certificates
from operations.wiring import Portal, open_portal
from store import brokers, issuers
from store.tables import Delivery, IdempotencyKey
from tests.support.brokers import enforce_all
from tests.support.harness import ON_SQLITE, Clock
from tests.support.pki import Pki
from tests.workflows.test_events import recorded, subscribe
from tests.workflows.test_registration import OPERATOR, PUMP
from workflows.authority.crl_publication import CrlPublication
from workflows.reconciliation import Reconciler


def crl_number(portal: Portal, issuer_id: int) -> int:
    with portal.database.snapshot() as tx:
        crl = issuers.get_crl(tx, issuer_id)
    assert crl is not None
    return crl.number


@pytest.mark.parametrize("name", ["acl", "crl.pem", "ca.pem"])
@pytest.mark.parametrize("damage", [b"", b"nonsense", None])
def test_a_damaged_broker_file_is_written_again_and_recorded(portal: Portal, name: str, damage: bytes | None) -> None:
    path = portal.settings.broker_file(name)
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage)
    assert any(check.name == "broker files" and check.problem for check in portal.readiness.checks())
    jobs.repair_broker(portal)
    assert portal.broker.files.damage() == []
    assert "broker:repair" in {
        entry.action for entry in portal.operators.audit("default", limit=5, before=None, filters={})[0]
    }


def test_damage_that_cannot_be_repaired_is_recorded_once(portal: Portal, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    portal.settings.broker_file("acl").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", full)
        for _ in range(3):
            jobs.repair_broker(portal)
    entries = portal.operators.audit("default", limit=50, before=None, filters={"action": "broker:repair"})[0]
    assert len(entries) == 1
    jobs.repair_broker(portal)
    assert portal.broker.files.damage() == []


def test_the_crl_is_renewed_at_half_its_life(portal: Portal, clock: Clock) -> None:
    issuer = portal.authority.first.issuing.id
    first = crl_number(portal, issuer)
    clock.advance(days=portal.settings.crl_days / 2 - 1)
    authority.renew_crls(portal)
    assert crl_number(portal, issuer) == first
    clock.advance(days=1)
    authority.renew_crls(portal)
    assert crl_number(portal, issuer) == first + 1
    crl = x509.load_pem_x509_crl(portal.settings.broker_file("crl.pem").read_bytes())
    assert crl.next_update_utc is not None
    assert (crl.next_update_utc - clock()).days >= portal.settings.crl_days - 1


@pytest.mark.parametrize("due", [True, False])
def test_crls_that_were_put_off_are_asked_for_when_the_broker_may_have_them(
    portal: Portal, monkeypatch: pytest.MonkeyPatch, due: bool
) -> None:
    asked: list[CrlPublication] = []
    monkeypatch.setattr(
        CrlPublication, "publish", lambda *_: pytest.fail("the thread of the CRLs does it, in its share")
    )
    monkeypatch.setattr(CrlPublication, "wake", lambda crls: asked.append(crls))
    monkeypatch.setattr(type(portal.broker.control), "crls_are_due", due)
    _run_job(portal, "CRLs put off")
    assert asked == ([portal.reconciler.crls] if due else [])


@pytest.mark.parametrize("publishes", [True, False])
def test_crls_that_a_crash_left_unsigned_are_asked_for(
    portal: Portal, monkeypatch: pytest.MonkeyPatch, publishes: bool
) -> None:
    asked: list[CrlPublication] = []
    monkeypatch.setattr(CrlPublication, "wake", lambda crls: asked.append(crls))
    monkeypatch.setattr(type(portal.broker.control), "publishes_crls", publishes)
    with portal.database.transaction() as tx:
        issuers.touch_issuer(
            tx, portal.authority.first.issuing.id, generation=db.next_generation(tx, at=portal.clock())
        )
    _run_job(portal, "CRLs put off")
    assert asked == ([portal.reconciler.crls] if publishes else [])
    portal.reconciler.crls.sign_due()
    _run_job(portal, "CRLs put off")
    assert len(asked) == int(publishes)


def _run_job(portal: Portal, name: str) -> None:
    (job,) = (job for job in jobs.JOBS if job.name == name)
    job.run(portal)


@ON_SQLITE
def test_the_write_ahead_log_is_emptied_each_half_minute_as_documented(portal: Portal) -> None:
    log = portal.settings.data_dir / "portal.db-wal"
    portal.registrations.register(OPERATOR, PUMP)
    assert log.stat().st_size
    (job,) = (job for job in jobs.JOBS if job.name == "write-ahead log")
    assert job.seconds == 30
    assert not job.final  # which would wait an hour after the clock was moved
    jobs.run(portal, stopping := threading.Event(), (job, Job("stop", 0, lambda _: stopping.set())))
    assert log.stat().st_size == 0


@ON_SQLITE
def test_what_a_fetched_bundle_was_made_of_is_in_no_file_of_the_database_any_more(portal: Portal) -> None:
    """With the link, which may be in a mailbox for ever, it would open the bundle without its password."""
    made = portal.registrations.register(OPERATOR, PUMP)
    with portal.database.snapshot() as tx:
        sealed = tx.execute(sa.select(Delivery.bundle).where(Delivery.device_id == made.device_id)).scalar_one() or b""
    assert sealed
    portal.deliveries.deliver(OPERATOR, str(made.download_url).rpartition("/")[2])

    def has_it() -> bool:
        return any(sealed in path.read_bytes() for path in portal.settings.data_dir.glob("portal.db*"))

    assert has_it()
    with portal.database.snapshot() as reader:
        reader.execute(sa.select(Delivery.id)).all()
        with portal.database.transaction() as tx:
            tx.execute(sa.update(Delivery).values(lease_until=None))
        _run_job(portal, "write-ahead log")  # waits for no reader
    _run_job(portal, "write-ahead log")
    assert not has_it()


def test_after_a_long_downtime_the_first_renewal_makes_everything_current(portal: Portal, clock: Clock) -> None:
    clock.advance(days=400)
    assert {check.name for check in portal.readiness.checks() if check.problem} >= {"crl", "broker files"}
    authority.renew_crls(portal)
    assert not {check.name for check in portal.readiness.checks() if check.problem} & {"crl", "broker files"}
    assert portal.broker.files.damage() == []


def test_a_clock_that_goes_back_an_hour_leaves_no_crl_that_is_not_yet_valid(portal: Portal, clock: Clock) -> None:
    for _ in range(3):
        portal.revocations.revoke(OPERATOR, portal.registrations.register(OPERATOR, PUMP).device_id, "unspecified")
    clock.advance(hours=-2)
    authority.renew_crls(portal)
    crl = x509.load_pem_x509_crl(portal.settings.broker_file("crl.pem").read_bytes())
    assert crl.last_update_utc <= clock()


def test_server_and_probe_certificates_renew_themselves(portal: Portal, clock: Clock) -> None:
    paths = [
        portal.settings.tls_dir / "server.pem",
        portal.settings.broker_file("server.pem"),
        portal.settings.data_dir / "canaries" / "good.pem",
        portal.settings.data_dir / "canaries" / "revoked.pem",
    ]
    before = [path.read_bytes() for path in paths]
    authority.renew_certificates(portal)
    assert [path.read_bytes() for path in paths] == before
    clock.advance(days=61)
    authority.renew_certificates(portal)
    for path, old in zip(paths, before, strict=True):
        assert path.read_bytes() != old
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        assert certificate.not_valid_before_utc <= clock() < certificate.not_valid_after_utc


def test_a_new_name_in_the_settings_gets_a_new_server_certificate(
    make_settings: Callable[..., Settings], clock: Clock
) -> None:
    portal = open_portal(make_settings(PORTAL_SERVER_NAMES="localhost,portal.example"), clock)
    authority.renew_certificates(portal)
    certificate = x509.load_pem_x509_certificate((portal.settings.tls_dir / "server.pem").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert "portal.example" in names.get_values_for_type(x509.DNSName)
    portal.close()


def test_a_key_that_does_not_belong_to_its_certificate_is_replaced(portal: Portal) -> None:
    key = portal.settings.tls_dir / "server.key"
    key.write_bytes((portal.settings.data_dir / "canaries" / "good.key").read_bytes())
    authority.renew_certificates(portal)
    authority.renew_certificates(portal)
    assert key.read_bytes() != (portal.settings.data_dir / "canaries" / "good.key").read_bytes()


def test_bundles_and_answers_whose_time_is_over_are_destroyed(portal: Portal, clock: Clock) -> None:
    portal.registrations.register(OPERATOR, PUMP, "a-key-of-16-chars")
    jobs.expire(portal)
    with portal.database.snapshot() as tx:
        assert tx.execute(sa.select(Delivery.status)).scalars().all() == ["ready"]
    clock.advance(hours=25)
    jobs.expire(portal)
    with portal.database.snapshot() as tx:
        assert tx.execute(sa.select(Delivery.status, Delivery.bundle)).one() == ("expired", None)
        assert tx.execute(sa.select(sa.func.count()).select_from(IdempotencyKey)).scalar_one() == 0


def test_a_job_that_fails_does_not_stop_the_others(portal: Portal) -> None:
    stopping, done = threading.Event(), threading.Event()

    def fail(_: Portal) -> None:
        raise RuntimeError("a job of a test")

    def succeed(_: Portal) -> None:
        done.set()
        stopping.set()

    jobs.run(portal, stopping, (Job("failing", 0, fail), Job("other", 0, succeed)))
    assert done.is_set()


def test_one_process_at_a_time_runs_the_jobs(portal: Portal) -> None:
    stopping, leading, release = threading.Event(), threading.Event(), threading.Event()

    def lead(_: Portal) -> None:
        leading.set()
        release.wait(10)
        stopping.set()

    first = threading.Thread(target=jobs.run, args=(portal, stopping, (Job("lead", 0, lead),)))
    first.start()
    assert leading.wait(10)
    with FileLock(portal.settings.data_dir / ".jobs.lock").try_hold() as held:
        assert not held
    release.set()
    first.join()


def test_where_the_clock_was_moved_every_job_runs_at_once_but_the_one_that_destroys(
    portal: Portal, clock: Clock
) -> None:
    stopping = threading.Event()
    ran: list[str] = []

    def move(_: Portal) -> None:
        ran.append("move")
        if ran.count("move") == 1:
            clock.advance(days=365)
        else:
            stopping.set()

    daily = Job("daily", 86400, lambda _: ran.append("daily"))
    expiry = Job("expiry", 0.02, lambda _: ran.append("expiry"), final=True)
    jobs.run(portal, stopping, (daily, expiry, Job("move", 0.05, move)))
    assert ran.count("daily") == 2
    assert ran.index("move") > ran.index("expiry")
    assert "expiry" not in ran[ran.index("move") :]
    assert CLOCK_TRUSTED_SECONDS >= 3600


def test_a_clock_that_was_moved_and_moved_back_while_another_process_ran_the_jobs_is_seen(
    portal: Portal, clock: Clock
) -> None:
    stopping = threading.Event()
    ran: list[str] = []
    daily = Job("daily", 86400, lambda _: ran.append("daily"))

    def stop(event: threading.Event) -> Job:
        return Job("stop", 0, lambda _: event.set())

    def sleep_while_another_stands_in(_: Portal) -> None:
        if ran.count("daily") == 1:
            clock.advance(days=365)
            other = threading.Event()
            jobs.lead(portal, other, (daily, stop(other)), lambda: True)
            clock.advance(days=-365)
        else:
            stopping.set()

    jobs.run(portal, stopping, (daily, Job("sleep", 0, sleep_while_another_stands_in)))
    assert ran == ["daily"] * 3


def test_what_was_seen_of_the_clock_before_the_machine_restarted_does_not_count(
    portal: Portal, clock: Clock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(boot, "BOOT_ID", tmp_path / "hidden from the service")
    ran: list[str] = []

    def run_and_stop(_: Portal) -> None:
        ran.append(os.environ["INVOCATION_ID"])
        stopping.set()

    for run_of_the_service in ("first", "second"):
        monkeypatch.setenv("INVOCATION_ID", run_of_the_service)
        stopping = threading.Event()
        too_late = threading.Timer(20, stopping.set)
        too_late.start()
        jobs.run(portal, stopping, (Job("expiry", 60, run_and_stop, final=True),))
        too_late.cancel()
        clock.advance(days=1)  # as the monotonic clock falls behind when it begins again
    assert ran == ["first", "second"]


def test_the_jobs_run_beside_a_process_that_leads_and_gives_no_sign_of_life(portal: Portal) -> None:
    lock = portal.settings.data_dir / LEADER_LOCK
    stopping = threading.Event()
    ran = threading.Event()

    def run_and_stop(_: Portal) -> None:
        ran.set()
        stopping.set()

    with FileLock(lock).hold():
        os.utime(lock, (0, time.time() - SILENT_SECONDS - 1))
        jobs.run(portal, stopping, (Job("only", 0, run_and_stop),))
    assert ran.is_set()


# --- The probe -------------------------------------------------------------------------------------------------------


def test_a_failed_probe_shows_at_once_with_its_reason_until_another_one_passes(
    portal: Portal, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Reconciler, "broker_answers", lambda _: True)
    monkeypatch.setattr(BrokerProvisioning, "reachable", lambda _: True)
    with portal.database.transaction() as tx:
        enforce_all(tx)
    another = open_portal(portal.settings, clock)  # as another process sees it

    def problem() -> str | None:
        return next(check.problem for check in another.readiness.checks() if check.name == "broker")

    assert problem() is None
    jobs.probe_again(portal)  # only after a probe that failed
    assert problem() is None
    with pytest.raises(BrokerUnavailable):
        jobs.probe_broker(portal)
    assert "does not answer at localhost:" in str(problem())
    jobs.probe_again(portal)
    assert "does not answer at localhost:" in str(problem())
    newest = x509.load_pem_x509_certificate(portal.settings.broker_file("server.pem").read_bytes())
    monkeypatch.setattr(Probe, "run", lambda *_: ProbeResult(44, 0.0, 0, 0.0))
    monkeypatch.setattr(Probe, "server_certificate", lambda *_: newest.public_bytes(Encoding.DER))
    jobs.probe_again(portal)
    assert problem() is None
    another.close()


class Accepts:
    """A broker that answers, has all that ``control.waits`` asks for, and accepts a revoked certificate if told to."""

    def __init__(self, portal: Portal, monkeypatch: pytest.MonkeyPatch) -> None:
        self.anybody, self.probes = False, 0
        monkeypatch.setattr(Probe, "run", lambda *_: self._run())
        monkeypatch.setattr(portal.broker.control, "enforce", lambda generation, deadline, **_: generation)
        monkeypatch.setattr(portal.broker.control, "waits", lambda deadline: None)

    def _run(self) -> ProbeResult:
        self.probes += 1
        if self.anybody:
            raise BrokerNotEnforcing(ACCEPTS_REVOKED)
        return ProbeResult(44, 0.0, 0, 0.0)


def test_a_broker_that_accepts_a_revoked_certificate_again_waits_for_a_restart(
    portal: Portal, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker, certificates, soon = Accepts(portal, monkeypatch), probe_certificates(portal.settings), time.monotonic() + 5
    assert (portal.broker.waits(certificates, soon), broker.probes) == (None, 0)
    broker.anybody = True
    with pytest.raises(BrokerNotEnforcing):
        portal.broker.probe(certificates, soon)
    assert portal.broker.waits(certificates, soon) is RestartReason.NO_CRL
    broker.anybody = False  # as after a restart
    assert portal.broker.waits(certificates, soon) is None
    assert portal.broker.probe_problem() is None


def test_under_files_nothing_is_enforced_after_a_repair_before_a_probe_passes(
    portal: Portal, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = Accepts(portal, monkeypatch)
    jobs.repair_broker(portal)
    before = portal.reconciler.applied_generation()
    broker.anybody = True
    portal.settings.broker_file("crl.pem").write_bytes(b"")
    with contextlib.suppress(BrokerUnavailable):
        jobs.repair_broker(portal)
    assert portal.broker.files.damage() == []
    assert portal.reconciler.applied_generation() == before
    assert portal.broker.accepted_revoked()
    broker.anybody = False
    jobs.repair_broker(portal)
    assert portal.reconciler.applied_generation() > before


# --- The broker's certificate ------------------------------------------------------------------------------------


class Shown:
    """A portal whose broker shows a certificate of the test's; the command to restart it leaves a line in a file."""

    def __init__(self, portal: Portal, restarted: Path) -> None:
        self.portal = portal
        self._restarted = restarted

    def obeys(self) -> None:
        """The broker was told something, and obeys."""
        with self.portal.database.transaction() as tx:
            generation = db.next_generation(tx, at=self.portal.clock())
            brokers.set_applied_generation(tx, 1, generation, applied_at=self.portal.clock())

    def probe(self, certificate: bytes | None, *, fails: bool = False) -> int:
        """Run the job; return how often the broker was restarted so far."""
        newest = x509.load_pem_x509_certificate(self.portal.settings.broker_file("server.pem").read_bytes())
        served = certificate or newest.public_bytes(Encoding.DER)

        def probed(*_: object) -> ProbeResult:
            if fails:
                raise BrokerUnavailable("The broker's certificate is refused: certificate has expired.")
            return ProbeResult(44, 0.0, 0, 0.0)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.portal.broker, "reachable", lambda: True)
            patch.setattr(self.portal.broker, "probe", probed)
            patch.setattr(self.portal.broker, "server_certificate", lambda *_: served)
            with pytest.raises(BrokerUnavailable) if fails else nullcontext():
                jobs.probe_broker(self.portal)
        return len(self._restarted.read_text().split()) if self._restarted.exists() else 0


@pytest.fixture(params=[ControlKind.GUARD, ControlKind.FILES])
def shown(
    request: pytest.FixtureRequest, make_settings: Callable[..., Settings], clock: Clock, tmp_path: Path
) -> Iterator[Callable[..., Shown]]:
    with ExitStack() as stack:

        def make(*, command: bool = True) -> Shown:
            restarted = tmp_path / "restarted"
            restart = f"sh -c 'echo restarted >> {restarted}'" if command else ""
            portal = open_portal(
                make_settings(PORTAL_BROKER_CONTROL=request.param, PORTAL_BROKER_RESTART=restart), clock
            )
            stack.callback(portal.close)
            made = Shown(portal, restarted)
            made.obeys()
            return made

        yield make


@pytest.fixture(scope="module")
def older() -> bytes:
    return Pki().issuing.issue("localhost", server_names=["localhost"]).certificate.public_bytes(Encoding.DER)


def test_a_broker_that_shows_an_older_certificate_is_restarted_in_a_quiet_moment_once_an_hour(
    shown: Callable[..., Shown], older: bytes, clock: Clock
) -> None:
    broker = shown()
    assert broker.probe(older) == 0  # it was told something just now
    clock.advance(seconds=60)
    assert [broker.probe(older) for _ in range(3)] == [1, 1, 1]
    clock.advance(hours=1)
    assert broker.probe(older) == 2
    found, _ = broker.portal.operators.audit("default", limit=50, before=None, filters={"action": "broker:restart"})
    assert len(found) == 2


def test_where_no_moment_is_quiet_the_broker_is_restarted_before_its_certificate_ends(
    shown: Callable[..., Shown], older: bytes, clock: Clock
) -> None:
    broker, certificate = shown(), x509.load_der_x509_certificate(older)
    lives = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    for left, restarted in ((lives / 6 + timedelta(minutes=1), 0), (lives / 6, 1)):
        clock.advance(seconds=(certificate.not_valid_after_utc - left - clock()).total_seconds())
        broker.obeys()
        assert broker.probe(older) == restarted


@pytest.mark.parametrize("moved", [timedelta(days=370), timedelta(days=-2)])
def test_a_broker_whose_certificate_is_not_valid_fails_the_probe_and_is_restarted_at_once(
    shown: Callable[..., Shown], older: bytes, clock: Clock, moved: timedelta
) -> None:
    broker = shown()
    clock.advance(seconds=moved.total_seconds())
    broker.obeys()  # just now, so that the moment is no quiet one
    assert broker.probe(older, fails=True) == 1


def test_a_broker_that_shows_its_newest_certificate_is_left_alone(shown: Callable[..., Shown], clock: Clock) -> None:
    broker = shown()
    clock.advance(minutes=2)
    assert broker.probe(None) == 0


def test_without_a_command_log_and_event_say_by_when_the_broker_must_be_restarted(
    shown: Callable[..., Shown], older: bytes, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    broker = shown(command=False)
    subscribe(broker.portal, ",broker_restart,")
    assert [broker.probe(older) for _ in range(3)] == [0, 0, 0]
    clock.advance(hours=2)
    broker.probe(older)
    first, second = [record for record in caplog.records if "restart the broker" in record.message]
    ends = x509.load_der_x509_certificate(older).not_valid_after_utc
    assert first.__dict__["before"] == second.__dict__["before"] == ends.isoformat()
    (event,) = recorded(broker.portal)
    assert (event["type"], event["device_id"]) == ("broker_restart", None)
    assert event["data"] == {"certificate_ends_at": f"{ends:%Y-%m-%dT%H:%M:%S.%fZ}", "by_portal": False}
