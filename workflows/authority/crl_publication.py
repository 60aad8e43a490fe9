"""Signs the CRLs that are due, and gives them to the broker where that needs no reconciliation."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime

from cryptography import x509
from sqlalchemy.engine import Connection

from broker.crl import Trust
from broker.probe import ProbeCertificate, ProbeCertificates
from broker_provisioning import BrokerProvisioning
from config import Settings
from core.errors import IssuerUnusable, PortalError, TokenKeyUnavailable, TokenUnavailable
from core.failpoints import failpoint
from core.files import FileLock
from pki.encoding import PemOfSuccessors
from store import generations
from store import issuers as store_issuers
from store.database import Database
from store.issuers import CrlHead, CrlRecord, KnownCrlStates
from store.scope import ALL_TENANTS
from workflows.authority.crls import RevokedEntries, crl_is_due, next_crl
from workflows.authority.issuers import Authority, Issuers, RecordedIssuer
from workflows.authority.own import replace_revoked_probe

log = logging.getLogger("portal.reconciliation")

# CRLs that nobody waits for are made in batches, and take no more than this share of the time, whichever process makes
# them: those of 100,000 entries slow down for 0.15 s whoever is answered meanwhile.
LEAST_PAUSE, MAX_SHARE = 0.4, 1 / 50
TOKEN_AGAIN_SECONDS = 1.0
LOCK = ".crl.lock"


class CrlPublication:
    """Signs CRLs, one process at a time, and publishes them; what they list is kept from one to the next.

    ``lock`` is held meanwhile; who needs that of the reconciliations, too, takes that first.
    """

    def __init__(
        self,
        settings: Settings,
        database: Database,
        authority: Authority,
        broker: BrokerProvisioning,
        probe_certificates: ProbeCertificates,
        clock: Callable[[], datetime],
        first_tenant: str,
    ) -> None:
        self._settings = settings
        self._database = database
        self._authority = authority
        self._broker = broker
        self._probe_certificates = probe_certificates
        self._clock = clock
        self._first_tenant = first_tenant
        self.lock = FileLock(settings.data_dir / LOCK)
        self._revoked = RevokedEntries()
        self._states = KnownCrlStates()
        self._crl_pem: dict[int, tuple[CrlHead, bytes]] = {}  # the newest CRL of each issuer
        self._crl_writers: dict[int, PemOfSuccessors] = {}  # by issuer
        self._probe_is_of: Sequence[
            RecordedIssuer
        ] = ()  # the CAs of which one has signed the revoked probe certificate
        self._woken = threading.Event()

    def wake(self) -> None:
        """Ask for the CRLs that were put off, without waiting for them."""
        self._woken.set()

    def run_requested(self, stopping: threading.Event) -> None:
        """Publish what ``wake`` asks for until ``stopping`` is set; the body of a thread."""
        self._read_ahead()
        took = 0.0
        while not stopping.is_set():
            if not self._woken.wait(timeout=1.0):
                continue
            pause = LEAST_PAUSE
            while pause > 0:
                if stopping.wait(pause):
                    return
                pause = took / MAX_SHARE - self._broker.files.seconds_since_crl()
            self._woken.clear()
            started = time.monotonic()
            try:
                self.publish()
            except TokenUnavailable:  # which is logged once; when it is back, the CRLs do not wait for the next change
                self._woken.set()
                stopping.wait(TOKEN_AGAIN_SECONDS)
            except PortalError as error:
                log.warning("CRLs were not published", extra={"problem": error.detail})
            except Exception:
                log.exception("CRLs were not published")
            took = time.monotonic() - started

    def _read_ahead(self) -> None:
        """Read what the CRLs list before the first revocation has to: for 100,000 entries that takes a second."""
        entries = RevokedEntries()
        try:
            with self._database.snapshot(sees=ALL_TENANTS) as tx:
                generation, now = generations.get_broker_state(tx).generation, self._clock()
                for recorded in self._authority.seen_by(tx).with_crl():
                    entries.listed(tx, recorded.id, generation=generation, now=now)
        except PortalError as error:
            log.warning("the CRLs' entries were not read ahead", extra={"problem": error.detail})
            return
        if self._revoked.are_unread:  # else a reconciliation was quicker, and works with those that it has read
            self._revoked = entries

    def take_off(self) -> None:
        """Give the broker CRLs without what is revoked no more: until then TLS refuses a device that was resumed."""
        try:
            self.publish(at_once=True)
        except PortalError as error:  # the job does it within minutes
            log.warning("a CRL was not published at once", extra={"problem": error.detail})

    def wake_if_due(self) -> None:
        """Ask for CRLs that nobody has asked for: those whose pause is over, and those that a crash left unsigned."""
        control = self._broker.control
        if control.crls_are_due or (control.publishes_crls and self._any_put_off()):
            self.wake()

    def _any_put_off(self) -> bool:
        with self._database.snapshot(sees=ALL_TENANTS) as tx:
            return store_issuers.any_crl_is_put_off(tx)

    def publish(self, *, at_once: bool = False) -> None:
        """Sign the CRLs that were put off, give them to the broker, and see that it refuses by them if it has them."""
        control = self._broker.control
        if not control.publishes_crls:
            return
        with self.lock.hold(self._settings.enforce_timeout):
            issuers, _ = self._sign_due()
            published = control.publish_crls(self._trust(issuers), at_once=at_once)
        if published and self._broker.reachable():
            self._broker.probe(self._probe_certificates, time.monotonic() + self._settings.enforce_timeout)

    def sign_put_off(self) -> None:
        """Sign the CRLs that were put off, for somebody who asks for them."""
        if self._broker.control.publishes_crls:
            with self.lock.hold(self._settings.enforce_timeout):
                self._sign_due()

    def sign_due(self) -> tuple[Issuers, Sequence[CrlRecord]]:
        """Sign the CRLs that are due, and record them; return the issuers and those CRLs."""
        with self.lock.hold(self._settings.enforce_timeout):
            return self._sign_due()

    @contextmanager
    def trust(self, issuers: Issuers) -> Iterator[Trust]:
        """Give the issuers with the newest CRL of each, while nobody else signs or publishes one."""
        with self.lock.hold(self._settings.enforce_timeout):
            yield self._trust(issuers)

    def _sign_due(self) -> tuple[Issuers, Sequence[CrlRecord]]:
        """Sign the CRLs that are due, and record them; return the issuers and those CRLs. The caller holds the lock.

        Of several nodes one signs, and the others find it done.
        """
        with self._database.locks.alone_among_nodes(LOCK, self._settings.enforce_timeout):
            return self._sign_alone()

    def _sign_alone(self) -> tuple[Issuers, Sequence[CrlRecord]]:
        now = self._clock()
        signed: list[CrlRecord] = []
        if not self._broker.control.publishes_crls:
            self._show_next_crl(now)
        with self._database.snapshot(sees=ALL_TENANTS) as tx:
            generation = generations.get_broker_state(tx).generation
            issuers, states = self._authority.seen_by(tx), self._states.read(tx)
            due = [recorded for recorded in issuers.with_crl() if crl_is_due(states[recorded.id], now=now)]
            for recorded in due:
                signed += self._next(tx, recorded, states[recorded.id].newest, generation, now)
        if signed:
            failpoint("apply.after_crl_signed")
            with self._database.transaction(sees=ALL_TENANTS) as tx:
                for crl in signed:
                    store_issuers.put_crl(tx, crl)
            failpoint("apply.after_crl_committed")
        return issuers, signed

    def _next(
        self, tx: Connection, recorded: RecordedIssuer, previous: CrlHead | None, generation: int, now: datetime
    ) -> list[CrlRecord]:
        """Sign the next CRL of a CA; none while the key of another tenant's CA is lost, which stops no other."""
        issuer, days = recorded.issuer, self._settings.crl_days
        try:
            return [
                next_crl(tx, recorded.id, issuer, previous, self._revoked, days=days, generation=generation, now=now)
            ]
        except (IssuerUnusable, TokenKeyUnavailable) as error:
            if recorded.tenant_id == self._first_tenant:
                raise
            log.error("a CRL is not signed", extra={"issuer": issuer.name, "problem": error.detail})
            return []

    def _show_next_crl(self, now: datetime) -> None:
        """If certificates were revoked, have the next CRL list one whose refusal shows that the broker has it."""
        with self._database.snapshot(sees=ALL_TENANTS) as tx:
            generation = generations.get_broker_state(tx).generation
            states, listing = self._states.read(tx), self._authority.seen_by(tx).with_crl()
            changed = [
                recorded
                for recorded in listing
                if (newest := states[recorded.id].newest) and states[recorded.id].changed_at > newest.generation
            ]
        probe = self._probe_certificates.revoked
        if changed:
            replace_revoked_probe(self._database, self._settings, changed[-1], probe, generation=generation, now=now)
        elif listing is not self._probe_is_of:
            if not _is_of_any(listing, probe):  # but of a tenant's CA that the broker does not know any more
                first = self._authority.first.issuing
                replace_revoked_probe(self._database, self._settings, first, probe, generation=None, now=now)
            self._probe_is_of = listing

    def _trust(self, issuers: Issuers) -> Trust:
        """Return the issuers with the newest CRL of each, encoded once. The caller holds the lock of the CRLs.

        Without those of further tenants whose CRL has expired, as after the loss of a key: the broker needs a current
        CRL of each CA, and refuses the devices of one that it does not know.
        """
        with self._database.snapshot(sees=ALL_TENANTS) as tx:
            states, now = self._states.read(tx), self._clock()
            heads = [
                head
                for one in issuers.with_crl()
                if (head := states[one.id].newest) and self._is_usable(one, head, now)
            ]
            kept = {
                head.issuer_id: known
                for head in heads
                if (known := self._crl_pem.get(head.issuer_id)) is not None and known[0] == head
            }
            new = [head.issuer_id for head in heads if head.issuer_id not in kept]
            read = {crl.issuer_id: self._pem(crl) for crl in store_issuers.list_crls(tx, new)}
        self._crl_pem = {head.issuer_id: kept.get(head.issuer_id) or (head, read[head.issuer_id]) for head in heads}
        others = {one.id for one in issuers.with_crl() if one.tenant_id != self._first_tenant}
        left_out = others - {head.issuer_id for head in heads}
        authorities = issuers.broker_ca_without(left_out) if left_out else issuers.broker_ca
        return Trust(b"".join(pem for _, pem in self._crl_pem.values()), authorities, issuers.tenants)

    def _is_usable(self, recorded: RecordedIssuer, crl: CrlHead, now: datetime) -> bool:
        return recorded.tenant_id == self._first_tenant or now < crl.next_update

    def _pem(self, crl: CrlRecord) -> bytes:
        return self._crl_writers.setdefault(crl.issuer_id, PemOfSuccessors("X509 CRL")).pem(crl.der)


def _is_of_any(issuers: Sequence[RecordedIssuer], probe: ProbeCertificate) -> bool:
    """Return whether one of the CAs has signed a probe certificate, or that is not there."""
    try:
        certificate = x509.load_pem_x509_certificate(probe.certificate.read_bytes())
    except (OSError, ValueError):
        return True  # it is replaced as a whole, by the renewal of the portal's own certificates
    return any(one.issuer.certificate.subject == certificate.issuer for one in issuers)
