"""Read what devices and their manufacturers have signed, in encodings that DER forbids but that many programs write.

``cryptography`` reads strict DER only. So the parts that count are written again in strict DER for it, the others are
left out, and the signature is verified over the bytes as they came. Reading takes linear time: elements are split
level by level, to a fixed depth, and their number is limited.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa

from pki.encoding import (
    BIT_STRING,
    BOOLEAN,
    INTEGER,
    OBJECT_IDENTIFIER,
    OCTET_STRING,
    SEQUENCE,
    SET,
    UTF8_STRING,
    Element,
    failing_as,
    join,
    split,
)

Name = tuple[frozenset[tuple[str, str]], ...]  # of RDNs, each of pairs of a dotted OID and a text

_MAX_OID_BYTES = 32
_NULL = join(0x05)
_TRUE = join(BOOLEAN, b"\xff")
# Algorithms whose parameters are NULL (RFC 4055 §2.1, RFC 3279 §2.3.1), and those that have none (RFC 5758 §3.2,
# RFC 8410 §3). mbedTLS 2 writes NULL for ECDSA, and others leave it out for RSA.
_NULL_PARAMETERS = frozenset({f"1.2.840.113549.1.1.{number}" for number in (1, 4, 5, 11, 12, 13, 14)})
_NO_PARAMETERS = frozenset({"1.3.101.112", "1.2.840.10045.4.1", *(f"1.2.840.10045.4.3.{n}" for n in range(1, 5))})
# Texts in names: each kind of string with the encoding that programs use in it, whatever its alphabet is meant to be.
_TEXTS = {0x0C: "utf-8", 0x12: "ascii", 0x13: "utf-8", 0x14: "latin-1", 0x16: "utf-8", 0x1A: "utf-8",
          0x1C: "utf-32-be", 0x1E: "utf-16-be"}  # fmt: skip
_REQUESTED_EXTENSIONS = frozenset({"1.2.840.113549.1.9.14", "1.3.6.1.4.1.311.2.1.14"})  # RFC 2985 §5.4.2, Microsoft's
_ALTERNATIVE_NAMES = "2.5.29.17"
_KEY_IDENTIFIER, _KEY_USAGE, _BASIC_CONSTRAINTS, _PURPOSES = "2.5.29.14", "2.5.29.15", "2.5.29.19", "2.5.29.37"
_NEEDED = frozenset({_KEY_IDENTIFIER, _KEY_USAGE, _BASIC_CONSTRAINTS, _PURPOSES})


@dataclass(frozen=True, slots=True)
class ForeignCsr:
    """A CSR: ``strict`` has its public key, signature and algorithm, but no subject; ``content`` is what was signed.

    ``alternative_names`` are the names of that extension, each in DER, once for each time that it is requested.
    """

    strict: x509.CertificateSigningRequest
    content: bytes
    public_key: bytes  # SubjectPublicKeyInfo, strict DER
    subject: Name
    attributes: frozenset[str]  # dotted OIDs
    alternative_names: tuple[tuple[bytes, ...], ...]


@dataclass(frozen=True, slots=True)
class ForeignCertificate:
    """A certificate as it came, ``der``: ``strict`` has the same names, dates and key; ``content`` is what was signed.

    Of its extensions ``strict`` has those that decide about its use, and all that are critical; ``extensions`` has the
    values of all as they came, by dotted OID.
    """

    strict: x509.Certificate
    content: bytes
    der: bytes
    issuer: Name
    subject: Name
    extensions: Mapping[str, bytes]


# --- CSRs -----------------------------------------------------------------------------------------------------------


def parse_csr(der: bytes) -> ForeignCsr:
    """Read a PKCS#10 request (RFC 2986 §4); raises ``ValueError``, whose text says what the CSR is or has.

    The version does not count, nor whether subject, attributes and their values are as they should be.
    """
    content, algorithm, signature = _signed(der)
    elements = split(content.content)
    if elements and elements[0].tag == 0xA0:
        raise ValueError("is a certificate, not a PKCS#10 request")
    if elements and elements[0].tag == INTEGER:
        del elements[0]
    if [element.tag for element in elements[:2]] != [SEQUENCE, SEQUENCE]:
        raise ValueError("has no subject (it may be empty) with a public key after it")
    subject, key = elements[:2]
    public_key = _public_key(key)
    info = join(SEQUENCE, join(INTEGER, b"\0"), join(SEQUENCE), public_key, join(0xA0))
    rewritten = join(SEQUENCE, info, _algorithm(algorithm), signature.der)
    with failing_as(ValueError("has a public key, a signature or an algorithm that cannot be read")):
        strict = x509.load_der_x509_csr(rewritten)
    attributes = list(_attributes(elements[2:]))
    return ForeignCsr(
        strict,
        content.der,
        public_key,
        read_name(subject.der),
        frozenset(oid for oid, _ in attributes),
        tuple(_requested_names(attributes)),
    )


def _attributes(elements: Sequence[Element]) -> Iterator[tuple[str, Element]]:
    """Return each value of each attribute; what is not an attribute is ignored."""
    for attribute in _children(elements[0]) if elements and elements[0].tag == 0xA0 else []:
        parts = _children(attribute)
        if len(parts) == 2 and parts[0].tag == OBJECT_IDENTIFIER:
            oid = _dotted(parts[0])
            yield from ((oid, value) for value in _children(parts[1]) or [parts[1]])


def _requested_names(attributes: Sequence[tuple[str, Element]]) -> Iterator[tuple[bytes, ...]]:
    for oid, value in attributes:
        for extension in _children(value) if oid in _REQUESTED_EXTENSIONS else []:
            parts = _children(extension)
            if len(parts) > 1 and parts[0].tag == OBJECT_IDENTIFIER and _dotted(parts[0]) == _ALTERNATIVE_NAMES:
                yield read_alternative_names(parts[-1].content)


def read_alternative_names(der: bytes) -> tuple[bytes, ...]:
    """Split the value of a subjectAltName extension into its names; one that is malformed is like none that is not."""
    outer = _children(Element(SEQUENCE, der, der))
    return tuple(element.der for element in _children(outer[0])) if len(outer) == 1 else (der,)


# --- Certificates ---------------------------------------------------------------------------------------------------


def read_certificate(der: bytes) -> ForeignCertificate:
    """Read an X.509 certificate (RFC 5280 §4.1); raises ``ValueError``, whose text says what the certificate has.

    The version and the serial number do not count.
    """
    content, algorithm, signature = _signed(der)
    elements = [element for element in split(content.content) if element.tag not in (0xA0, 0x81, 0x82)]
    if [element.tag for element in elements[:6]] != [INTEGER, *[SEQUENCE] * 5]:
        raise ValueError("is not an X.509 certificate: number, algorithm, issuer, dates, subject and key do not follow")
    _, inner, issuer, dates, subject, key = elements[:6]
    if _oid_of(inner) != _oid_of(algorithm):
        raise ValueError("names two signature algorithms")
    extensions, values = b"", dict[str, bytes]()
    if len(elements) > 6:
        kept, values = _extensions(elements[6])
        extensions = join(0xA3, join(SEQUENCE, *kept))
    signed_by = _algorithm(algorithm)
    info = join(
        SEQUENCE,
        join(0xA0, join(INTEGER, b"\2")),
        join(INTEGER, b"\1"),
        signed_by,
        _strict_name(issuer.der),
        dates.der,
        _strict_name(subject.der),
        _public_key(key),
        extensions,
    )
    with failing_as(ValueError("has dates, a public key, a signature or an algorithm that cannot be read")):
        strict = x509.load_der_x509_certificate(join(SEQUENCE, info, signed_by, signature.der))
    with failing_as(ValueError("has an extension that counts and cannot be read")):
        strict.extensions  # noqa: B018 - they are read when first asked for
    return ForeignCertificate(strict, content.der, der, read_name(issuer.der), read_name(subject.der), values)


def _extensions(explicit: Element) -> tuple[list[bytes], dict[str, bytes]]:
    """Return those that count in strict DER, and the values of all by dotted OID."""
    lists = _children(explicit)
    if explicit.tag != 0xA3 or len(lists) != 1:
        raise ValueError("has something else in place of its extensions")
    values: dict[str, bytes] = {}
    kept = []
    for extension in split(lists[0].content):
        oid, critical, value = _extension(extension)
        if oid in values:
            raise ValueError(f"has the extension {oid} twice")
        values[oid] = value
        if critical or oid in _NEEDED:
            mark = [_TRUE] if critical else []
            kept.append(join(SEQUENCE, _children(extension)[0].der, *mark, join(OCTET_STRING, _value(oid, value))))
    return kept, values


def _extension(element: Element) -> tuple[str, bool, bytes]:
    """Return OID, criticality and value; FALSE may be written out, and any other octet is TRUE, as in BER."""
    parts = _children(element)
    tags = [part.tag for part in parts]
    if tags not in ([OBJECT_IDENTIFIER, OCTET_STRING], [OBJECT_IDENTIFIER, BOOLEAN, OCTET_STRING]):
        raise ValueError("has an extension that is not one of X.509")
    return _dotted(parts[0]), len(parts) == 3 and _is_true(parts[1]), parts[-1].content


def _value(oid: str, value: bytes) -> bytes:
    """Write the extensions in strict DER in which programs are known to write defaults and unused bits."""
    outer = _children(Element(SEQUENCE, value, value))
    if oid == _BASIC_CONSTRAINTS and [element.tag for element in outer] == [SEQUENCE]:
        parts = _children(outer[0])
        ca = [_TRUE] if any(part.tag == BOOLEAN and _is_true(part) for part in parts) else []
        return join(SEQUENCE, *ca, *(part.der for part in parts if part.tag != BOOLEAN))
    if oid == _KEY_USAGE and [element.tag for element in outer] == [BIT_STRING] and outer[0].content[1:]:
        unused, *bits = outer[0].content
        if unused < 8:
            bits[-1] &= 0xFF << unused & 0xFF
            return join(BIT_STRING, b"\0", bytes(bits))
    return value


# --- Signatures -----------------------------------------------------------------------------------------------------


def is_signed_by(key: object, signed: x509.Certificate | x509.CertificateSigningRequest, content: bytes) -> bool:
    """Return whether the signature in ``signed`` is one of ``content`` by this key.

    Raises ``UnsupportedAlgorithm`` or ``ValueError`` for an algorithm that is unknown or not for a key of this kind.
    """
    how = signed.signature_algorithm_parameters
    try:
        match key, how:
            case ed25519.Ed25519PublicKey(), None:
                key.verify(signed.signature, content)
            case ec.EllipticCurvePublicKey(), ec.ECDSA():
                key.verify(signed.signature, content, how)
            case rsa.RSAPublicKey(), padding.PKCS1v15() | padding.PSS():
                key.verify(signed.signature, content, how, _hash_of(signed))
            case _:
                raise ValueError("signed with an algorithm for another kind of key")
    except InvalidSignature:
        return False
    return True


def _hash_of(signed: x509.Certificate | x509.CertificateSigningRequest) -> hashes.HashAlgorithm:
    if signed.signature_hash_algorithm is None:
        raise ValueError("signed without a hash")
    return signed.signature_hash_algorithm


def _signed(der: bytes) -> tuple[Element, Element, Element]:
    """Take apart what all signed structures have in common: content, algorithm, signature."""
    outer = split(der)
    if len(outer) > 1:
        raise ValueError(f"has {len(der) - len(outer[0].der)} bytes after its end")
    parts = split(outer[0].content) if outer and outer[0].tag == SEQUENCE else []
    if [part.tag for part in parts] != [SEQUENCE, SEQUENCE, BIT_STRING]:
        raise ValueError("is not a SEQUENCE of content, signature algorithm and signature in DER")
    content, algorithm, signature = parts
    return content, algorithm, signature


@lru_cache(maxsize=64)  # most requests have the same two
def _algorithm(element: Element) -> bytes:
    """Write an AlgorithmIdentifier with the parameters that its algorithm has, whatever was there."""
    oid = _oid_of(element)
    parts = _children(element)
    if oid in _NULL_PARAMETERS:
        return join(SEQUENCE, parts[0].der, _NULL)
    if oid in _NO_PARAMETERS:
        return join(SEQUENCE, parts[0].der)
    return join(SEQUENCE, *(part.der for part in parts))


def _public_key(element: Element) -> bytes:
    parts = _children(element)
    if [part.tag for part in parts] != [SEQUENCE, BIT_STRING]:
        raise ValueError("has no public key that is a SubjectPublicKeyInfo")
    return join(SEQUENCE, _algorithm(parts[0]), parts[1].der)


# --- Names and other small things -----------------------------------------------------------------------------------


def read_name(der: bytes) -> Name:
    """Read a Name in DER (RFC 5280 §4.1.2.4), with every kind of string; what is not an attribute is ignored."""
    return tuple(frozenset((_dotted(oid), text) for oid, text in rdn) for rdn in _rdns(der))


def texts_of(name: Name, *oids: str) -> list[str]:
    """Return the values of a name's attributes, those of the first OID first."""
    return [text for wanted in oids for rdn in name for oid, text in sorted(rdn) if oid == wanted]


def _strict_name(der: bytes) -> bytes:
    rdns = ([join(SEQUENCE, oid.der, join(UTF8_STRING, text.encode())) for oid, text in rdn] for rdn in _rdns(der))
    return join(SEQUENCE, *(join(SET, *sorted(attributes)) for attributes in rdns))


def _rdns(der: bytes) -> list[list[tuple[Element, str]]]:
    outer = _children(Element(SEQUENCE, der, der))
    rdns = [list(map(_children, _children(rdn))) for rdn in (_children(outer[0]) if outer else [])]
    known = ([(pair[0], _text(pair[1])) for pair in rdn if _is_attribute(pair)] for rdn in rdns)
    return [rdn for rdn in known if rdn]


def _is_attribute(pair: Sequence[Element]) -> bool:
    return len(pair) == 2 and pair[0].tag == OBJECT_IDENTIFIER


def _text(value: Element) -> str:
    encoding = _TEXTS.get(value.tag)
    if encoding is None:
        return f"#{value.der.hex()}"  # as RFC 4514 §2.4 writes values without a text
    try:
        return value.content.decode(encoding)
    except ValueError:
        return value.content.decode("latin-1")


def _oid_of(algorithm: Element) -> str:
    parts = _children(algorithm)
    if not parts or parts[0].tag != OBJECT_IDENTIFIER:
        raise ValueError("has an algorithm without an object identifier")
    return _dotted(parts[0])


def _dotted(oid: Element) -> str:
    """Write an object identifier with dots, one that is malformed or very long in hex."""
    arcs, arc = [], 0
    for byte in oid.content[:_MAX_OID_BYTES]:
        arc = arc << 7 | byte & 0x7F
        if byte < 0x80:
            arcs.append(arc)
            arc = 0
    if not arcs or arc or len(oid.content) > _MAX_OID_BYTES:
        return f"#{oid.content.hex()}"
    first = min(arcs[0] // 40, 2)
    return ".".join(map(str, (first, arcs[0] - 40 * first, *arcs[1:])))


def _is_true(boolean: Element) -> bool:
    return boolean.content != b"\0"


def _children(element: Element) -> list[Element]:
    """Return the elements in an element, none if it has something else in it."""
    try:
        return split(element.content)
    except ValueError:
        return []
