"""Check the names in a certificate against the name constraints of its issuer (RFC 5280 section 4.2.1.10).

``cryptography`` checks them for DNS names and addresses only, and in certificates of TLS servers. The rules and the
cases that the RFC leaves open are those of OpenSSL, which checks the same where it ends TLS.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from urllib.parse import urlsplit

from pki.encoding import SEQUENCE, Element, split
from pki.foreign import ForeignCertificate, Name, read_alternative_names, read_name, texts_of

_NAME_CONSTRAINTS, _ALTERNATIVE_NAMES = "2.5.29.30", "2.5.29.17"
_COMMON_NAME, _EMAIL_ADDRESS = "2.5.4.3", "1.2.840.113549.1.9.1"
_PERMITTED, _EXCLUDED = 0xA0, 0xA1  # of NameConstraints
_MINIMUM = 0x80  # of GeneralSubtree
_EMAIL, _DNS, _DIRECTORY, _URI, _IP = 0x81, 0x82, 0xA4, 0x86, 0x87  # tags of GeneralName
_HOST_NAME = re.compile(rb"(?!-)[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)+")

_Name = tuple[int, bytes | Name]  # the tag of a GeneralName with its content


def is_permitted(certificate: ForeignCertificate, issuer: ForeignCertificate) -> bool:
    """Return whether the issuer's certificate permits all names of a certificate that it has signed.

    A constraint that cannot be read, or of a kind of name that is not known here but is in the certificate, permits
    nothing.
    """
    value = issuer.extensions.get(_NAME_CONSTRAINTS)
    if value is None:
        return True
    try:
        permitted, excluded = _constraints(value)
        names = list(_names(certificate))
        for tag, name in names:
            bases = [base for kind, base in permitted if kind == tag]
            if bases and not any(_is_within(tag, name, base) for base in bases):
                return False
            if any(_is_within(tag, name, base) for kind, base in excluded if kind == tag):
                return False
    except ValueError:
        return False
    return True


def _constraints(der: bytes) -> tuple[list[_Name], list[_Name]]:
    """Return the permitted and the excluded names; raise ``ValueError`` if the extension is malformed."""
    found: dict[int, list[_Name]] = {_PERMITTED: [], _EXCLUDED: []}
    [outer] = split(der)
    for subtrees in split(outer.content):
        if outer.tag != SEQUENCE or subtrees.tag not in found:
            raise ValueError("is not the value of name constraints")
        found[subtrees.tag] += [_base(subtree) for subtree in split(subtrees.content)]
    return found[_PERMITTED], found[_EXCLUDED]


def _base(subtree: Element) -> _Name:
    base, *limits = split(subtree.content)
    # A minimum of 0 is the default; other limits are not used (RFC 5280 section 4.2.1.10).
    if subtree.tag != SEQUENCE or any((limit.tag, limit.content) != (_MINIMUM, b"\0") for limit in limits):
        raise ValueError("has a subtree with limits")
    return _general_name(base)


def _general_name(element: Element) -> _Name:
    return element.tag, read_name(element.content) if element.tag == _DIRECTORY else element.content


def _names(certificate: ForeignCertificate) -> Iterator[_Name]:
    if certificate.subject:
        yield _DIRECTORY, certificate.subject
    yield from ((_EMAIL, text.encode()) for text in texts_of(certificate.subject, _EMAIL_ADDRESS))
    value = certificate.extensions.get(_ALTERNATIVE_NAMES)
    alternative = [_general_name(split(der)[0]) for der in read_alternative_names(value)] if value is not None else []
    yield from alternative
    if not any(tag == _DNS for tag, _ in alternative):  # then programs take a common name like a host's for one
        common_names = (text.encode() for text in texts_of(certificate.subject, _COMMON_NAME))
        yield from ((_DNS, text) for text in common_names if _HOST_NAME.fullmatch(text))


# --- Whether a name is within a subtree ------------------------------------------------------------------------------


def _is_within(tag: int, name: bytes | Name, base: bytes | Name) -> bool:
    """Return whether a name is in a subtree of its kind; raise ``ValueError`` if that cannot be said."""
    if isinstance(name, tuple) and isinstance(base, tuple):
        return _folded(name)[: len(base)] == _folded(base)
    if tag not in _RULES or not isinstance(name, bytes) or not isinstance(base, bytes):
        raise ValueError("has names of a kind whose constraints are not known here")
    return _RULES[tag](name, base)


def _folded(name: Name) -> Sequence[frozenset[tuple[str, str]]]:
    """Make names comparable without regard to case and to repeated white space (RFC 5280 section 7.1)."""
    return [frozenset((oid, " ".join(text.split()).casefold()) for oid, text in rdn) for rdn in name]


def _dns_name(name: bytes, base: bytes) -> bool:
    name, base = name.lower(), base.lower()
    if not base or name == base:
        return True
    return name.endswith(base if base.startswith(b".") else b"." + base)


def _email(name: bytes, base: bytes) -> bool:
    local, _, host = name.rpartition(b"@")
    if not local:
        raise ValueError("has an address without a host")
    if b"@" in base:
        mailbox, _, base_host = base.rpartition(b"@")
        return (not mailbox or mailbox == local) and host.lower() == base_host.lower()
    return _host(host, base)


def _uri(name: bytes, base: bytes) -> bool:
    host = urlsplit(name.decode("ascii")).hostname
    if not host:
        raise ValueError("has a URI without a host")
    return _host(host.encode(), base)


def _host(host: bytes, base: bytes) -> bool:
    host, base = host.lower(), base.lower()
    return host.endswith(base) if base.startswith(b".") else host == base


def _address(name: bytes, base: bytes) -> bool:
    if len(name) not in (4, 16) or len(base) not in (8, 32):
        raise ValueError("has an address of another length")
    network, mask = base[: len(base) // 2], base[len(base) // 2 :]
    if len(name) != len(network):
        return False
    return all(part & bits == of & bits for part, of, bits in zip(name, network, mask, strict=True))


_RULES: dict[int, Callable[[bytes, bytes], bool]] = {_EMAIL: _email, _DNS: _dns_name, _URI: _uri, _IP: _address}
