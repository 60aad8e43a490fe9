"""Read and write PEM and DER."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import contextmanager

from pyasn1.codec.der import decoder, encoder
from pyasn1.error import PyAsn1Error
from pyasn1.type import tag, univ
from pyasn1.type.base import Asn1Item

from core.errors import PortalError

_BLOCK = 48 << 10  # bytes: a multiple of the 48 that fill a line


@contextmanager
def failing_as(failure: PortalError) -> Iterator[None]:
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
