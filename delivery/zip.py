"""Writes small ZIP archives in which some entries are encrypted by WinZip's AES-256."""

from __future__ import annotations

import hmac
import secrets
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from Cryptodome.Cipher import AES
from Cryptodome.Util import Counter
from cryptography.hazmat.primitives.hashes import SHA1
from cryptography.hazmat.primitives.kdf.pbkdf2 import PBKDF2HMAC
from pyzipper.zipfile_aes import AESZipEncrypter

# WinZip's AE-2 derives its keys by 1000 rounds of PBKDF2; it is the password's entropy that protects the archive.
WZ_AES_ROUNDS = 1000
_WZ_AES_HASH = SHA1()  # noqa: S303 - the format's; collisions do not matter to PBKDF2 and HMAC
SALT_BYTES = 16
KEY_BYTES = 32

# Of PKWARE's APPNOTE 6.3.10 (sections 4.3.7, 4.3.12, 4.3.16) and WinZip's AE-2 specification. pyzipper's own writer
# makes the same bytes in three times the time: it is made for files of any size and kind.
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_CENTRAL_HEADER = struct.Struct("<4s4B4HL2L5H2L")
_END = struct.Struct("<4s4H2LH")
_AES_EXTRA = struct.pack("<HHH2sBH", 0x9901, 7, 2, b"AE", 3, 0)  # AE-2, AES-256, stored
_STORED, _AES_ENCRYPTED = 0, 99
_PLAIN_VERSION, _AES_VERSION = 20, 51  # needed to extract
_UNIX = 3


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of the archive: its name (ASCII), content, Unix mode, and whether it is encrypted."""

    name: str
    content: bytes
    mode: int
    encrypted: bool


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


def write_archive(entries: Sequence[Entry], password: bytes, *, modified_at: datetime) -> bytes:
    """The archive, its entries stored without compression; ``modified_at`` is in UTC and from 1980 on."""
    date = (modified_at.year - 1980) << 9 | modified_at.month << 5 | modified_at.day
    time = modified_at.hour << 11 | modified_at.minute << 5 | modified_at.second // 2
    body, directory, offset = [], [], 0
    for entry in entries:
        name, content = entry.name.encode("ascii"), entry.content
        if entry.encrypted:
            encrypter = _Encrypter(password)
            data = encrypter.encryption_header() + encrypter.encrypt(content) + encrypter.flush()
            # The checksum stays 0: it would tell what is inside, which the authentication code covers.
            version, flags, method, checksum, extra = _AES_VERSION, 1, _AES_ENCRYPTED, 0, _AES_EXTRA
        else:
            data, checksum = content, zlib.crc32(content)
            version, flags, method, extra = _PLAIN_VERSION, 0, _STORED, b""
        sizes = (checksum, len(data), len(content), len(name), len(extra))
        local = _LOCAL_HEADER.pack(b"PK\3\4", version, flags, method, time, date, *sizes)
        body += [local, name, extra, data]
        attributes = (0o100000 | entry.mode) << 16
        directory.append(
            _CENTRAL_HEADER.pack(
                b"PK\1\2", version, _UNIX, version, 0, flags, method, time, date, *sizes, 0, 0, 0, attributes, offset
            )
            + name
            + extra
        )
        offset += len(local) + len(name) + len(extra) + len(data)
    index = b"".join(directory)
    end = _END.pack(b"PK\5\6", 0, 0, len(directory), len(directory), len(index), offset, 0)
    return b"".join([*body, index, end])
