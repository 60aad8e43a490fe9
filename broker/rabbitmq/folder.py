"""What the nodes of a RabbitMQ cluster read: a folder of each, with its certificates and the CRLs by their issuers."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path

from cryptography import x509

from broker.capath import FILE_MODE, name_hash
from broker.crl import Trust, read_crl, split_crls
from broker.folder import CA_FILE, CRL_FILE, SERVER_CERTIFICATE_FILE, SERVER_KEY_FILE, broker_group
from broker.guard.folder import GuardFiles
from config import Settings
from core.errors import PortalError, ProjectionInvalid
from core.files import FileLock, access_problem, private_folder, replace_file
from core.rabbitmq_nodes import RabbitmqNode

CRL_FOLDER, PORTAL_CA_FILE = "crls", "portal-ca.pem"
FOLDER_MODE = 0o750
LOCK_SECONDS = 2.0
_LOCK = ".portal.lock"  # several portals may write into one folder

log = logging.getLogger("portal.broker")


class NodeFolder:
    """The folder of one node. A file of it is replaced by a rename, and read by the node when it needs it."""

    def __init__(self, path: Path, group: int | None) -> None:
        self.path = path
        self._group = group
        self._seen: dict[Path, tuple[tuple[int, ...], bytes]] = {}  # the files, as this process has read them

    def write(self, contents: Mapping[str, bytes], *, is_all: bool) -> bool:
        """Write files, by their paths in the folder; return whether one has changed. Raise ``OSError``.

        A CRL with a higher number is kept. With ``is_all`` other CRLs, and those of before, are removed.
        """
        changed = False
        for folder in (self.path, self.path / CRL_FOLDER):
            if not folder.is_dir():
                private_folder(folder, mode=FOLDER_MODE, group=self._group)
        with FileLock(self.path / _LOCK).hold(LOCK_SECONDS):
            for name, content in contents.items():
                if not self._has(name, content):
                    replace_file(self.path / name, content, mode=FILE_MODE, group=self._group)
                    changed = True
            if is_all:
                for path in (self.path / CRL_FOLDER).glob("*.r*"):
                    if f"{CRL_FOLDER}/{path.name}" not in contents:
                        path.unlink(missing_ok=True)
        return changed

    def problem(self, contents: Mapping[str, bytes]) -> str | None:
        """Return what is wrong with a file, or ``None``."""
        for name, content in contents.items():
            try:
                if not self._has(name, content):
                    return f"{self.path / name} is not what the portal wrote."
            except OSError as error:
                return f"{self.path / name} cannot be read: {error.strerror}."
        return None

    def _has(self, name: str, content: bytes) -> bool:
        """Return whether a file has a content, or a newer CRL, and the node may read it."""
        path = self.path / name
        if access_problem(path, FILE_MODE, self._group) is not None:
            return False
        status = path.stat()
        signature = status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
        seen = self._seen.get(path)
        if seen is None or seen[0] != signature:
            seen = self._seen[path] = signature, path.read_bytes()
        return seen[1] == content or (name.startswith(CRL_FOLDER) and _is_newer(seen[1], content))


class RabbitmqFiles(GuardFiles):
    """The broker folder with the journal, and the folders of all nodes."""

    def __init__(self, settings: Settings, clock: Callable[[], datetime]) -> None:
        super().__init__(settings, clock)
        group = broker_group(settings)
        self.nodes: Mapping[RabbitmqNode, NodeFolder] = {
            node: NodeFolder(node.folder or settings.broker_dir, group) for node in settings.rabbitmq_nodes
        }
        self._named: tuple[bytes, Mapping[str, bytes]] = (b"", {})

    def publish_to_nodes(self, trust: Trust) -> Mapping[str, str]:
        """Write CRLs and CAs into each node's folder; return the nodes for which that failed, each with the reason."""
        contents = {CA_FILE: trust.ca, PORTAL_CA_FILE: trust.ca, **self._crl_files(trust.crl)}
        return self._write_to_nodes(contents, is_all=True)

    def write_server_certificate(self, chain: bytes, key: bytes) -> bool:
        """Write the nodes' server certificate; see ``BrokerFolder``."""
        changed = super().write_server_certificate(chain, key)
        if problems := self._write_to_nodes({SERVER_KEY_FILE: key, SERVER_CERTIFICATE_FILE: chain}, is_all=False):
            log.error("nodes did not get their server certificate", extra={"problems": list(problems.values())})
        return changed

    def _write_to_nodes(self, contents: Mapping[str, bytes], *, is_all: bool) -> Mapping[str, str]:
        problems = {}
        for node, folder in self.nodes.items():
            try:
                folder.write(contents, is_all=is_all)
            except OSError as error:
                said = error.strerror or type(error).__name__
                problems[node.name] = f"{folder.path} of {node.name} cannot be written: {said}."
            except PortalError as error:
                problems[node.name] = error.detail
        return problems

    def _crl_files(self, bundle: bytes) -> Mapping[str, bytes]:
        """Return the CRLs of a file, in its order, by their paths in a node's folder."""
        digest = hashlib.sha256(bundle).digest()
        if self._named[0] != digest:
            self._named = digest, dict(_named(bundle))
        return self._named[1]

    def _live_problem(self) -> str | None:
        """Return what is wrong with what the nodes read."""
        try:
            broker = self._settings.broker_dir
            bundle, authorities = (broker / CRL_FILE).read_bytes(), (broker / CA_FILE).read_bytes()
            server = {name: (broker / name).read_bytes() for name in (SERVER_CERTIFICATE_FILE, SERVER_KEY_FILE)}
            contents = {CA_FILE: authorities, PORTAL_CA_FILE: authorities, **server, **self._crl_files(bundle)}
        except (OSError, ProjectionInvalid):
            return None  # which is said of the file itself
        problems = (folder.problem(contents) for folder in self.nodes.values())
        return next((problem for problem in problems if problem is not None), None)


def _named(bundle: bytes) -> Iterator[tuple[str, bytes]]:
    counts: dict[str, int] = {}
    for block in split_crls(bundle):
        key = name_hash(read_crl(block).crl.issuer)
        counts[key] = counts.get(key, -1) + 1
        yield f"{CRL_FOLDER}/{key}.r{counts[key]}", block


def _is_newer(there: bytes, own: bytes) -> bool:
    """Return whether a CRL is a later one of the same CA: another portal has written it."""
    try:
        numbers = []
        for block in (there, own):
            crl = read_crl(block).crl
            key = crl.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
            number = crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
            numbers.append((crl.issuer, key, number))
    except (ProjectionInvalid, ValueError, x509.ExtensionNotFound):
        return False
    return numbers[0][:2] == numbers[1][:2] and numbers[0][2] > numbers[1][2]
