"""How an agent speaks with its portal: mutual TLS, and an end to each wait."""

from __future__ import annotations

import contextlib
import json
import re
import socket
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlencode, urlsplit

import urllib3
from urllib3.connection import HTTPConnection
from urllib3.exceptions import HTTPError

from broker.guard.feed import Mark, TrustNames, split_lines
from core.errors import (
    ClientCertificateRefused,
    Forbidden,
    PortalError,
    ProjectionInvalid,
    StateConflict,
    Unauthenticated,
    Unavailable,
)
from operations.agent.folder import AgentFolder, Identity

# A link that has broken is noticed after WAIT + MARGIN seconds, if the kernel does not know before.
WAIT_SECONDS, MARGIN_SECONDS, CONNECT_SECONDS = 5, 10.0, 5.0
MAX_ANSWER = 1 << 30
_BLOCK = 64 << 10
_REFUSALS: Mapping[int, type[PortalError]] = {401: Unauthenticated, 403: ClientCertificateRefused, 409: StateConflict}
_OPTIONS = [
    *HTTPConnection.default_socket_options,
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 3),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
]


class PortalClient:
    """Asks the portal as one agent; made anew when its certificate or the portal's CAs have changed."""

    def __init__(self, folder: AgentFolder, identity: Identity, run: str = "") -> None:
        self._run = run
        address = urlsplit(identity.url)
        self._url, self._base = identity.url, address.path.rstrip("/")
        self._pool = urllib3.HTTPSConnectionPool(
            address.hostname or "",
            address.port or 443,
            maxsize=3,
            retries=False,
            cert_reqs="CERT_REQUIRED",
            ca_certs=str(folder.portal_ca),
            cert_file=str(folder.pair),
            socket_options=_OPTIONS,
        )

    def close(self) -> None:
        """Close its connections."""
        self._pool.close()

    @contextlib.contextmanager
    def changes(self, since: Mark, seen: TrustNames, wait: int, *, ends: int = 0) -> Iterator[Iterator[bytes]]:
        """Ask for the changes after a page; yield the lines as they arrive. Raise ``Unavailable``, or a refusal.

        Whose sessions must end because of changes up to generation ``ends`` is known already.
        """
        query: dict[str, str | int] = {
            "since": since.generation,
            "digest": since.digest,
            "cas": seen.cas,
            "crls": seen.crls,
            "wait": wait,
            "run": self._run,
        }
        if ends:
            query["ends"] = ends
        with self._request("GET", f"/broker-agents/changes?{urlencode(query)}", wait=wait) as answer:
            if int(answer.headers.get("Content-Length", MAX_ANSWER + 1)) > MAX_ANSWER:
                raise ProjectionInvalid(f"The portal's list of changes is longer than {MAX_ANSWER} bytes.")
            yield split_lines(answer.stream(_BLOCK))

    def trust(self) -> tuple[TrustNames, Mapping[str, Any]]:
        """Return the CAs and CRLs with their names."""
        with self._request("GET", "/broker-agents/trust") as answer:
            said = _json(answer)
            tag = answer.headers.get("ETag", "").strip('"')
            return TrustNames(tag[:64], tag[64:]), said

    def certificates(self, requests: Mapping[str, str]) -> tuple[Mapping[str, str], int]:
        """Have keys certified; return the chains (PEM), and the generation whose CRL lists the revoked one."""
        with self._request("POST", "/broker-agents/certificates", requests) as answer:
            said = _json(answer)
            return said.get("certificates", {}), int(said.get("generation", 0))

    def report(self, mark: Mark, problem: str | None, presence: str | None = None) -> bool:
        """Say how far the broker was seen to obey, or what is wrong; return whether the portal knows who is connected.

        ``presence`` is the session in which it was told that.
        """
        body = {"generation": mark.generation, "digest": mark.digest, "problem": problem, "presence": presence}
        body["run"] = self._run
        with self._request("POST", "/broker-agents/report", body) as answer:
            return _json(answer).get("presence") is True

    def presence(self, told: Mapping[str, Any]) -> str | None:
        """Tell who is connected; return up to whom the portal has taken it in, ``None`` for all. Raise a refusal."""
        with self._request("POST", "/broker-agents/presence", told) as answer:
            upto = _json(answer).get("upto")
            return upto if isinstance(upto, str) else None

    @contextlib.contextmanager
    def _request(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, *, wait: int = 0
    ) -> Iterator[urllib3.BaseHTTPResponse]:
        timeout = urllib3.Timeout(connect=CONNECT_SECONDS, read=wait + MARGIN_SECONDS)
        content = None if body is None else json.dumps(body).encode()
        headers = {} if content is None else {"Content-Type": "application/json"}
        try:
            answer = self._pool.urlopen(
                method, self._base + path, content, headers, timeout=timeout, preload_content=False, redirect=False
            )
            try:
                if answer.status != 200:
                    raise refusal_of(answer.status, answer.read(MAX_ANSWER))
                yield answer
            except BaseException:
                answer.close()  # what is left of the answer is not waited for
                raise
            finally:
                answer.release_conn()
        except (HTTPError, OSError) as error:
            raise unreachable(
                error,
                f"check that the portal runs with PORTAL_AGENTS_BIND, that {self._url} (PORTAL_AGENTS_URL there) leads"
                " to it and nothing in between ends TLS, and that firewalls let this machine through",
            ) from error


def unreachable(error: Exception, advice: str) -> Unavailable:
    """Return that the portal was not reached and what to check, in a sentence."""
    reason = re.sub(r"^<?HTTPSConnection(Pool)?\([^)]*\)>?: ", "", str(getattr(error, "reason", None) or error))
    return Unavailable(f"The portal was not reached: {reason[:300].rstrip('.')}; {advice}.")


def refusal_of(status: int, content: bytes) -> PortalError:
    """Return what the portal has refused, in its own words."""
    try:
        detail = str(json.loads(content)["detail"])[:500]
    except (ValueError, KeyError, TypeError):
        detail = f"The portal answered with status {status}."
    return _REFUSALS.get(status, Unavailable if status >= 500 else Forbidden)(detail)


def _json(answer: urllib3.BaseHTTPResponse) -> dict[str, Any]:
    try:
        said = json.loads(answer.read(MAX_ANSWER))
    except ValueError:
        raise Unavailable("The portal's answer was cut or is not JSON.") from None
    if not isinstance(said, dict):
        raise Unavailable("The portal's answer is not a JSON object.")
    return said
