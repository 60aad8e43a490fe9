"""Read and write PEM and DER."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pyasn1.codec.der import decoder, encoder
from pyasn1.error import PyAsn1Error
from pyasn1.type import tag, univ
from pyasn1.type.base import Asn1Item

from core.errors import PortalError

_BLOCK = 48 << 10  # bytes: a multiple of the 48 that fill a line


@contextmanager
def failing_as(failure: Exception) -> Iterator[None]:
    """Raise ``failure`` in place of every error in the body of the ``with``, except the portal's own errors.

    The errors that ``cryptography`` documents are several unrelated classes. For malicious input it may also raise a
    panic of its Rust code: a ``BaseException`` without a public name. Signals to the process are not replaced.
    """
    try:
        yield
    except PortalError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise failure from error


_ANY_SEQUENCE = univ.SequenceOf(componentType=univ.Any())


def encode(value: object, schema: Asn1Item | None = None) -> bytes:
    """Encode a value of pyasn1, or a plain one by its schema, as DER."""
    return bytes(encoder.encode(value, asn1Spec=schema))


def encode_sequence(*elements: bytes) -> bytes:
    """Encode a SEQUENCE of elements that are DER already."""
    return encode(elements, _ANY_SEQUENCE)


def explicit(number: int, schema: Asn1Item) -> Asn1Item:
    """Return a schema under the explicit tag ``[number]``."""
    return schema.subtype(explicitTag=tag.Tag(tag.tagClassContext, tag.tagFormatConstructed, number))


def sequence_elements(der: bytes) -> list[bytes]:
    """Split a DER SEQUENCE into its elements, each with tag and length; raises ``ValueError`` if it is malformed."""
    try:
        elements, rest = decoder.decode(der, asn1Spec=_ANY_SEQUENCE)
    except PyAsn1Error as error:
        raise ValueError("not a DER SEQUENCE") from error
    if rest:
        raise ValueError("a DER SEQUENCE is followed by other bytes")
    return [bytes(element) for element in elements]


# --- Elements, without a schema -------------------------------------------------------------------------------------

SEQUENCE, BOOLEAN, INTEGER, BIT_STRING, OCTET_STRING, OBJECT_IDENTIFIER = 0x30, 0x01, 0x02, 0x03, 0x04, 0x06
UTF8_STRING, SET, UTC_TIME, GENERALIZED_TIME = 0x0C, 0x31, 0x17, 0x18
MAX_ELEMENTS = 1000
_MAX_LENGTH_BYTES = 4


@dataclass(frozen=True, slots=True)
class Element:
    """One element of DER: its tag in one byte, its content, and the whole of it."""

    tag: int
    content: bytes
    der: bytes


def split(content: bytes) -> list[Element]:
    """Split concatenated DER into its elements, at most ``MAX_ELEMENTS``, without looking into them.

    Lengths must be definite, but may be longer than needed. Raises ``ValueError``.
    """
    elements: list[Element] = []
    position = 0
    while position < len(content):
        if len(elements) == MAX_ELEMENTS:
            raise ValueError(f"has more than {MAX_ELEMENTS} elements in one place")
        begin, end = _bounds(content, position)
        elements.append(Element(content[position], content[begin:end], content[position:end]))
        position = end
    return elements


def _bounds(content: bytes, position: int) -> tuple[int, int]:
    """Return where the content of the element at ``position`` begins and ends."""
    header = content[position : position + 2]
    if len(header) < 2 or header[0] & 0x1F == 0x1F:
        raise ValueError("is not DER: it has an element without a length, or with a tag of several bytes")
    begin, length = position + 2, header[1]
    if length == 0x80:
        raise ValueError("is not DER: it has an element of indefinite length")
    if length > 0x80:
        count = length - 0x80
        if count > _MAX_LENGTH_BYTES:
            raise ValueError(f"is not DER: it has a length of more than {_MAX_LENGTH_BYTES} bytes")
        begin += count
        length = int.from_bytes(content[position + 2 : begin], "big")
    if begin + length > len(content):
        raise ValueError("is not DER, or was cut off: an element is longer than what contains it")
    return begin, begin + length


def join(tag: int, *contents: bytes) -> bytes:
    """Encode one element of DER with this tag, in one byte, and content."""
    content = b"".join(contents)
    size = len(content)
    if size < 0x80:
        return bytes([tag, size]) + content
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(length)]) + length + content


# --- PEM ------------------------------------------------------------------------------------------------------------


def pem(label: str, der: bytes) -> str:
    """Encode ``der`` as PEM (RFC 7468 §2), with lines of 64 characters as OpenSSL writes them."""
    return f"-----BEGIN {label}-----\n{_lines(der).decode('ascii')}-----END {label}-----\n"


class PemOfSuccessors:
    """Encodes a series of documents as PEM, each of which differs little from the one before.

    Only the blocks that changed are encoded again: for a CRL of 100,000 entries this saves 23 ms.
    """

    def __init__(self, label: str) -> None:
        self._begin, self._end = f"-----BEGIN {label}-----\n".encode(), f"-----END {label}-----\n".encode()
        self._blocks: list[tuple[bytes, bytes]] = []  # of the last document, with their lines

    def pem(self, der: bytes) -> bytes:
        """Encode the next document, as the function ``pem`` does."""
        blocks = []
        for number, start in enumerate(range(0, len(der), _BLOCK)):
            block = der[start : start + _BLOCK]
            known = self._blocks[number] if number < len(self._blocks) else (b"", b"")
            blocks.append(known if known[0] == block else (block, _lines(block)))
        self._blocks = blocks
        return b"".join([self._begin, *(lines for _, lines in blocks), self._end])


def _lines(der: bytes) -> bytes:
    text = base64.b64encode(der)
    return b"".join([text[start : start + 64] + b"\n" for start in range(0, len(text), 64)])
