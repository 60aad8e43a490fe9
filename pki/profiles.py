"""Certificate profiles: which keys and lifetimes the certificates of devices may have, and which names they get."""

from __future__ import annotations

import ipaddress
import itertools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import ObjectIdentifier
from cryptography.x509.oid import NameOID

from core.errors import FieldProblem, ProfileInvalid, ProfileRefused
from pki.algorithms import KeyType
from pki.foreign import read_certificate
from pki.issuers import DNS_LABEL, MAX_DNS_NAME, DeviceContents
from pki.name_constraints import NamePatterns, violation_by_all
from pki.outer_chain import named

DEFAULT = "default"  # the profile of every device that has no other; it is built in
MAX_DAYS = 36500
MAX_TEMPLATES = 8  # of each kind of name
MAX_TEMPLATE = 253  # characters
MAX_ATTRIBUTE = 64  # characters: ub-organization-name and its like, RFC 5280 appendix A.1

FIELDS = ("id", "name", "external_id", "type", "location", "firmware", "serial")
_METADATA = "metadata."
_FIELD = re.compile(r"\{([^{}]*)\}")
_METADATA_KEY = re.compile(r"metadata\.[A-Za-z0-9_-]{1,64}")
_FIELDS_IN_WORDS = f"{', '.join(f'{{{name}}}' for name in FIELDS)} and {{metadata.KEY}}"
_PRINTABLE = re.compile(r"[A-Za-z0-9 '()+,\-./:=?]*")  # PrintableString (X.680 section 41.4)
_PRINTABLE_IN_WORDS = "it may have letters, digits, spaces and '()+,-./:=? (PrintableString)"
_BROADCAST = "255.255.255.255"
_LABEL_PART = re.compile(r"[A-Za-z0-9-]+")
_ATTRIBUTES = (
    ("organization", "organizationName", NameOID.ORGANIZATION_NAME),
    ("organizational_unit", "organizationalUnitName", NameOID.ORGANIZATIONAL_UNIT_NAME),
    ("serial_number", "serialNumber", NameOID.SERIAL_NUMBER),
)
_Rule = Callable[[str], str | None]  # says what is wrong with a value of a device


class Purpose(StrEnum):
    """What a device's certificate may be used for in TLS (extKeyUsage, RFC 5280 section 4.2.1.12)."""

    CLIENT_AUTH = "client_auth"
    SERVER_AUTH = "server_auth"


@dataclass(frozen=True, slots=True)
class CertificateProfile:
    """What a device's certificate may be, and what it holds beside the device's UUID (``check_profile``).

    ``default_days`` is its validity if a request names none (``None``: as the settings say, but at most ``max_days``).
    The names and attributes are templates, text with fields such as ``{name}`` that are filled in for each device.
    """

    name: str
    default_days: int | None = None
    max_days: int | None = None
    key_types: tuple[str, ...] = tuple(KeyType)
    extended_key_usage: tuple[str, ...] = (Purpose.CLIENT_AUTH,)
    dns_names: tuple[str, ...] = ()
    ip_addresses: tuple[str, ...] = ()
    organization: str | None = None
    organizational_unit: str | None = None
    serial_number: str | None = None

    @property
    def templates(self) -> tuple[str, ...]:
        """All templates of the profile."""
        subject = (self.organization, self.organizational_unit, self.serial_number)
        return (*self.dns_names, *self.ip_addresses, *(text for text in subject if text is not None))

    def uses(self, name: str) -> bool:
        """Return whether a template has this field."""
        return any(name in _FIELD.findall(template) for template in self.templates)


BUILT_IN = CertificateProfile(DEFAULT)

# --- What a profile may say ---------------------------------------------------------------------------------------


def check_profile(profile: CertificateProfile, chain: Sequence[x509.Certificate] = ()) -> None:
    """Raise ``ProfileInvalid``, with the field, for a profile by which no certificate could or should be issued.

    ``chain`` are the issuing CA and those above it, whose name constraints count.
    """
    _check_usage(profile)
    if profile.max_days is not None and (profile.default_days or 0) > profile.max_days:
        raise _invalid("default_days", f"is more than max_days, {profile.max_days}")
    for name, values in (
        ("key_types", profile.key_types),
        ("extended_key_usage", profile.extended_key_usage),
        ("dns_names", profile.dns_names),
        ("ip_addresses", profile.ip_addresses),
    ):
        if len(set(values)) < len(values):
            raise _invalid(name, "has one value twice")
    for template in profile.dns_names:
        _check_dns_template(template)
    for template in profile.ip_addresses:
        if not _fields_of("ip_addresses", template):
            raise _invalid("ip_addresses", f"{template!r} needs a field, such as {{metadata.ip}}")
    for name in ("organization", "organizational_unit", "serial_number"):
        _check_attribute(name, getattr(profile, name))
    if (violated := violated_constraint(profile, chain)) is not None:
        raise _invalid(*violated)


def _check_usage(profile: CertificateProfile) -> None:
    if Purpose.CLIENT_AUTH not in profile.extended_key_usage:
        raise _invalid("extended_key_usage", "must have client_auth, without which the broker refuses the device")
    has_names = profile.dns_names or profile.ip_addresses
    if Purpose.SERVER_AUTH in profile.extended_key_usage and not has_names:
        raise _invalid("extended_key_usage", "has server_auth, which needs dns_names or ip_addresses to be of use")


def _check_dns_template(template: str) -> None:
    name = "dns_names"
    if not _fields_of(name, template):
        raise _invalid(name, f"{template!r} needs a field, such as {{name}}: each device has a name of its own")
    labels = _FIELD.sub("{}", template).split(".")
    if len(labels) < 2 or "{" in labels[-1]:
        raise _invalid(name, f"{template!r} must end in a fixed domain, as {{name}}.devices.example.com")
    if not _is_dns_name(_FIELD.sub("x", template)):
        raise _invalid(name, f"{template!r} is not a DNS name of letters, digits, hyphens and fields (RFC 1034)")


def _check_attribute(name: str, template: str | None) -> None:
    if template is None:
        return
    fields = _fields_of(name, template)
    literal = _FIELD.sub("", template)
    if len(literal) + len(fields) > MAX_ATTRIBUTE:
        raise _invalid(name, f"has more than {MAX_ATTRIBUTE} characters (RFC 5280 appendix A.1)")
    if not literal.isprintable() or template != template.strip():
        raise _invalid(name, "must have printable characters, and no space at an end")
    if name == "serial_number" and not _PRINTABLE.fullmatch(literal):
        raise _invalid(name, f"has other characters; {_PRINTABLE_IN_WORDS}")


def violated_constraint(profile: CertificateProfile, chain: Sequence[x509.Certificate]) -> tuple[str, str] | None:
    """Return a field by which no certificate could be issued, and why not: the name constraints of a CA in ``chain``.

    These are the issuing CA and those above it (RFC 5280 section 4.2.1.10). What depends on the device is checked when
    its certificate is issued.
    """
    subject = [
        (oid.dotted_string, None if _FIELD.search(template) else template)
        for name, _, oid in _ATTRIBUTES
        if (template := getattr(profile, name)) is not None
    ]
    common_name = (NameOID.COMMON_NAME.dotted_string, None)
    every = {
        "dns_names": NamePatterns(domains=[_fixed_domain(template) for template in profile.dns_names]),
        "ip_addresses": NamePatterns(addresses=bool(profile.ip_addresses)),
        next((name for name, *_ in _ATTRIBUTES if getattr(profile, name)), "organization"): NamePatterns(
            subject=[*subject, common_name]
        ),
    }
    for certificate in chain:
        issuer = read_certificate(certificate.public_bytes(Encoding.DER))
        for name, patterns in every.items():
            if (violated := violation_by_all(patterns, issuer)) is not None:
                return name, f"violates the name constraints of the CA {named(certificate)}: {violated}"
    return None


def _fixed_domain(template: str) -> str:
    """Return the labels at the end of a DNS template that have no field."""
    fixed = itertools.takewhile(lambda label: "{" not in label, reversed(_FIELD.sub("{}", template).split(".")))
    return ".".join(reversed([*fixed]))


def _fields_of(name: str, template: str) -> Sequence[str]:
    """Return the fields in a template of the profile's field ``name``."""
    fields: list[str] = _FIELD.findall(template)
    unknown = [inner for inner in fields if inner not in FIELDS and not _METADATA_KEY.fullmatch(inner)]
    if unknown or re.search("[{}]", _FIELD.sub("", template)):
        raise _invalid(name, f"{template!r} has a field that is unknown; there are {_FIELDS_IN_WORDS}")
    return fields


def _invalid(name: str, problem: str) -> ProfileInvalid:
    return ProfileInvalid(f"{name} {problem}.", [FieldProblem(name, problem)])


def _is_dns_name(name: str) -> bool:
    labels = name.split(".")
    return len(name) <= MAX_DNS_NAME and not labels[-1].isdigit() and all(map(DNS_LABEL.fullmatch, labels))


# --- What it makes of a device ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CertificateTerms:
    """The profile that a device's certificate is issued under, with what the templates need of the device.

    ``fields`` are its values by their names in ``FIELDS``, and its ``metadata``; what it does not have is ``None``.
    """

    profile: CertificateProfile
    fields: Mapping[str, Any] = field(repr=False)

    def days(self, wanted: int | None, usual: int) -> int:
        """Return the validity in days, ``usual`` being that of the settings; raise ``ProfileRefused``."""
        profile = self.profile
        most = profile.max_days or MAX_DAYS
        if wanted is not None and wanted > most:
            raise self._refused(f"allows certificates of at most {most} days, not {wanted}", "validity_days")
        return wanted or profile.default_days or min(usual, most)

    def check_key(self, key_type: str, *, of_csr: bool = False) -> str:
        """Return the kind of a key; raise ``ProfileRefused`` if the profile does not allow it."""
        if key_type not in self.profile.key_types:
            allowed = ", ".join(self.profile.key_types)
            raise self._refused(f"allows keys of {allowed}, not {key_type}", "csr" if of_csr else "key_type")
        return key_type

    def usual_key(self, *preferred: str) -> str:
        """Return the first kind of key among ``preferred`` that the profile allows, else its first."""
        return next((kind for kind in preferred if kind in self.profile.key_types), self.profile.key_types[0])

    def contents(self, own_names: Collection[str]) -> DeviceContents:
        """Return what the device's certificate holds beside its UUID.

        ``own_names`` are DNS names (with ``*`` in place of a first label) and addresses of the portal and the broker,
        which no device gets. Raise ``ProfileRefused`` with the profile and the rule.
        """
        dns_names = [self._dns_name(template, own_names) for template in self.profile.dns_names]
        addresses = [self._address(template, own_names) for template in self.profile.ip_addresses]
        return DeviceContents(
            server_auth=Purpose.SERVER_AUTH in self.profile.extended_key_usage,
            dns_names=tuple(dict.fromkeys(dns_names)),
            ip_addresses=tuple(dict.fromkeys(addresses)),
            subject=tuple(self._subject()),
        )

    def _dns_name(self, template: str, own_names: Collection[str]) -> str:
        name = self._filled(template, _problem_in_label).lower()
        if not _is_dns_name(name):
            raise self._refused(f"makes {name!r} of {template}, which is too long or otherwise no DNS name")
        literal = set(_FIELD.sub("{}", template).lower().split("."))
        if any(label[2:4] == "--" and label not in literal for label in name.split(".")):
            raise self._refused(f"makes {name!r} of {template}, and labels with -- as third characters are reserved")
        if name.endswith(".localhost") or is_own_name(name, own_names):
            raise self._refused(f"makes {name!r} of {template}, which is a name of the portal or the broker")
        return name

    def _address(self, template: str, own_names: Collection[str]) -> str:
        text = self._filled(template, _no_problem)
        try:
            address = ipaddress.ip_address(text)
        except ValueError:
            raise self._refused(f"needs an IP address for {template}, which {text!r} is not") from None
        shared = address.is_loopback or address.is_unspecified or address.is_multicast or text == _BROADCAST
        if shared or "%" in text or getattr(address, "ipv4_mapped", None) is not None:
            raise self._refused(f"needs the address of one device for {template}, which {text} is not")
        if is_own_name(str(address), own_names):
            raise self._refused(f"makes {address} of {template}, which is an address of the portal or the broker")
        return str(address)

    def _subject(self) -> Iterator[tuple[ObjectIdentifier, str]]:
        for name, what, oid in _ATTRIBUTES:
            template = getattr(self.profile, name)
            if template is None:
                continue
            value = self._filled(template, _problem_in_attribute)
            if not 0 < len(value.strip()) <= len(value) <= MAX_ATTRIBUTE:
                raise self._refused(f"makes a {what} of {len(value)} characters of {template}; 1 to 64 are allowed")
            if name == "serial_number" and not _PRINTABLE.fullmatch(value):
                raise self._refused(f"makes the {what} {value!r}; {_PRINTABLE_IN_WORDS}")
            yield oid, value

    def _filled(self, template: str, problem_of: _Rule) -> str:
        """Return a template with the device's values in place of its fields."""

        def value_of(found: re.Match[str]) -> str:
            value = self._value(found[1])
            if value is None:
                raise self._refused(f"needs the device's {found[1]} for {template}, and it has none")
            if (problem := problem_of(value)) is not None:
                raise self._refused(f"needs the device's {found[1]} for {template}, and {value!r} {problem}")
            return value

        return _FIELD.sub(value_of, template)

    def _value(self, name: str) -> str | None:
        if not name.startswith(_METADATA):
            value = self.fields.get(name)
        else:
            value = (self.fields.get("metadata") or {}).get(name.removeprefix(_METADATA))
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        return value if isinstance(value, str) and value else None

    def _refused(self, rule: str, name: str = "profile") -> ProfileRefused:
        return ProfileRefused(f"The certificate profile {self.profile.name} {rule}.", [FieldProblem(name, rule)])


def _problem_in_label(value: str) -> str | None:
    # Not a dot either: a value fills a part of one label, so that the domain around it is the profile's.
    return None if _LABEL_PART.fullmatch(value) else "has other characters than letters, digits and hyphens"


def _problem_in_attribute(value: str) -> str | None:
    # Some programs print a subject as text, in which "x, CN=y" would look like another attribute.
    return None if value.isprintable() and "=" not in value else "has an equals sign or a character that is not printed"


def _no_problem(_value: str) -> str | None:
    return None


def is_own_name(name: str, own_names: Collection[str]) -> bool:
    """Return whether a DNS name or address in lower case is among ``own_names``, which may have ``*`` first labels."""
    return name in own_names or f"*.{name.partition('.')[2]}" in own_names
