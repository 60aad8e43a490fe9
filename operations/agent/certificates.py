"""The certificates of an agent: its own, its broker's, and the two that it probes the broker with.

Keys never leave the machine; the portal certifies them.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from broker_provisioning import BrokerProvisioning
from config import Settings
from core.errors import Unavailable
from core.failpoints import failpoint
from core.files import replace_file
from operations.agent.client import PortalClient
from operations.agent.folder import AgentFolder, is_due, server_files, utc_seconds
from pki.algorithms import private_key_pem
from pki.csr import new_request

log = logging.getLogger("portal.agent")

AGENT, SERVER, GOOD, REVOKED = "agent", "server", "good", "revoked"


def new_key() -> tuple[bytes, str]:
    """Make a key; return it (PEM, PKCS#8), and the request that is signed with it (PEM, PKCS#10)."""
    key = ec.generate_private_key(ec.SECP256R1())
    return private_key_pem(key), new_request(key)


@dataclass(slots=True)
class _Put:
    """The next probe certificate that is revoked, until the broker has a CRL that lists it."""

    key: bytes
    chain: str
    generation: int


class AgentCertificates:
    """Has the certificates of an agent renewed when they are due."""

    def __init__(self, settings: Settings, folder: AgentFolder, broker: BrokerProvisioning) -> None:
        self._settings = settings
        self._folder = folder
        self._broker = broker
        self._next_revoked: _Put | None = None

    def due(self) -> list[str]:
        """Return which certificates are to be renewed."""
        folder, now = self._folder, utc_seconds()
        probes, host = folder.probes, self._settings.mqtt_host
        files = {
            AGENT: (folder.pair, folder.pair, ""),
            SERVER: (*server_files(self._settings), host),
            GOOD: (probes.good.certificate, probes.good.key, ""),
            REVOKED: (probes.revoked.certificate, probes.revoked.key, ""),
        }
        due = [kind for kind, (certificate, key, name) in files.items() if is_due(certificate, key, now, name=name)]
        if self._settings.broker_certificate is not None and SERVER in due:
            due.remove(SERVER)
        return [kind for kind in due if kind != REVOKED or self._next_revoked is None]

    def renew(self, client: PortalClient) -> list[str]:
        """Renew what is due; return what was. Raise ``Unavailable``."""
        made = {kind: new_key() for kind in self.due()}
        if not made:
            return []
        chains, generation = client.certificates({kind: request for kind, (_, request) in made.items()})
        failpoint("agent.certified")
        for kind, (key, _) in made.items():
            if kind not in chains:
                raise Unavailable("The portal did not issue all certificates that were asked for.")
            self._put(kind, key, chains[kind], generation)
            log.info("issued", extra={"what": f"{kind} certificate"})
        return [*made]

    def _put(self, kind: str, key: bytes, chain: str, generation: int) -> None:
        """Write a key and its certificate; of what is not in force yet it is kept back."""
        folder = self._folder
        if kind == AGENT:
            folder.keep_pair(key, chain)
        elif kind == SERVER:
            self._broker.files.write_server_certificate(chain.encode(), key)
        elif kind == GOOD:
            replace_file(folder.probes.good.key, key)
            failpoint("agent.key_written")
            replace_file(folder.probes.good.certificate, chain.encode())
        else:
            self._next_revoked = _Put(key, chain, generation)

    @property
    def awaited_serial(self) -> str | None:
        """The serial number, lower-case hex, of a revoked certificate that the broker's CRL must list at once."""
        if self._next_revoked is None:
            return None
        return f"{x509.load_pem_x509_certificate(self._next_revoked.chain.encode()).serial_number:x}"

    def crl_installed(self, generation: int) -> None:
        """Take the revoked probe certificate into use, if the CRL that was installed lists it."""
        put = self._next_revoked
        if put is not None and generation >= put.generation:
            replace_file(self._folder.probes.revoked.key, put.key)
            replace_file(self._folder.probes.revoked.certificate, put.chain.encode())
            self._next_revoked = None
