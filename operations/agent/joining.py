"""How an agent joins: it verifies the portal by a fingerprint, makes a key, and has it certified for a code."""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import urllib3
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from urllib3.exceptions import HTTPError, InsecureRequestWarning

from core.errors import Unavailable
from operations.agent.certificates import new_key
from operations.agent.client import refusal_of, unreachable
from operations.agent.folder import AgentFolder, Identity

SECONDS = 15.0
MAX_CERTIFICATE, MAX_ANSWER = 64 << 10, 1 << 20


def join(folder: AgentFolder, url: str, fingerprint: str | None, code: str) -> Identity:
    """Join the portal at ``url`` with a code, and keep what was learnt; the code is used up.

    Without the ``fingerprint`` of its root, SHA-256 in hex, the portal is verified as any web server. Raise
    ``Unavailable`` if it is not reached or not verified, another ``PortalError`` for what it refuses.
    """
    base = url.rstrip("/")
    key, request = new_key()
    with tempfile.TemporaryDirectory() as temporary:
        roots = None
        if fingerprint is not None:
            roots = Path(temporary, "root.pem")
            roots.write_bytes(_root(base, fingerprint))
        said = _post(base, roots, {"code": code, "csr": request})
    try:
        identity = Identity(str(said["name"]), str(said["agents_url"]))
        chain, portal_ca = str(said["chain"]), str(said["portal_ca"])
        settings = {str(name): str(text) for name, text in said["settings"].items()}
        x509.load_pem_x509_certificates(portal_ca.encode())
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Unavailable("The portal's answer is not that of a portal.") from error
    folder.join(identity, key, chain, portal_ca, settings)
    return identity


def _root(base: str, fingerprint: str) -> bytes:
    """Fetch the root with a fingerprint, PEM, from a server that nothing verifies yet: no other has this SHA-256."""
    path = f"{urlsplit(base).path}/ca/{fingerprint}.cer"
    with _pool(base, None, verified=False) as pool:
        content = _answer(pool, "GET", path, None, MAX_CERTIFICATE)
    if hashlib.sha256(content).hexdigest() != fingerprint:
        raise Unavailable(
            f"The server at {base} has no root certificate with this fingerprint, so it may be another than the portal;"
            " the code was not used."
        )
    try:
        return x509.load_der_x509_certificate(content).public_bytes(Encoding.PEM)
    except ValueError as error:
        raise Unavailable("What has this fingerprint is not a certificate; the code was not used.") from error


def _post(base: str, roots: Path | None, body: dict[str, str]) -> dict[str, Any]:
    with _pool(base, roots, verified=True) as pool:
        path = f"{urlsplit(base).path}/broker-agents/join"
        content = _answer(pool, "POST", path, json.dumps(body).encode(), MAX_ANSWER)
    try:
        said = json.loads(content)
    except ValueError as error:
        raise Unavailable("The portal's answer is not JSON.") from error
    return said if isinstance(said, dict) else {}


@contextlib.contextmanager
def _pool(base: str, roots: Path | None, *, verified: bool) -> Iterator[urllib3.HTTPSConnectionPool]:
    address = urlsplit(base)
    if address.scheme != "https" or not address.hostname:
        raise Unavailable("The portal's URL must begin with https://.")
    requirements = "CERT_REQUIRED" if verified else "CERT_NONE"
    pool = urllib3.HTTPSConnectionPool(
        address.hostname,
        address.port or 443,
        retries=False,
        timeout=urllib3.Timeout(SECONDS),
        cert_reqs=requirements,
        ca_certs=None if roots is None else str(roots),
    )
    with contextlib.closing(pool):
        yield pool


def _answer(pool: urllib3.HTTPSConnectionPool, method: str, path: str, body: bytes | None, limit: int) -> bytes:
    headers = {} if body is None else {"Content-Type": "application/json"}
    try:
        with _unwarned():
            answer = pool.urlopen(method, path, body, headers, redirect=False, preload_content=False)
        content = answer.read(limit)
        answer.release_conn()
    except (HTTPError, OSError) as error:
        raise unreachable(
            error,
            f"check that https://{pool.host}:{pool.port} of --url is the portal's address, and that firewalls let this"
            " machine through",
        ) from error
    if answer.status != 200:
        raise refusal_of(answer.status, content)
    return bytes(content)


@contextlib.contextmanager
def _unwarned() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InsecureRequestWarning)
        yield
