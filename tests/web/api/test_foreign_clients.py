"""Requests as programs of devices send them: each is accepted everywhere."""

from __future__ import annotations

import base64
import ssl
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from flask import Flask

from app import portal_of
from tests.support.est import Device, certificates_of, csr_der, device, new_key, refused
from tests.support.foreign import (
    BASIC_CONSTRAINTS,
    CA,
    COMMON_NAME,
    FILES,
    PRINTABLE,
    ForeignCertificate,
    algorithm,
    name,
    signature,
)
from tests.support.harness import ON_SQLITE, Api
from tests.support.ocsp import oid, sequence, tlv
from workflows.enrolment.clients import CLIENT_CAS

pytestmark = ON_SQLITE


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_a_csr_of_another_program_is_certified_over_each_interface(api: Api, path: Path) -> None:
    assert api.register(name="pump-1", csr=path.read_text())["certificate"]
    certificates_of(device(api).call("POST", "simpleenroll", path.read_bytes()))


def test_a_device_with_a_key_of_4096_bits_enrols(api: Api) -> None:
    request = csr_der(rsa.generate_private_key(65537, 4096))
    [certificate] = certificates_of(device(api, key_types=["rsa-4096"]).enrol(request))
    assert isinstance(certificate.public_key(), rsa.RSAPublicKey)
    assert "rsa-4096" in refused(device(api, key_types=["rsa-3072"]).enrol(request), 400)


def test_a_factory_certificate_with_slips_below_a_ca_with_slips_enrols_a_device(api: Api, app: Flask) -> None:
    ca_key, key = new_key(), new_key()
    null, maker = algorithm(ca_key, b"\x05\x00"), name((COMMON_NAME, PRINTABLE, b"Maker_CA"))
    ca = ForeignCertificate(ca_key, ca_key, maker, subject=maker, extensions=(CA,), signed_with=null).der()
    added = api.post("/manufacturers", {"name": "A maker", "certificate": ssl.DER_cert_to_PEM_cert(ca)})
    assert added.status_code == 201, added.text
    proof = base64.b64encode(signature(ca_key, added.json["nonce"].encode())).decode()
    proven = api.post(f"/manufacturers/{added.json['manufacturer_id']}/proof", {"signature": proof})
    assert proven.json["status"] == "registered"
    in_tls = ssl.create_default_context(cafile=str(portal_of(app).settings.tls_dir / CLIENT_CAS))
    assert ca in in_tls.get_ca_certs(binary_form=True)

    not_a_ca = sequence(oid(BASIC_CONSTRAINTS), tlv(1, b"\0"), tlv(4, sequence(tlv(1, b"\0"))))
    factory = ForeignCertificate(
        key, ca_key, maker, subject=name((COMMON_NAME, PRINTABLE, b"dev_1")), extensions=(not_a_ca,), signed_with=null
    )
    [certificate] = certificates_of(Device(api, certificate=factory.der()).enrol())
    assert api.get(f"/devices/{certificate.subject.rfc4514_string()[3:]}").json["name"] == "dev_1"
