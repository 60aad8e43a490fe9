"""Serves agents beside brokers elsewhere: mutual TLS, and a thread for each connection, since most of them wait.

It runs in one worker process of a node, so that waiting agents take no thread of those that answer requests. Who has
not shown an agent's certificate has few connections at a time, each address fewer, and they are ended soon.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, urlsplit

from broker.guard.feed import Mark, Page, TrustNames, none_line
from config import Settings
from core.errors import (
    BodyTooLarge,
    ClientCertificateRefused,
    InputInvalid,
    NotFound,
    PortalError,
    RequestMalformed,
    Unavailable,
)
from core.files import FileLock
from operations.wiring import Portal
from store.agents import AgentRecord, Given
from web.api.problems import of_error
from web.listeners import CIPHERS, listen
from web.slow_clients import network_of
from workflows.agents.agents import AgentCertificate, Report

log = logging.getLogger("portal.agents")

LOCK = ".agents.lock"
MAX_CONNECTIONS, MAX_OF_AGENT = 1000, 4
MAX_UNKNOWN, MAX_UNKNOWN_OF_ADDRESS = 256, 16  # connections that have not shown an agent's certificate
IDLE_SECONDS = 90.0  # from an answer to the end of the next request
ANSWER_SECONDS = 300.0
MAX_WAIT = 60.0
MAX_BODY, BLOCK = 256 << 10, 64 << 10
AGAIN_SECONDS = 2.0
_DIGEST = re.compile("[0-9a-f]{64}")


def run(portal: Portal, stopping: threading.Event) -> None:
    """Serve agents until ``stopping`` is set, in one process among all on the data folder; the body of a thread."""
    lock = FileLock(portal.settings.data_dir / LOCK)
    while not stopping.is_set():
        try:
            with lock.try_hold() as mine:
                if mine:
                    AgentListener(portal).serve(stopping)
        except (PortalError, OSError) as error:
            log.error("agents cannot be served", extra={"problem": str(error)})
        stopping.wait(AGAIN_SECONDS)


class AgentListener:
    """Accepts agents' connections, and ends those that take too long."""

    def __init__(self, portal: Portal) -> None:
        self.portal = portal
        self.listening, self.stopping = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._open: dict[socket.socket, float] = {}  # until when each may take
        self._unknown: Counter[str] = Counter()  # connections of none that is known as an agent, by address
        self._of_agent: Counter[int] = Counter()
        self._context: tuple[object, ssl.SSLContext] | None = None

    def serve(self, stopping: threading.Event) -> None:
        """Serve until ``stopping`` is set; raise ``StartupError`` if the address cannot be bound."""
        settings = self.portal.settings
        if settings.agents_bind is None:
            return
        [listener] = listen(settings.agents_bind, "PORTAL_AGENTS_BIND", settings.request_timeout, 1)
        log.info("serving agents", extra={"url": settings.agents_url})
        with listener:
            listener.settimeout(0.5)
            self.listening.set()
            while not stopping.is_set():
                with contextlib.suppress(TimeoutError, ConnectionError):
                    self._accept(listener.accept()[0])
                self._end_late()
        self.stopping.set()
        with self._lock:
            for client in self._open:
                _end(client)

    def _accept(self, client: socket.socket) -> None:
        address = network_of(client)
        with self._lock:
            of_address, unknown = self._unknown[address], self._unknown.total()
            if len(self._open) >= MAX_CONNECTIONS or unknown >= MAX_UNKNOWN or of_address >= MAX_UNKNOWN_OF_ADDRESS:
                client.close()
                return
            self._open[client] = time.monotonic() + self.portal.settings.request_timeout
            self._unknown[address] += 1
        threading.Thread(target=self._converse, args=(client, address), name="agent", daemon=True).start()

    def _end_late(self) -> None:
        """End the connections whose time is over: their threads notice."""
        now = time.monotonic()
        with self._lock:
            for client in [client for client, until in self._open.items() if until < now]:
                _end(client)

    def extend(self, client: socket.socket, seconds: float) -> None:
        """Give a connection time."""
        with self._lock:
            if client in self._open:
                self._open[client] = time.monotonic() + seconds

    def _converse(self, client: socket.socket, address: str) -> None:
        is_known = False
        try:
            client.settimeout(self.portal.settings.request_timeout)
            secure = self._tls().wrap_socket(client, server_side=True, do_handshake_on_connect=False)
            with self._lock:
                self._open[secure] = self._open.pop(client)
            client = secure
            secure.do_handshake()
            # Each device has a certificate of this CA, so that TLS alone does not tell agents from others.
            with contextlib.suppress(PortalError):  # the first request is answered with it
                self.portal.agents.shown(secure.getpeercert(binary_form=True) or b"")
                self._known(address)
                is_known = True
            _Conversation(secure, self)
        except OSError as error:  # of TLS, too
            log.debug("an agent's connection has ended", extra={"problem": str(error)})
        except Exception:
            log.exception("an agent's connection has failed")
        finally:
            if not is_known:
                self._known(address)
            with self._lock:
                self._open.pop(client, None)
            client.close()

    def _known(self, address: str) -> None:
        """Count a connection from an address no longer as one that is not an agent's."""
        with self._lock:
            self._unknown[address] -= 1
            if not self._unknown[address]:
                del self._unknown[address]

    def _tls(self) -> ssl.SSLContext:
        """Return the TLS context, made anew if a certificate of the portal's has changed."""
        folder, cas = self.portal.settings.tls_dir, self.portal.agents.client_cas
        certificate, key = folder / "agents.pem", folder / "agents.key"
        seen = (cas, certificate.stat().st_mtime_ns, key.stat().st_mtime_ns)
        with self._lock:
            if self._context is None or self._context[0] != seen:
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                context.minimum_version = ssl.TLSVersion.TLSv1_2
                context.set_ciphers(CIPHERS)
                context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
                context.num_tickets = 0  # each connection shows its certificate
                context.verify_mode = ssl.CERT_REQUIRED
                context.load_verify_locations(cadata=cas)
                context.load_cert_chain(certificate, key)
                self._context = (seen, context)
            return self._context[1]

    @contextlib.contextmanager
    def counted(self, record: AgentRecord) -> Any:
        """Count a request of an agent in the body; raise ``Unavailable`` if it has too many."""
        with self._lock:
            if self._of_agent[record.broker_id] >= MAX_OF_AGENT:
                raise Unavailable("This agent has too many requests under way: does another one run with its key?")
            self._of_agent[record.broker_id] += 1
        try:
            yield
        finally:
            with self._lock:
                self._of_agent[record.broker_id] -= 1


def _end(client: socket.socket) -> None:
    with contextlib.suppress(OSError):
        client.shutdown(socket.SHUT_RDWR)


class _Conversation(BaseHTTPRequestHandler):
    """Answers the requests of one connection."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "portal", ""

    def __init__(self, client: ssl.SSLSocket, listener: AgentListener) -> None:
        self._listener = listener
        self._portal = listener.portal
        self._client = client
        self._record: AgentRecord | None = None
        super().__init__(client, client.getpeername(), None)  # type: ignore[arg-type]

    @property
    def _settings(self) -> Settings:
        return self._portal.settings

    def setup(self) -> None:
        """Give the client time for its first request."""
        super().setup()
        self._listener.extend(self._client, self._settings.request_timeout)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the library's name
        """Log nothing: what counts is logged where it is decided."""

    def do_GET(self) -> None:
        """Answer what an agent asks for."""
        self._answer({"/broker-agents/changes": self._changes, "/broker-agents/trust": self._trust})

    def do_POST(self) -> None:
        """Take in what an agent says."""
        self._answer({"/broker-agents/report": self._report, "/broker-agents/certificates": self._certificates})

    def _answer(self, handlers: Mapping[str, Callable[[], None]]) -> None:
        self._listener.extend(self._client, ANSWER_SECONDS)
        self._begun = False
        try:
            body = self._read_body()
            # Looked up at each request: a removed agent's connection ends with its next one.
            self._record = self._portal.agents.shown(self._client.getpeercert(binary_form=True) or b"")
            handler = handlers.get(urlsplit(self.path).path)
            if handler is None:
                raise NotFound("There is nothing at this path for agents.")
            self._body = body
            with self._listener.counted(self._record):
                handler()
        except PortalError as error:
            self._refuse(error)
        except OSError:
            self.close_connection = True
            raise
        except Exception as error:
            log.exception("an agent was not answered")
            self._refuse(error)
        self._listener.extend(self._client, IDLE_SECONDS)
        if self._listener.stopping.is_set():
            self.close_connection = True

    def _refuse(self, error: Exception) -> None:
        problem = of_error(error, request_id="", path=urlsplit(self.path).path)
        if isinstance(error, ClientCertificateRefused | BodyTooLarge | RequestMalformed):
            self.close_connection = True
        if self._begun:  # a page without its last line is no page
            self.close_connection = True
            return
        content = json.dumps({"code": problem.code, "detail": problem.detail}).encode()
        self._send(problem.status, content, "application/problem+json")

    def _send(self, status: int, content: bytes, media_type: str, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", media_type)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self._write(content)

    def _write(self, content: bytes) -> None:
        view = memoryview(content)
        for start in range(0, len(content), BLOCK):
            self.wfile.write(view[start : start + BLOCK])

    def _read_body(self) -> bytes:
        length = self.headers.get("Content-Length", "0")
        if "Transfer-Encoding" in self.headers or not re.fullmatch("[0-9]{1,9}", length):
            raise RequestMalformed("A request of an agent states the length of its body.")
        if int(length) > MAX_BODY:
            raise BodyTooLarge(f"A request of an agent has at most {MAX_BODY} bytes.")
        body = self.rfile.read(int(length))
        if len(body) != int(length):
            raise ConnectionResetError("the body was cut")
        return body

    @property
    def _agent(self) -> AgentRecord:
        assert self._record is not None  # noqa: S101 - set before any handler is called
        return self._record

    # --- What it asks for

    def _changes(self) -> None:
        asked = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
        mark = Mark(_number(asked.get("since", "0")), _digest(asked.get("digest", "0" * 64)))
        seen = TrustNames(_digest(asked.get("cas", "0" * 64)), _digest(asked.get("crls", "0" * 64)))
        wait = min(float(_number(asked.get("wait", "0"))), MAX_WAIT)
        feed, record = self._portal.agent_feed, self._agent
        start = feed.start_of(record, mark)
        has_changes = feed.wait(start, seen, wait, goes_on=lambda: not self._listener.stopping.is_set())
        if wait and has_changes:  # it may have been removed meanwhile, or have another certificate
            record = self._portal.agents.shown(self._client.getpeercert(binary_form=True) or b"")
            start = feed.start_of(record, mark)
        if not has_changes:
            content = none_line(start.generation, feed.names())
            self._send(HTTPStatus.OK, content, "text/plain")
            return
        with contextlib.closing(feed.page(record, start)) as page:
            self._send_page(record, start, page)

    def _send_page(self, record: AgentRecord, start: Given, page: Page) -> None:
        feed = self._portal.agent_feed
        end_size = len(page.end(feed.names()))
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(page.size + end_size))
        self.end_headers()
        self._begun = True
        for block in page.blocks():
            self._write(block)
        feed.given(record, start, page)
        self._write(page.end(feed.names()))

    def _trust(self) -> None:
        names, body = self._portal.agent_feed.trust(self._agent)
        tag = f'"{names.cas}{names.crls}"'
        self._send(HTTPStatus.OK, json.dumps(body).encode(), "application/json", ETag=tag)

    def _report(self) -> None:
        said = self._json()
        problem, generation, digest = said.get("problem"), said.get("generation"), said.get("digest")
        if problem is not None and not (isinstance(problem, str) and 0 < len(problem) <= 2000):
            raise InputInvalid("A problem is a sentence.")
        if type(generation) is not int or generation < 0 or not isinstance(digest, str):
            raise InputInvalid("A report names the generation and the digest of a page of changes.")
        self._portal.agents.report(self._agent, Report(generation, digest, problem))
        self._send(HTTPStatus.OK, b"{}", "application/json")

    def _certificates(self) -> None:
        said = self._json()
        kinds = {*AgentCertificate}
        if not said or not all(kind in kinds and isinstance(csr, str) for kind, csr in said.items()):
            raise InputInvalid(f"Certificates are asked for by CSRs (PEM) for {', '.join(kinds)}.")
        requests = {AgentCertificate(kind): csr for kind, csr in said.items()}
        issued = self._portal.agents.certify(self._agent, requests)
        body = {"generation": issued.generation, "certificates": dict(issued.chains)}
        self._send(HTTPStatus.OK, json.dumps(body).encode(), "application/json")

    def _json(self) -> dict[str, Any]:
        try:
            said = json.loads(self._body)
        except (ValueError, RecursionError):
            raise RequestMalformed("The body is not JSON.") from None
        if not isinstance(said, dict):
            raise RequestMalformed("The body is not a JSON object.")
        return said


def _number(text: str) -> int:
    if not re.fullmatch("[0-9]{1,18}", text):
        raise InputInvalid("A generation, and seconds to wait, are whole numbers.")
    return int(text)


def _digest(text: str) -> str:
    if not _DIGEST.fullmatch(text):
        raise InputInvalid("A digest has 64 lower-case hexadecimal digits.")
    return text
