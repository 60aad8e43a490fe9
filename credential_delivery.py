"""The encrypted bundle of a device's credentials, behind a signed link."""

from __future__ import annotations

import hashlib
import hmac
import io
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pyzipper
from Cryptodome.Cipher import AES
from Cryptodome.Util import Counter
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA1, SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.kdf.pbkdf2 import PBKDF2HMAC
from itsdangerous import BadSignature, URLSafeTimedSerializer
from itsdangerous.timed import TimestampSigner
from pyzipper.zipfile_aes import WZ_AES, AESZipEncrypter, AESZipFile

from errors import LinkExpired, LinkUnknown

# WinZip's AE-2 derives its keys by 1000 rounds of PBKDF2; it is the password's entropy that protects the bundle.
WZ_AES_ROUNDS = 1000
_WZ_AES_HASH = SHA1()  # noqa: S303 - the format's; collisions do not matter to PBKDF2 and HMAC
SALT_BYTES = 16
KEY_BYTES = 32

README = """\
Credentials of the device {device_id}
issued by the Device Onboarding Portal

  device.key              the device's private key. Keep it on the device, readable by its owner only
  device.pem              its certificate
  chain.pem               the certificate with its issuers
  ca.pem                  what the device trusts: check the broker's certificate against it
  mosquitto-client.conf   options for mosquitto_pub and mosquitto_sub

device.key and ca.pem are encrypted (AES-256). To try them, in this folder:

  mosquitto_pub -h {host} -p {port} --cafile ca.pem --cert chain.pem --key device.key \\
      -i {device_id} -t {topic} -m hello -q 1
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
    """What a bundle holds: PEM texts, with where the broker is. ``key_pem`` is the device's key, unencrypted."""

    device_id: str
    key_pem: bytes
    certificate_pem: str
    chain_pem: str
    ca_pem: str
    broker_host: str
    broker_port: int
    example_topic: str


class _Encrypter(AESZipEncrypter):  # type: ignore[misc]  # pyzipper has no types
    """pyzipper's WinZip AE-2 encryption with cryptography's PBKDF2, which takes half the time of hashlib's."""

    def __init__(self, pwd: bytes) -> None:
        self.force_wz_aes_version = 2
        self.salt_length = SALT_BYTES
        self.aes_strength = 3
        self.salt = secrets.token_bytes(SALT_BYTES)
        derived = PBKDF2HMAC(_WZ_AES_HASH, 2 * KEY_BYTES + 2, self.salt, WZ_AES_ROUNDS).derive(pwd)
        counter = Counter.new(nbits=128, little_endian=True)  # a key of its own for each entry, so it may begin at 1
        self.encrypter = AES.new(derived[:KEY_BYTES], AES.MODE_CTR, counter=counter)
        self.hmac = hmac.new(derived[KEY_BYTES : 2 * KEY_BYTES], digestmod="sha1")
        self.encpwdverify = derived[2 * KEY_BYTES :]


class _BundleFile(AESZipFile):  # type: ignore[misc]  # pyzipper has no types
    """A ZIP in which each entry is encrypted or not, as ``encryption`` says when it is written."""

    def __init__(self, buffer: io.BytesIO, password: bytes) -> None:
        super().__init__(buffer, "w", compression=pyzipper.ZIP_STORED)
        self._password = password  # not setpassword(): pyzipper then encrypts every entry

    def get_encrypter(self) -> _Encrypter:
        return _Encrypter(self._password)


def new_bundle_password() -> str:
    """A password of 132 random bits: 22 characters of the URL-safe base64 alphabet."""
    return secrets.token_urlsafe(17)[:22]


def package_credentials(credentials: Credentials, password: str, *, now: datetime) -> bytes:
    """Pack a bundle: a ZIP whose ``device.key`` and ``ca.pem`` are AES-256 encrypted and authenticated (WinZip AE-2).

    The rest is public and altering it opens nothing, so it stays in the clear. Opens with 7z and pyzipper.
    """
    blanks = {
        "device_id": credentials.device_id,
        "host": credentials.broker_host,
        "port": credentials.broker_port,
        "topic": credentials.example_topic,
    }
    clear = {
        "device.pem": credentials.certificate_pem.encode(),
        "chain.pem": credentials.chain_pem.encode(),
        "mosquitto-client.conf": CLIENT_CONFIGURATION.format(**blanks).encode(),
        "README.txt": README.format(**blanks).encode(),
    }
    date_time = now.astimezone(UTC).timetuple()[:6]
    buffer = io.BytesIO()
    with _BundleFile(buffer, password.encode()) as bundle:
        for secret, content in (("device.key", credentials.key_pem), ("ca.pem", credentials.ca_pem.encode())):
            bundle.encryption = WZ_AES
            bundle.writestr(_entry(bundle, secret, date_time, mode=0o600), content)
        bundle.encryption = None
        for name, content in clear.items():
            bundle.writestr(_entry(bundle, name, date_time, mode=0o644), content)
    return buffer.getvalue()


def _entry(bundle: AESZipFile, name: str, date_time: tuple[int, ...], *, mode: int) -> Any:
    entry = bundle.zipinfo_cls(name, date_time=date_time)
    entry.external_attr = (0o100000 | mode) << 16
    entry.create_system = 3  # Unix: the mode above is one
    return entry


# --- The link -----------------------------------------------------------------------------------------------------


def generate_download_link(delivery_id: str, keys: Sequence[str], *, public_url: str, now: datetime) -> str:
    """The one-time URL of a delivery, signed with the last of ``keys`` (the others verify older links still)."""
    return f"{public_url}/download/{_serializer(keys, now).dumps(delivery_id)}"


def read_download_token(token: str, keys: Sequence[str], *, now: datetime, max_age: timedelta) -> str:
    """The delivery that a link's token names, its signature checked in constant time.

    Raises ``LinkUnknown`` where the token was altered or never signed here, ``LinkExpired`` where it is older than
    ``max_age``.
    """
    try:
        # Without its max_age, which refuses links from before the clock was set back.
        delivery_id, made_at = _serializer(keys, now).loads(token, return_timestamp=True)
    except BadSignature:
        delivery_id, made_at = None, now
    if now - made_at > max_age:
        raise LinkExpired("This link's time is over, so its bundle was destroyed; give the device new credentials.")
    if not isinstance(delivery_id, str) or len(delivery_id) > 64:
        raise LinkUnknown("This download link is not known here; check that it was copied whole.")
    return delivery_id


def _serializer(keys: Sequence[str], now: datetime) -> URLSafeTimedSerializer:
    seconds = int(now.timestamp())

    class Signer(TimestampSigner):
        def get_timestamp(self) -> int:
            return seconds

    return URLSafeTimedSerializer(
        list(keys),
        salt="onboarding-portal/download",
        signer=Signer,
        signer_kwargs={"key_derivation": "hmac", "digest_method": hashlib.sha256},
    )


# --- Answers kept for a repeat --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AnswerSeal:
    """Seals an answer under an idempotency key, of which only ``key_hash`` is stored."""

    key_hash: str
    _seal_key: bytes
    _request_key: bytes

    @classmethod
    def of(cls, idempotency_key: str, *, pepper: bytes) -> AnswerSeal:
        """Derive all from the key; ``pepper``, kept outside the database, makes guessing from a copy hopeless."""
        derivation = HKDF(SHA256(), 96, salt=pepper, info=b"onboarding-portal/idempotency")
        derived = derivation.derive(idempotency_key.encode())
        return cls(derived[:32].hex(), derived[32:64], derived[64:])

    def request_hash(self, request: bytes) -> str:
        """HMAC-SHA-256 of a request in hex: tells a repeat from another body, and nothing of what was in it."""
        return hmac.new(self._request_key, request, "sha256").hexdigest()

    def seal(self, answer: bytes) -> bytes:
        """Encrypt and authenticate (AES-256-GCM, random 96-bit nonce in front)."""
        nonce = secrets.token_bytes(12)
        return nonce + AESGCM(self._seal_key).encrypt(nonce, answer, self.key_hash.encode())

    def open(self, sealed: bytes) -> bytes:
        """Decrypt what ``seal`` made; raises ``cryptography.exceptions.InvalidTag`` where it was altered."""
        return AESGCM(self._seal_key).decrypt(sealed[:12], sealed[12:], self.key_hash.encode())
