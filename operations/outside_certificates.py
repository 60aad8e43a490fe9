"""Takes server certificates of other issuers into use, again each time they are renewed."""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509

from broker.folder import SERVER_CERTIFICATE_FILE, SERVER_KEY_FILE
from config import Settings
from core.errors import ServerCertificateRefused
from core.files import replace_file
from pki.server_chain import MAX_FILE_BYTES, ServerPair, check_pair

log = logging.getLogger("portal.installation")


@dataclass(frozen=True, slots=True, kw_only=True)
class OutsideCertificate:
    """The files of a certificate and its key that somebody else renews, for the ``server`` "portal" or "broker".

    ``variables`` are the settings that name them; ``names`` those that the certificate must have. ``installed`` are the
    portal's copies of certificate and key, ``trust`` is where clients find what to trust, ``problem`` why the newest
    pair is not in use.
    """

    server: str
    variables: tuple[str, str]
    certificate: Path
    key: Path
    names: tuple[str, ...]
    installed: tuple[Path, Path]
    trust: Path
    problem: Path

    def read(self, known: Path, now: datetime) -> ServerPair:
        """Read and check the pair; its root may be among those of the file ``known``.

        Raise ``ServerCertificateRefused`` with a sentence that begins with the setting.
        """
        try:
            chain = _read(self.certificate, self.variables[0])
            key = _read(self.key, self.variables[1], secret=True)
            return check_pair(chain, key, self.names, x509.load_pem_x509_certificates(known.read_bytes()), now=now)
        except _FileRefused as error:
            raise ServerCertificateRefused(str(error)) from None
        except ServerCertificateRefused as error:
            both = " and ".join(self.variables)
            raise ServerCertificateRefused(f"{both} ({self.certificate}, {self.key}): {error.detail}") from None

    def is_installed(self, pair: ServerPair) -> bool:
        """Return whether the copies are those of the pair."""
        contents = {self.installed[0]: pair.chain, self.installed[1]: pair.key, self.trust: pair.roots}
        return all(path.exists() and path.read_bytes() == content for path, content in contents.items())

    def refused(self) -> str | None:
        """Return why the newest pair is not in use, ``None`` if it is."""
        try:
            return self.problem.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None


def https_certificate(settings: Settings) -> OutsideCertificate | None:
    """Return what PORTAL_TLS_CERTIFICATE and PORTAL_TLS_KEY name, ``None`` if they are not set."""
    if settings.tls_certificate is None or settings.tls_key is None:
        return None
    return OutsideCertificate(
        server="portal",
        variables=("PORTAL_TLS_CERTIFICATE", "PORTAL_TLS_KEY"),
        certificate=settings.tls_certificate,
        key=settings.tls_key,
        names=settings.server_names,
        installed=(settings.tls_dir / "server.pem", settings.tls_dir / "server.key"),
        trust=settings.https_ca_file,
        problem=settings.data_dir / ".tls-certificate.problem",
    )


def broker_certificate(settings: Settings) -> OutsideCertificate | None:
    """Return what PORTAL_BROKER_CERTIFICATE and PORTAL_BROKER_KEY name, ``None`` if they are not set."""
    if not settings.has_broker or settings.broker_certificate is None or settings.broker_key is None:
        return None
    return OutsideCertificate(
        server="broker",
        variables=("PORTAL_BROKER_CERTIFICATE", "PORTAL_BROKER_KEY"),
        certificate=settings.broker_certificate,
        key=settings.broker_key,
        names=settings.broker_names,
        installed=(settings.broker_file(SERVER_CERTIFICATE_FILE), settings.broker_file(SERVER_KEY_FILE)),
        trust=settings.broker_ca_file,
        problem=settings.data_dir / ".broker-certificate.problem",
    )


def outside_certificates(settings: Settings) -> list[OutsideCertificate]:
    """Return those that the settings name."""
    return [one for one in (https_certificate(settings), broker_certificate(settings)) if one is not None]


def take(
    outside: OutsideCertificate,
    settings: Settings,
    clock: Callable[[], datetime],
    write: Callable[[bytes, bytes], object],
    *,
    served: bool,
) -> bool:
    """Have the pair written, chain and key, if it has changed; return whether it had.

    Raise ``ServerCertificateRefused`` if it cannot be used; where it is ``served`` already say so in the log and in the
    file ``problem``, while the one before goes on.
    """
    try:
        pair = outside.read(settings.data_dir / "ca.pem", clock())
    except ServerCertificateRefused as error:
        if not served:
            raise
        if outside.refused() != error.detail:
            log.error("a new server certificate is not taken", extra={"problem": error.detail})
            replace_file(outside.problem, error.detail.encode())
        return False
    outside.problem.unlink(missing_ok=True)
    if outside.is_installed(pair):
        return False
    if outside.trust.exists() and outside.trust.read_bytes() != pair.roots:
        log.warning(
            "the server's certificate has another root; give it to all clients", extra={"file": str(outside.trust)}
        )
        if outside.server == "broker":
            keep_until_restart(settings)
    replace_file(outside.trust, pair.roots, mode=0o644)
    write(pair.chain, pair.key)
    return True


def keep_until_restart(settings: Settings) -> None:
    """Keep the root of the broker's certificate for the probe: the running broker still shows what is below it."""
    root, before = settings.probe_ca_files
    if root.exists():
        replace_file(before, root.read_bytes())


class _FileRefused(Exception):
    """A file is not one that the portal reads; says so in a sentence."""


def _read(path: Path, variable: str, *, secret: bool = False) -> bytes:
    """Return a file's content; raise ``_FileRefused``."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # opening a FIFO would block
        with contextlib.closing(os.fdopen(descriptor, "rb")) as file:
            mode = os.fstat(descriptor).st_mode
            if not stat.S_ISREG(mode):
                raise _FileRefused(f"{variable} names {path}, which is not a file.")
            if secret and mode & 0o007:
                raise _FileRefused(f"{variable} names a key that is open to others; chmod 600 {path}.")
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise _FileRefused(f"{variable} names {path}, which cannot be read ({error.strerror}).") from None
    if len(content) > MAX_FILE_BYTES:
        raise _FileRefused(f"{variable} names {path}, which is longer than {MAX_FILE_BYTES} bytes.")
    return content
