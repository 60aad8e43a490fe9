"""The management API of a RabbitMQ node: requests with an end to each wait, and limits on what is read."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import quote

from broker.folder import CA_FILE
from config import Settings
from core.errors import BrokerNotEnforcing, BrokerUnavailable
from core.rabbitmq_nodes import RabbitmqNode

MAX_ANSWER = 8 << 20
BLOCK = 256 << 10
MAX_SECONDS = 10.0
_CONNECTIONS = 4

Json: TypeAlias = Any


def password_of(settings: Settings) -> str:
    """Return the password of the portal's user at RabbitMQ; raise ``BrokerUnavailable``."""
    path = settings.rabbitmq_password_file
    named = f"PORTAL_RABBITMQ_PASSWORD_FILE names {path}, which"
    try:
        if path is None or path.stat().st_mode & 0o027:  # a group may read it, as it may read systemd's credentials
            raise BrokerUnavailable(f"{named} is open to others; chmod 600 {path}.")
        password = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise BrokerUnavailable(f"{named} cannot be read ({error.strerror}).") from None
    except ValueError:
        password = ""
    if not password or not password.isprintable() or len(password) > 1000:
        raise BrokerUnavailable(f"{named} must have one line, the password.")
    return password


def path_of(*parts: str) -> str:
    """Return the path of a thing of the API, whatever characters its name has: ``path_of("vhosts", "/")``."""
    return "/api/" + "/".join(quote(part, safe="") for part in parts)


def all_nodes(settings: Settings) -> list[Management]:
    """Return what asks each node of the settings; raise ``BrokerUnavailable`` without a password."""
    password = password_of(settings)
    return [of_node(settings, node, settings.rabbitmq_user, password) for node in settings.rabbitmq_nodes]


def of_node(settings: Settings, node: RabbitmqNode, user: str, password: str) -> Management:
    """Return what asks a node as a user of it."""
    ca = settings.broker_ca_file if settings.broker_ca_file.exists() else settings.broker_file(CA_FILE)
    return Management(node, user, password, ca=ca)


class Management:
    """Asks one node; for several threads. An ``https`` URL is verified by the CAs of ``ca`` (PEM), or the system's."""

    def __init__(self, node: RabbitmqNode, user: str, password: str, *, ca: Path | None = None) -> None:
        import urllib3  # here, as few portals have a RabbitMQ

        self.node = node
        self._pool = urllib3.connectionpool.connection_from_url(
            node.management,
            maxsize=_CONNECTIONS,
            retries=False,
            **({} if node.management.startswith("http:") else {"ca_certs": None if ca is None else str(ca)}),
        )
        self._base = urllib3.util.parse_url(node.management).path or ""
        self._headers = {
            **urllib3.make_headers(basic_auth=f"{user}:{password}".encode().decode("latin-1")),
            "Content-Type": "application/json",
        }
        self._user = user

    def close(self) -> None:
        """Close its connections."""
        self._pool.close()

    def get(self, path: str, deadline: float) -> Json:
        """Return what is at a path, ``None`` if nothing is; raise as ``ask`` does."""
        return self.ask("GET", path, deadline)

    def put(self, path: str, deadline: float, body: Mapping[str, Json]) -> None:
        """Make or replace what is at a path; raise as ``ask`` does."""
        self.ask("PUT", path, deadline, body)

    def delete(self, path: str, deadline: float) -> None:
        """Remove what is at a path, if it is there; raise as ``ask`` does."""
        self.ask("DELETE", path, deadline)

    def ask(self, method: str, path: str, deadline: float, body: Mapping[str, Json] | None = None) -> Json:
        """Return the answer to a request, ``None`` if there is nothing at the path or the answer is empty.

        Raise ``BrokerUnavailable`` without an answer by ``deadline`` (of ``time.monotonic``), ``BrokerNotEnforcing``
        if the node refuses the portal's user.
        """
        from urllib3 import Timeout
        from urllib3.exceptions import HTTPError

        left = min(deadline - time.monotonic(), MAX_SECONDS)
        if left <= 0:
            raise self._unavailable("has not answered in time")
        content = None if body is None else json.dumps(body).encode()
        try:
            answer = self._pool.request(
                method,
                self._base + path,
                body=content,
                headers=self._headers,
                timeout=Timeout(total=left),
                redirect=False,
                preload_content=False,
            )
            said, is_whole = b"", False
            try:
                while not is_whole and len(said) <= MAX_ANSWER:
                    # The time-out is one of each part, of which there may be many.
                    if time.monotonic() >= deadline:
                        raise TimeoutError("no whole answer in time")
                    part = answer.read1(BLOCK)
                    said, is_whole = said + part, not part
            finally:
                if is_whole:
                    answer.release_conn()
                else:
                    answer.close()
        except (HTTPError, OSError) as error:
            raise self._unavailable(f"does not answer ({_reason(error)})") from error
        return self._json(answer.status, said)

    def _json(self, status: int, said: bytes) -> Json:
        if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            raise BrokerNotEnforcing(
                f"The management API of {self.node.name} refuses the user {self._user}: it must be an internal user"
                " with the tag administrator, and PORTAL_RABBITMQ_PASSWORD_FILE must have its password."
            )
        if status == HTTPStatus.NOT_FOUND:
            return None
        if len(said) > MAX_ANSWER or not HTTPStatus.OK <= status < HTTPStatus.MULTIPLE_CHOICES:
            raise self._unavailable(f"answered with the status {status} and {len(said)} bytes")
        try:
            return json.loads(said) if said else None
        except (ValueError, RecursionError):
            raise self._unavailable("answered with what is not JSON") from None

    def _unavailable(self, why: str) -> BrokerUnavailable:
        return BrokerUnavailable(f"The management API of {self.node.name} at {self.node.management} {why}.")


def _reason(error: Exception) -> str:
    inner = getattr(error, "reason", error)
    return str(getattr(inner, "strerror", None) or type(inner).__name__)
