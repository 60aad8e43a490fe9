"""Pack a device's credentials: a ZIP archive encrypted by AES, a PKCS#12 file, or a key as encrypted PKCS#8."""

from __future__ import annotations

import hmac
import io
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

import pyzipper
from Cryptodome.Cipher import AES
from Cryptodome.Util import Counter
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.hashes import SHA1, SHA256
from cryptography.hazmat.primitives.kdf.pbkdf2 import PBKDF2HMAC
from cryptography.hazmat.primitives.serialization import PrivateFormat, load_pem_private_key, pkcs12

from pki.algorithms import encrypt_private_key

# The number that OpenSSL 3 uses. cryptography's MAC is fixed at it, and a password can be guessed by the MAC as well as
# by the encryption, so more rounds for the encryption would add nothing. The password's entropy protects the file.
PKCS12_ROUNDS = 2048


class BundleFormat(StrEnum):
    """Choose how a bundle is packed: an AES ZIP, a PKCS#12 file, or a plain ZIP with the key as encrypted PKCS#8."""

    ZIP = "zip"
    P12 = "p12"
    PEM = "pem"

    @property
    def media_type(self) -> str:
        """Return the media type of a download."""
        return "application/x-pkcs12" if self is BundleFormat.P12 else "application/zip"

    @property
    def extension(self) -> str:
        """Return the extension of the file's name, without the dot."""
        return "p12" if self is BundleFormat.P12 else "zip"


def encrypted_pem(key_pem: bytes, password: str) -> bytes:
    """Encrypt a private key as PKCS#8 (PEM): PBES2, 600,000 rounds of PBKDF2 with HMAC-SHA-256, AES-256-CBC."""
    return encrypt_private_key(_key(key_pem), password.encode())


def pkcs12_file(key_pem: bytes, certificate_pem: str, ca_pem: str, password: str, *, name: str) -> bytes:
    """Make a PKCS#12 file (RFC 7292) of the key, its certificate, and the certificates of the CAs up to the root.

    Encrypted by PBES2 with AES-256-CBC, with a MAC by SHA-256: OpenSSL 3 and Java 8u301 or later open it. ``name``
    is the alias.
    """
    encryption = (
        PrivateFormat.PKCS12.encryption_builder()
        .key_cert_algorithm(pkcs12.PBES.PBESv2SHA256AndAES256CBC)
        .hmac_hash(SHA256())
        .kdf_rounds(PKCS12_ROUNDS)
        .build(password.encode())
    )
    certificate = x509.load_pem_x509_certificate(certificate_pem.encode())
    authorities = x509.load_pem_x509_certificates(ca_pem.encode())
    return pkcs12.serialize_key_and_certificates(name.encode(), _key(key_pem), certificate, authorities, encryption)


def _key(pem: bytes) -> ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey:
    key = load_pem_private_key(pem, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey):
        raise TypeError("the portal does not make keys of this kind")
    return key


# --- ZIP archives -------------------------------------------------------------------------------------------------

WZ_AES_ROUNDS = 1000  # fixed by WinZip's AE-2 specification; the password's entropy protects the archive
_AES_256 = 3  # the number of this key size in an entry's extra field
_AES_VERSION = 51  # of the ZIP specification: the first with AES
_SALT_BYTES, _KEY_BYTES, _MAC_BYTES = 16, 32, 10
_SHA1 = SHA1()  # noqa: S303 - the format's; PBKDF2 and HMAC do not depend on collision resistance


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of an archive: its name, content, Unix mode, and whether it is encrypted."""

    name: str
    content: bytes
    mode: int
    encrypted: bool


def write_archive(entries: Iterable[Entry], password: bytes, *, modified_at: datetime) -> bytes:
    """Write a ZIP archive whose entries are stored without compression; ``modified_at`` is in UTC, from 1980 on."""
    buffer = io.BytesIO()
    with _Archive(buffer, password) as archive:
        for entry in entries:
            info = pyzipper.zipfile_aes.AESZipInfo(entry.name, modified_at.timetuple()[:6])
            info.external_attr = (0o100000 | entry.mode) << 16
            archive.encryption = pyzipper.WZ_AES if entry.encrypted else None
            archive.writestr(info, entry.content)
    return buffer.getvalue()


class _Archive(pyzipper.AESZipFile):
    """Writes an archive whose entries are encrypted by ``_Encrypter`` while ``encryption`` is set."""

    def __init__(self, file: io.BytesIO, password: bytes) -> None:
        super().__init__(file, "w")
        # Not pyzipper's setpassword: it encrypts every entry once a password is set, and none if that is empty.
        self.entry_password = password

    def get_encrypter(self) -> _Encrypter:
        """Return an encrypter for the next entry; pyzipper calls this for each entry that it encrypts."""
        return _Encrypter(self.entry_password)


class _Encrypter(pyzipper.zipfile_aes.BaseZipEncrypter):
    """Encrypts one entry by WinZip's AE-2 with AES-256.

    pyzipper's own encrypter derives the keys by pycryptodomex, which takes five times as long as ``cryptography``.
    """

    def __init__(self, password: bytes) -> None:
        self._salt = secrets.token_bytes(_SALT_BYTES)
        derived = PBKDF2HMAC(_SHA1, 2 * _KEY_BYTES + 2, self._salt, WZ_AES_ROUNDS).derive(password)
        key, mac_key, self._verifier = derived[:_KEY_BYTES], derived[_KEY_BYTES:-2], derived[-2:]
        # The salt gives each entry its own key, so the counter may begin at 1, as the specification has it.
        self._cipher = AES.new(key, AES.MODE_CTR, counter=Counter.new(nbits=128, little_endian=True))
        self._mac = hmac.new(mac_key, digestmod="sha1")

    def update_zipinfo(self, zipinfo: pyzipper.zipfile_aes.AESZipInfo) -> None:
        """Mark the entry as encrypted by AE-2, which leaves the content's checksum out."""
        zipinfo.wz_aes_vendor_id = pyzipper.zipfile_aes.WZ_AES_VENDOR_ID
        zipinfo.wz_aes_version = pyzipper.zipfile_aes.WZ_AES_V2
        zipinfo.wz_aes_strength = _AES_256
        zipinfo.create_version = zipinfo.extract_version = _AES_VERSION

    def finalize_zipinfo(self, zipinfo: pyzipper.zipfile_aes.AESZipInfo) -> None:
        """Change nothing: the marks do not depend on the content."""

    def encryption_header(self) -> bytes:
        """Return the salt with the two bytes by which a reader recognizes the password."""
        return self._salt + self._verifier

    def encrypt(self, data: bytes) -> bytes:
        """Encrypt the next part of the content and authenticate the result."""
        encrypted: bytes = self._cipher.encrypt(data)
        self._mac.update(encrypted)
        return encrypted

    def flush(self) -> bytes:
        """Return the authentication code, which ends the entry."""
        return self._mac.digest()[:_MAC_BYTES]
