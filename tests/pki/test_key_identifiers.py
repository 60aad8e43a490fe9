"""A CA's subjectKeyIdentifier counts as its own if it is a hash of its key, in the ways that standards name."""

from __future__ import annotations

import hashlib

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from pki.client_certificates import has_identifier_of_its_key
from pki.outer_chain import spki
from tests.support.pki import Authority

LENGTH_OF_THE_KEY = 65  # octets of a point on P-256, uncompressed


@pytest.mark.parametrize(
    ("name", "whole", "octets"),
    [
        ("sha1", False, 20), ("sha256", False, 20), ("sha384", False, 20), ("sha512", False, 20),
        ("sha256", False, 32), ("sha256", True, 32), ("sha1", True, 20),
    ],
)  # fmt: skip
def test_a_hash_of_the_key_is_its_own(name: str, whole: bool, octets: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = x509.SubjectKeyIdentifier.from_public_key

    def identifier(key: object) -> x509.SubjectKeyIdentifier:
        info = spki(key)
        content = info if whole else info[-LENGTH_OF_THE_KEY:]
        return x509.SubjectKeyIdentifier(hashlib.new(name, content).digest()[:octets])

    monkeypatch.setattr(x509.SubjectKeyIdentifier, "from_public_key", identifier)
    der = Authority("Maker CA").certificate.public_bytes(Encoding.DER)
    monkeypatch.setattr(x509.SubjectKeyIdentifier, "from_public_key", made)
    assert has_identifier_of_its_key(der)


@pytest.mark.parametrize("identifier", [b"", b"\0" * 20, b"x"])
def test_any_other_one_is_not(identifier: bytes) -> None:
    der = Authority("Maker CA", key_identifier=identifier or hashlib.sha1(b"other", usedforsecurity=False).digest())
    assert not has_identifier_of_its_key(der.certificate.public_bytes(Encoding.DER))
