"""Open the places of the CA keys that the settings name."""

from __future__ import annotations

from config import Settings
from pki.keys.files import passphrase
from pki.keys.stores import KeyStores


def open_keys(settings: Settings, *, make: bool = True) -> KeyStores:
    """Return the CA keys of an installation; with ``make`` a missing passphrase file is created.

    Asks no token. Raises ``CaKeyUnavailable`` if the passphrase of the files cannot be read.
    """
    return KeyStores(
        settings.ca_dir,
        passphrase(settings.ca_passphrase.get_secret_value(), settings.secrets_dir / "ca-passphrase", make=make),
        issuing=settings.ca_keys,
        root=settings.root_keys,
        timeout=settings.token_timeout,
    )
