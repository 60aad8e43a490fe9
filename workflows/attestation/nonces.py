"""The use case of a nonce: given to whoever may present evidence, for five minutes and one use."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from sqlalchemy.engine import Connection

from attestation.evidence import NONCE_LIFETIME, Challenge, EvidenceType, from_base64url, to_base64url
from attestation.refusals import NonceExpired, NonceSpent, NonceUnknown
from attestation.tpm import challenge_ek
from attestation.tpm_credential import Credential
from store import attestation
from store.attestation import NonceState
from store.database import Database
from workflows.attestation.policies import RegisteredPolicy

# Spent ones count: else a client could fill the table. A batch of devices may have one token; one device is one device.
# The oldest make room: were the newest refused, a holder of the batch's token could keep all its devices waiting.
MAX_NONCES = 2000
MAX_NONCES_OF_ONE = 20
KEPT = timedelta(minutes=5)  # after it has expired, so that whoever presents it is told that it has


@dataclass(frozen=True, slots=True)
class NonceHolder:
    """Who is given nonces, and alone may present them; ``name`` is such as ``enrolment_token:<id>``."""

    tenant_id: str
    name: str
    is_one_device: bool = False

    @classmethod
    def of_token(cls, tenant_id: str, token_id: str, *, is_one_device: bool) -> NonceHolder:
        """Return the devices that have an enrolment token."""
        return cls(tenant_id, f"enrolment_token:{token_id}", is_one_device)

    @classmethod
    def of_factory_key(cls, tenant_id: str, key_fingerprint: str) -> NonceHolder:
        """Return the device with the factory certificate for this key (SHA-256 in hex)."""
        return cls(tenant_id, f"factory_key:{key_fingerprint}", is_one_device=True)

    @classmethod
    def of_device(cls, tenant_id: str, device_id: str) -> NonceHolder:
        """Return a device that renews."""
        return cls(tenant_id, f"device:{device_id}", is_one_device=True)

    @classmethod
    def of_operator(cls, tenant_id: str, token_id: str) -> NonceHolder:
        """Return an operator, who registers devices."""
        return cls(tenant_id, f"operator_token:{token_id}")


@dataclass(frozen=True, slots=True)
class EndorsementKey:
    """What a TPM shows to be given a credential: its EK certificate (DER), CAs above it, and its AK (TPMT_PUBLIC)."""

    certificate: bytes
    intermediates: tuple[bytes, ...]
    ak_public: bytes


@dataclass(frozen=True, slots=True)
class IssuedNonce:
    """A nonce in Base64url, and the credential by which a TPM learns the secret that takes its place, if one asked."""

    nonce: str
    expires_at: datetime
    credential: Credential | None = field(default=None, repr=False)


@dataclass(eq=False, repr=False)
class AttestationNonces:
    """Gives nonces, and takes each back once; the database holds a seed for each, and the hash of what was given."""

    _database: Database
    _clock: Callable[[], datetime]

    def issue(
        self, holder: NonceHolder, policy: RegisteredPolicy | None = None, key: EndorsementKey | None = None
    ) -> IssuedNonce:
        """Give a nonce, with a credential for the TPM whose endorsement ``key`` the anchors of the policy vouch for.

        The oldest of a holder that has too many count no more. Raises a kind of ``AttestationRefused`` for the key.
        """
        now, challenge = self._clock(), Challenge(secrets.token_bytes(32))
        credential = None
        if key is not None:
            anchors = policy.anchors_for(EvidenceType.TPM) if policy is not None else []
            credential = challenge_ek(challenge, key.certificate, key.intermediates, key.ak_public, anchors, now)
        expires_at, limit = now + NONCE_LIFETIME, MAX_NONCES_OF_ONE if holder.is_one_device else MAX_NONCES
        nonce_hash = _hash_of(challenge.nonce)

        def record(tx: Connection) -> None:
            attestation.add_nonce(
                tx,
                holder.tenant_id,
                holder.name,
                nonce_hash=nonce_hash,
                seed=challenge.seed,
                expires_at=expires_at,
                limit=limit,
            )

        self._database.write(record)
        return IssuedNonce(to_base64url(challenge.nonce), expires_at, credential)

    def spend(self, holder: NonceHolder, nonce: str) -> Challenge:
        """Take a nonce back, for good, whatever becomes of what came with it; return its challenge.

        Raises ``NonceUnknown``, also for that of another holder, ``NonceSpent``, ``NonceExpired``, and
        ``EvidenceMalformed``.
        """
        now, nonce_hash = self._clock(), _hash_of(from_base64url(nonce, "The nonce"))
        spent = self._database.write(
            lambda tx: attestation.spend_nonce(tx, holder.tenant_id, holder.name, nonce_hash, now=now)
        )
        match spent.state:
            case NonceState.UNKNOWN:
                raise NonceUnknown("The nonce is not one that was given for this credential; ask for one, and use it.")
            case NonceState.SPENT:
                raise NonceSpent("The nonce was used before; ask for another one, and make evidence for that.")
            case NonceState.EXPIRED:
                raise NonceExpired("The nonce has expired; ask for another one, and make evidence within five minutes.")
        return Challenge(spent.seed)

    def sweep(self) -> None:
        """Delete nonces that nobody can use any more."""
        before = self._clock() - KEPT
        with self._database.snapshot() as tx:
            if not attestation.has_old_nonces(tx, before=before):
                return
        with self._database.transaction() as tx:
            attestation.forget_nonces(tx, before=before)


def _hash_of(nonce: bytes) -> str:
    return hashlib.sha256(nonce).hexdigest()
