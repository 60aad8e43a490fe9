"""A small portal for the command line's tests: it speaks the REST interface, keeps all in memory, signs for real."""

from __future__ import annotations

import io
import json
import re
import ssl
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pyzipper
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import NameOID

from commands.vocabulary import NAMES
from tests.support.pki import PEM, Authority, Credentials, Pki, key_pem

TOKEN = "operator-token-of-the-tests"
BUNDLE_PASSWORD = "bundle-password-of-the-tests"
LINK_TOKEN = "signed-link-token"
CLIENT_CONFIGURATION = (
    "# Options\n-h localhost\n-p 8883\n-i {id}\n--cafile ca.pem\n--cert chain.pem\n--key device.key\n"
)


@dataclass(frozen=True)
class Reply:
    """An answer; ``body`` is JSON unless it is bytes, ``breaks_off`` closes the connection in the middle of it."""

    status: int = 200
    body: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)
    breaks_off: bool = False


def problem(
    status: int, code: str, detail: str, *, errors: Any = None, headers: Mapping[str, str] | None = None
) -> Reply:
    body = {"type": "about:blank", "title": "Refused", "status": status, "detail": detail, "code": code}
    if errors is not None:
        body["errors"] = errors
    return Reply(status, body, {"Content-Type": "application/problem+json", **(headers or {})})


def rows_reply(answers: Iterable[Mapping[str, Any]], *, breaks_off: bool = False) -> Reply:
    """Answers to the rows of an upload."""
    lines = "".join(json.dumps(answer) + "\n" for answer in answers)
    return Reply(200, lines.encode(), {"Content-Type": "application/x-ndjson"}, breaks_off)


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    query: dict[str, str]
    headers: Mapping[str, str]
    body: Any


Answerer = Callable[[Request], Reply]


def device_files(pki: Pki, device_id: str, credentials: Credentials | None = None) -> dict[str, bytes]:
    """What a bundle holds, by name."""
    credentials = credentials or pki.issuing.issue(device_id)
    certificate = credentials.certificate.public_bytes(PEM)
    return {
        "device.key": key_pem(credentials.key),
        "ca.pem": pki.ca_bundle,
        "device.pem": certificate,
        "chain.pem": certificate + pki.issuing.certificate.public_bytes(PEM),
        "mosquitto-client.conf": CLIENT_CONFIGURATION.format(id=device_id).encode(),
        "README.txt": b"Read me.\n",
    }


def build_bundle(
    files: Mapping[str, bytes],
    *,
    password: str = BUNDLE_PASSWORD,
    encrypted: tuple[str, ...] = ("device.key", "ca.pem", "SHA256SUMS"),
    compression: int = pyzipper.ZIP_STORED,
    sums_of: Mapping[str, bytes] | None = None,
) -> bytes:
    """A ZIP bundle with the hashes of its own files, or of those in ``sums_of`` (none: as an older portal made it)."""
    files = dict(files)
    listed = {name: content for name, content in (files if sums_of is None else sums_of).items() if name in NAMES}
    if listed and "SHA256SUMS" in encrypted:
        files["SHA256SUMS"] = "".join(f"{sha256(data).hexdigest()}  {name}\n" for name, data in listed.items()).encode()
    buffer = io.BytesIO()
    with pyzipper.AESZipFile(buffer, "w", compression=compression) as archive:
        for name, content in files.items():
            archive.pwd = password.encode() if name in encrypted else None
            archive.encryption = pyzipper.WZ_AES if name in encrypted else None
            archive.writestr(name, content)
    return buffer.getvalue()


class PortalStub:
    """Set ``replies[(method, path)]`` to answer otherwise: one reply for ever, or a list for one call each."""

    def __init__(self, pki: Pki) -> None:
        self.pki = pki
        self.url = ""
        self.requests: list[Request] = []
        self.replies: dict[tuple[str, str], Reply | list[Reply]] = {}
        self.devices: dict[str, dict[str, Any]] = {}
        self.bundles: dict[str, bytes] = {}
        self.used: dict[str, str | None] = {}  # links that were spent, with the idempotency key of the fetch
        self.answers: dict[str, Any] = {}
        self.broker = "enforced"
        self.name_shown: str | None = None
        self.registered: dict[str, Any] = {}  # what the answer to a registration says besides
        self.bundle_of: Callable[[str], bytes] | None = None  # the bundle of a device, if it is another one

    def add_device(self, name: str = "sensor-7", **fields: Any) -> str:
        device_id = str(uuid.uuid4())
        self.devices[device_id] = {
            "device_id": device_id,
            "name": name,
            "type": "thermometer",
            "location": "Hall 2",
            "firmware": "1.4.2",
            "metadata": {},
            "status": "active",
            "profile": "default",
            "created_at": "2026-01-01T00:00:00Z",
            "expires_at": "2036-01-01T00:00:00Z",
            "connection": {"connected": True, "since": "2026-01-02T00:00:00Z", "last_seen": "2026-01-03T00:00:00Z"},
            "broker": "enforced",
            "brokers": [{"host": "broker.example.com", "port": 8883}],
            "topics": [{"filter": "devices/{id}/#", "access": "readwrite"}],
            "certificate": {"serial_number": "0a1b", "fingerprint": "ab" * 32, "status": "active"},
            **fields,
        }
        return device_id

    def add_link(self, bundle: bytes) -> str:
        token = f"{LINK_TOKEN}-{len(self.bundles)}"
        self.bundles[token] = bundle
        return f"{self.url}/download/{token}"

    def calls(self, method: str, path: str) -> list[Request]:
        return [request for request in self.requests if (request.method, request.path) == (method, path)]

    def answer(self, request: Request) -> Reply:
        self.requests.append(request)
        replies = self.replies.get((request.method, request.path))
        if isinstance(replies, Reply):
            return replies
        if replies:
            return replies.pop(0)
        if request.path.startswith("/download/"):
            return self._download(request)
        public = {
            "/healthz": Reply(body={"status": "ok"}),
            "/readyz": Reply(body={"status": "ready", "checks": [{"name": "database", "ok": True, "problem": None}]}),
            "/ca.pem": Reply(body=self.pki.ca_bundle, headers={"Content-Type": "application/x-pem-file"}),
            "/broker-ca.pem": Reply(body=self.pki.ca_bundle, headers={"Content-Type": "application/x-pem-file"}),
        }
        if request.path in public:
            return public[request.path]
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return problem(401, "unauthenticated", "This token is not known; log in again.")
        return self._authenticated(request)

    def _authenticated(self, request: Request) -> Reply:
        routes: list[tuple[str, str, Answerer]] = [
            ("POST", "/register", self._register),
            ("POST", "/register/bulk", self._register_rows),
            ("GET", "/devices", self._list),
            ("POST", "/devices/actions", self._act),
            ("GET", "/devices/([^/]+)", self._show),
            ("PATCH", "/devices/([^/]+)", self._update),
            ("GET", "/devices/([^/]+)/certificates", self._certificates),
            ("POST", "/revoke/([^/]+)", self._revoke),
            ("GET", "/tokens", lambda _: Reply(body={"tokens": [_token("factory")]})),
            ("POST", "/tokens", lambda call: Reply(201, _token(call.body["name"]) | {"token": "secret-of-new-token"})),
            ("DELETE", "/tokens/([^/]+)", lambda _: Reply(body=_token("factory"))),
            ("GET", "/audit", lambda _: Reply(body={"entries": [_entry()], "next_cursor": None})),
        ]
        for method, pattern, answerer in routes:
            if request.method == method and re.fullmatch(pattern, request.path):
                return answerer(request)
        return problem(404, "not_found", "There is nothing here.")

    def _register(self, request: Request) -> Reply:
        key = request.headers["Idempotency-Key"]
        if key in self.answers:
            return Reply(201, self.answers[key])
        device_id = self.add_device(request.body["name"])
        answer = {
            "device_id": device_id,
            "name": self.name_shown or request.body["name"],
            "status": "active",
            "fingerprint": "cd" * 32,
            "serial_number": "0a1b",
            "issued_at": "2026-01-01T00:00:00Z",
            "expires_at": "2036-01-01T00:00:00Z",
        }
        answer |= self.registered
        if "csr" in request.body:
            answer |= self._sign(device_id, request.body["csr"])
        else:
            password = request.body.get("bundle_password", BUNDLE_PASSWORD)
            link = self.add_link(
                self.bundle_of(device_id)
                if self.bundle_of
                else build_bundle(device_files(self.pki, device_id), password=password)
            )
            answer |= {"download_url": link, "download_expires_at": "2036-01-01T00:00:00Z", "bundle_password": password}
        self.answers[key] = answer
        return Reply(201, answer)

    def _register_rows(self, request: Request) -> Reply:
        answers: list[dict[str, Any]] = []
        for number, row in enumerate(request.body, 1):
            known = {device.get("external_id"): device_id for device_id, device in self.devices.items()}
            if request.query.get("dry_run") == "true":
                answers.append({"row": number, "dry_run": True, "repeated": row.get("external_id") in known})
                continue
            device_id = known.get(row["external_id"]) or self.add_device(row["name"], external_id=row["external_id"])
            answers.append({"row": number, "device_id": device_id, "repeated": row["external_id"] in known})
        return rows_reply(answers)

    def _sign(self, device_id: str, csr: str) -> dict[str, str]:
        key = x509.load_pem_x509_csr(csr.encode()).public_key()
        certificate = sign_key(self.pki.issuing, device_id, key).decode()
        return {
            "certificate": certificate,
            "chain": certificate + self.pki.issuing.certificate.public_bytes(PEM).decode(),
        }

    def _list(self, request: Request) -> Reply:
        devices = list(self.devices.values())
        if "named" in request.query:
            named = request.query["named"]
            devices = [
                device
                for device in devices
                if named in (device["name"], device.get("external_id")) or device["device_id"].startswith(named)
            ]
        start, limit = int(request.query.get("cursor", 0)), int(request.query.get("limit", 50))
        more = start + limit < len(devices)
        return Reply(
            body={"devices": devices[start : start + limit], "next_cursor": str(start + limit) if more else None}
        )

    def _device(self, request: Request) -> dict[str, Any] | None:
        return self.devices.get(request.path.split("/")[2])

    def _show(self, request: Request) -> Reply:
        device = self._device(request)
        return Reply(body=device) if device else problem(404, "device_not_found", "No device has this id.")

    def _update(self, request: Request) -> Reply:
        device = self._device(request)
        if device is None:
            return problem(404, "device_not_found", "No device has this id.")
        device.update(request.body)
        return Reply(body=device)

    def _certificates(self, _request: Request) -> Reply:
        row = {
            "serial_number": "0a1b",
            "status": "active",
            "issued_at": "2026-01-01T00:00:00Z",
            "fingerprint": "ab" * 32,
        }
        return Reply(body={"certificates": [row]})

    def _revoke(self, request: Request) -> Reply:
        device = self._device(request)
        if device is None:
            return problem(404, "device_not_found", "No device has this id.")
        device["status"] = "revoked"
        reason = request.body.get("reason", "unspecified")
        answer = {"device_id": device["device_id"], "status": "revoked", "revoked_at": "2026-01-02T00:00:00Z"}
        return Reply(body=answer | {"reason": reason, "broker": self.broker})

    def _act(self, request: Request) -> Reply:
        lines: list[dict[str, Any]] = []
        action = request.body["action"]
        for device_id in request.body["ids"]:
            device = self.devices.get(device_id)
            if device is not None and action == "update":
                device.update(request.body["changes"])
                lines.append({"device_id": device_id})
                continue
            if device is not None and action == "renew" and device["status"] == "active":
                password = f"secret of {device_id} by {request.headers['Idempotency-Key']}"
                link = {"download_url": f"{self.url}/download/x", "bundle_password": password}
                lines.append({"device_id": device_id, "status": "active", **link})
                continue
            if device is None or device["status"] == "revoked" != action + "d":
                lines.append({"device_id": device_id, "code": "state_conflict", "detail": "The device cannot."})
                continue
            status = {"revoke": "revoked", "suspend": "suspended", "resume": "active"}[action]
            before = {"repeated": True} if device["status"] == status else {}
            device["status"] = status
            lines.append({"device_id": device_id, "status": status, "broker": self.broker, **before})
        return Reply(200, "".join(json.dumps(line) + "\n" for line in lines).encode())

    def _download(self, request: Request) -> Reply:
        token = request.path.rsplit("/", 1)[1]
        bundle = self.bundles.get(token)
        key = request.headers.get("Idempotency-Key")
        if request.method != "HEAD":
            self.used.setdefault(token, key)
        if bundle is None or self.used.get(token, key) != key:
            return problem(410, "link_used", "This link was used already.")
        return Reply(body=bundle, headers={"Content-Type": "application/zip"})


def sign_key(issuer: Authority, device_id: str, key: Any) -> bytes:
    """A device's certificate for a public key of its own."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, device_id)])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(issuer.certificate.subject).public_key(key)
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(issuer.now - timedelta(hours=1))
    builder = builder.not_valid_after(issuer.now + timedelta(days=30))
    return builder.sign(issuer.key, hashes.SHA256()).public_bytes(PEM)


def _token(name: str) -> dict[str, Any]:
    return {
        "token_id": "0f9d2c4e-5b1a-4c7d-9e8f-102030405060",
        "name": name,
        "role": "operator",
        "created_at": "2026-01-01T00:00:00Z",
        "expires_at": None,
        "revoked_at": None,
    }


def _entry() -> dict[str, Any]:
    return {
        "id": 1,
        "at": "2026-01-01T00:00:00Z",
        "actor": "token:factory",
        "action": "device:register",
        "object": "device:0f9d2c4e-5b1a-4c7d-9e8f-102030405060",
        "outcome": "done",
        "request_id": "request-1",
        "address": "127.0.0.1",
        "detail": {"name": "sensor-7"},
    }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    stub: PortalStub

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        content = self.rfile.read(length)
        parts = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        if self.headers.get("Content-Type") == "application/x-ndjson":
            body: Any = [json.loads(line) for line in content.splitlines()]
        else:
            body = json.loads(content) if content else {}
        reply = self.stub.answer(Request(self.command, parts.path, query, dict(self.headers), body))
        sent = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body or {}).encode()
        headers = {"Content-Type": "application/json", "X-Request-Id": "request-1", "Connection": "close"}
        headers |= dict(reply.headers)
        self.close_connection = True
        if reply.breaks_off and not sent:
            return
        self.send_response(reply.status)
        for name, value in (headers | {"Content-Length": str(len(sent))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(sent[: len(sent) // 2] if reply.breaks_off else sent)

    do_GET = do_HEAD = do_POST = do_PATCH = do_DELETE = _answer  # noqa: N815 - http.server's names

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - http.server's name
        """Keep quiet."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that refuse the certificate break off: that is what is tested."""


@contextmanager
def running(stub: PortalStub, *, tls: tuple[Path, Path] | None = None) -> Iterator[PortalStub]:
    """Serve on a free port of the loopback address, with TLS where a certificate and a key are given."""
    handler = type("Handler", (_Handler,), {"stub": stub})
    server = _Server(("127.0.0.1", 0), handler)
    scheme, host = "http", "127.0.0.1"
    if tls is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*tls)
        # The handshake is done by the thread of the connection, so one that fails hurts no other.
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        scheme, host = "https", "localhost"
    stub.url = f"{scheme}://{host}:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
