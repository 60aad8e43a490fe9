"""Serves agents beside brokers elsewhere, most of which wait: web/mutual_tls.py has what their connections may cost."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import ssl
import threading
import time
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qs, urlsplit

from broker.guard.feed import Mark, Page, TrustNames, none_line
from core.errors import (
    BodyTooLarge,
    ClientCertificateRefused,
    InputInvalid,
    NotFound,
    PortalError,
    RequestMalformed,
    Unavailable,
)
from core.failpoints import failpoint
from core.setting_values import Address
from core.topics import is_device_id
from operations.wiring import Portal
from store.agents import AgentRecord, Given
from web.api.problems import of_error
from web.mutual_tls import BLOCK, Conversation, MutualTlsListener, run_in_one_process
from workflows.agents.agents import AgentCertificate, Report, check_not_copied, check_run
from workflows.agents.presence import Part, ToldPresence
from workflows.agents.runs import OF_BEFORE

log = logging.getLogger("portal.agents")

LOCK = ".agents.lock"
MAX_OF_AGENT, MAX_CONNECTIONS_OF_AGENT = 4, 16  # requests at a time, and connections, some of which are lost links
# Each time, a certificate of a probe may come onto the CRL. An agent asks at its start, and then every few weeks.
MAX_CERTIFIED, CERTIFIED_SECONDS = 30, 3600.0
IDLE_SECONDS = 90.0  # from an answer to the end of the next request
ANSWER_SECONDS = 300.0
MAX_WAIT = 60.0
MAX_CLIENTS, MAX_TIME = 4000, 253402300800  # told at once; the end of the year 9999, in Unix time
_DIGEST, _SESSION = re.compile("[0-9a-f]{64}"), re.compile("[0-9a-f]{32}")


def run(portal: Portal, stopping: threading.Event) -> None:
    """Serve agents until ``stopping`` is set, in one process among all on the data folder; the body of a thread."""
    run_in_one_process(portal.settings.data_dir / LOCK, lambda event: AgentListener(portal).serve(event), stopping)


class AgentListener(MutualTlsListener):
    """Accepts agents' connections."""

    name, variable = "agents", "PORTAL_AGENTS_BIND"
    max_of_client = MAX_CONNECTIONS_OF_AGENT

    def __init__(self, portal: Portal) -> None:
        super().__init__(portal.settings)
        self.portal = portal
        self._certified: dict[int, list[float]] = {}  # when the agent of a broker had certificates issued

    @property
    def address(self) -> Address | None:
        """Where it listens."""
        return self.settings.agents_bind

    @property
    def client_cas(self) -> str:
        """The CAs that agents' certificates are verified by, PEM."""
        return self.portal.agents.client_cas

    def check(self, certificate: bytes) -> None:
        """Raise ``ClientCertificateRefused`` if a certificate is not an agent's."""
        self.portal.agents.shown(certificate)

    def converse(self, client: ssl.SSLSocket) -> None:
        """Answer an agent."""
        _Conversation(client, self)

    def serve(self, stopping: threading.Event) -> None:
        """Serve until ``stopping`` is set, and follow the changes for all agents that wait."""
        follow = self.portal.agent_feed.follow
        following = threading.Thread(target=follow, args=(self.stopping,), name="agents' changes", daemon=True)
        if self.address is not None:
            following.start()
        try:
            super().serve(stopping)
        finally:
            self.stopping.set()
            if self.address is not None:
                self.portal.database.advances.tell()
                self.portal.database.advances.heard()
                following.join()

    def check_may_be_certified(self, record: AgentRecord) -> None:
        """Count a request for certificates; raise ``Unavailable`` if an agent has made too many."""
        now = time.monotonic()
        with self._lock:
            times = [at for at in self._certified.get(record.broker_id, ()) if at > now - CERTIFIED_SECONDS]
            if len(times) >= MAX_CERTIFIED:
                raise Unavailable("This agent has asked for certificates too often; try again in an hour.")
            self._certified[record.broker_id] = [*times, now]


class _Conversation(Conversation):
    """Answers the requests of one connection."""

    max_body = 256 << 10

    def __init__(self, client: ssl.SSLSocket, listener: AgentListener) -> None:
        self._listener = listener
        self._portal = listener.portal
        self._record: AgentRecord | None = None
        super().__init__(client, listener)

    def answer(self) -> None:
        """Answer what an agent asks for, or take in what it says."""
        handlers = {
            "GET /broker-agents/changes": self._changes,
            "GET /broker-agents/trust": self._trust,
            "POST /broker-agents/report": self._report,
            "POST /broker-agents/presence": self._presence,
            "POST /broker-agents/certificates": self._certificates,
        }
        self._begun = False
        try:
            try:
                # Looked up at each request: a removed agent's connection ends with its next one.
                self._record = self._portal.agents.shown(self.certificate)
                self.extend(ANSWER_SECONDS)
            finally:  # who is refused reads why once its request was read, for which it has no more time than before
                body = self.read_body()
            handler = handlers.get(f"{self.command} {urlsplit(self.path).path}")
            if handler is None:
                raise NotFound("There is nothing at this path for agents.")
            self._body = body
            with self._listener.counted(self._record.broker_id, MAX_OF_AGENT) as may_ask:
                if not may_ask:
                    raise Unavailable("This agent has too many requests under way: does another one run with its key?")
                handler()
        except PortalError as error:
            self._refuse(error)
        except OSError:
            self.close_connection = True
            raise
        except Exception as error:
            log.exception("an agent was not answered")
            self._refuse(error)
        self.extend(IDLE_SECONDS)

    def write(self, content: bytes | memoryview) -> None:
        """Send bytes; on a slow link an agent has time for as long as it takes in some."""
        view = memoryview(content)
        for start in range(0, len(content), BLOCK):
            self.extend(ANSWER_SECONDS)
            super().write(view[start : start + BLOCK])

    def _refuse(self, error: Exception) -> None:
        problem = of_error(error, request_id="", path=urlsplit(self.path).path)
        if isinstance(error, ClientCertificateRefused | BodyTooLarge | RequestMalformed):
            self.close_connection = True
        if self._begun:  # a page without its last line is no page
            self.close_connection = True
            return
        content = json.dumps({"code": problem.code, "detail": problem.detail}).encode()
        self.send(problem.status, content, "application/problem+json")

    @property
    def _agent(self) -> AgentRecord:
        assert self._record is not None  # noqa: S101 - set before any handler is called
        return self._record

    # --- What it asks for

    def _changes(self) -> None:
        asked = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
        mark = Mark(_number(asked.get("since", "0")), _digest(asked.get("digest", "0" * 64)))
        seen = TrustNames(_digest(asked.get("cas", "0" * 64)), _digest(asked.get("crls", "0" * 64)))
        ends = _number(asked.get("ends", "0"))
        wait = min(float(_number(asked.get("wait", "0"))), MAX_WAIT)
        feed, record, run = self._portal.agent_feed, self._agent, _run(asked.get("run", OF_BEFORE))
        self._portal.agents.take_run(record, run)
        start = feed.start_of(record, mark)
        has_changes = feed.wait(start, seen, wait, goes_on=lambda: not self._listener.stopping.is_set())
        if wait and has_changes:  # it may have been removed meanwhile, or have another certificate
            record = self._portal.agents.shown(self.certificate)
            if record.copied_since is None:
                check_run(record, run)
            start = feed.start_of(record, mark)
        if not has_changes:
            content = none_line(start.generation, feed.names())
            self.send(HTTPStatus.OK, content, "text/plain")
            return
        with contextlib.closing(feed.page(record, start, ends)) as page:
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
            self.write(block)
        failpoint("agents.before_given")
        feed.given(record, start, page)
        failpoint("agents.after_given")
        self.write(page.end(feed.names()))

    def _trust(self) -> None:
        names, body = self._portal.agent_feed.trust(self._agent)
        tag = f'"{names.cas}{names.crls}"'
        self.send(HTTPStatus.OK, json.dumps(body).encode(), "application/json", ETag=tag)

    def _report(self) -> None:
        said = self._json()
        problem, generation, digest = said.get("problem"), said.get("generation"), said.get("digest")
        if problem is not None and not (isinstance(problem, str) and 0 < len(problem) <= 2000):
            raise InputInvalid("A problem is a sentence.")
        problem = problem and "".join(letter if letter.isprintable() else "?" for letter in problem)
        if type(generation) is not int or generation < 0 or not isinstance(digest, str):
            raise InputInvalid("A report names the generation and the digest of a page of changes.")
        presence = said.get("presence")
        if presence is not None and not (isinstance(presence, str) and _SESSION.fullmatch(presence)):
            raise InputInvalid("A session has 32 lower-case hexadecimal digits.")
        run = _run(said.get("run", OF_BEFORE))
        knows_presence = self._portal.agents.report(self._agent, Report(generation, digest, problem, presence, run))
        failpoint("agents.after_report")
        self.send(HTTPStatus.OK, json.dumps({"presence": knows_presence}).encode(), "application/json")

    def _presence(self) -> None:
        check_not_copied(self._agent)
        done = self._portal.agent_presences.take(self._agent, told_presence(self._json()))
        self.send(HTTPStatus.OK, json.dumps({"upto": done}).encode(), "application/json")

    def _certificates(self) -> None:
        said = self._json()
        kinds = {*AgentCertificate}
        if not said or not all(kind in kinds and isinstance(csr, str) for kind, csr in said.items()):
            raise InputInvalid(f"Certificates are asked for by CSRs (PEM) for {', '.join(kinds)}.")
        requests = {AgentCertificate(kind): csr for kind, csr in said.items()}
        self._listener.check_may_be_certified(self._agent)
        issued = self._portal.agents.certify(self._agent, requests)
        body = {"generation": issued.generation, "certificates": dict(issued.chains)}
        self.send(HTTPStatus.OK, json.dumps(body).encode(), "application/json")

    def _json(self) -> dict[str, Any]:
        try:
            said = json.loads(self._body)
        except (ValueError, RecursionError):
            raise RequestMalformed("The body is not JSON.") from None
        if not isinstance(said, dict):
            raise RequestMalformed("The body is not a JSON object.")
        return said


def told_presence(said: Mapping[str, Any]) -> ToldPresence:
    """Return what an agent says of who is connected; raise ``InputInvalid``."""
    session, number, at, part = (said.get(name) for name in ("session", "number", "at", "part"))
    if not isinstance(session, str) or not _SESSION.fullmatch(session):
        raise InputInvalid("A session has 32 lower-case hexadecimal digits.")
    if type(number) is not int or not 0 <= number < 1 << 63 or type(said.get("known")) is not bool:
        raise InputInvalid("A message about clients has a number, and says whether there are no more of them.")
    if not isinstance(at, int | float) or isinstance(at, bool) or not 0 <= at < MAX_TIME:
        raise InputInvalid("A time is in seconds since 1970.")
    connected, disconnected = (_times(said.get(name, [])) for name in ("connected", "disconnected"))
    return ToldPresence(session, number, at, _part(part), connected, disconnected, said["known"])


def _part(said: Any) -> Part | None:
    match said:
        case None:
            return None
        case {"after": str(after), "upto": None | str() as upto}:
            if all(not one or is_device_id(one) for one in (after, upto)):
                return Part(after, upto or None)
    raise InputInvalid("A part of the clients is after one of them, and up to one of them or to the end.")


def _times(said: Any) -> dict[str, int]:
    """Return ids with times, of which there are few at once; raise ``InputInvalid``."""
    times: dict[str, int] = {}
    for pair in said if isinstance(said, list) and len(said) <= MAX_CLIENTS else [None]:
        match pair:
            case [str(identity), int(at)] if is_device_id(identity) and type(at) is int and 0 <= at < MAX_TIME:
                times[identity] = at
            case _:
                raise InputInvalid(f"Clients are told as pairs of id and time, at most {MAX_CLIENTS} at once.")
    return times


def _number(text: str) -> int:
    if not re.fullmatch("[0-9]{1,18}", text):
        raise InputInvalid("A generation, and seconds to wait, are whole numbers.")
    return int(text)


def _run(said: object) -> str:
    if said != OF_BEFORE and not (isinstance(said, str) and _SESSION.fullmatch(said)):
        raise InputInvalid("A run has 32 lower-case hexadecimal digits.")
    return str(said)


def _digest(text: str) -> str:
    if not _DIGEST.fullmatch(text):
        raise InputInvalid("A digest has 64 lower-case hexadecimal digits.")
    return text
