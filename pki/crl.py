"""Sign certificate revocation lists, and verify them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, padding, rsa
from cryptography.x509.oid import SignatureAlgorithmOID

from core.errors import SignatureCheckFailed
from pki.algorithms import check_public_key, signature_identifier, signed
from pki.encoding import MAX_ELEMENTS, SEQUENCE, join, sequence_elements, split
from pki.issuers import SERIAL_BITS, Extension, Issuer, Reason, extension, signing_key, whole_second

VerifyingKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey | ed25519.Ed25519PublicKey | ed448.Ed448PublicKey

_SERIAL_NUMBER = re.compile(r"[0-9a-f]{1,40}")
_KEY_OF_NO_CA = ed25519.Ed25519PrivateKey.generate()
_ANY_TIME = datetime(2000, 1, 1, tzinfo=UTC)


def _reason_extension(reason: Reason) -> Extension:
    return extension(x509.CRLReason(x509.ReasonFlags[reason.value]))


# "unspecified" is expressed by the absence of the extension (RFC 5280 §5.3.1).
_REASON_EXTENSIONS = {reason: _reason_extension(reason) for reason in Reason if reason is not Reason.UNSPECIFIED}


def crl_entry(serial_number: str, revoked_at: datetime, reason: Reason) -> x509.RevokedCertificate:
    """Make the CRL entry of a certificate (RFC 5280 §5.1.2.6, §5.3), which can be kept and put into many CRLs.

    ``serial_number`` is lower-case hex, ``revoked_at`` is cut to whole seconds.
    """
    if not _SERIAL_NUMBER.fullmatch(serial_number):
        raise ValueError("a serial number is 1 to 40 lower-case hex digits")
    builder = x509.RevokedCertificateBuilder().serial_number(int(serial_number, 16))
    builder = builder.revocation_date(whole_second(revoked_at))
    if reason in _REASON_EXTENSIONS:
        builder = builder.add_extension(_REASON_EXTENSIONS[reason].value, critical=False)
    return builder.build()


def encode_entries(entries: Iterable[x509.RevokedCertificate]) -> Iterator[bytes]:
    """Yield the DER of each of ``crl_entry``'s entries, to be kept for ``sign_crl``."""
    left = iter(entries)
    while batch := list(itertools.islice(left, MAX_ELEMENTS)):
        *_, revoked = _encoded_fields(x509.Name([]), _ANY_TIME, _ANY_TIME + timedelta(1), [], batch)
        yield from (entry.der for entry in split(split(revoked)[0].content))


def sign_crl(
    issuer: Issuer, entries: Iterable[bytes], *, number: int, this_update: datetime, next_update: datetime
) -> bytes:
    """Sign a full v2 CRL (RFC 5280 §5) of what ``encode_entries`` yields, as DER; ``number`` must grow each time.

    An issuer that has expired still signs: a revocation is never refused. Raises ``IssuerUnusable`` if the issuer's
    key is not on this machine, ``SignatureCheckFailed`` if the result does not verify.
    """
    key = signing_key(issuer)
    if not 0 < number < 1 << SERIAL_BITS:
        raise ValueError("a CRL number is positive and has at most 20 bytes (RFC 5280 §5.2.3)")
    begin, end = whole_second(this_update), whole_second(next_update)
    if not begin < end:
        raise ValueError("nextUpdate must come after thisUpdate")
    listed = list(entries)
    version, _, *names_and_times, extensions = _encoded_fields(
        issuer.certificate.subject, begin, end, [issuer.authority_key_identifier, extension(x509.CRLNumber(number))], []
    )
    algorithm = signature_identifier(key, issuer.signature_hash)
    revoked = [join(SEQUENCE, *listed)] if listed else []  # absent, not empty (RFC 5280 §5.1.2.6)
    content = join(SEQUENCE, version, algorithm, *names_and_times, *revoked, extensions)
    der = signed(content, key, issuer.signature_hash)
    if not _is_as_meant(der, issuer, number, len(listed), begin, end):
        raise SignatureCheckFailed(
            "A new CRL did not verify under its issuer and was thrown away; check the machine and the CA's key."
        )
    return der


def _encoded_fields(
    name: x509.Name,
    begin: datetime,
    end: datetime,
    extensions: Sequence[Extension],
    revoked: list[x509.RevokedCertificate],
) -> list[bytes]:
    """Have ``cryptography`` encode the fields of a TBSCertList (RFC 5280 §5.1.2).

    It encodes all entries again for each CRL, and nothing else in the process runs in the 0.2 s which that takes for
    100,000. So they are encoded once, in a CRL that is of no CA and is dropped, as are the other fields each time.
    """
    builder = x509.CertificateRevocationListBuilder(extensions=list(extensions), revoked_certificates=revoked)
    builder = builder.issuer_name(name).last_update(begin).next_update(end)
    return sequence_elements(builder.sign(_KEY_OF_NO_CA, None).tbs_certlist_bytes)


def _is_as_meant(der: bytes, issuer: Issuer, number: int, count: int, begin: datetime, end: datetime) -> bool:
    """Read the CRL back from its bytes, compare its fields and verify it under the issuer's key."""
    try:
        crl = x509.load_der_x509_crl(der)
        public_key = check_public_key(issuer.certificate.public_key())
        return (
            len(crl) == count
            and crl.issuer == issuer.certificate.subject
            and (crl.last_update_utc, crl.next_update_utc) == (begin.astimezone(UTC), end.astimezone(UTC))
            and crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number == number
            and is_signed_by(crl, der, public_key)
        )
    except (ValueError, x509.ExtensionNotFound):
        return False


def is_signed_by(crl: x509.CertificateRevocationList, der: bytes, key: VerifyingKey) -> bool:
    """Return whether a CRL, given with its DER, is signed by this key (RFC 5280 §5.1.1).

    Verifies the bytes as they are: ``crl.is_signature_valid`` encodes a CRL of 100,000 entries again first, which takes
    0.1 s. Raises ``ValueError`` or ``UnsupportedAlgorithm`` if it is signed in a way that cannot be checked.
    """
    content, _algorithm, _signature = sequence_elements(der)
    if crl.signature_algorithm_oid == SignatureAlgorithmOID.RSASSA_PSS:
        raise UnsupportedAlgorithm("the portal's CAs do not sign with RSASSA-PSS")
    try:
        _verify(key, crl, content)
    except InvalidSignature:
        return False
    return True


def _verify(key: VerifyingKey, crl: x509.CertificateRevocationList, content: bytes) -> None:
    algorithm = crl.signature_hash_algorithm
    if isinstance(key, ed25519.Ed25519PublicKey | ed448.Ed448PublicKey):
        key.verify(crl.signature, content)
    elif algorithm is None:
        raise InvalidSignature("a key of this kind does not sign without a hash")
    elif isinstance(key, rsa.RSAPublicKey):
        key.verify(crl.signature, content, padding.PKCS1v15(), algorithm)
    else:
        key.verify(crl.signature, content, ec.ECDSA(algorithm))
