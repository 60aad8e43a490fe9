"""Pack a device's credentials as an encrypted bundle, seal them until then, and sign the one-time link."""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from itsdangerous import BadSignature, Signer, URLSafeTimedSerializer
from itsdangerous.encoding import base64_encode, int_to_bytes

from core.errors import LinkExpired, LinkUnknown
from delivery.formats import BundleFormat, Entry, encrypted_pem, pkcs12_file, write_archive

README = """\
Credentials of {device_id}
issued by the Device Onboarding Portal

  device.key              the private key
  device.pem              the certificate
  chain.pem               the certificate with its issuers
  ca.pem                  what to trust: check the broker's certificate against it
{portal_ca}  mosquitto-client.conf   options for mosquitto_pub and mosquitto_sub
{sums}
{protection}
To try them, in the folder of these files:

  {program} -h {host} -p {port} --cafile ca.pem --cert chain.pem --key device.key \\
      -i {device_id} -t {topic}
"""

PORTAL_CA = """\
  portal-ca.pem           what to trust of the portal itself, at its HTTPS address: EST, renewals
"""
SUMS = """\
  SHA256SUMS              the SHA-256 of each file above and of this one
"""
PROTECTED = """\
Encrypted with the bundle password (AES-256): {encrypted}
Not encrypted: {plain}
So whoever has this ZIP file reads, without the password, the id, the certificate, the broker's
address, and the names and sizes of all files. Once unpacked, device.key is not encrypted any
more: keep it where it is used, readable by its owner only.

Each of these opens the file:

  portal unpack bundle.zip        checks the credentials, too
  7z x bundle.zip                 7-Zip on Windows, the package 7zip on Linux, 7zz on macOS
  Keka, WinZip, bsdtar --passphrase, and for programs zip4j (Java), pyzipper (Python)

None of these does: unzip, and the ZIP tools that come with Windows, macOS and Python.

Who has no password can have written the files that are not encrypted, but not SHA256SUMS. portal
unpack has checked them against it, and leaves it out. If you used another tool, this shows
whether they are those of the portal, this one among them:

  sha256sum --check SHA256SUMS    (macOS: shasum -a 256 --check SHA256SUMS)
"""
KEY_PROTECTED = """\
Encrypted with the bundle password (PKCS#8, AES-256): {encrypted}
Not encrypted: {plain}
device.key is encrypted in itself, and stays so when this ZIP file is unpacked, which any program
does. Nothing protects the other files from being altered on their way: before you trust ca.pem,
compare it with what whoever runs your portal has.

  portal unpack bundle.zip        checks that key and certificates belong together
  openssl pkey -in device.key -out device.key.open
                                  for programs that cannot ask for the password: the key without one
"""

CLIENT_CONFIGURATION = """\
# Options for mosquitto_pub and mosquitto_sub; copy to ~/.config/mosquitto_pub and ~/.config/mosquitto_sub
# and make the paths absolute.
-h {host}
-p {port}
-i {device_id}
--cafile ca.pem
--cert chain.pem
--key device.key
"""


@dataclass(frozen=True, slots=True)
class Credentials:
    """The content of a bundle: PEM texts and the broker's address. ``key_pem`` is the device's key, unencrypted.

    ``example_topic`` is one to publish to or, with ``example_reads``, a filter to subscribe to. ``portal_ca_pem`` is
    what to trust at the portal's HTTPS address, empty if it is ``ca_pem``.
    """

    device_id: str
    key_pem: bytes
    certificate_pem: str
    chain_pem: str
    ca_pem: str
    broker_host: str
    broker_port: int
    example_topic: str
    example_reads: bool = False
    portal_ca_pem: str = ""


def new_bundle_password() -> str:
    """Return a password of 132 random bits: 22 characters of the URL-safe base64 alphabet."""
    return secrets.token_urlsafe(17)[:22]


def package_credentials(
    credentials: Credentials, password: str, *, now: datetime, bundle_format: BundleFormat = BundleFormat.ZIP
) -> bytes:
    """Pack a bundle: a ZIP whose ``device.key`` and ``ca.pem`` are AES-256 encrypted and authenticated (WinZip AE-2).

    The other files are public and not encrypted: ``SHA256SUMS``, which is, authenticates them. 7z and pyzipper open it.
    As ``p12`` it is a PKCS#12 file; as ``pem`` a ZIP in which only the key itself is encrypted, and nothing is
    authenticated.
    """
    if bundle_format is BundleFormat.P12:
        return pkcs12_file(
            credentials.key_pem,
            credentials.certificate_pem,
            credentials.ca_pem,
            password,
            name=credentials.device_id,
        )
    in_zip = bundle_format is BundleFormat.ZIP
    return write_archive(
        _entries(credentials, password, in_zip=in_zip), password.encode(), modified_at=now.astimezone(UTC)
    )


def _entries(credentials: Credentials, password: str, *, in_zip: bool) -> list[Entry]:
    """Return the files of a ZIP, which encrypts those that are not public, or else has the key encrypted in itself."""
    blanks = {
        "device_id": credentials.device_id,
        "host": credentials.broker_host,
        "port": credentials.broker_port,
        "program": "mosquitto_sub" if credentials.example_reads else "mosquitto_pub",
        "topic": f"{shlex.quote(credentials.example_topic)} {'-v' if credentials.example_reads else '-m hello'} -q 1",
    }
    secret, public = 0o600, 0o644
    key = credentials.key_pem if in_zip else encrypted_pem(credentials.key_pem, password)
    portal_ca, protection = credentials.portal_ca_pem.encode(), PROTECTED if in_zip else KEY_PROTECTED
    entries = [
        Entry("device.key", key, secret, encrypted=in_zip),
        Entry("ca.pem", credentials.ca_pem.encode(), secret, encrypted=in_zip),
        *([Entry("portal-ca.pem", portal_ca, secret, encrypted=in_zip)] if portal_ca else []),
        Entry("device.pem", credentials.certificate_pem.encode(), public, encrypted=False),
        Entry("chain.pem", credentials.chain_pem.encode(), public, encrypted=False),
        Entry("mosquitto-client.conf", CLIENT_CONFIGURATION.format(**blanks).encode(), public, encrypted=False),
    ]
    # The README is public, and the sums, which list it, are secret where there are any.
    hidden = [entry.name for entry in entries if entry.encrypted or entry.name == "device.key"]
    shown = [entry.name for entry in entries if entry.name not in hidden]
    readme = README.format(
        **blanks,
        portal_ca=PORTAL_CA if portal_ca else "",
        sums=SUMS if in_zip else "",
        protection=protection.format(
            encrypted=", ".join([*hidden, "SHA256SUMS"] if in_zip else hidden), plain=", ".join([*shown, "README.txt"])
        ),
    )
    entries.append(Entry("README.txt", readme.encode(), public, encrypted=False))
    if in_zip:
        entries.append(Entry("SHA256SUMS", _sums(entries), public, encrypted=True))
    return entries


def _sums(entries: Sequence[Entry]) -> bytes:
    """List the SHA-256 of each file as ``sha256sum`` does."""
    return "".join(f"{hashlib.sha256(entry.content).hexdigest()}  {entry.name}\n" for entry in entries).encode()


# --- The link -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DownloadToken:
    """What a link holds: the id of its delivery, and the secret under which that is sealed, empty if it is not."""

    delivery_id: str
    secret: str = field(default="", repr=False)


def new_link_secret() -> str:
    """Return 128 random bits in the URL-safe base64 alphabet; they stand in the link and nowhere else."""
    return secrets.token_urlsafe(16)


def generate_download_link(
    delivery_id: str, keys: Sequence[str], *, public_url: str, now: datetime, secret: str = ""
) -> str:
    """Return the one-time URL of a delivery, signed with the last of ``keys``; the others still verify older links.

    The ``secret`` of a sealed delivery is in it.
    """
    content = f"{delivery_id}.{secret}" if secret else delivery_id
    payload = base64_encode(json.dumps(content))  # not the serializer's: it would try to compress this
    made_at = base64_encode(int_to_bytes(int(now.timestamp())))  # not the clock's, which itsdangerous would read
    return f"{public_url}/download/{_signer(keys[-1]).sign(b'.'.join((payload, made_at))).decode()}"


def read_download_token(token: str, keys: Sequence[str], *, now: datetime, max_age: timedelta) -> DownloadToken:
    """Return what a link's token holds, after verifying its signature in constant time.

    Raises ``LinkUnknown`` if the token was altered or not signed by these keys, ``LinkExpired`` if it is older than
    ``max_age``.
    """
    try:
        # Without max_age: that also refuses links that were signed before the clock was set back.
        content, made_at = _serializer(tuple(keys)).loads(token, return_timestamp=True)
    except BadSignature:
        content, made_at = None, now
    if now - made_at > max_age:
        raise LinkExpired("This link has expired, so its bundle was destroyed; issue new credentials for the device.")
    if not isinstance(content, str) or len(content) > 128:
        raise LinkUnknown(_UNKNOWN)
    delivery_id, _, secret = content.partition(".")
    return DownloadToken(delivery_id, secret)


_UNKNOWN = "This download link is not known here; check that it was copied whole."


_SALT = b"onboarding-portal/download"
_SIGNATURE: Mapping[str, Any] = {"key_derivation": "hmac", "digest_method": hashlib.sha256}


@lru_cache(maxsize=8)
def _signer(key: str) -> Signer:
    """Return what signs a link's content and time, with the key that is derived from one of the portal's."""
    derived = Signer(key, _SALT, **_SIGNATURE).derive_key()
    return Signer(derived, **{**_SIGNATURE, "key_derivation": "none"})


@lru_cache(maxsize=8)
def _serializer(keys: tuple[str, ...]) -> URLSafeTimedSerializer:
    return URLSafeTimedSerializer(list(keys), salt=_SALT, signer_kwargs={**_SIGNATURE})


# --- What a bundle is made of, until it is fetched ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SealedSecrets:
    """The secrets of a bundle that is made when it is fetched: the device's key (PKCS#8, DER) and the password."""

    key: bytes = field(repr=False)
    password: str = field(repr=False)

    def seal(self, link: DownloadToken, keys: Sequence[str], *, about: str) -> bytes:
        """Encrypt and authenticate them (AES-256-GCM) under the link's secret and the last of ``keys``, the portal's.

        Neither alone opens them. ``about`` says what they are for, and must be the same when they are opened.
        """
        nonce = secrets.token_bytes(12)
        content = self.password.encode() + b"\n" + self.key
        return nonce + _link_cipher(link, keys[-1]).encrypt(nonce, content, about.encode())

    @classmethod
    def open(cls, sealed: bytes, link: DownloadToken, keys: Sequence[str], *, about: str) -> Self:
        """Decrypt the result of ``seal``; raises ``LinkUnknown`` unless link, one of ``keys`` and ``about`` are its."""
        for key in reversed(keys):
            try:
                content = _link_cipher(link, key).decrypt(sealed[:12], sealed[12:], about.encode())
            except InvalidTag:
                continue
            password, _, device_key = content.partition(b"\n")
            return cls(device_key, password.decode())
        raise LinkUnknown(_UNKNOWN)


def _link_cipher(link: DownloadToken, key: str) -> AESGCM:
    """Return a cipher whose key, for one delivery, is derived from the link's secret and a key of the portal."""
    info = f"onboarding-portal/bundle/{link.delivery_id}"
    return AESGCM(HKDF(SHA256(), 32, salt=key.encode(), info=info.encode()).derive(link.secret.encode()))


# --- What is kept for a repeated request ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AnswerSeal:
    """Encrypts a response or a bundle under an idempotency key, of which only ``key_hash`` is stored."""

    key_hash: str
    _seal_key: bytes
    _request_key: bytes

    @classmethod
    def of(cls, idempotency_key: str, *, pepper: bytes, purpose: str = "") -> AnswerSeal:
        """Derive the keys; ``pepper`` is kept outside the database, so that nobody can guess keys from a copy of it.

        The same idempotency key gives other keys for another ``purpose``.
        """
        info = "/".join(("onboarding-portal/idempotency", *filter(None, [purpose])))
        derivation = HKDF(SHA256(), 96, salt=pepper, info=info.encode())
        derived = derivation.derive(idempotency_key.encode())
        return cls(derived[:32].hex(), derived[32:64], derived[64:])

    def request_hash(self, request: bytes) -> str:
        """Return the HMAC-SHA-256 of a request in hex, which distinguishes a repeat from another request."""
        return hmac.new(self._request_key, request, "sha256").hexdigest()

    def seal(self, answer: bytes) -> bytes:
        """Encrypt and authenticate it (AES-256-GCM, after its random 96-bit nonce)."""
        nonce = secrets.token_bytes(12)
        return nonce + AESGCM(self._seal_key).encrypt(nonce, answer, self.key_hash.encode())

    def open(self, sealed: bytes) -> bytes:
        """Decrypt the result of ``seal``; raises ``cryptography.exceptions.InvalidTag`` if it was altered."""
        return AESGCM(self._seal_key).decrypt(sealed[:12], sealed[12:], self.key_hash.encode())
