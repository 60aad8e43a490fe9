"""An identity provider for tests: OpenID Connect over TLS, on a port of its own, which can be made to misbehave."""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import hmac
import json
import secrets
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

from joserfc import jws
from joserfc.jwk import ECKey, KeyParameters, OKPKey, RSAKey
from joserfc.jws import JWSRegistry

from tests.support.pki import PEM, Authority

Key = RSAKey | ECKey | OKPKey
CLIENT_ID, CLI_CLIENT_ID = "portal", "portal-cli"
GROUPS = {"fleet-admins": "admin", "acme-ops": "operator@acme", "auditors": ["auditor", "auditor@acme"]}
CONFIGURATION = "/.well-known/openid-configuration"


@functools.cache
def key_for(algorithm: str, number: int = 0) -> Key:
    """A private key, made once; another one for each ``number``."""
    parameters: KeyParameters = {"kid": f"{algorithm}-{number}", "use": "sig"}
    if algorithm == "RS256":
        return RSAKey.generate_key(2048, parameters)
    if algorithm == "ES256":
        return ECKey.generate_key("P-256", parameters)
    return OKPKey.generate_key("Ed25519", parameters)


class _AnyAlgorithm(JWSRegistry):
    """Signs with what is asked for, without a warning."""

    def get_alg(self, name: str) -> Any:
        return self.algorithms[name]

    def check_header(self, header: Any) -> None:
        pass


def signed(claims: Mapping[str, Any] | bytes, key: Key | None, **header: Any) -> str:
    """A JWS of claims; ``header`` is added to the algorithm of the key and its id."""
    algorithm = {"RSA": "RS256", "EC": "ES256", "OKP": "EdDSA"}[key.key_type] if key else "none"
    named = {"alg": algorithm} | ({"kid": key.kid} if key is not None and key.kid else {}) | header
    content = claims if isinstance(claims, bytes) else json.dumps(claims).encode()
    registry = _AnyAlgorithm(strict_check_header=False)
    named = {name: value for name, value in named.items() if value is not None}
    return jws.serialize_compact(named, content, key, registry=registry)


def hmac_by_public_key(claims: Mapping[str, Any]) -> str:
    """A token whose HMAC has the public RSA key as its secret, which verifiers once took."""
    head = _b64(json.dumps({"alg": "HS256", "kid": key_for("RS256").kid}).encode())
    signed_part = f"{head}.{_b64(json.dumps(claims).encode())}"
    secret = key_for("RS256").as_pem(private=False)
    return f"{signed_part}.{_b64(hmac.new(secret, signed_part.encode(), hashlib.sha256).digest())}"


def _b64(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


Answer = tuple[int, Mapping[str, str], bytes]


@dataclass
class IdentityProvider:
    """``answers`` replaces what a path answers; ``person`` are the claims of whoever logs in next."""

    folder: Path
    now: Callable[[], float] = time.time
    port: int = 0
    keys: list[Key] = field(default_factory=lambda: [key_for("RS256")])
    person: dict[str, Any] = field(
        default_factory=lambda: {"sub": "ada", "name": "Ada Lovelace", "groups": ["fleet-admins"]}
    )
    configuration: dict[str, Any] = field(default_factory=dict)
    answers: dict[str, Callable[[BaseHTTPRequestHandler], Answer | None]] = field(default_factory=dict)
    asks: bool = False  # whether there is a page on which somebody has to log in
    requests: list[tuple[str, str]] = field(default_factory=list)
    redeemed: list[dict[str, str]] = field(default_factory=list)
    device_answers: list[Answer] = field(default_factory=list)  # to polls, before the token
    stopped: threading.Event = field(default_factory=threading.Event)
    _codes: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def issuer(self) -> str:
        return f"https://localhost:{self.port}/realms/factory"

    def environment(self, **more: str) -> dict[str, str]:
        """The settings of a portal whose operators log in here."""
        return {
            "PORTAL_OIDC_ISSUER": self.issuer,
            "PORTAL_OIDC_CLIENT_ID": CLIENT_ID,
            "PORTAL_OIDC_CLI_CLIENT_ID": CLI_CLIENT_ID,
            "PORTAL_OIDC_CA_FILE": str(self.folder / "idp-root.pem"),
            "PORTAL_OIDC_GROUPS": json.dumps(GROUPS),
            **more,
        }

    def count(self, path: str) -> int:
        """How often a path was asked for."""
        return sum(1 for _, asked in self.requests if asked == path)

    def claims(self, **more: Any) -> dict[str, Any]:
        """The claims of an ID token of the device flow; those that are ``None`` are left out."""
        now = int(self.now())
        times = {"iss": self.issuer, "aud": CLI_CLIENT_ID, "iat": now, "exp": now + 300, "jti": secrets.token_hex(8)}
        return {name: value for name, value in (times | self.person | more).items() if value is not None}

    def id_token(self, **more: Any) -> str:
        """A valid ID token, but for the claims given."""
        return signed(self.claims(**more), self.keys[0])

    # --- What it answers -----------------------------------------------------------------------------------------

    def answer(self, handler: BaseHTTPRequestHandler) -> Answer | None:
        parts = urlsplit(handler.path)
        path = parts.path.removeprefix("/realms/factory")
        self.requests.append((handler.command, path))
        if path in self.answers:
            return self.answers[path](handler)
        length = int(handler.headers.get("Content-Length", 0))
        given = {name: values[0] for name, values in parse_qs(parts.query).items()}
        given |= {name: values[0] for name, values in parse_qs(handler.rfile.read(length).decode()).items()}
        routes: dict[str, Callable[[], Answer]] = {
            CONFIGURATION: lambda: as_json(self._configuration() | self.configuration),
            "/jwks": lambda: as_json({"keys": [key.as_dict(private=False) for key in self.keys]}),
            "/authorize": lambda: self._authorize(given),
            "/token": lambda: self._token(given, handler.headers.get("Authorization", "")),
            "/device": lambda: self._device(given),
        }
        return routes[path]() if path in routes else as_json({"error": "not_found"}, 404)

    def _configuration(self) -> dict[str, Any]:
        return {
            "issuer": self.issuer,
            "authorization_endpoint": f"{self.issuer}/authorize",
            "token_endpoint": f"{self.issuer}/token",
            "jwks_uri": f"{self.issuer}/jwks",
            "device_authorization_endpoint": f"{self.issuer}/device",
            "authorization_response_iss_parameter_supported": True,
        }

    def _authorize(self, given: Mapping[str, str]) -> Answer:
        code = secrets.token_urlsafe(16)
        self._codes[code] = dict(given)
        back = given["redirect_uri"] + "?" + urlencode({"code": code, "state": given["state"], "iss": self.issuer})
        if self.asks:
            page = f'<!doctype html><title>Provider</title><a href="{escape(back)}">Log in as Ada</a>'
            return 200, {"Content-Type": "text/html"}, page.encode()
        return 302, {"Location": back}, b""

    def _token(self, given: dict[str, str], authorization: str) -> Answer:
        self.redeemed.append(given | {"authorization": authorization})
        if given.get("grant_type") == "urn:ietf:params:oauth:grant-type:device_code":
            if self.device_answers:
                return self.device_answers.pop(0)
            begun = self._codes.get(given["device_code"])
            if begun is not None and not _fits(begun, given):
                return as_json({"error": "invalid_grant"}, 400)
            return as_json({"id_token": self.id_token(), "access_token": "x", "token_type": "Bearer"})
        asked = self._codes.pop(given.get("code", ""), None)
        if asked is None or not _fits(asked, given) or asked["redirect_uri"] != given["redirect_uri"]:
            return as_json({"error": "invalid_grant"}, 400)
        claims = {"aud": CLIENT_ID, "nonce": asked["nonce"]} | self.person
        return as_json({"id_token": self.id_token(**claims), "access_token": "x", "token_type": "Bearer"})

    def _device(self, given: dict[str, str]) -> Answer:
        """Begin a device flow, of a client that has to use PKCE, as Keycloak does."""
        if given.get("code_challenge_method") != "S256":
            missing = "Missing parameter: code_challenge_method"
            return as_json({"error": "invalid_request", "error_description": missing}, 400)
        self._codes["the-device-code"] = given
        return as_json(
            {
                "device_code": "the-device-code",
                "user_code": "WDJB-MJHT",
                "verification_uri": f"{self.issuer}/activate",
                "expires_in": 600,
                "interval": 1,
            }
        )


def _fits(asked: Mapping[str, str], given: Mapping[str, str]) -> bool:
    """Whether the PKCE verifier of a request is that of the challenge which the first one had (RFC 7636 §4.6)."""
    return asked["code_challenge"] == _b64(hashlib.sha256(given.get("code_verifier", "").encode()).digest())


def as_json(content: Any, status: int = 200) -> Answer:
    return status, {"Content-Type": "application/json"}, json.dumps(content).encode()


class _Handler(BaseHTTPRequestHandler):
    provider: IdentityProvider

    def do_GET(self) -> None:
        answer = self.provider.answer(self)
        if answer is not None:
            status, headers, body = answer
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    do_POST = do_GET  # noqa: N815 - the name of the library

    def handle(self) -> None:
        with contextlib.suppress(OSError):
            super().handle()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name of the library
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    context: ssl.SSLContext

    def get_request(self) -> Any:
        connection, address = self.socket.accept()
        return self.context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False), address

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


@contextlib.contextmanager
def identity_provider(folder: Path, now: Callable[[], float] = time.time) -> Iterator[IdentityProvider]:
    """Serve on localhost until the end of the ``with``."""
    root = Authority("identity provider's root")
    (folder / "idp-root.pem").write_bytes(root.certificate.public_bytes(PEM))
    certificate, key = root.issue("localhost", server_names=["localhost"]).write(folder, "idp")
    provider = IdentityProvider(folder, now)
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"provider": provider}))
    server.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.context.load_cert_chain(certificate, key)
    provider.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield provider
    finally:
        provider.stopped.set()
        server.shutdown()
        server.server_close()
        thread.join()
