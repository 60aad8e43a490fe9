"""The folder from which the running broker takes new CRLs and CAs, without being told: ``capath`` of its configuration.

At a handshake OpenSSL looks for ``<hash of the CA's name>.rN`` (a CRL) or ``.N`` (a CA certificate) with the next
number that it has not read, and keeps what it has found until the process ends. Of several CRLs of a CA the one with
the newest thisUpdate counts. So each new CRL has the next number, without a gap.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import re
from collections.abc import Iterator, Sequence, Set
from pathlib import Path

from cryptography import x509

from broker.ca_certificates import MAX_REMEMBERED, CaCertificate, read_cas
from broker.crl import Trust, read_crl, read_crls, split_crls
from core.errors import BrokerUnavailable, ProjectionInvalid
from core.files import access_problem, private_folder, remove_leftovers, replace_file
from pki.encoding import encode_sequence, sequence_elements

FILE_MODE, _FOLDER_MODE = 0o640, 0o750
_MAX_REPLACED = 64  # files of CRLs that a newer one has replaced, before they are removed while no broker runs
_FILE = re.compile(r"([0-9a-f]{8}\.r?)(0|[1-9][0-9]{0,8})")
_STRINGS = frozenset([0x0C, 0x13, 0x14, 0x16, 0x1A, 0x1C, 0x1E])  # DER tags of the types that OpenSSL compares as text

# In place of a CRL that a newer one has replaced: OpenSSL needs a CRL there, of whatever CA, and reads all at a start.
_REPLACED = b"""-----BEGIN X509 CRL-----
MIGZMEICAQEwCgYIKoZIzj0EAwIwEzERMA8GA1UEAwwIcmVwbGFjZWQXDTAwMDEw
MTAwMDAwMFoXDTAwMDEwMjAwMDAwMFowCgYIKoZIzj0EAwIDRwAwRAIgd91tlS99
BVSKeCB+hbfNdkjl7cpnLqp4Id4HqfNWYMMCIBYyvh4q1RupO/duYFyeCmknPKiP
AWzIq2T3Io7TTpAQ
-----END X509 CRL-----
"""


@functools.lru_cache(maxsize=MAX_REMEMBERED)
def name_hash(name: x509.Name) -> str:
    """Return the hash by which OpenSSL names files of a CA (``openssl x509 -subject_hash``): 8 hex digits.

    It is the SHA-1 of the name in a canonical form, of which the first four bytes count, in little-endian order.
    """
    canonical = b""
    for relative in name.rdns:
        parts = []
        for attribute in relative:
            (alone,) = sequence_elements(x509.Name([attribute]).public_bytes())
            ((oid, value),) = map(sequence_elements, sequence_elements(b"\x30" + alone[1:]))
            if value[0] in _STRINGS:
                text = " ".join(part for part in re.split(r"[ \t\n\v\f\r]+", str(attribute.value)) if part)
                lower = "".join(chr(ord(one) + 32) if "A" <= one <= "Z" else one for one in text)
                value = _utf8_string(lower.encode())
            parts.append(encode_sequence(oid, value))
        content = b"".join(sorted(parts))
        canonical += b"\x31" + _length(len(content)) + content
    return hashlib.sha1(canonical, usedforsecurity=False).digest()[3::-1].hex()


def _utf8_string(content: bytes) -> bytes:
    return b"\x0c" + _length(len(content)) + content


def _length(length: int) -> bytes:
    """Return a length as DER has it (X.690 section 8.1.3)."""
    if length < 0x80:
        return bytes([length])
    digits = length.to_bytes((length.bit_length() + 7) // 8, "big")
    return bytes([0x80 | len(digits)]) + digits


@functools.lru_cache(maxsize=MAX_REMEMBERED)
def _ca_file(authority: CaCertificate) -> tuple[str, bytes]:
    """Return the hash of a CA's name, and the SHA-256 of its file."""
    return name_hash(authority.certificate.subject), hashlib.sha256(authority.pem).digest()


class CaFolder:
    """The folder; one process at a time writes in it, the caller holds the lock."""

    def __init__(self, path: Path, group: int | None) -> None:
        self.path = path
        self._group = group
        self._seen: dict[str, tuple[tuple[int, ...], bytes]] = {}  # the files, as this process has read them
        self._keys: dict[bytes, str] = {}  # the hashes of the names of CRLs, by the SHA-256 of their PEM

    def publish(self, trust: Trust) -> bool:
        """Add the CAs and CRLs of ``trust`` that are not the newest there; return whether there were any.

        The broker obeys from the next handshake on. Raise ``BrokerUnavailable`` if the folder cannot be written.
        """
        try:
            private_folder(self.path, mode=_FOLDER_MODE, group=self._group)
            there = self._look()
            added = [self._add(f"{key}.", content) for key, content in self._missing_cas(trust.ca, there)]
            for key, crl, content in self._missing_crls(trust.crl, there):
                existing = self._add(f"{key}.r", content)
                self._replace_older(existing, crl)
                added.append(existing)
        except OSError as error:
            raise BrokerUnavailable.unwritable(self.path, error) from error
        return bool(added)

    def _look(self) -> Set[tuple[str, bytes]]:
        """Return what OpenSSL finds: the beginning of each file's name, and the SHA-256 of its content.

        A file is read only if its inode, size or times have changed since this process has read it.
        """
        before, self._seen = self._seen, {}
        numbers: dict[str, dict[int, str]] = {}
        with os.scandir(self.path) as entries:
            for entry in entries:
                if (parts := _FILE.fullmatch(entry.name)) is None:
                    continue
                status = entry.stat()
                signature = status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
                known = before.get(entry.name)
                if known is None or known[0] != signature:
                    known = signature, self._digest(entry.name)
                self._seen[entry.name] = known
                numbers.setdefault(parts[1], {})[int(parts[2])] = entry.name
        return {
            (beginning, self._seen[name][1])
            for beginning, named in numbers.items()
            for name in itertools.takewhile(bool, (named.get(number, "") for number in itertools.count()))
        }

    def _digest(self, name: str) -> bytes:
        return hashlib.sha256((self.path / name).read_bytes()).digest()

    @staticmethod
    def _missing_cas(ca_bundle: bytes, there: Set[tuple[str, bytes]]) -> Iterator[tuple[str, bytes]]:
        for one in read_cas(ca_bundle):
            key, digest = _ca_file(one)
            if (f"{key}.", digest) not in there:
                yield key, one.pem

    def _missing_crls(
        self, pem_bundle: bytes, there: Set[tuple[str, bytes]]
    ) -> Iterator[tuple[str, x509.CertificateRevocationList, bytes]]:
        """Yield the CRLs to add; one that was looked at the last time is not parsed again."""
        before, self._keys = self._keys, {}
        for block in split_crls(pem_bundle):
            digest = hashlib.sha256(block).digest()
            key = self._keys[digest] = before.get(digest) or name_hash(read_crl(block).crl.issuer)
            if (f"{key}.r", digest) not in there:
                yield key, read_crl(block).crl, block

    def compact(self) -> None:
        """Remove what newer CRLs have replaced, while no broker runs: a running one would miss the next."""
        if sum(1 for _ in self.path.glob("*.r*")) <= _MAX_REPLACED:
            return
        for path in [*self.path.glob("*.r*")]:
            path.unlink(missing_ok=True)
        remove_leftovers(self.path)

    def problem(self) -> str | None:
        """Return why the broker could not read the folder, or ``None``: it would accept revoked certificates then."""
        return access_problem(self.path, _FOLDER_MODE, self._group, folder=True)

    def _add(self, beginning: str, content: bytes) -> list[Path]:
        """Write a file with the next number, and return those that were there.

        They are up to the first gap, as OpenSSL reads them.
        """
        existing: list[Path] = []
        while (path := self.path / f"{beginning}{len(existing)}").exists():
            existing.append(path)
        replace_file(path, content, mode=FILE_MODE, group=self._group)
        return existing

    def _replace_older(self, existing: Sequence[Path], newest: x509.CertificateRevocationList) -> None:
        """Replace the CRLs of the same CA: a broker that starts reads all files at its first handshake."""
        for path in existing:
            if path.stat().st_size == len(_REPLACED):
                continue
            try:
                same = _signer(read_crls(path.read_bytes())[0].crl) == _signer(newest)
            except ProjectionInvalid:  # torn: OpenSSL would stop here
                same = True
            if same:
                replace_file(path, _REPLACED, mode=FILE_MODE, group=self._group)


def _signer(crl: x509.CertificateRevocationList) -> tuple[x509.Name, bytes | None]:
    """Return what tells the CA of a CRL from others, which may have the same name."""
    try:
        key = crl.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
    except x509.ExtensionNotFound:
        key = None
    return crl.issuer, key
