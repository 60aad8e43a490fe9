"""Makes evidence of each format as a device would: the public vectors, and a root of trust in software for all else."""

from __future__ import annotations

import base64
import hashlib
import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import cbor2
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, load_der_public_key

from attestation import psa
from attestation.anchors import Anchor
from attestation.evidence import Challenge, Claims, EvidenceType, to_base64url
from attestation.verification import VERIFIERS
from pki.algorithms import PublicKey, public_key_der
from tests.support.pki import Authority

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
RECORDED = json.loads((Path(__file__).parents[1] / "attestation" / "tpm_evidence.json").read_text())
UEID = b"\x01" + bytes(range(32))
IMPLEMENTATION = bytes(range(32, 64))
MEASURED = {1: "PRoT", 2: b"\x11" * 32, 4: "1.3.5", 5: b"\x22" * 32}
SigningKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey


@dataclass(frozen=True)
class Case:
    """Evidence with everything that it is verified against."""

    type: EvidenceType
    evidence: bytes
    challenge: Challenge
    public_key: PublicKey
    anchors: tuple[Anchor, ...]
    now: datetime = NOW

    def verify(self, evidence: bytes | None = None, **changes: Any) -> Claims:
        case = replace(self, **changes)
        content = case.evidence if evidence is None else evidence
        return VERIFIERS[self.type](content, case.challenge, case.public_key, case.anchors, case.now)


def signature(key: SigningKey, content: bytes) -> bytes:
    """As JOSE and COSE have it: r and s side by side."""
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return key.sign(content)
    size = key.curve.key_size // 8
    r, s = decode_dss_signature(key.sign(content, ec.ECDSA(hashes.SHA256() if size == 32 else hashes.SHA384())))
    return r.to_bytes(size, "big") + s.to_bytes(size, "big")


def anchor_of(key: SigningKey, identifier: bytes = b"") -> Anchor:
    return Anchor(public_key_der(key.public_key()), False, identifier)


@dataclass
class Maker:
    """A device with a key for its certificate and one of its root of trust."""

    key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))
    root_of_trust: SigningKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))
    challenge: Challenge = field(default_factory=lambda: Challenge(b"\x07" * 32))

    def case(self, kind: EvidenceType, evidence: bytes | None = None) -> Case:
        makers: dict[EvidenceType, Callable[[], bytes]] = {
            EvidenceType.EAT_JWT: self.jwt,
            EvidenceType.EAT_CWT: self.cwt,
            EvidenceType.PSA: self.psa,
        }
        made = makers[kind]() if evidence is None else evidence
        return Case(kind, made, self.challenge, self.key.public_key(), (anchor_of(self.root_of_trust),))

    # --- EAT as JWT ---

    def json_claims(self) -> dict[str, Any]:
        return {
            "eat_nonce": to_base64url(self.challenge.nonce),
            "iat": int(NOW.timestamp()),
            "ueid": to_base64url(UEID),
            "hwmodel": to_base64url(IMPLEMENTATION),
            "dbgstat": "disabled-permanently",
            "oemboot": True,
            "swname": "firmware",
            "swversion": ["3.1.4", 1],
            "cnf": {"jwk": jwk(self.key.public_key())},
        }

    def jwt(self, header: Mapping[str, Any] | None = None, payload: bytes | None = None, **claims: Any) -> bytes:
        """The token; a claim that is None is left out."""
        alg = {"alg": jws_algorithm(self.root_of_trust)}
        content = json.dumps(present(self.json_claims() | claims)).encode() if payload is None else payload
        signed = b".".join(
            to_base64url(part).encode() for part in (json.dumps({**alg, **(header or {})}).encode(), content)
        )
        return signed + b"." + to_base64url(signature(self.root_of_trust, signed)).encode()

    # --- EAT as CWT ---

    def cbor_claims(self) -> dict[int, Any]:
        return {
            10: self.challenge.nonce,
            6: int(NOW.timestamp()),
            256: UEID,
            259: IMPLEMENTATION,
            263: 3,
            262: True,
            270: "firmware",
            271: ["3.1.4", 1],
            8: {1: cose_key(self.key.public_key())},
        }

    def cwt(self, claims: Mapping[Any, Any] | None = None, **parts: Any) -> bytes:
        return b"\xd8\x3d" + self.sign1(cbor2.dumps(present({**self.cbor_claims(), **(claims or {})})), **parts)

    def sign1(
        self,
        payload: bytes,
        *,
        protected: bytes | None = None,
        unprotected: Any = None,
        tag: bytes = b"\xd2",
        made: Callable[[bytes], bytes] | None = None,
    ) -> bytes:
        header = cbor2.dumps({1: cose_algorithm(self.root_of_trust)}) if protected is None else protected
        signed = cbor2.dumps(["Signature1", header, b"", payload])
        value = made(signed) if made else signature(self.root_of_trust, signed)
        return tag + cbor2.dumps([header, {} if unprotected is None else unprotected, payload, value])

    # --- PSA ---

    def psa_claims(self) -> dict[int, Any]:
        return {
            265: psa.PROFILE,
            10: psa.nonce_for(self.challenge.nonce, self.key.public_key()),
            256: UEID,
            2394: -1,
            2395: 0x3000,
            2396: IMPLEMENTATION,
            2397: b"\x33" * 32,
            2399: [MEASURED],
        }

    def psa(self, claims: Mapping[int, Any] | None = None, **parts: Any) -> bytes:
        return self.sign1(cbor2.dumps(present({**self.psa_claims(), **(claims or {})})), **parts)


def present(claims: Mapping[Any, Any]) -> dict[Any, Any]:
    return {name: value for name, value in claims.items() if value is not None}


def jws_algorithm(key: SigningKey) -> str:
    return "EdDSA" if isinstance(key, ed25519.Ed25519PrivateKey) else "ES256" if key.curve.key_size == 256 else "ES384"


def cose_algorithm(key: SigningKey) -> int:
    return {"EdDSA": -8, "ES256": -7, "ES384": -35}[jws_algorithm(key)]


def jwk(key: PublicKey) -> dict[str, str]:
    if isinstance(key, ed25519.Ed25519PublicKey):
        return {"kty": "OKP", "crv": "Ed25519", "x": to_base64url(key.public_bytes_raw())}
    x, y = coordinates(key)
    return {"kty": "EC", "crv": f"P-{8 * len(x)}", "x": to_base64url(x), "y": to_base64url(y)}


def cose_key(key: PublicKey) -> dict[int, Any]:
    if isinstance(key, ed25519.Ed25519PublicKey):
        return {1: 1, -1: 6, -2: key.public_bytes_raw()}
    x, y = coordinates(key)
    return {1: 2, -1: 1 if len(x) == 32 else 2, -2: x, -3: y}


def coordinates(key: PublicKey) -> tuple[bytes, bytes]:
    assert isinstance(key, ec.EllipticCurvePublicKey)
    size, numbers = key.curve.key_size // 8, key.public_numbers()
    return numbers.x.to_bytes(size, "big"), numbers.y.to_bytes(size, "big")


# --- TPM ------------------------------------------------------------------------------------------------------------


def recorded(name: str) -> Case:
    """What a software TPM made, of which record_tpm.py tells how."""
    return case_of(RECORDED[name])


def case_of(entry: Mapping[str, Any]) -> Case:
    """What record_tpm.py returned."""
    return Case(
        type=EvidenceType.TPM,
        evidence=json.dumps(entry["evidence"]).encode(),
        challenge=Challenge(bytes.fromhex(entry["seed"])),
        public_key=load_der_public_key(base64.b64decode(entry["public_key"])),  # type: ignore[arg-type]
        anchors=(Anchor(base64.b64decode(entry["root"]), True),),
        now=datetime.fromisoformat(entry["at"]),
    )


NATIVE_SIGNING, RESTRICTED = 1 << 1 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 18, 1 << 16


def sized(content: bytes) -> bytes:
    return struct.pack(">H", len(content)) + content


def tpm_public(key: PublicKey, attributes: int) -> bytes:
    """A TPMT_PUBLIC of a P-256 key."""
    x, y = coordinates(key)
    scheme = struct.pack(">HHH", 0x0010, 0x0018, 0x000B)
    return (
        struct.pack(">HHI", 0x0023, 0x000B, attributes)
        + sized(b"")
        + scheme
        + struct.pack(">HH", 0x0003, 0x0010)
        + sized(x)
        + sized(y)
    )


def tpm_name(public: bytes) -> bytes:
    return b"\x00\x0b" + hashlib.sha256(public).digest()


def attested(kind: int, nonce: bytes, rest: bytes, magic: int = 0xFF544347) -> bytes:
    """A TPMS_ATTEST."""
    return struct.pack(">IH", magic, kind) + sized(b"signer") + sized(nonce) + bytes(25) + rest


@dataclass
class SoftwareTpm:
    """A TPM with an attestation key that has a certificate (IAK); it does what no real one would, if it is told to."""

    authority: Authority = field(default_factory=lambda: Authority("TPM maker", now=NOW))
    key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))
    challenge: Challenge = field(default_factory=lambda: Challenge(b"\x08" * 32))
    ak_attributes: int = NATIVE_SIGNING | RESTRICTED
    key_attributes: int = NATIVE_SIGNING
    purpose: str = "2.23.133.8.3"
    field_of: str = "ak_certificate"
    now: datetime = NOW

    def __post_init__(self) -> None:
        self.ak = ec.generate_private_key(ec.SECP256R1())

    def signed(self, content: bytes) -> bytes:
        r, s = decode_dss_signature(self.ak.sign(content, ec.ECDSA(hashes.SHA256())))
        parts = sized(r.to_bytes(32, "big")) + sized(s.to_bytes(32, "big"))
        return struct.pack(">HH", 0x0018, 0x000B) + parts

    def certificate(self) -> bytes:
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "AK")]))
            .issuer_name(self.authority.certificate.subject)
            .public_key(self.ak.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(self.now - timedelta(days=1))
            .not_valid_after(self.now + timedelta(days=1))
        )
        usage = x509.ExtendedKeyUsage([x509.ObjectIdentifier(self.purpose)])
        return (
            builder.add_extension(usage, critical=False)
            .sign(self.authority.key, hashes.SHA256())
            .public_bytes(Encoding.DER)
        )

    def evidence(self, **changes: Any) -> dict[str, Any]:
        key_public = tpm_public(self.key.public_key(), self.key_attributes)
        certify = changes.pop("attested", None) or attested(
            0x8017, changes.pop("nonce", self.challenge.nonce), sized(tpm_name(key_public)) + sized(b"qualified")
        )
        made: dict[str, Any] = {
            self.field_of: self.certificate(),
            "ak_public": tpm_public(self.ak.public_key(), self.ak_attributes),
            "key_public": key_public,
            "certify": certify,
            "certify_signature": self.signed(certify),
        }
        return {name: base64.b64encode(value).decode() for name, value in made.items()} | changes

    def quote(
        self, pcrs: Mapping[int, bytes], *, nonce: bytes | None = None, digest: bytes | None = None
    ) -> dict[str, Any]:
        bitmap = bytes(sum(1 << n % 8 for n in pcrs if n // 8 == byte) for byte in range(3))
        found = hashlib.sha256(b"".join(pcrs[n] for n in sorted(pcrs))).digest() if digest is None else digest
        rest = struct.pack(">IHB", 1, 0x000B, 3) + bitmap + sized(found)
        content = attested(0x8018, self.challenge.nonce if nonce is None else nonce, rest)
        return {
            "attested": base64.b64encode(content).decode(),
            "signature": base64.b64encode(self.signed(content)).decode(),
            "pcrs": {"sha256": {str(number): value.hex() for number, value in pcrs.items()}},
        }

    def case(self, evidence: Mapping[str, Any] | None = None) -> Case:
        content = json.dumps(self.evidence() if evidence is None else evidence).encode()
        root = Anchor(self.authority.certificate.public_bytes(Encoding.DER), True)
        return Case(EvidenceType.TPM, content, self.challenge, self.key.public_key(), (root,))
