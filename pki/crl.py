"""Signs certificate revocation lists."""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import UTC, datetime

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from core.errors import SignatureCheckFailed
from pki.algorithms import check_public_key
from pki.der import SEQUENCE, Signed, children, element, sign, take_apart, verifies
from pki.issuers import SERIAL_BITS, Issuer, Reason, signing_key, whole_second
from pki.profiles import extension

_SERIAL_NUMBER = re.compile(r"[0-9a-f]{1,40}")
_INTEGER, _BIT_STRING, _UTC_TIME, _GENERALIZED_TIME, _EXTENSIONS_TAG = 0x02, 0x03, 0x17, 0x18, 0xA0
_REASON_OID = bytes.fromhex("0603551d15")  # id-ce-cRLReasons
_REASON_CODES = {
    Reason.KEY_COMPROMISE: 1,
    Reason.CA_COMPROMISE: 2,
    Reason.AFFILIATION_CHANGED: 3,
    Reason.SUPERSEDED: 4,
    Reason.CESSATION_OF_OPERATION: 5,
    Reason.CERTIFICATE_HOLD: 6,
    Reason.PRIVILEGE_WITHDRAWN: 9,
    Reason.AA_COMPROMISE: 10,
}


def _reason_extensions(reason: Reason) -> bytes:
    code = _REASON_CODES.get(reason)
    if code is None:  # "unspecified" is said by leaving the extension out (RFC 5280 §5.3.1)
        return b""
    value = element(0x04, bytes([0x0A, 1, code]))  # OCTET STRING with an ENUMERATED
    return element(SEQUENCE, element(SEQUENCE, _REASON_OID, value))


_REASON_EXTENSIONS = {reason: _reason_extensions(reason) for reason in Reason}


def crl_entry(serial_number: str, revoked_at: datetime, reason: Reason) -> bytes:
    """Make the CRL entry of a certificate, as DER (RFC 5280 §5.1.2.6, §5.3); it can be kept, and stand in many CRLs.

    ``serial_number`` is lower-case hex, ``revoked_at`` is cut to whole seconds.
    """
    if not _SERIAL_NUMBER.fullmatch(serial_number):
        raise ValueError("a serial number is 1 to 40 lower-case hex digits")
    number = int(serial_number, 16)
    if not 0 < number < 1 << SERIAL_BITS:
        raise ValueError("a serial number is positive and has 20 bytes at most (RFC 5280 §4.1.2.2)")
    serial = number.to_bytes(number.bit_length() // 8 + 1, "big")
    moment = whole_second(revoked_at)
    if moment.year < 2050:  # RFC 5280 §5.1.2.4
        time = element(_UTC_TIME, f"{moment:%y%m%d%H%M%SZ}".encode())
    else:
        time = element(_GENERALIZED_TIME, f"{moment:%Y%m%d%H%M%SZ}".encode())
    return element(SEQUENCE, element(_INTEGER, serial), time, _REASON_EXTENSIONS[reason])


def sign_crl(
    issuer: Issuer, entries: Iterable[bytes], *, number: int, this_update: datetime, next_update: datetime
) -> bytes:
    """Sign a full v2 CRL (RFC 5280 §5) of ``crl_entry``'s entries, as DER; ``number`` must grow each time.

    An issuer that is out of date still signs: revoking is never refused. Raises ``IssuerUnusable`` where the
    issuer's key is not here, ``SignatureCheckFailed`` where the result does not verify.
    """
    key = signing_key(issuer)
    if not 0 < number < 1 << SERIAL_BITS:
        raise ValueError("a CRL number is positive and has 20 bytes at most (RFC 5280 §5.2.3)")
    begin, end = whole_second(this_update), whole_second(next_update)
    if not begin < end:
        raise ValueError("nextUpdate must come after thisUpdate")
    listed = list(entries)
    der = (
        x509.CertificateRevocationListBuilder(
            extensions=[issuer.authority_key_identifier, extension(x509.CRLNumber(number))]
        )
        .issuer_name(issuer.certificate.subject)
        .last_update(begin)
        .next_update(end)
        .sign(key, issuer.signature_hash)
        .public_bytes(Encoding.DER)
    )
    if listed:
        # The builder takes some 8 µs for each entry, at every CRL: those of old are put in as they were encoded.
        empty = take_apart(der)
        content = _with_entries(empty, listed)
        signature = sign(key, issuer.signature_hash, content)
        der = element(SEQUENCE, content, empty.algorithm, element(_BIT_STRING, b"\0", signature))
    if not _is_as_meant(der, issuer, number, len(listed), begin, end):
        raise SignatureCheckFailed(
            "A new CRL did not verify under its issuer and was thrown away; check the machine and the CA's key."
        )
    return der


def _with_entries(empty: Signed, entries: list[bytes]) -> bytes:
    """The content of a CRL without entries, with entries: they stand before its extensions (RFC 5280 §5.1)."""
    parts = children(empty.content)
    extensions = parts.pop()
    if extensions[0] != _EXTENSIONS_TAG:
        raise ValueError("a CRL of the builder ends with its extensions")
    return element(SEQUENCE, *parts, element(SEQUENCE, *entries), extensions)


def _is_as_meant(der: bytes, issuer: Issuer, number: int, count: int, begin: datetime, end: datetime) -> bool:
    """Read the CRL back with another program than the one that wrote it, and verify it under the issuer's key."""
    try:
        crl = x509.load_der_x509_crl(der)
        public_key = check_public_key(issuer.certificate.public_key())
        return (
            len(crl) == count
            and crl.issuer == issuer.certificate.subject
            and (crl.last_update_utc, crl.next_update_utc) == (begin.astimezone(UTC), end.astimezone(UTC))
            and crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number == number
            and verifies(public_key, issuer.signature_hash, crl.signature, bytes(take_apart(der).content))
        )
    except (ValueError, x509.ExtensionNotFound):
        return False
