"""A device with a TPM enrols with what real TPMs have made, recorded by tests/attestation/record_tpm.py."""

from __future__ import annotations

import base64
import json
from datetime import datetime
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography import x509

from attestation.evidence import to_base64url
from pki.algorithms import public_key_der
from pki.encoding import pem
from tests.support.attestation import RECORDED
from tests.support.est import Device, token
from tests.support.harness import ON_SQLITE, Api, Clock, problem_of
from workflows.attestation import nonces

pytestmark = ON_SQLITE
each_recording = pytest.mark.parametrize("name", ["rsa-ek", "ecc-ek"])


class Recorded:
    """The device of a recording, at a portal that gives it the same challenge again."""

    def __init__(self, api: Api, name: str, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
        entry = RECORDED[name]
        clock.advance(seconds=max(0.0, (datetime.fromisoformat(entry["at"]) - clock()).total_seconds()))
        again = SimpleNamespace(token_bytes=lambda _: bytes.fromhex(entry["seed"]))
        monkeypatch.setattr(nonces, "secrets", again)
        self.evidence = entry["evidence"]
        self.csr = pem("CERTIFICATE REQUEST", base64.b64decode(entry["csr"]))
        self.key = base64.b64decode(entry["public_key"])
        root = {"pem": pem("CERTIFICATE", base64.b64decode(entry["root"])), "types": ["tpm2"]}
        self.device = Device(api, token(api, attestation={"mode": "require", "anchors": [root]}), path="/")

    def call(self, path: str, **body: Any) -> Any:
        return self.device.call("POST", path, json.dumps(body).encode(), content_type="application/json")

    def nonce(self) -> str:
        shown = {name: self.evidence[name] for name in ("ek_certificate", "intermediates", "ak_public")}
        answer = self.call("attestation/nonce", type="tpm2", **shown)
        assert {"nonce", "expires_at", "credential", "secret"} == answer.json.keys()
        return str(answer.json["nonce"])

    def enrol(self, nonce: str, **changes: Any) -> Any:
        content = to_base64url(json.dumps(self.evidence | changes).encode())
        return self.call("enroll", csr=self.csr, attestation={"type": "tpm2", "nonce": nonce, "evidence": content})


@each_recording
def test_a_device_enrols_with_what_its_tpm_has_made(
    api: Api, clock: Clock, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    one = Recorded(api, name, clock, monkeypatch)
    answer = one.enrol(one.nonce())
    assert answer.status_code == 201, answer.text
    certificate = x509.load_pem_x509_certificate(answer.json["certificate"].encode())
    assert public_key_der(certificate.public_key()) == one.key  # type: ignore[arg-type]


@each_recording
@pytest.mark.parametrize(
    ("of_other", "code"),
    [
        (("ek_certificate",), "attestation_nonce_mismatch"),
        (("ek_certificate", "ak_public"), "evidence_signature_invalid"),
        (("key_public", "certify", "certify_signature"), "evidence_signature_invalid"),
        (("ak_public", "key_public", "certify", "certify_signature"), "attestation_nonce_mismatch"),
        (("key_public",), "attested_key_mismatch"),
    ],
)
def test_what_another_tpm_of_the_same_maker_has_made_is_refused_in_any_part(
    api: Api, clock: Clock, monkeypatch: pytest.MonkeyPatch, name: str, of_other: tuple[str, ...], code: str
) -> None:
    one = Recorded(api, name, clock, monkeypatch)
    other = RECORDED["ecc-ek" if name == "rsa-ek" else "rsa-ek"]["evidence"]
    problem_of(one.enrol(one.nonce(), **{part: other[part] for part in of_other}), 403, code)


def test_the_certificate_of_an_endorsement_key_is_no_permission_for_another_key(
    api: Api, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Recorded(api, "rsa-ek", clock, monkeypatch)
    one.csr = pem("CERTIFICATE REQUEST", base64.b64decode(RECORDED["ecc-ek"]["csr"]))
    problem_of(one.enrol(one.nonce()), 403, "attested_key_mismatch")
