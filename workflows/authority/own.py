"""The portal's own certificates: how they are recorded, and the revoked one that shows that the broker has a CRL."""

from __future__ import annotations

import uuid
from datetime import datetime

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from sqlalchemy.engine import Connection

import ca
import db
from broker.probe import ProbeCertificate
from config import Settings
from core.errors import IssuerUnusable
from core.files import replace_file
from store import audit, issuers
from store.database import Database
from store.scope import ALL_TENANTS
from workflows.authority.issuers import RecordedIssuer

PROBE_DAYS = 90


def record_own(
    tx: Connection,
    tenant_id: str,
    signer: RecordedIssuer,
    issued: ca.Issued,
    *,
    purpose: str,
    now: datetime,
    generation: int = 0,
) -> None:
    """Record a certificate of the portal's own, revoked as of ``generation`` unless that is 0."""
    db.add_certificate(
        tx,
        tenant_id=tenant_id,
        issuer_id=signer.id,
        purpose=purpose,
        serial_number=issued.serial_number,
        fingerprint=issued.fingerprint,
        der=issued.der,
        not_before=issued.not_before,
        not_after=issued.not_after,
        issued_at=now,
        revoked_at=now if generation else None,
        reason="cessation_of_operation" if generation else None,
        generation=generation,
    )
    target = f"certificate:{issued.serial_number}"
    audit.record(tx, audit.system_actor(tenant_id), "certificate:issue", target, at=now, purpose=purpose)


def replace_revoked_probe(
    database: Database,
    settings: Settings,
    signer: RecordedIssuer,
    probe: ProbeCertificate,
    *,
    generation: int | None,
    now: datetime,
) -> None:
    """Put a certificate in the place of the revoked ``probe`` that no CRL before the one of ``generation`` lists.

    ``None``: before the CA's next CRL, which is due then.

    So a broker that refuses it as revoked has read that CRL. It lives as long as that, so that it is not listed for
    longer, and belongs to the tenant of its CA, with whose rows it is deleted. The key stays; without one, nothing is
    changed.
    """
    try:
        key = load_pem_private_key(probe.key.read_bytes(), None).public_key()
    except (OSError, ValueError, TypeError):
        return  # it is replaced as a whole, by the renewal of the portal's own certificates
    if not isinstance(key, ec.EllipticCurvePublicKey):
        return
    try:
        issued = ca.sign_certificate(
            signer.issuer, key, device_id=str(uuid.uuid4()), now=now, days=settings.crl_days, pki_url=settings.pki_url
        )
    except IssuerUnusable:
        return  # it has expired, which refuses all its certificates
    with database.transaction(sees=ALL_TENANTS) as tx:
        if generation is None:
            generation = db.next_generation(tx, at=now)
            issuers.touch_issuer(tx, signer.id, generation=generation)
        record_own(tx, signer.tenant_id, signer, issued, purpose="canary", now=now, generation=generation)
    replace_file(probe.certificate, signer.chain_pem(issued.pem).encode())
