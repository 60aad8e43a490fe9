"""The certificates with which the portal answers OCSP, one for each CA, and their renewal."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import ca
import db
from config import Settings
from core.errors import IssuerUnusable, PortalError
from core.files import replace_file
from core.states import IssuerKind
from pki import ocsp
from pki.algorithms import KeyType, private_key_pem
from pki.issuers import Issuer
from pki.ocsp import Signer
from store.database import Database
from workflows import audit
from workflows.authority.issuers import Authority, RecordedIssuer

log = logging.getLogger("portal.responder")

# Nobody checks whether a responder's certificate is revoked, so that it lives shortly. At two thirds of its life it is
# renewed; what is left then is more than the longest life of an answer (PORTAL_OCSP_HOURS).
RESPONDER_DAYS = 14


class ResponderCertificates:
    """Files ``<name of the CA>.pem``, 0600, of a key in the clear with its certificate, replaced as one."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        authority: Authority,
        clock: Callable[[], datetime],
        tenant_id: str,
    ) -> None:
        self._folder = settings.ocsp_dir
        self._database = database
        self._authority = authority
        self._clock = clock
        self._tenant_id = tenant_id
        # What was read last of each file, with what told it from others then; a process that renews tells no other.
        self._read: dict[str, tuple[tuple[int, int, int], Signer | None]] = {}

    def path(self, issuer_name: str) -> Path:
        """Where key and certificate for a CA are."""
        return self._folder / f"{issuer_name}.pem"

    def signer(self, issuer: Issuer) -> Signer | None:
        """What answers for this CA now, read again whenever the file is another; ``None`` where nothing can."""
        now = self._clock()
        signer = self._current(issuer)
        return signer if signer is not None and signer.not_before <= now < signer.not_after else None

    def renew(self) -> list[str]:
        """Issue anew whatever is missing, past two thirds of its life, or of no use; returns the names of the CAs.

        A CA whose key is not here, or that is out of date, is left as it is. One that fails does not keep the others.
        """
        now = self._clock()
        renewed = []
        for recorded in self._authority.issuers:
            if not recorded.issuer.not_before <= now < recorded.issuer.not_after or not self._is_due(recorded, now):
                continue
            try:
                # The root's key comes and goes while the portal runs.
                able = self._authority.root_with_key() if recorded.kind == IssuerKind.ROOT else recorded
                if able is None or able.issuer.key is None:
                    continue
                self._issue(able, now)
            except PortalError as error:
                log.error("an OCSP responder is not renewed", extra={"problem": error.detail})
            else:
                log.info("issued", extra={"what": f"OCSP responder of {recorded.issuer.name}"})
                renewed.append(recorded.issuer.name)
        return renewed

    def _is_due(self, recorded: RecordedIssuer, now: datetime) -> bool:
        signer = self._current(recorded.issuer)
        if signer is None:
            return True
        renewed_at = signer.not_before + (signer.not_after - signer.not_before) * 2 / 3
        return not signer.not_before <= now < renewed_at

    def _current(self, issuer: Issuer) -> Signer | None:
        path = self.path(issuer.name)
        try:
            status = path.stat()
            seen = status.st_ino, status.st_mtime_ns, status.st_size
            known = self._read.get(issuer.name)
            if known is not None and known[0] == seen:
                return known[1]
            content = path.read_bytes()
        except OSError:
            return None
        signer = None
        try:
            signer = ocsp.open_signer(content, issuer)
        except IssuerUnusable as error:
            log.error("an OCSP responder's file is of no use", extra={"problem": error.detail, "path": str(path)})
        self._read[issuer.name] = seen, signer
        return signer

    def _issue(self, recorded: RecordedIssuer, now: datetime) -> None:
        key = ca.generate_keypair(KeyType.EC_P256)
        issued = ca.sign_responder_certificate(recorded.issuer, key.public_key(), now=now, days=RESPONDER_DAYS)
        with self._database.transaction() as tx:
            db.add_certificate(
                tx,
                tenant_id=self._tenant_id,
                issuer_id=recorded.id,
                purpose="server",
                serial_number=issued.serial_number,
                fingerprint=issued.fingerprint,
                der=issued.der,
                not_before=issued.not_before,
                not_after=issued.not_after,
                issued_at=now,
            )
            audit.record(
                tx,
                audit.system_actor(self._tenant_id),
                "certificate:issue",
                f"certificate:{issued.serial_number}",
                at=now,
                purpose="ocsp",
                issuer=recorded.issuer.name,
            )
        replace_file(self.path(recorded.issuer.name), private_key_pem(key) + issued.pem.encode())
