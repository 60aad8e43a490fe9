"""The program of a process that makes credentials for an upload."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from datetime import UTC, datetime
from multiprocessing.connection import Connection

from core.errors import PortalError
from pki.keystore import KeyFiles, passphrase
from store.database import Database
from workflows.authority.issuers import open_authority
from workflows.bulk.workers import Setup, make_all
from workflows.credentials import CredentialIssuer

NICENESS = 5  # whoever waits for a single request goes first


def main() -> None:
    """Answer what comes through the pipe whose descriptor is the first argument, until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of the group; the server decides
    with contextlib.suppress(OSError):  # where the system does not let a process choose
        os.nice(NICENESS)
    with Connection(int(sys.argv[1])) as pipe, contextlib.suppress(EOFError, OSError):
        setup: Setup = pipe.recv()
        maker: CredentialIssuer | None = None
        while True:
            jobs = pipe.recv()
            try:
                maker = maker or _maker(setup)
                pipe.send(make_all(maker, jobs))
            except PortalError as error:
                pipe.send(error)


def _maker(setup: Setup) -> CredentialIssuer:
    settings = setup.settings
    secret = passphrase(settings.ca_passphrase, settings.secrets_dir / "ca-passphrase", make=False)
    database = Database(settings.database_url, lock_path=settings.data_dir / ".write.lock", threads=1)
    authority = open_authority(
        database, KeyFiles(settings.ca_dir, secret), settings, setup.tenant_id, now=datetime.now(UTC)
    )
    return CredentialIssuer(settings, authority, setup.link_keys)


if __name__ == "__main__":
    main()
