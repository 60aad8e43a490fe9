"""The HTTP client of the portal's REST interface."""

from __future__ import annotations

import contextlib
import email.utils
import json
import re
import ssl
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

import requests
import urllib3.exceptions

from commands.connection import ConnectionSettings, is_loopback
from commands.errors import CliError, ConnectionLost, Misused, Refused, Unreachable
from commands.wording import command_for, in_words_of_the_cli, without_requests

CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 60.0  # a revocation or a download waits for the broker
MAX_ANSWER = 32 << 20  # bytes
MAX_PAGE = 200  # rows that the portal returns at once
MAX_DETAIL = 1000  # characters of a sentence from the portal that are shown
MAX_FIELDS = 50
MAX_LINE = 1 << 20  # bytes of a line of an answer that is read line by line
RETRY_PAUSES = (0.3, 1.0)  # seconds before the second and the third attempt

_FILE_NAME = re.compile(r'filename="([0-9a-f-]{36}\.[a-z0-9]{3})"')
# X509_V_ERR_: no issuer found, bad signature, self-signed leaf or chain, leaf not verified, key identifiers differ.
_ANCHOR_UNKNOWN = (2, 7, 18, 19, 20, 21, 30)
_NAME_DIFFERS = (62, 64)  # host name, IP address
_NOT_NOW = (9, 10)  # not yet valid, expired
_NOT_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST", "PACKET_LENGTH_TOO_LONG")
# The answer to a HEAD request has no body with a reason.
_UNKNOWN_LINK = "The portal does not know this link; check that it was copied completely."
_SECONDS = re.compile("[0-9]{1,7}")
_Cause = TypeVar("_Cause", bound=BaseException)


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """A complete answer; header names are case-insensitive."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    origin: str

    def json(self) -> dict[str, Any]:
        """Return the body as a JSON object; raises ``Unreachable`` if it is not one."""
        if self.status == 204 or not self.body:
            return {}
        data = _json_object(self.body)
        if data is None:
            kind = self.headers.get("Content-Type", "").split(";")[0] or "no media type"
            raise Unreachable(
                f"The answer of {self.origin} does not come from the portal (status {self.status}, {kind}, "
                f"{len(self.body)} bytes).",
                hints=_hints_of(self.origin),
            )
        return data


class Client:
    """Talks to one portal over verified TLS; raises every failure as a ``CliError``."""

    def __init__(self, settings: ConnectionSettings, *, version: str, patience: float = ANSWER_SECONDS) -> None:
        self._settings = settings
        self._patience = patience  # seconds that an answer may take
        self.unfinished: str | None = None  # the path of a change whose answer has not come
        self._session = requests.Session()
        self._session.headers.update({"User-Agent": f"portal-cli/{version}", "Accept-Encoding": "identity"})

    def call(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        body: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        anonymous: bool = False,
        repeatable: bool | None = None,
        accept: tuple[int, ...] = (),
    ) -> HttpAnswer:
        """Send a request; send it again if the connection breaks and the request is ``repeatable``.

        Unless the caller says so, a ``POST`` is repeatable only if it has an ``Idempotency-Key``, and the rest is
        (RFC 9110 section 9.2.2; a ``PATCH`` of the portal says what shall be, not what shall be added).
        Raises ``Refused`` for a status of 400 and above that is not in ``accept``, ``Unreachable`` if no answer
        arrives, ``Misused`` if a token is needed and there is none.
        """
        token = None if anonymous else self._token()
        url = self._settings.url + path
        if repeatable is None:
            repeatable = method != "POST" or "Idempotency-Key" in (headers or {})
        if method != "GET":
            self.unfinished = path
        try:
            answer = self._send(method, url, token, repeatable=repeatable, headers=headers, params=params, json=body)
            self.unfinished = None
        except ConnectionLost as error:
            if not repeatable and (lists := command_for("GET", path)):
                error.hints = (*error.hints, f"It may have been done all the same; see: {lists}")
            raise
        if answer.status >= 400 and answer.status not in accept:
            raise self.refusal(answer)
        return answer

    def takes_key(self, path: str) -> bool:
        """Return whether the portal says that a ``POST`` there takes an ``Idempotency-Key``; others would ignore it."""
        try:
            operation = self.call("GET", "/openapi.json", anonymous=True).json()["paths"][path]["post"]
            return any(parameter.get("name") == "Idempotency-Key" for parameter in operation.get("parameters", ()))
        except (CliError, LookupError, TypeError, AttributeError):
            return False

    def get(self, path: str, **params: Any) -> dict[str, Any]:
        """Return the JSON object at ``path``; leaves out parameters that are ``None``."""
        return self.call("GET", path, params=params).json()

    def pages(
        self, path: str, key: str, *, limit: int | None = None, cursor: str | None = None, **params: Any
    ) -> Iterator[dict[str, Any]]:
        """Follow the cursor from page to page until ``limit`` rows (``None`` for all) have come."""
        seen: set[str] = set()
        while limit is None or limit > 0:
            count = MAX_PAGE if limit is None else min(limit, MAX_PAGE)
            page = self.get(path, limit=count, cursor=cursor, **params)
            rows = page.get(key)
            if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
                raise Unreachable(f"The answer of {self._settings.url} has no list of {key}; its version may differ.")
            yield page
            cursor = page.get("next_cursor")
            if not cursor or cursor in seen:
                return
            seen.add(cursor)
            limit = None if limit is None else limit - len(rows)

    def read_pages(self, path: str, key: str, **options: Any) -> dict[str, Any]:
        """Return the rows of ``pages`` as one answer, with the cursor of the page after them."""
        rows: list[dict[str, Any]] = []
        next_cursor = None
        for page in self.pages(path, key, **options):
            rows += page[key]
            next_cursor = page.get("next_cursor")
        return {key: rows, "next_cursor": next_cursor}

    def fetch_bundle(self, link: str, key: str, bundle_format: str | None = None) -> bytes:
        """Return the encrypted bundle of a one-time link, which needs no token; raises as ``call`` does.

        If the connection breaks it is fetched again, which the portal allows by the same idempotency ``key`` only.
        """
        headers, params = {"Connection": "close", "Idempotency-Key": key}, {"format": bundle_format}
        answer = self._send("GET", link, None, headers=headers, params=params)
        if answer.status >= 400:
            raise self.refusal(answer)
        if not answer.body.startswith((b"PK", b"\x30")):  # a ZIP, a PKCS#12 file
            raise Unreachable(
                f"The answer of {answer.origin} is not a bundle; check the link, and whether a proxy answers."
            )
        return answer.body

    def check_link_works(self, link: str, key: str) -> None:
        """Raise as ``fetch_bundle`` would, without using the link up."""
        answer = self._send("HEAD", link, None, headers={"Idempotency-Key": key})
        if answer.status == 410:  # nothing is left to be used up; a GET says when it was, and has the operators told
            answer = self._send("GET", link, None, headers={"Connection": "close", "Idempotency-Key": key})
        if answer.status == 404:
            raise Refused(_UNKNOWN_LINK, status=404)
        if answer.status >= 400:
            raise self.refusal(answer)

    def get_public(self, url: str) -> HttpAnswer:
        """Return what is at a URL that needs no token, whatever the status; not repeated. Raises ``Unreachable``."""
        return self._send("GET", url, None, repeatable=False)

    def file_behind(self, link: str) -> str | None:
        """Return the name of the file behind a link without using it, ``None`` if there is none."""
        answer = self._send("HEAD", link, None, repeatable=False)
        found = _FILE_NAME.search(answer.headers.get("Content-Disposition", ""))
        return found[1] if answer.status == 200 and found else None

    def register_rows(self, rows: bytes, *, dry_run: bool = False) -> Iterator[dict[str, Any]]:
        """Register a device for each line of NDJSON; yield the answers, whose ``row`` counts from 1, as they arrive.

        With ``dry_run`` the rows are only checked, by a portal that can do so.
        Raises as ``call`` does; repeats nothing, since the caller knows which rows have an answer.
        """
        url = self._settings.url + "/register/bulk" + ("?dry_run=true" if dry_run else "")
        headers = {"Content-Type": "application/x-ndjson"}
        with self._open("POST", url, self._token(), headers=headers, data=rows) as response:
            if response.status_code != 200:
                raise self.refusal(self._whole(response))
            yield from map(_row_answer, _lines(response))

    def stream(self, path: str) -> Iterator[bytes]:
        """Yield the body at ``path`` in parts as they arrive, however long it is; raises as ``call`` does."""
        with self._open("GET", self._settings.url + path, self._token()) as response:
            if response.status_code != 200:
                raise self.refusal(self._whole(response))
            yield from response.iter_content(65536)

    def _token(self) -> str:
        if self._settings.token is None:
            raise Misused(
                "There is no operator token.",
                hints=[
                    "To save one, run: portal login",
                    "On the portal's machine, load the settings that the server wrote: . data/operator.env",
                ],
            )
        return self._settings.token

    def _send(self, method: str, url: str, token: str | None, *, repeatable: bool = True, **content: Any) -> HttpAnswer:
        pauses = iter(RETRY_PAUSES if repeatable else ())
        while True:
            try:
                with self._open(method, url, token, **content) as response:
                    return self._whole(response)
            except ConnectionLost:
                pause = next(pauses, None)
                if pause is None:
                    raise
                time.sleep(pause)

    @contextlib.contextmanager
    def _open(self, method: str, url: str, token: str | None, **content: Any) -> Iterator[requests.Response]:
        """Send a request, whose ``content`` is as requests has it: headers, params, and json or data.

        What goes wrong with the connection inside the block is raised as ``Unreachable``.
        """
        # A loopback address is never behind a proxy.
        self._session.trust_env = not is_loopback(urlsplit(url).hostname or "")
        try:
            with self._session.request(
                method,
                url,
                **content,
                auth=_Bearer(token),
                # ConnectionOptions here and not on the session, where REQUESTS_CA_BUNDLE would win over it.
                verify=str(self._settings.ca_file) if self._settings.ca_file else True,
                timeout=(min(CONNECT_SECONDS, self._patience), self._patience),
                allow_redirects=False,
                stream=True,
            ) as response:
                yield response
        except requests.exceptions.SSLError as error:
            raise self._tls_failure(_origin(url), error) from None
        except requests.RequestException as error:
            raise _connection_failure(_origin(url), error) from None

    @staticmethod
    def _whole(response: requests.Response) -> HttpAnswer:
        origin = _origin(response.url)
        answer = HttpAnswer(response.status_code, response.headers, _read(response, origin), origin)
        if 300 <= answer.status < 400:
            raise Unreachable(
                f"{origin} redirects the request (status {answer.status}), which the portal never does.",
                hints=["Check the URL, and whether a proxy answers instead of the portal."],
            )
        return answer

    def _tls_failure(self, origin: str, error: BaseException) -> Unreachable:
        cause = _find(error, ssl.SSLCertVerificationError)
        if cause is None:
            said = _find(error, ssl.SSLError)
            if said is not None and said.reason in _NOT_TLS:
                return Unreachable(
                    f"{origin} does not speak TLS, so it is not the portal's port for operators.",
                    hints=["Check the port; the portal's default is 8443, and 8080 is for certificates alone."],
                )
            return Unreachable(
                f"The TLS connection to {origin} failed.",
                hints=["Check the port; the portal's default is 8443."],
            )
        code = cause.verify_code
        ca_file = self._settings.ca_file
        if code in _NAME_DIFFERS:
            return Unreachable(
                f"The certificate of {origin} is for another name.",
                hints=["Use a name in the certificate, or add this one to PORTAL_SERVER_NAMES on the portal's server."],
            )
        if code in _NOT_NOW:
            return Unreachable(
                f"The certificate of {origin} is expired or not yet valid; check the clock of this machine first."
            )
        if code not in _ANCHOR_UNKNOWN:
            return Unreachable(f"The certificate of {origin} was refused: {cause.verify_message}.")
        if ca_file is None:
            return Unreachable(
                f"The certificate of {origin} is not signed by a CA that this system trusts.",
                hints=["Give the portal's ca.pem (in its data folder) with --ca-file or PORTAL_CA."],
            )
        return Unreachable(
            f"The certificate of {origin} is not signed by the CA in {ca_file}.",
            hints=["Check the URL, and that this is the ca.pem of the same portal (in its data folder)."],
        )

    def refusal(self, answer: HttpAnswer) -> Refused:
        """Return the exception for an answer with an error status."""
        problem = _problem(answer)
        hints = []
        retry_after = answer.headers.get("Retry-After", "").strip()
        if answer.status == 401 and self._settings.token is not None:
            hints += _about_refused_token(self._settings.token_source)
        seconds = int(retry_after) if _SECONDS.fullmatch(retry_after) else None
        if again := _try_again(retry_after):
            hints.append(again)
        if problem is None:
            problem = {}
            sentence = (
                f"{answer.origin} answered with status {answer.status}, but not as the portal does; "
                "a proxy or another server may answer instead."
            )
            hints += [] if answer.origin.startswith("https:") else _hints_of(answer.origin)
        else:
            said = problem.get("detail") or problem.get("title") or f"The portal answered with status {answer.status}."
            sentence = in_words_of_the_cli(str(said)[:MAX_DETAIL])
        return Refused(
            sentence,
            status=answer.status,
            code=str(problem.get("code", "")),
            fields=_fields(problem.get("errors")),
            request_id=answer.headers.get("X-Request-Id", ""),
            retry_after=seconds,
            hints=hints,
        )


def _about_refused_token(source: str) -> list[str]:
    """Return where the token came from, which is unknown, expired or revoked, and how to get another."""
    hints = [f"The token came from {source}."]
    if source == "PORTAL_TOKEN":
        hints.append("A newer one may be in data/operator.env of the portal's machine: . data/operator.env")
    if source == "the saved login":
        hints.append("To save another, run: portal login --token-file FILE, or portal login --oidc")
    return [*hints, "An admin makes another, by: portal token create NAME --role operator"]


class _Bearer(requests.auth.AuthBase):
    """Sends the operator token, if any; also keeps requests from reading ~/.netrc."""

    def __init__(self, token: str | None) -> None:
        self._token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._token is not None:
            request.headers["Authorization"] = f"Bearer {self._token}"
        return request


def _json_object(content: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _origin(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def _lines(response: requests.Response) -> Iterator[bytes]:
    rest = b""
    for chunk in response.iter_content(65536):
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
        if len(rest) > MAX_LINE:
            raise Unreachable(f"A line of the answer of {_origin(response.url)} is longer than any of the portal's.")


def _row_answer(line: bytes) -> dict[str, Any]:
    answer = _json_object(line)
    if answer is None or not isinstance(answer.get("row"), int):
        raise Unreachable("The portal's answer to a row cannot be read; its version may differ.")
    return answer | ({"detail": without_requests(answer["detail"])} if isinstance(answer.get("detail"), str) else {})


def _read(response: requests.Response, origin: str) -> bytes:
    body = bytearray()
    for chunk in response.iter_content(65536):
        body += chunk
        if len(body) > MAX_ANSWER:
            raise Unreachable(f"The answer of {origin} is longer than any of the portal's.")
    return bytes(body)


def _connection_failure(origin: str, error: requests.RequestException) -> Unreachable:
    if isinstance(error, requests.exceptions.ProxyError):
        return Unreachable(f"The proxy for {origin} does not answer; check HTTPS_PROXY and NO_PROXY.")
    if _find(error, urllib3.exceptions.NameResolutionError):
        return Unreachable(f"The host name in {origin} cannot be resolved; check --url or PORTAL_URL.")
    refused = _find(error, urllib3.exceptions.NewConnectionError)
    if isinstance(error, requests.exceptions.ConnectTimeout) or refused:
        hints = ["Check that it is running, and the address: --url, PORTAL_URL or portal login."]
        if is_loopback(urlsplit(origin).hostname or ""):
            hints.append("A portal of scripts/run is started again with: scripts/run")
        return Unreachable(f"The portal does not answer at {origin}.", hints=hints)
    if isinstance(error, requests.exceptions.ReadTimeout):
        return ConnectionLost(f"{origin} accepted the request but did not answer within {ANSWER_SECONDS:.0f} seconds.")
    if isinstance(error, requests.exceptions.InvalidURL | requests.exceptions.InvalidHeader):
        return Unreachable(f"The address {origin} cannot be used; check --url or PORTAL_URL.")
    return ConnectionLost(
        f"The connection to {origin} was lost before the answer was complete.",
        hints=_hints_of(origin, "Check the network and the port; the portal's default is 8443."),
    )


def _hints_of(
    origin: str, otherwise: str = "Check the URL, and whether a proxy or another server answers instead of the portal."
) -> list[str]:
    """Return what to do if what answers at ``origin`` does not answer as the portal does."""
    if origin.startswith("https:"):
        return [otherwise]
    return [f"The portal speaks HTTPS; try https:{origin.partition(':')[2]} (--url, PORTAL_URL or portal login)."]


def _find(error: BaseException, kind: type[_Cause]) -> _Cause | None:
    """Return the cause of that type among the errors that requests and urllib3 wrap around each other."""
    waiting: list[object] = [error]
    for _ in range(20):
        if not waiting:
            return None
        found = waiting.pop(0)
        if isinstance(found, kind):
            return found
        if isinstance(found, BaseException):
            waiting += [found.__cause__, found.__context__, getattr(found, "reason", None), *found.args]
    return None


def _problem(answer: HttpAnswer) -> dict[str, Any] | None:
    kind = answer.headers.get("Content-Type", "").split(";")[0].strip().lower()
    if kind not in ("application/problem+json", "application/json"):
        return None
    return _json_object(answer.body)


def _fields(errors: object) -> list[tuple[str, str]]:
    if not isinstance(errors, list):
        return []
    entries = [entry for entry in errors[:MAX_FIELDS] if isinstance(entry, dict)]
    return [
        (str(entry.get("field", ""))[:200], in_words_of_the_cli(str(entry.get("message", ""))[:MAX_DETAIL]))
        for entry in entries
    ]


def _try_again(value: str) -> str:
    """Return a sentence for a Retry-After header (RFC 9110 section 10.2.3)."""
    if _SECONDS.fullmatch(value):
        seconds = int(value)
        return f"Try again in {seconds} second{'' if seconds == 1 else 's'}."
    try:
        at = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return ""
    at = at.replace(tzinfo=at.tzinfo or UTC)
    if at <= datetime.now(UTC):
        return "Try again now."
    return f"Try again after {at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC."
