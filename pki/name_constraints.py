"""Check the names in a certificate against the name constraints of its issuer (RFC 5280 section 4.2.1.10).

``cryptography`` checks them for DNS names and addresses only, and in certificates of TLS servers. The rules and the
cases that the RFC leaves open are those of OpenSSL, which checks the same where it ends TLS.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from urllib.parse import urlsplit

from pki.encoding import SEQUENCE, Element, split
from pki.foreign import ForeignCertificate, Name, read_alternative_names, read_name, texts_of

_NAME_CONSTRAINTS, _ALTERNATIVE_NAMES = "2.5.29.30", "2.5.29.17"
_COMMON_NAME, _EMAIL_ADDRESS = "2.5.4.3", "1.2.840.113549.1.9.1"
_PERMITTED, _EXCLUDED = 0xA0, 0xA1  # of NameConstraints
_MINIMUM = 0x80  # of GeneralSubtree
_EMAIL, _DNS, _DIRECTORY, _URI, _IP = 0x81, 0x82, 0xA4, 0x86, 0x87  # tags of GeneralName
_HOST_NAME = re.compile(rb"(?!-)[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)+")

_KINDS = {_EMAIL: "email addresses", _DNS: "DNS names", _DIRECTORY: "subjects", _URI: "URIs", _IP: "IP addresses"}
_ATTRIBUTES = {"2.5.4.3": "CN", "2.5.4.5": "serialNumber", "2.5.4.6": "C", "2.5.4.10": "O", "2.5.4.11": "OU"}
_MAX_SHOWN = 200  # characters of a name

_Subject = Sequence[tuple[str, str | None]]
_Name = tuple[int, bytes | Name]  # the tag of a GeneralName with its content


@dataclass(frozen=True, slots=True)
class NamesToCertify:
    """The names in a certificate that is not signed yet: its subject, and its extensions by dotted OID."""

    subject: Name
    extensions: Mapping[str, bytes]


def is_permitted(certificate: ForeignCertificate, issuer: ForeignCertificate) -> bool:
    """Return whether the issuer's certificate permits all names of a certificate that it has signed."""
    return violation(certificate, issuer) is None


def violation(certificate: ForeignCertificate | NamesToCertify, issuer: ForeignCertificate) -> str | None:
    """Return which constraint in the issuer's certificate a certificate violates that it signs, as a clause.

    A constraint that cannot be read, or of a kind of name that is not known here but is in the certificate, permits
    nothing.
    """
    value = issuer.extensions.get(_NAME_CONSTRAINTS)
    if value is None:
        return None
    try:
        permitted, excluded = _constraints(value)
        for tag, name in _names(certificate):
            bases = [base for kind, base in permitted if kind == tag]
            if bases and not any(_is_within(tag, name, base) for base in bases):
                return f"{_permits(tag, bases)}, not {in_words(tag, name)}"
            if found := [base for kind, base in excluded if kind == tag and _is_within(tag, name, base)]:
                return f"{_excludes(tag, found)}, such as {in_words(tag, name)}"
    except ValueError as error:
        return f"they cannot be kept: one {error}"
    return None


@dataclass(frozen=True, slots=True)
class NamePatterns:
    """What is known of the names in certificates to come: each has a DNS name right below each of ``domains``.

    ``subject`` are the types (dotted) and values of its attributes, one in each relative distinguished name, and
    ``None`` for a value that differs from certificate to certificate; so do the ``addresses`` differ, if there are any.
    """

    domains: Sequence[str] = ()
    addresses: bool = False
    subject: _Subject = ()


def violation_by_all(patterns: NamePatterns, issuer: ForeignCertificate) -> str | None:
    """Return which constraint every certificate with such names would violate, as a clause; ``None`` if some may do."""
    value = issuer.extensions.get(_NAME_CONSTRAINTS)
    if value is None:
        return None
    try:
        permitted, excluded = _constraints(value)
    except ValueError as error:
        return f"they cannot be kept: one {error}"
    for tag, pattern, shown in _kinds_of(patterns):
        bases = [base for kind, base in permitted if kind == tag]
        if bases and not any(_are_within(pattern, base, all_of_them=False) for base in bases):
            return f"{_permits(tag, bases)}, not {shown}"
        if found := [base for kind, base in excluded if kind == tag and _are_within(pattern, base, all_of_them=True)]:
            return f"{_excludes(tag, found)}, such as {shown}"
    if patterns.addresses and {(_IP, bytes(8)), (_IP, bytes(32))} <= {*excluded}:
        return f"of {_KINDS[_IP]} they exclude all"
    return None


def _kinds_of(patterns: NamePatterns) -> Iterator[tuple[int, bytes | _Subject, str]]:
    """Yield the tag of a kind of names, a domain or a subject, and how it is called."""
    yield from ((_DNS, domain.lower().encode(), f"names in {domain}") for domain in patterns.domains)
    if patterns.subject:
        known = ", ".join(f"{_ATTRIBUTES.get(oid, oid)}={value}" for oid, value in patterns.subject if value)
        yield _DIRECTORY, patterns.subject, known or "one without it"


def _are_within(pattern: bytes | _Subject, base: bytes | Name, *, all_of_them: bool) -> bool:
    """Return whether all names of a pattern are in a subtree, or whether some can be."""
    if isinstance(pattern, bytes):
        if not isinstance(base, bytes):
            return False
        return _dns_name(b"x." + pattern, base) or (not all_of_them and base.lower().endswith(b"." + pattern))
    if isinstance(base, bytes) or len(base) > len(pattern):
        return False
    return all(
        rdn == _folded((frozenset({(oid, value)}),))[0]
        if value is not None
        else not all_of_them and {kind for kind, _ in rdn} == {oid}
        for rdn, (oid, value) in zip(_folded(base), pattern, strict=False)
    )


def _permits(tag: int, bases: Sequence[bytes | Name]) -> str:
    return f"of {_KINDS[tag]} they permit only {' and '.join(in_words(tag, base) for base in bases)}"


def _excludes(tag: int, bases: Sequence[bytes | Name]) -> str:
    return f"of {_KINDS[tag]} they exclude {' and '.join(in_words(tag, base) for base in bases)}"


def in_words(tag: int, name: bytes | Name) -> str:
    """Return a name, or the base of a constraint, as text that can be printed."""
    if isinstance(name, tuple):
        shown = ", ".join("+".join(f"{_ATTRIBUTES.get(oid, oid)}={text}" for oid, text in rdn) for rdn in name)
    elif tag == _IP and len(name) in (4, 16):
        shown = str(ip_address(name))
    elif tag == _IP and len(name) in (8, 32):
        half = len(name) // 2
        shown = f"{ip_address(name[:half])}/{ip_address(name[half:])}"
    else:
        shown = name.decode("ascii", "replace") or "all"
    return "".join(char if char.isprintable() else "?" for char in shown[:_MAX_SHOWN])


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


def _names(certificate: ForeignCertificate | NamesToCertify) -> Iterator[_Name]:
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
