"""The portal's two tiers of CAs, as the tests of the certificate authority build them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import uuid4

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

import ca
from pki.algorithms import KeyType, PrivateKey, PublicKey
from pki.crl import encode_entries, sign_crl
from pki.issuers import ONLY_UUID, DeviceContents, Issuer

MakeKey = Callable[[KeyType], PrivateKey]
PKI_URL = "http://pki.example.com:8080"


@dataclass(frozen=True)
class Hierarchy:
    """A root with an issuing CA below it, both made at ``now``."""

    now: datetime
    root: Issuer
    issuing: Issuer

    def device(
        self,
        public_key: PublicKey | None = None,
        *,
        device_id: str | None = None,
        now: datetime | None = None,
        contents: DeviceContents = ONLY_UUID,
    ) -> ca.Issued:
        return ca.sign_certificate(
            self.issuing,
            public_key or ca.generate_keypair(KeyType.EC_P256).public_key(),
            device_id=device_id or str(uuid4()),
            now=now or self.now,
            days=365,
            pki_url=PKI_URL,
            contents=contents,
        )

    def server(self, *names: str, public_key: PublicKey | None = None) -> ca.Issued:
        return ca.sign_server_certificate(
            self.issuing,
            public_key or ca.generate_keypair(KeyType.EC_P256).public_key(),
            names=names,
            now=self.now,
            days=90,
            pki_url=PKI_URL,
        )

    def crl(self, *revoked: x509.RevokedCertificate, number: int = 1, issuer: Issuer | None = None) -> bytes:
        return sign_crl(
            issuer or self.issuing,
            encode_entries(revoked),
            number=number,
            this_update=self.now,
            next_update=self.now + timedelta(days=7),
        )


def make_hierarchy(
    now: datetime,
    make_key: MakeKey = ca.generate_keypair,
    *,
    root_days: int = 7300,
    issuing_days: int = 1825,
    issuing_key_type: KeyType = KeyType.EC_P256,
) -> Hierarchy:
    root_key = make_key(KeyType.EC_P384)
    created = ca.create_root(root_key, common_name="Test Root CA", now=now, days=root_days)
    root = Issuer("root", created.certificate, root_key)
    issuing_key = make_key(issuing_key_type)
    issued = ca.create_issuing(
        root,
        issuing_key.public_key(),
        common_name="Test Issuing CA 1",
        now=now,
        days=issuing_days,
        pki_url=PKI_URL,
    )
    return Hierarchy(now, root, Issuer("issuing-1", issued.certificate, issuing_key))


class HeldElsewhere(ec.EllipticCurvePrivateKey):
    """A private key outside of cryptography, as in a PKCS#11 token; it can be made to sign wrongly."""

    def __init__(self, key: ec.EllipticCurvePrivateKey, *, damage: bool) -> None:
        self._key = key
        self._damage = damage

    def sign(self, data: Any, signature_algorithm: ec.EllipticCurveSignatureAlgorithm) -> bytes:
        return self._key.sign(bytes(data) + b"!" * self._damage, signature_algorithm)

    def public_key(self) -> ec.EllipticCurvePublicKey:
        return self._key.public_key()

    @property
    def curve(self) -> ec.EllipticCurve:
        return self._key.curve

    @property
    def key_size(self) -> int:
        return self._key.key_size

    def exchange(self, algorithm: ec.ECDH, peer_public_key: ec.EllipticCurvePublicKey) -> bytes:
        raise NotImplementedError

    def private_numbers(self) -> ec.EllipticCurvePrivateNumbers:
        raise NotImplementedError

    def private_bytes(self, *_: Any) -> bytes:
        raise NotImplementedError

    def __copy__(self) -> HeldElsewhere:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> HeldElsewhere:
        return self
