"""The agent: follows the portal's changes, has its broker obey them, and reports what was seen.

It knows no database. What it is given it appends to the journal beside its broker; only what the guard there has proven
it reports. Without the portal it goes on denying what it knows.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
import time
from collections.abc import Callable

from broker.guard.control import GuardControl
from broker.guard.feed import NOTHING, Mark, PageReader, ReadPage, Sessions
from broker_provisioning import BrokerProvisioning
from config import Settings
from core.errors import (
    BrokerUnavailable,
    ClientCertificateRefused,
    PortalError,
    ProjectionInvalid,
    StartupError,
    Unavailable,
)
from core.failpoints import failpoint
from operations.agent.certificates import AGENT, SERVER, AgentCertificates
from operations.agent.client import WAIT_SECONDS, PortalClient
from operations.agent.folder import AgentFolder, State, utc_seconds
from operations.agent.pages import Loading, Pages
from operations.agent.presence import AgentPresence
from operations.agent.progress import Progress
from operations.agent.proof import Proof
from operations.agent.restarts import AgentRestarts
from operations.agent.trust import AgentTrust

log = logging.getLogger("portal.agent")

LOOK_SECONDS = 1.0  # between looks at the broker
SIGN_SECONDS = 10.0  # between two signs of life for the portal
CERTIFICATES_SECONDS, PROBE_SECONDS = 60.0, 60.0
AGAIN_SECONDS, REFUSED_SECONDS = 1.0, 10.0


class Agent:
    """One agent. ``follow`` asks for changes and ``look`` after the broker, each again and again in its own thread."""

    def __init__(self, settings: Settings, folder: AgentFolder) -> None:
        self._settings = settings
        self._folder = folder
        self._identity = folder.identity()
        self._broker = BrokerProvisioning(settings)
        if not isinstance(self._broker.control, GuardControl):
            raise StartupError("An agent needs the guard: set PORTAL_BROKER_CONTROL=guard.")
        self._control = self._broker.control
        # Kept on no disk: a copy of the folder that is started is another run, which the portal tells by it.
        self._run = secrets.token_hex(16)
        self._client = PortalClient(folder, self._identity, self._run)
        self._certificates = AgentCertificates(settings, folder, self._broker)
        self._trust = AgentTrust(folder, lambda: self._client)
        self.presence = AgentPresence(self._broker, lambda: self._client)
        self._restarts = AgentRestarts(settings, folder, self._broker, self._control.files)
        self._lock = threading.RLock()  # of the journal, and of all below
        self._progress = Progress(folder, self._lock)
        self._pages = Pages(self._control, self._certificates, self.state.mark)
        goes_on = self.state.mark != NOTHING and not self.state.denies_all
        self._proof = Proof(self.state.mark) if goes_on else None
        self._reported = NOTHING
        self._next: dict[str, float] = {}

    @property
    def state(self) -> State:
        """How far it has come."""
        return self._progress.state

    def run(self, stopping: threading.Event) -> None:
        """Follow and look until ``stopping`` is set, or the portal has told of other settings."""
        ended = threading.Event()
        bodies = (self._look_once, self._follow_once, self.presence.follow)
        threads = [threading.Thread(target=self._repeat, args=(body, ended), daemon=True) for body in bodies]
        for thread in threads:
            thread.start()
        while not stopping.wait(LOOK_SECONDS) and not self._trust.has_other_settings.is_set():
            pass
        ended.set()
        self._drop()
        if not stopping.is_set():
            for thread in threads:
                thread.join()
        self.close()

    def close(self) -> None:
        """Drop what is not installed, and close all connections."""
        self._drop()
        self.presence.close()
        self._client.close()

    def _drop(self) -> None:
        """Drop what is not installed, and begin nothing more; what is being written is written to the end."""
        with self._lock:
            self._pages.close()
            if self._proof is not None:
                self._proof.close()

    def _repeat(self, once: Callable[[], float], stopping: threading.Event) -> None:
        while not stopping.is_set():
            try:
                pause = once()
            except PortalError as error:
                pause = self._failed(error)
            except OSError as error:  # such as on a full disk
                pause = self._failed(problem := Unavailable(f"The agent's files fail: {error.strerror or error}."))
                self._tell(problem.detail)
            except Exception:
                log.exception("failed unexpectedly")
                pause = AGAIN_SECONDS
            stopping.wait(pause)

    def _failed(self, error: PortalError) -> float:
        self._progress.failed(error.detail)
        return REFUSED_SECONDS if isinstance(error, ClientCertificateRefused) else AGAIN_SECONDS

    def _is_time(self, what: str, seconds: float) -> bool:
        now = time.monotonic()
        if now < self._next.get(what, 0.0):
            return False
        self._next[what] = now + seconds
        return True

    # --- Following the portal

    def _follow_once(self) -> float:
        if not self._folder.probes.good.certificate.exists() or self._is_time("certificates", CERTIFICATES_SECONDS):
            self.renew_certificates()
        self.follow(WAIT_SECONDS)
        return 0.0

    def renew_certificates(self) -> None:
        """Have the certificates renewed that are due; raise as ``follow`` does."""
        renewed = self._certificates.renew(self._client)
        if SERVER in renewed:
            self._restarts.look_soon()
        if AGENT in renewed:
            self._client.close()
            self._client = PortalClient(self._folder, self._identity, self._run)

    def follow(self, wait: int) -> bool:
        """Ask for changes, wait some seconds for them if there are none, and take them in; return whether there were.

        Raise ``Unavailable`` if the portal does not answer, ``ClientCertificateRefused`` if it knows the agent no more,
        ``ProjectionInvalid`` for what it should not have sent, ``BrokerUnavailable`` if the broker does not obey yet.
        """
        with self._lock:
            if (loading := self._pages.loading) is not None and loading.page is not None:
                self._install(loading, loading.page)
            self._check_certificate()
            asked, ends = self._asked(), self._proof.ends if self._proof is not None else 0
        with self._client.changes(asked, self._trust.seen, wait, ends=ends) as lines:
            reader = PageReader()
            reader.read(next(lines, b""))
            if reader.page is not None:
                self._heard_of_portal(reader.page)
                return False
            with self._lock:
                if self._pages.is_closed or asked != self._asked():
                    return True  # repaired meanwhile: it is asked again
                page, sessions = self._pages.take(reader, lines)
                failpoint("agent.page_read")
        self._heard_of_portal(page)
        with self._lock:
            self._taken(page, sessions)
        return True

    def _check_certificate(self) -> None:
        """Raise ``ClientCertificateRefused`` if the portal would not know the agent by its certificate any more."""
        expired = self._folder.expired_at(utc_seconds())
        if expired is not None:
            raise ClientCertificateRefused(
                f"The agent's certificate has expired on {expired:%Y-%m-%d}: add its broker at the portal under another"
                " name, join with portal-server agent join --again, then remove the broker by its old name."
            )

    def _asked(self) -> Mark:
        """Return after which page to go on."""
        return self._pages.last(denies_all=self.state.denies_all)

    def _heard_of_portal(self, page: ReadPage) -> None:
        self._trust.seen = page.names
        self._progress.heard_of_portal()

    # --- Having the broker obey

    def _taken(self, page: ReadPage, sessions: Sessions) -> None:
        """Install a page that is whole, and have it proven if it is the last one."""
        if (loading := self._pages.loading) is None:
            sessions.close()
            return
        proof = self._proof or Proof(in_doubt=self._reported == NOTHING)
        proof.sessions.add(sessions)
        if page.is_last:
            proof.ends = page.mark.generation
        self._proof = proof
        if not loading.complete(page):
            return
        self._install(loading, page)
        if page.is_last:
            self.prove()

    def _install(self, loading: Loading, page: ReadPage) -> None:
        """Write a draft for the broker; if the CRLs for it cannot be fetched it waits for the next attempt."""
        known = self._trust.known if self._trust.has_cas(page.names) else None
        needs_none = known is not None and loading.draft.puts_off_crls(known.ca, known.tenants)
        trust = None if needs_none else self._trust.fetch()
        proof = self._proof or Proof()
        proof.has_crls |= self._pages.install(loading, page, trust)
        proof.mark = page.mark
        self._proof = proof
        self._progress.installed()

    def prove(self) -> None:
        """Have the broker prove what was installed, and report it; the caller holds the lock.

        Raise ``BrokerUnavailable`` if it does not obey yet, and ``Unavailable`` if the portal cannot be told.
        """
        proof = self._proof
        if proof is None or proof.mark == NOTHING or self._pages.loading is not None:
            return
        started = time.monotonic()
        try:
            changes = proof.make(self._broker, self._folder.probes, self._settings.enforce_timeout)
        except PortalError as error:
            self._tell(error.detail)
            raise
        failpoint("agent.proven")
        proof.close()
        self._proof = None
        self._progress.proven(proof.mark)
        took = round((time.monotonic() - started) * 1000, 1)
        figures = {"generation": changes.generation, "cut": len(changes.sessions_to_end), "ms": took}
        log.info("broker enforces", extra=figures)
        failpoint("agent.before_report")
        self._report()
        failpoint("agent.after_report")

    def _report(self) -> None:
        """Say how far the broker was seen to obey."""
        self._tell_portal(None)
        self._reported = self.state.mark
        self._next["sign"] = time.monotonic() + SIGN_SECONDS

    def _tell(self, problem: str) -> None:
        """Tell the portal what is wrong, as often as it is given a sign of life."""
        if self._is_time("sign", SIGN_SECONDS):
            with contextlib.suppress(PortalError):
                self._tell_portal(problem)

    def _tell_portal(self, problem: str | None) -> None:
        session = self.presence.known_session
        if not self._client.report(self.state.mark, problem, session) and session is not None:
            self.presence.has_to_begin_again.set()

    # --- Looking after the broker

    def _look_once(self) -> float:
        self.look()
        return LOOK_SECONDS

    def look(self) -> None:
        """Repair what is damaged, prove what was not proven, fetch new CRLs, deny all if it is time.

        Give a sign of life. Raise as ``follow`` does.
        """
        with self._lock:
            if self._denies_all_now():
                return
            is_settled = self._pages.loading is None and self._pages.installed != NOTHING
            if problems := self._broker.files.damage() if is_settled else []:
                log.error(
                    "the broker's files were damaged and are written again", extra={"problem": " ".join(problems)}
                )
                self._pages.forget()
                return
            try:
                self.prove()
            except BrokerUnavailable:
                self._restart_if_due()  # until then it may show a certificate without a name that it was given since
                raise
            self._renew_crls()
            if self.state.mark == NOTHING or self._proof is not None:
                return
            self._restart_if_due()
            if self._reported != self.state.mark or self._is_time("sign", SIGN_SECONDS):
                self._try_broker()
                self._report()

    def _try_broker(self) -> None:
        """See that the broker refuses and accepts as it must, although nothing has changed."""
        if self._is_time("probe", PROBE_SECONDS):
            try:
                self._broker.probe(self._folder.probes, time.monotonic() + self._settings.enforce_timeout)
            except PortalError as error:
                self._next["probe"] = 0.0
                self._tell_portal(error.detail)
                raise

    def _restart_if_due(self) -> None:
        if self._restarts.restart_if_due():
            proof = self._proof = self._proof or Proof(self.state.mark)
            proof.in_doubt = True  # it has to prove all again, with what it had not proven before

    def _renew_crls(self) -> None:
        """Give the broker the newest CRLs, if there are any that it does not have."""
        is_settled = self._pages.loading is None and self._pages.installed != NOTHING and not self.state.denies_all
        if not is_settled or self._trust.known is None or not self._trust.may_be_fetched:
            return
        if not self._trust.lacks_crls and not self._control.crls_are_due:
            return
        trust = self._trust.fetch()
        if self._control.publish_crls(trust) and self._broker.reachable():
            self._broker.probe(self._folder.probes, time.monotonic() + self._settings.enforce_timeout)

    def _denies_all_now(self) -> bool:
        """Have the broker deny everybody if the portal was not heard for long; return whether it does."""
        limit = self._settings.agent_deny_all_after
        if not limit or self._progress.age < limit:
            return False
        if not self.state.denies_all:
            self._pages.discard()
            if self._proof is not None:
                self._proof.close()
            self._proof = None
            log.error("the portal was not heard for long, so the broker denies every device")
            with contextlib.suppress(ProjectionInvalid):  # a damaged journal denies everybody anyway
                self._control.deny_everybody()
            self._progress.denies_all()
            self._next["deny"] = 0.0
        position = self._control.files.position()
        if position is not None and self._is_time("deny", PROBE_SECONDS):
            try:
                self._control.enforce(position.generation, time.monotonic() + self._settings.enforce_timeout)
            except BrokerUnavailable:  # one that does not run reads the journal at its start
                self._next["deny"] = 0.0
        return True
