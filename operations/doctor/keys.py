"""Checks of the CAs' keys: where they are, how they were made, and whether they sign."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from cryptography import x509

from core.errors import PortalError, TokenUnavailable
from core.server_command import server_command
from core.states import IssuerKind
from operations.doctor.base import Finding, Findings, Installation, combine
from pki.keys.contract import KeyDescription, Origin
from pki.keys.stores import KeyStores
from store.issuers import IssuerRecord
from workflows.authority.keys import open_keys

_MAKE_ANOTHER = f"Make a CA whose key is born in the token: {server_command('ca rollover')} (docs/hsm.md)."
_REPLACE_ROOT = "Destroy every copy of it, or put another root above the next CA (docs/ca.md)."
_RESTORE = "Restore the key from a backup, or correct PORTAL_CA_PASSPHRASE or the settings of its token."


def ca_keys(installation: Installation) -> Finding:
    """Check that each key opens, signs, belongs to its certificate and, in a token, was born there."""
    found = Findings()
    _check_pin_files(installation, found)
    if found:
        return combine(found, "")  # their tokens cannot be asked
    with contextlib.closing(open_keys(installation.settings, make=False)) as keys:
        seen = [said for issuer in installation.issuers() if (said := _key(issuer, keys, found))]
        for path in keys.files.set_aside_files():
            found.warning(f"{path} has a key that was moved into a token.", f"Destroy it: shred -u {path}")
    return combine(found, "; ".join(seen) + ".")


def _key(issuer: IssuerRecord, keys: KeyStores, found: Findings) -> str:
    """Return what there is to say of a key that is as it should be."""
    is_root, name = issuer.kind == IssuerKind.ROOT, issuer.name
    if is_root and not keys.exists(name):
        return "the root's key is not here"
    try:
        if keys.load(name).public_key() != x509.load_der_x509_certificate(issuer.der).public_key():
            found.problem(f"The key of {name} does not belong to its certificate.", "Restore its key from a backup.")
            return ""
        described = keys.examine(name)
    except TokenUnavailable as error:
        if not is_root:
            found.problem(error.detail, "Correct that; until then nothing is signed (docs/hsm.md).")
            return ""
        described = keys.describe(name)  # its token is better kept elsewhere
        return f"the root's key was {described.origin}, which is not in use here: {error.detail.rstrip('.')}"
    except PortalError as error:
        found.problem(error.detail, _RESTORE)
        return ""
    return _told(described, is_root, found)


def _told(described: KeyDescription, is_root: bool, found: Findings) -> str:
    name, remedy = described.name, _REPLACE_ROOT if is_root else _MAKE_ANOTHER
    if described.origin is Origin.FILE:
        return "the root's key is in the CA folder, and can be moved away" if is_root else f"{name} is in a file"
    if described.can_leave:
        found.problem(f"The token lets the key of {name} be read.", remedy)
    elif described.origin is Origin.IMPORTED:
        found.warning(f"The key of {name} is in a token, but was imported: there may be copies of it.", remedy)
    elif described.origin is Origin.UNKNOWN:
        found.warning(f"The token of {name} does not say whether its key was made there.", remedy)
    return f"{name} was {described.origin}"


def _check_pin_files(installation: Installation, found: Findings) -> None:
    settings = installation.settings
    for uri in dict.fromkeys((*settings.ca_keys, *settings.root_keys)):
        if uri is None:
            continue
        if wrong := _wrong_with(uri.pin_file, may_be_missing=uri not in settings.ca_keys):
            what, _, remedy = wrong.partition(": ")
            found.problem(f"The PIN file {uri.pin_file} {what}.", f"Correct it: {remedy}")


def _wrong_with(path: Path, *, may_be_missing: bool) -> str | None:
    """Return what is wrong and, after a colon, what to do."""
    from pki.keys.token_process import pin_file_problem  # here, since with it comes the library of PKCS#11 modules

    try:
        return pin_file_problem(path, os.stat(path))
    except FileNotFoundError:
        return None if may_be_missing else f"does not exist: write the PIN to {path}, with mode 0600"
    except OSError as error:
        return f"cannot be read ({error.strerror}): let the portal's user read it"
