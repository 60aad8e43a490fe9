"""Each thing for which evidence is refused over HTTP, with a code of its own; no device is made."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import cbor2
import pytest

from tests.attestation.test_tokens import with_entry
from tests.support.attestation import Maker, SoftwareTpm, jwk
from tests.support.attested import AttestedDevice, attested_device
from tests.support.est import Device, token
from tests.support.harness import ON_SQLITE, Api, Clock, problem_of
from tests.support.pki import PEM, Authority

pytestmark = ON_SQLITE
Make = Callable[[AttestedDevice], dict[str, Any]]


def other_nonce(device: AttestedDevice) -> dict[str, Any]:
    return device.evidence() | {"nonce": device.nonce()}


def of_another_device(device: AttestedDevice) -> dict[str, Any]:
    other = AttestedDevice(device.api, device.credential, Maker(), device.clock)
    return other.evidence(nonce=device.nonce())


def used(device: AttestedDevice) -> dict[str, Any]:
    evidence = device.evidence()
    device.enrol(evidence | {"evidence": "e30.e30.AA"})
    return evidence


def late(device: AttestedDevice) -> dict[str, Any]:
    evidence = device.evidence()
    device.clock.advance(minutes=5)
    return evidence


def duplicate(device: AttestedDevice) -> dict[str, Any]:
    return device.made(
        "eat-cwt", lambda maker: b"\xd8\x3d" + maker.sign1(with_entry(_payload(maker), b"\x0a", b"\x48" + bytes(8)))
    )


def _payload(maker: Maker) -> bytes:
    return cbor2.dumps(maker.cbor_claims())


def indefinite(device: AttestedDevice) -> dict[str, Any]:
    return device.made("eat-cwt", lambda maker: b"\xd8\x3d\xd2\x9f" + maker.cwt()[4:] + b"\xff")


def deep(device: AttestedDevice) -> dict[str, Any]:
    nested: list[Any] = []
    for _ in range(20):
        nested = [nested]
    return device.evidence(submods=nested)


CASES: dict[str, tuple[Make, str]] = {
    "another nonce": (other_nonce, "attestation_nonce_mismatch"),
    "a used one": (used, "attestation_nonce_used"),
    "a late one": (late, "attestation_nonce_expired"),
    "one that was made up": (lambda device: device.evidence(nonce="A" * 43), "attestation_nonce_unknown"),
    "one that is no Base64url": (lambda device: device.evidence() | {"nonce": "A" * 42 + "B"}, "evidence_malformed"),
    "another device's evidence": (of_another_device, "evidence_signature_invalid"),
    "another key": (
        lambda device: device.evidence(cnf={"jwk": jwk(Maker().key.public_key())}),
        "attested_key_mismatch",
    ),
    "no key": (lambda device: device.evidence(cnf=None), "attested_key_missing"),
    "none": (
        lambda device: device.made("eat-jwt", lambda maker: maker.jwt({"alg": "none"})),
        "evidence_algorithm_refused",
    ),
    "HS256": (
        lambda device: device.made("eat-jwt", lambda maker: maker.jwt({"alg": "HS256"})),
        "evidence_algorithm_refused",
    ),
    "duplicate keys": (duplicate, "evidence_duplicate_keys"),
    "indefinite length": (indefinite, "evidence_indefinite_length"),
    "depth": (deep, "evidence_too_deep"),
    "a million characters": (lambda device: device.evidence() | {"evidence": "A" * 1_000_000}, "evidence_too_large"),
    "another type": (lambda device: device.evidence() | {"type": "psa"}, "evidence_malformed"),
    "a clock ahead": (
        lambda device: device.evidence(iat=int(device.clock().timestamp()) + 600),
        "evidence_from_the_future",
    ),
    "a clock behind": (lambda device: device.evidence(iat=int(device.clock().timestamp()) - 3600), "evidence_too_old"),
    "another profile": (
        lambda device: device.made("psa", lambda maker: maker.psa({265: "tag:example.com,2026:other"})),
        "evidence_profile_unsupported",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_evidence_is_refused_with_a_code_of_its_own(api: Api, clock: Clock, name: str) -> None:
    make, code = CASES[name]
    device = attested_device(api, clock=clock)
    problem_of(device.enrol(make(device)), 403, code)
    assert not api.get("/devices").json["devices"]
    device.enrol(device.evidence())
    assert len(api.get("/devices").json["devices"]) == 1


def test_what_the_policy_refuses_is_refused(api: Api) -> None:
    for rules in (
        {"debug": ["enabled"]},
        {"lifecycle": ["secured"]},
        {"types": ["psa"]},
        {"reference_values": [CLASS]},
    ):
        device = attested_device(api, **rules)
        problem_of(device.enrol(device.evidence()), 403, "attestation_policy_failed")
    assert not api.get("/devices").json["devices"]


CLASS = {"environment": {"class": {"class_id": "00" * 32}}, "measurements": []}


def tpm_device(api: Api, clock: Clock, trusted: Authority, tpm: SoftwareTpm) -> AttestedDevice:
    root = trusted.certificate.public_bytes(PEM).decode()
    secret = token(api, attestation={"mode": "require", "anchors": [root]})
    return AttestedDevice(api, Device(api, secret), Maker(key=tpm.key), clock)


def evidence_of(device: AttestedDevice, tpm: SoftwareTpm, **changes: Any) -> dict[str, Any]:

    return device.made("tpm2", lambda maker: json.dumps(tpm.evidence(nonce=maker.challenge.nonce, **changes)).encode())


def test_a_chain_to_another_root_is_refused(api: Api, clock: Clock) -> None:
    tpm = SoftwareTpm(authority=Authority("TPM maker", now=clock()), now=clock())
    device = tpm_device(api, clock, Authority("another maker", now=clock()), tpm)
    problem_of(device.enrol(evidence_of(device, tpm)), 403, "attestation_anchor_unknown")


def test_an_anchor_that_has_expired_vouches_for_nobody(api: Api, clock: Clock) -> None:
    tpm = SoftwareTpm(authority=Authority("TPM maker", now=clock()), now=clock())
    body = {"name": "maker", "expires_in_hours": 8760}
    root = tpm.authority.certificate.public_bytes(PEM).decode()
    secret = token(api, attestation={"mode": "require", "anchors": [root]}, **body)
    device = AttestedDevice(api, Device(api, secret), Maker(key=tpm.key), clock)
    clock.advance(days=40)
    tpm.now = clock()
    problem_of(device.enrol(evidence_of(device, tpm)), 403, "attestation_anchor_expired")


def test_an_attestation_key_that_could_sign_anything_is_refused(api: Api, clock: Clock) -> None:
    authority = Authority("TPM maker", now=clock())
    tpm = SoftwareTpm(authority=authority, now=clock(), ak_attributes=0x00040072)
    device = tpm_device(api, clock, authority, tpm)
    problem_of(device.enrol(evidence_of(device, tpm)), 403, "attestation_key_refused")


def test_a_body_over_the_limit_is_not_read(api: Api) -> None:
    device = attested_device(api)
    problem_of(device.enrol(device.evidence() | {"evidence": "A" * (2 << 20)}), 413, "body_too_large")
