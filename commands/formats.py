"""Opens a bundle in whichever form it was delivered."""

from __future__ import annotations

import dataclasses

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key, pkcs12

from commands.bundle import BUNDLE_MOST, CA, CERTIFICATE, CHAIN, KEY, NAMES, Bundle, open_bundle
from commands.errors import BundleLocked, CheckFailed

FORMATS = ("zip", "p12", "pem")
P12 = "device.p12"
FILES = (*NAMES, P12)

_DER_SEQUENCE = b"\x30"  # a PKCS#12 file begins with it, a ZIP with PK
_LOCKED = "The password does not open this bundle, or the bundle was altered."
_UNPROTECTED = (
    "Nothing protects ca.pem in a bundle of this form (pem): before the device trusts it, compare it with portal ca."
)


def extension_of(content: bytes) -> str:
    """What the name of a bundle's file ends with."""
    return "p12" if content.startswith(_DER_SEQUENCE) else "zip"


def open_any(content: bytes, password: str) -> Bundle:
    """Read a bundle of any form; raises ``BundleLocked`` for a wrong password, ``CheckFailed`` for one that is none.

    The key of a ``p12`` stays in it, that of a ``pem`` stays encrypted: these are for programs that open them.
    """
    if content.startswith(_DER_SEQUENCE):
        return _open_p12(content, password)
    if b"-----BEGIN ENCRYPTED PRIVATE KEY-----" in content:
        return _open_pem(content, password)
    return open_bundle(content, password)


def _open_p12(content: bytes, password: str) -> Bundle:
    if len(content) > BUNDLE_MOST:
        raise CheckFailed(f"This bundle is larger than the {BUNDLE_MOST} bytes that any has.")
    try:
        store = pkcs12.load_pkcs12(content, password.encode())
    except (ValueError, UnsupportedAlgorithm):
        raise BundleLocked(_LOCKED) from None
    if store.key is None or store.cert is None:
        raise CheckFailed("There is no key with its certificate in this PKCS#12 file; it is not a device's bundle.")
    leaf = store.cert.certificate
    above = [other.certificate for other in store.additional_certs]
    between = [certificate for certificate in above if certificate.issuer != certificate.subject]
    files = {P12: content, CERTIFICATE: _pem(leaf), CHAIN: _pem(leaf, *between), CA: _pem(*above)}
    return Bundle(files, (), store.key.public_key())


def _open_pem(content: bytes, password: str) -> Bundle:
    bundle = open_bundle(content, password, encrypted=())
    try:
        key = load_pem_private_key(bundle.files[KEY], password.encode())
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise BundleLocked(_LOCKED) from None
    return dataclasses.replace(bundle, notes=(*bundle.notes, _UNPROTECTED), key=key.public_key())


def _pem(*certificates: x509.Certificate) -> bytes:
    return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in certificates)
