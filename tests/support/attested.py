"""A device with a root of trust in software that enrols with evidence, at a portal in this process."""

from __future__ import annotations

import base64
import json
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from attestation.evidence import Challenge, from_base64url, to_base64url
from tests.support.attestation import Maker
from tests.support.est import Device, csr_der, token
from tests.support.harness import Api, Clock


class Given(Challenge):
    """What a device knows of a challenge: the nonce."""

    @property
    def nonce(self) -> bytes:
        return self.seed


def policy(*makers: Maker, mode: str = "require", **rules: Any) -> dict[str, Any]:
    """A policy that trusts the roots of trust of these devices."""
    keys = [maker.root_of_trust.public_key() for maker in makers]
    anchors = [key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode() for key in keys]
    return {"mode": mode, "anchors": anchors, **rules}


@dataclass
class AttestedDevice:
    """A device with a credential to enrol, with a root of trust, and with the time that it takes it to be."""

    api: Api
    credential: Device
    maker: Maker = field(default_factory=Maker)
    clock: Clock = field(default_factory=Clock)

    def call(self, path: str, body: Any = None) -> Any:
        content = None if body is None else json.dumps(body).encode()
        return Device(self.api, self.credential.token, self.credential.certificate, path="/").call(
            "POST", path, content, content_type="application/json"
        )

    def nonce(self, **fields: Any) -> str:
        answer = self.call("attestation/nonce", fields or None)
        assert answer.status_code == 201, answer.text
        return str(answer.json["nonce"])

    def made(self, kind: str, make: Callable[[Maker], bytes], nonce: str | None = None) -> dict[str, Any]:
        """Evidence as ``make`` makes it, which knows the nonce."""
        nonce = self.nonce() if nonce is None else nonce
        self.maker.challenge = Given(from_base64url(nonce, "the nonce"))
        content = make(self.maker)
        return {
            "type": kind,
            "nonce": nonce,
            "evidence": content.decode() if kind == "eat-jwt" else to_base64url(content),
        }

    def evidence(self, kind: str = "eat-jwt", nonce: str | None = None, **claims: Any) -> dict[str, Any]:
        """Evidence of a kind; ``claims`` of a JWT replace those that it would have."""
        now = int(self.clock().timestamp())
        makers: dict[str, Callable[[Maker], bytes]] = {
            "eat-jwt": lambda maker: maker.jwt(**{"iat": now, **claims}),
            "eat-cwt": lambda maker: maker.cwt({6: now}),
            "psa": lambda maker: maker.psa(),
        }
        return self.made(kind, makers[kind], nonce)

    def csr(self, subject: str = "serial-1") -> str:
        der = base64.encodebytes(csr_der(self.maker.key, subject)).decode()
        return f"-----BEGIN CERTIFICATE REQUEST-----\n{der}-----END CERTIFICATE REQUEST-----\n"

    def enrol(self, evidence: dict[str, Any] | None = None, **fields: Any) -> Any:
        body = {"csr": self.csr(), **({} if evidence is None else {"attestation": evidence}), **fields}
        return self.call("enroll", body)

    def renewing(self, pem: str) -> AttestedDevice:
        """The same device, with the certificate that it was given."""
        shown = Device(self.api, None, ssl.PEM_cert_to_DER_cert(pem))
        return AttestedDevice(self.api, shown, self.maker, self.clock)


def attested_device(
    api: Api, maker: Maker | None = None, *, clock: Clock | None = None, count: int = 1, **rules: Any
) -> AttestedDevice:
    """A device with an enrolment token for several whose policy has these rules."""
    maker = maker or Maker()
    secret = token(api, attestation=policy(maker, **rules), count=count)
    return AttestedDevice(api, Device(api, secret), maker, clock or Clock())
