"""Opens a device's bundle, in any of its formats, and checks that its credentials match."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import lzma
import re
import secrets
import shlex
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key, pkcs12
from cryptography.x509.oid import NameOID

from commands.errors import BundleLocked, CheckFailed
from commands.files import NewFile
from commands.vocabulary import (
    CA,
    CERTIFICATE,
    CHAIN,
    CLIENT_CONFIGURATION,
    ENCRYPTED,
    FILES,
    KEY,
    NAMES,
    P12,
    PORTAL_CA,
    README,
    REQUIRED,
    SECRET,
    SUMS,
)

if TYPE_CHECKING:
    import pyzipper

_DER_SEQUENCE = b"\x30"  # a PKCS#12 file begins with it, a ZIP with PK
_LOCKED = "The password is wrong, or the bundle was modified."
_UNPROTECTED = (
    "ca.pem is not protected in a bundle of the format pem: compare it with portal ca before the device trusts it."
)


MAX_BUNDLE = 1 << 20  # bytes
MAX_ENTRIES = 32
MAX_ENTRY = 64 * 1024  # bytes
MAX_CHAIN = 8  # certificates from the device to the root
AES_256 = 3  # the strength field of WinZip's AE-2
AES_OVERHEAD = 16 + 2 + 10  # bytes of salt, password verifier, authentication code

_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
# Errors, beside BadZipFile, that zipfile and its decoders raised for damaged and malicious archives in tests.
_ZIP_ERRORS = (
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
    lzma.LZMAError,
)
# A modified configuration must not disable checks or use other files, so only these options and names are accepted.
_CLIENT_FILES = {"--cafile": CA, "--cert": CHAIN, "--key": KEY}
_CLIENT_VALUES = {
    "-h": re.compile(r"[A-Za-z0-9.:_-]{1,253}"),
    "-p": re.compile(r"[0-9]{1,5}"),
    "-i": _UUID,
    "-V": re.compile(r"[a-z0-9.]{1,8}"),
}


@dataclass(frozen=True)
class DeviceBundle:
    """The content of a bundle by file name; ``notes`` say what was left out.

    ``key`` is the public key if the private key is encrypted in its file.
    """

    files: Mapping[str, bytes]
    notes: tuple[str, ...]
    key: PublicKeyTypes | None = None

    def __repr__(self) -> str:  # never the key
        return f"DeviceBundle({', '.join(self.files)})"

    def new_files(self) -> dict[str, NewFile]:
        """Return the files with their modes: the key for its owner only."""
        certificates = (CERTIFICATE, CHAIN, CA, PORTAL_CA)
        return {
            name: NewFile(
                certificates_only(content) if name in certificates else content, 0o600 if name in SECRET else 0o644
            )
            for name, content in self.files.items()
        }


@dataclass(frozen=True, slots=True)
class Checked:
    """Matching credentials: serial number and SHA-256 fingerprint in lower-case hex, times in UTC."""

    device_id: str
    serial_number: str
    fingerprint: str
    not_before: datetime
    not_after: datetime
    root: str


def extension_of(content: bytes) -> str:
    """Return the file name extension for a bundle."""
    return "p12" if content.startswith(_DER_SEQUENCE) else "zip"


def open_bundle(content: bytes, password: str) -> DeviceBundle:
    """Read a bundle of any format; raises ``BundleLocked`` for a wrong password, ``CheckFailed`` for other content.

    The key of a ``p12`` bundle stays in its file and that of a ``pem`` bundle stays encrypted, as programs expect them.
    """
    if content.startswith(_DER_SEQUENCE):
        return _open_p12(content, password)
    if b"-----BEGIN ENCRYPTED PRIVATE KEY-----" in content:
        return _open_pem(content, password)
    return _open_zip(content, password)


def _open_p12(content: bytes, password: str) -> DeviceBundle:
    if len(content) > MAX_BUNDLE:
        raise CheckFailed(f"This is not a bundle: it is larger than {MAX_BUNDLE} bytes.")
    try:
        with warnings.catch_warnings(action="error"):  # of what is no DER, but read as BER
            store = pkcs12.load_pkcs12(content, password.encode())
    except UserWarning:
        raise CheckFailed(
            "This PKCS#12 file was modified on its way: it is not DER, or something follows it. Renew the device to get"
            " a new one."
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        raise BundleLocked(_LOCKED) from None
    if _opens_with(content, secrets.token_hex().encode()):  # no MAC (RFC 7292 section 4): anybody can have made it
        raise BundleLocked(_LOCKED)
    if store.key is None or store.cert is None:
        raise CheckFailed("This PKCS#12 file is not a device bundle: it has no key with a certificate.")
    leaf = store.cert.certificate
    above = [other.certificate for other in store.additional_certs]
    between = [certificate for certificate in above if certificate.issuer != certificate.subject]
    files = {P12: content, CERTIFICATE: _pem(leaf), CHAIN: _pem(leaf, *between), CA: _pem(*above)}
    return DeviceBundle(files, (), store.key.public_key())


def _opens_with(content: bytes, password: bytes) -> bool:
    try:
        pkcs12.load_pkcs12(content, password)
    except (ValueError, UnsupportedAlgorithm):
        return False
    return True


def _open_pem(content: bytes, password: str) -> DeviceBundle:
    bundle = _open_zip(content, password, encrypted=())
    try:
        key = load_pem_private_key(bundle.files[KEY], password.encode())
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise BundleLocked(_LOCKED) from None
    return dataclasses.replace(bundle, notes=(*bundle.notes, _UNPROTECTED), key=key.public_key())


def _open_zip(content: bytes, password: str, *, encrypted: tuple[str, ...] = ENCRYPTED) -> DeviceBundle:
    """Read the known files of a ZIP bundle; leave out others.

    The files in ``encrypted`` must be encrypted (WinZip AE, AES-256), because only that authenticates them.
    Raises ``BundleLocked`` for a wrong password, ``CheckFailed`` for a file that is not a ZIP, too large or incomplete.
    """
    import pyzipper  # a fifth of the time that the other commands take to start

    if len(content) > MAX_BUNDLE:
        raise CheckFailed(f"This is not a bundle: it is larger than {MAX_BUNDLE} bytes.")
    try:
        with pyzipper.AESZipFile(io.BytesIO(content)) as archive:
            entries = archive.infolist()
            _check_entries(entries, encrypted)
            known = {*NAMES, PORTAL_CA, *encrypted}
            notes = [
                f"{e.filename!r} is not part of a bundle and was left out." for e in entries if e.filename not in known
            ]
            files = {e.filename: _read(archive, e, password) for e in entries if e.filename in known}
    except (pyzipper.BadZipFile, *_ZIP_ERRORS):
        raise CheckFailed("This is not a bundle, or it is damaged; renew the device to get a new one.") from None
    notes += _without_forgeries(files) if encrypted else _without_harmful(files)
    return DeviceBundle(files, tuple(notes))


def _without_forgeries(files: dict[str, bytes]) -> list[str]:
    """Check the files against ``SHA256SUMS``, which is encrypted and so of somebody who knows the password.

    Without it, as in bundles of older portals, or if somebody removed it, leave out the files that nothing else
    authenticates. Raise ``CheckFailed`` if a file differs or is missing.
    """
    sums = files.pop(SUMS, None)
    if sums is None:
        left = [name for name in (CLIENT_CONFIGURATION, README) if files.pop(name, None) is not None]
        said = f"{' and '.join(left)} left out: this bundle has no {SUMS} to check them with, as of an older portal."
        return [said] if left else []
    lines = (line.partition("  ") for line in sums.decode("ascii", "replace").splitlines())
    listed = {name: digest for digest, _, name in lines}
    for name in {*files, *listed}:
        if name not in files or hashlib.sha256(files[name]).hexdigest() != listed.get(name):
            raise CheckFailed(
                f"{name!r} in this bundle is not the one that {SUMS} lists, so the bundle was modified on its way;"
                " nothing was unpacked. Renew the device to get a new one."
            )
    return []


def _without_harmful(files: dict[str, bytes]) -> list[str]:
    """Leave out files that nothing authenticates if they have more in them than they may."""
    harmful = [name for name in (CLIENT_CONFIGURATION, README) if name in files and not _is_harmless(name, files[name])]
    for name in harmful:
        del files[name]
    return [f"{name} was modified and was left out." for name in harmful]


def _check_entries(entries: Iterable[pyzipper.zipfile_aes.AESZipInfo], encrypted: tuple[str, ...]) -> None:
    entries = list(entries)
    names = [entry.filename for entry in entries]
    if len(entries) > MAX_ENTRIES or any(entry.file_size > MAX_ENTRY for entry in entries):
        raise CheckFailed("This ZIP file is larger than a bundle, so it was not opened.")
    if len(set(names)) != len(names):
        raise CheckFailed("This ZIP file has two files with the same name, so it was not opened.")
    missing = [name for name in REQUIRED if name not in names]
    if missing:
        raise CheckFailed(f"This ZIP file is not a device bundle: it has no {' and no '.join(missing)}.")
    for entry in entries:
        if entry.filename in encrypted:
            _check_encrypted(entry)
        elif entry.filename in FILES and entry.compress_type not in (
            zipfile.ZIP_STORED,
            zipfile.ZIP_DEFLATED,
        ):
            raise CheckFailed(f"{entry.filename} is compressed in a way that bundles do not use.")


def _check_encrypted(entry: pyzipper.zipfile_aes.AESZipInfo) -> None:
    if not entry.flag_bits & 1 or entry.wz_aes_version is None or entry.wz_aes_strength != AES_256:
        raise CheckFailed(
            f"{entry.filename} is not encrypted with AES-256 in this bundle, so it may have been replaced; "
            "nothing was unpacked. Renew the device with --overlap 0, which makes new credentials and ends these."
        )
    # The sizes are not authenticated: a smaller one would truncate the content.
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size - AES_OVERHEAD:
        raise CheckFailed(f"The size of {entry.filename} in this bundle was modified; nothing was unpacked.")


def _read(archive: pyzipper.AESZipFile, entry: pyzipper.zipfile_aes.AESZipInfo, password: str) -> bytes:
    import pyzipper

    encrypted = bool(entry.flag_bits & 1)
    try:
        with archive.open(entry, pwd=password.encode() if encrypted else None) as file:
            content = bytes(file.read(MAX_ENTRY + 1))
    except (pyzipper.BadZipFile, *_ZIP_ERRORS):
        if encrypted:
            raise BundleLocked(_LOCKED) from None
        raise
    if len(content) > MAX_ENTRY:
        raise CheckFailed("This ZIP file is larger than a bundle, so it was not opened.")
    return content


def _is_harmless(name: str, content: bytes) -> bool:
    """Return whether an unencrypted file is plain text, and a configuration has only the expected options."""
    try:
        text = content.decode("ascii")
    except UnicodeDecodeError:
        return False
    lines = text.splitlines()
    if not all(line.isprintable() for line in lines):
        return False
    return name != CLIENT_CONFIGURATION or all(_is_client_option(line) for line in lines)


def _is_client_option(line: str) -> bool:
    if not line.strip() or line.startswith("#"):
        return True
    try:
        option, value = shlex.split(line)
    except ValueError:
        return False
    if option in _CLIENT_FILES:
        return value == _CLIENT_FILES[option]
    return option in _CLIENT_VALUES and _CLIENT_VALUES[option].fullmatch(value) is not None


def check_bundle(bundle: DeviceBundle, *, now: datetime) -> Checked:
    """Check that key, certificate, chain and CA of a bundle match; raises ``CheckFailed``."""
    try:
        key = bundle.key or load_pem_private_key(bundle.files[KEY], password=None).public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise CheckFailed("The private key in the bundle cannot be read.") from None
    return check_credentials(
        lambda certified: _public_bytes(certified) == _public_bytes(key),
        certificate=bundle.files[CERTIFICATE],
        chain=bundle.files[CHAIN],
        ca=bundle.files[CA],
        now=now,
    )


def check_credentials(
    is_own: Callable[[PublicKeyTypes], bool], *, certificate: bytes, chain: bytes, ca: bytes, now: datetime
) -> Checked:
    """Check that a certificate is for an own key, for a device, valid ``now``, and signed up to a root in ``ca``.

    All are PEM; ``chain`` begins with the certificate. The path is built by signatures (RFC 5280 section 6.1: issuer
    and subject names, basicConstraints, keyUsage, validity of each). Raises ``CheckFailed``.
    """
    try:
        leaf, *more = x509.load_pem_x509_certificates(certificate)
        links = x509.load_pem_x509_certificates(chain)
        anchors = x509.load_pem_x509_certificates(ca)
        if more or links[0] != leaf:
            raise CheckFailed("The chain does not begin with the device's certificate, so the files do not match.")
        if not is_own(leaf.public_key()):
            raise CheckFailed("The certificate is not for this private key; renew the device to get new ones.")
        device_id = _device_id(leaf)
        root = _path_to_root(leaf, links[1:], anchors, now)
        return Checked(
            device_id=device_id,
            serial_number=f"{leaf.serial_number:x}",
            fingerprint=leaf.fingerprint(SHA256()).hex(),
            not_before=leaf.not_valid_before_utc,
            not_after=leaf.not_valid_after_utc,
            root=root.subject.rfc4514_string(),
        )
    except (ValueError, UnsupportedAlgorithm, x509.DuplicateExtension, x509.UnsupportedGeneralNameType):
        raise CheckFailed("A certificate in the bundle cannot be read.") from None


def _public_bytes(key: PublicKeyTypes) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _pem(*certificates: x509.Certificate) -> bytes:
    return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in certificates)


def _device_id(leaf: x509.Certificate) -> str:
    names = [str(attribute.value) for attribute in leaf.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if len(names) != 1 or _UUID.fullmatch(names[0]) is None or _is_ca(leaf):
        raise CheckFailed("This is not the certificate of a device: its common name is not a device id.")
    return names[0]


def _is_ca(certificate: x509.Certificate) -> bool:
    try:
        if not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca:
            return False
        return certificate.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    except x509.ExtensionNotFound:
        return False


def _path_to_root(
    leaf: x509.Certificate, links: list[x509.Certificate], anchors: list[x509.Certificate], now: datetime
) -> x509.Certificate:
    current = leaf
    for _ in range(MAX_CHAIN):
        _check_validity(current, now)
        if current in anchors and _signed(current, current):
            return current
        issuer = next((above for above in (*anchors, *links) if above != current and _signed(current, above)), None)
        if issuer is None:
            break
        current = issuer
    raise CheckFailed(
        "The certificate is not signed by the CA in ca.pem; do not use it, and renew the device to get a new one."
    )


def _signed(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    if certificate.issuer != issuer.subject or not _is_ca(issuer):
        return False
    try:
        certificate.verify_directly_issued_by(issuer)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def _check_validity(certificate: x509.Certificate, now: datetime) -> None:
    if now < certificate.not_valid_before_utc:
        raise CheckFailed(
            f"The certificate is not valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M:%S} UTC; "
            "check the clock of this machine."
        )
    if now > certificate.not_valid_after_utc:
        raise CheckFailed(f"The certificate expired at {certificate.not_valid_after_utc:%Y-%m-%d %H:%M:%S} UTC.")


def certificates_only(pem: bytes) -> bytes:
    """Return the certificates of a PEM file without other text; raises ``CheckFailed``."""
    try:
        return b"".join(found.public_bytes(Encoding.PEM) for found in x509.load_pem_x509_certificates(pem))
    except (ValueError, UnsupportedAlgorithm):
        raise CheckFailed("The answer contains no readable certificate.") from None


def describe(pem: bytes) -> list[dict[str, str]]:
    """Describe the certificates of a PEM file; raises ``CheckFailed``."""
    try:
        return [
            {
                "subject": certificate.subject.rfc4514_string(),
                "issuer": certificate.issuer.rfc4514_string(),
                "serial_number": f"{certificate.serial_number:x}",
                "fingerprint": certificate.fingerprint(SHA256()).hex(),
                "not_before": f"{certificate.not_valid_before_utc:%Y-%m-%dT%H:%M:%SZ}",
                "not_after": f"{certificate.not_valid_after_utc:%Y-%m-%dT%H:%M:%SZ}",
            }
            for certificate in x509.load_pem_x509_certificates(pem)
        ]
    except (ValueError, UnsupportedAlgorithm):
        raise CheckFailed("The answer contains no readable certificate.") from None
