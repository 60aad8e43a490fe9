"""The CRLs that a restore reads: the broker's, and those that were saved from the public address."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from sqlalchemy.engine import Connection

from broker.crl import read_crls
from core.errors import BackupRefused, ProjectionInvalid
from core.states import IssuerKind
from operations.backup.revocations import Tables
from pki.encoding import failing_as
from pki.issuers import CLOCK_SKEW
from store import issuers as store_issuers
from store.issuers import CrlRecord, IssuerRecord

CrlById = Mapping[int, x509.CertificateRevocationList]
_PEM_CRL = re.compile(rb"-----BEGIN X509 CRL-----.*?-----END X509 CRL-----", re.DOTALL)


@dataclass(frozen=True, slots=True)
class SavedCrls:
    """CRLs as they were read, not verified yet, each with the file that it is from; ``broker_file`` may be missing."""

    broker_file: Path
    found: Sequence[tuple[Path, x509.CertificateRevocationList]]

    @classmethod
    def read(cls, broker_file: Path, files: Sequence[Path]) -> Self:
        """Read the broker's CRLs and those of ``files``; raise ``BackupRefused`` if a file is damaged."""
        broker = [(broker_file, crl) for crl in _broker_crls(broker_file)]
        return cls(broker_file, [*broker, *((path, crl) for path in files for crl in _saved_crls(path))])

    def without_others(self, issuers: Sequence[IssuerRecord]) -> Self:
        """Leave out what the broker has of other CAs: those of tenants that are not restored."""
        names = {x509.load_der_x509_certificate(issuer.der).subject for issuer in issuers}
        found = [(path, crl) for path, crl in self.found if path != self.broker_file or crl.issuer in names]
        return dataclasses.replace(self, found=found)

    def of(self, issuers: Sequence[IssuerRecord]) -> tuple[CrlById, list[str]]:
        """Return the newest CRL of each issuer, by its id, and notes about those of the broker that were ignored.

        Raise ``BackupRefused`` if a CRL names an issuer that did not sign it (RFC 5280 section 5), or if a file that
        the operator named has a CRL of another CA.
        """
        newest: dict[int, x509.CertificateRevocationList] = {}
        notes = []
        for path, crl in self.found:
            issuer = next((issuer for issuer in issuers if _is_of(path, crl, issuer)), None)
            if issuer is not None:
                newest[issuer.id] = max(newest.get(issuer.id, crl), crl, key=_number)
            elif path == self.broker_file:
                notes.append("The broker's folder has a CRL of a CA that is not in the backup; it was ignored.")
            else:
                raise BackupRefused(f"{path} has a CRL of a CA that is not in the backup; give one of its CAs.")
        return newest, notes


def unknown_revocations(
    issuers: Sequence[IssuerRecord], crls: CrlById, made_at: datetime, now: datetime
) -> Iterator[str]:
    """Say of each issuing CA from when on its revocations are in no CRL here."""
    for issuer in issuers:
        if issuer.kind != IssuerKind.ISSUING or issuer.not_after <= now:
            continue
        crl = crls.get(issuer.id)
        if crl is None:
            yield (
                f"certificates of {issuer.name} that were revoked after {made_at:%Y-%m-%d %H:%M:%S} UTC, and"
                " their devices: they are admitted again; restore once more with --crl if its CRL was saved anywhere"
            )
        else:
            known = max(made_at, min(crl.last_update_utc + CLOCK_SKEW, now))
            yield (
                f"certificates of {issuer.name} that were revoked after {known:%Y-%m-%d %H:%M:%S} UTC, the time"
                " of its newest CRL here, and their devices"
            )


def continue_crls(
    tx: Connection, crls: CrlById, issuers: Sequence[IssuerRecord], replaced: Tables | None, generation: int
) -> None:
    """Let the next CRL of each issuer have a number and a thisUpdate above those of any known one."""
    before: dict[str, CrlRecord] = {}
    if replaced is not None:
        fingerprints = {row["id"]: row["fingerprint"] for row in replaced("issuers")}
        for row in replaced("crls"):
            values = (row[name] for name in ("issuer_id", "number", "this_update", "next_update", "generation", "der"))
            before[fingerprints[row["issuer_id"]]] = CrlRecord(*values)
    for issuer in issuers:
        given = _record(issuer.id, crls[issuer.id]) if issuer.id in crls else None
        known = [record for record in (given, before.get(issuer.fingerprint)) if record is not None]
        if known:
            newest = max(known, key=lambda record: record.number)
            ours = dataclasses.replace(newest, issuer_id=issuer.id, generation=generation - 1)
            store_issuers.put_crl(tx, ours)


# --- Files ------------------------------------------------------------------------------------------------------------


def _broker_crls(path: Path) -> list[x509.CertificateRevocationList]:
    try:
        return [read.crl for read in read_crls(path.read_bytes())]
    except FileNotFoundError:
        return []
    except (OSError, ProjectionInvalid) as error:
        raise BackupRefused(
            f"{path} cannot be read, so it is not known what was revoked after the backup; repair it, or move it away"
            " to restore without it."
        ) from error


def _saved_crls(path: Path) -> list[x509.CertificateRevocationList]:
    """Return the CRLs of a file: one in DER, or one or more in PEM, with any text around the blocks."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BackupRefused(f"{path} cannot be read: {error.strerror}.") from error
    blocks = _PEM_CRL.findall(content)
    if len(blocks) != content.count(b"-----BEGIN X509 CRL-----"):
        raise BackupRefused(f"{path} is cut off; save the CRL again.")
    with failing_as(BackupRefused(f"{path} is not a CRL in PEM or DER; save it again, as from /crl/issuing-1.crl.")):
        return [x509.load_pem_x509_crl(block) for block in blocks] or [x509.load_der_x509_crl(content)]


# --- CRLs -------------------------------------------------------------------------------------------------------------


def _is_of(path: Path, crl: x509.CertificateRevocationList, issuer: IssuerRecord) -> bool:
    with failing_as(BackupRefused(f"{path} has a malformed CRL; use another copy of it.")):
        certificate = x509.load_der_x509_certificate(issuer.der)
        if crl.issuer != certificate.subject or _authority_key(crl) != _subject_key(certificate):
            return False
        key: Any = certificate.public_key()
        signed = crl.is_signature_valid(key)
    if not signed:
        raise BackupRefused(
            f"The signature of the CRL of {issuer.name} in {path} does not verify, so it is not known what was revoked"
            " after the backup; use another copy of it, or restore without this file (move it away if it is the"
            " broker's)."
        )
    return True


def _record(issuer_id: int, crl: x509.CertificateRevocationList) -> CrlRecord | None:
    """Return a CRL as the database keeps it, ``None`` if it has no number or no nextUpdate."""
    number = _number(crl)
    if number < 0 or crl.next_update_utc is None:
        return None
    return CrlRecord(issuer_id, number, crl.last_update_utc, crl.next_update_utc, 0, crl.public_bytes(Encoding.DER))


def _number(crl: x509.CertificateRevocationList) -> int:
    """Return the number of a CRL, -1 if it has none."""
    try:
        return crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
    except (x509.ExtensionNotFound, ValueError):
        return -1


def _authority_key(crl: x509.CertificateRevocationList) -> bytes | None:
    try:
        return crl.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
    except (x509.ExtensionNotFound, ValueError):
        return None


def _subject_key(certificate: x509.Certificate) -> bytes:
    return certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest
