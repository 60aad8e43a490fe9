"""Requests as programs of devices send them: each is accepted everywhere."""

from __future__ import annotations

import base64
import ssl
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding
from flask import Flask

from app import portal_of
from config import KEY_TYPES
from tests.support.est import Device, certificates_of, csr_der, device, new_key, refused
from tests.support.foreign import (
    BASIC_CONSTRAINTS,
    CA,
    COMMON_NAME,
    FILES,
    KEY_IDENTIFIER,
    PRINTABLE,
    UTF8,
    ForeignCertificate,
    Key,
    algorithm,
    name,
    signature,
)
from tests.support.harness import ON_SQLITE, Api, problem_of
from tests.support.ocsp import extension, integer, oid, sequence, tlv
from tests.support.pki import Authority
from workflows.enrolment.clients import CLIENT_CAS

pytestmark = ON_SQLITE


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_a_csr_of_another_program_is_certified_over_each_interface(api: Api, path: Path) -> None:
    registered = api.register(name="pump-1", csr=path.read_text())
    assert registered["certificate"]
    api.post(f"/revoke/{registered['device_id']}")  # its key is free for the next one
    certificates_of(device(api).call("POST", "simpleenroll", path.read_bytes()))


def test_a_token_may_allow_every_kind_of_key(api: Api) -> None:
    assert api.post("/enrolment-tokens", {"name": "a", "type": "pump", "key_types": list(KEY_TYPES)}).status_code == 201


def test_a_device_with_a_key_of_4096_bits_enrols(api: Api) -> None:
    request = csr_der(rsa.generate_private_key(65537, 4096))
    [certificate] = certificates_of(device(api, key_types=["rsa-4096"]).enrol(request))
    assert isinstance(certificate.public_key(), rsa.RSAPublicKey)
    assert "rsa-4096" in refused(device(api, key_types=["rsa-3072"]).enrol(request), 400)


# --- Two CAs of one name ------------------------------------------------------------------------------------------


def ca_named(common_name: bytes, key: Key, *, identifier: bytes = b"", serial_number: int = 7) -> bytes:
    """The certificate of a CA with a key identifier, or with none."""
    subject = name((COMMON_NAME, UTF8, common_name))
    extensions = (CA, *([extension(KEY_IDENTIFIER, tlv(4, identifier))] if identifier else []))
    return ForeignCertificate(
        key, key, subject, subject=subject, serial_number=integer(serial_number), extensions=extensions
    ).der()


def add(api: Api, ca: bytes) -> Any:
    return api.post("/manufacturers", {"name": "A maker", "certificate": ssl.DER_cert_to_PEM_cert(ca)})


def prove(api: Api, key: Key, added: Any) -> Any:
    proof = base64.b64encode(signature(key, added.json["nonce"].encode())).decode()
    return api.post(f"/manufacturers/{added.json['manufacturer_id']}/proof", {"signature": proof})


def test_the_ca_that_counts_is_the_one_that_has_signed_the_device_s_certificate_directly(api: Api) -> None:
    root = Authority("A maker's root")
    intermediate = Authority("A maker's CA", root)
    one = Device(api, certificate=intermediate.issue("sn-1").certificate.public_bytes(Encoding.DER))
    for authority in (root, intermediate):
        added = add(api, authority.certificate.public_bytes(Encoding.DER))
        assert "directly" in refused(one.enrol(), 403)
        assert prove(api, authority.key, added).status_code == 200
    certificates_of(one.enrol())


@pytest.mark.parametrize(
    ("common_name", "identifiers", "status"),
    [
        (b"Maker", (b"", b""), 409),
        (b"Maker", (b"one", b""), 409),
        (b"Maker", (b"", b"two"), 409),
        (b"Maker", (b"one", b"one"), 409),
        (b" mAKER ", (b"", b""), 409),
        (b"Maker", (b"one", b"two"), 201),
        (b"Another", (b"", b""), 201),
    ],
)
def test_a_ca_that_would_lock_out_the_devices_of_another_is_refused(
    api: Api, common_name: bytes, identifiers: tuple[bytes, bytes], status: int
) -> None:
    keys = new_key(), new_key()
    first = add(api, ca_named(b"Maker", keys[0], identifier=identifiers[0]))
    second = ca_named(common_name, keys[1], identifier=identifiers[1])
    early = add(api, second)  # before the first is registered: only the proof shows whether both can be
    assert prove(api, keys[0], first).status_code == 200
    assert prove(api, keys[1], early).status_code == (200 if status == 201 else 409)
    if status == 409:
        problem = problem_of(add(api, ca_named(common_name, new_key(), identifier=identifiers[1])), 409, "conflict")
        assert "subjectKeyIdentifier" in problem["detail"]


def test_the_next_certificate_of_the_same_key_is_accepted(api: Api) -> None:
    key = new_key()
    assert prove(api, key, add(api, ca_named(b"Maker", key))).status_code == 200
    assert add(api, ca_named(b"Maker", key, serial_number=8)).status_code == 201


def test_a_ca_with_the_name_of_the_portal_s_own_is_refused(api: Api, app: Flask) -> None:
    [own] = portal_of(app).authority.first.issuing.issuer.certificate.subject
    problem_of(add(api, ca_named(str(own.value).encode(), new_key())), 409, "conflict")


# --- Factory certificates -----------------------------------------------------------------------------------------


def test_a_factory_certificate_with_slips_below_a_ca_with_slips_enrols_a_device(api: Api, app: Flask) -> None:
    ca_key, key = new_key(), new_key()
    null, maker = algorithm(ca_key, b"\x05\x00"), name((COMMON_NAME, PRINTABLE, b"Maker_CA"))
    ca = ForeignCertificate(ca_key, ca_key, maker, subject=maker, extensions=(CA,), signed_with=null).der()
    added = add(api, ca)
    assert added.status_code == 201, added.text
    proven = prove(api, ca_key, added)
    assert proven.json["status"] == "registered"
    in_tls = ssl.create_default_context(cafile=str(portal_of(app).settings.tls_dir / CLIENT_CAS))
    assert ca in in_tls.get_ca_certs(binary_form=True)

    not_a_ca = sequence(oid(BASIC_CONSTRAINTS), tlv(1, b"\0"), tlv(4, sequence(tlv(1, b"\0"))))
    factory = ForeignCertificate(
        key, ca_key, maker, subject=name((COMMON_NAME, PRINTABLE, b"dev_1")), extensions=(not_a_ca,), signed_with=null
    )
    [certificate] = certificates_of(Device(api, certificate=factory.der()).enrol())
    assert api.get(f"/devices/{certificate.subject.rfc4514_string()[3:]}").json["name"] == "dev_1"
