"""Encode certificates (RFC 5280 §4.1) around parts that are DER already, so that what many share is encoded once."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from pki.encoding import GENERALIZED_TIME, INTEGER, SEQUENCE, UTC_TIME, join
from pki.issuers import SERIAL_BITS

_VERSION_3 = join(0xA0, join(INTEGER, b"\x02"))
_EXTENSIONS = 0xA3


def tbs_certificate(
    *,
    serial_number: int,
    signature: bytes,
    issuer: bytes,
    validity: tuple[datetime, datetime],
    subject: bytes,
    public_key: bytes,
    extensions: Iterable[bytes],
) -> bytes:
    """Encode what a CA signs, the TBSCertificate of a version 3 certificate; bytes are DER and are taken as they are.

    ``signature`` is the AlgorithmIdentifier, ``validity`` has whole seconds in UTC. Raises ``ValueError`` for a serial
    number that is not positive or longer than 20 bytes, and for times that do not follow each other.
    """
    begin, end = validity
    if not 0 < serial_number < 1 << SERIAL_BITS:
        raise ValueError("a serial number is positive and has at most 20 bytes (RFC 5280 §4.1.2.2)")
    if not begin < end:
        raise ValueError("notAfter must come after notBefore")
    return join(
        SEQUENCE,
        _VERSION_3,
        join(INTEGER, serial_number.to_bytes(serial_number.bit_length() // 8 + 1, "big")),
        signature,
        issuer,
        join(SEQUENCE, _time(begin), _time(end)),
        subject,
        public_key,
        join(_EXTENSIONS, join(SEQUENCE, *extensions)),
    )


def _time(moment: datetime) -> bytes:
    """Encode a time of a certificate: in two forms, by its year (RFC 5280 §4.1.2.5)."""
    if not 1950 <= moment.year < 2050:
        return join(GENERALIZED_TIME, f"{moment:%Y%m%d%H%M%SZ}".encode("ascii"))
    return join(UTC_TIME, f"{moment:%y%m%d%H%M%SZ}".encode("ascii"))
