"""Looks at the files of the portal's own certificates."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from broker.probe import Canaries, Canary
from config import Settings
from pki.issuers import Issuer


def canary_files(settings: Settings) -> Canaries:
    """Where the two canaries are, with which the portal tries the broker."""
    folder = settings.data_dir / "canaries"
    return Canaries(
        good=Canary(folder / "good.pem", folder / "good.key"),
        revoked=Canary(folder / "revoked.pem", folder / "revoked.key"),
    )


def is_due(path: Path, key: Path, now: datetime, issuer: Issuer, names: tuple[str, ...] = ()) -> bool:
    """Whether a certificate is to be issued anew.

    It is where a file is missing or unreadable, the two do not belong together (a write was cut off between them),
    two thirds of the life are over, the issuer is another, or a name is missing.
    """
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        if load_pem_private_key(key.read_bytes(), password=None).public_key() != certificate.public_key():
            return True
    except (OSError, ValueError):
        return True
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if not start <= now < start + (end - start) * 2 / 3:
        return True
    try:
        certificate.verify_directly_issued_by(issuer.certificate)
    except (ValueError, TypeError, InvalidSignature):
        return True  # of another CA, which may have the same name
    if not names:
        return False
    alternative = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    present = {str(name.value) for name in alternative}
    return not set(names) <= present


def is_current(path: Path, now: datetime) -> bool:
    """Whether there is a certificate in the file, and ``now`` is within its life."""
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError):
        return False
    return certificate.not_valid_before_utc <= now < certificate.not_valid_after_utc
