"""The agent: follows the portal's changes, has its broker obey them, and reports what was seen.

It knows no database. What it is given it appends to the journal beside its broker; only what the guard there has proven
it reports. Without the portal it goes on denying what it knows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from broker.control import RestartReason
from broker.crl import Trust
from broker.guard.control import GuardControl
from broker.guard.draft import GuardDraft
from broker.guard.feed import NOTHING, Mark, PageReader, ReadPage, Sessions, TrustNames
from broker.guard.journal import decode
from broker.restarts import BrokerRestarts
from broker_provisioning import BrokerProvisioning
from config import Settings
from core.boot import boot_seconds
from core.errors import (
    BrokerUnavailable,
    ClientCertificateRefused,
    PortalError,
    ProjectionInvalid,
    StartupError,
    Unavailable,
)
from core.failpoints import failpoint
from core.tenants import TenantOnBroker
from operations.agent.certificates import AgentCertificates
from operations.agent.client import WAIT_SECONDS, PortalClient
from operations.agent.folder import AgentFolder, State, server_files, utc_seconds
from operations.agent.presence import AgentPresence

log = logging.getLogger("portal.agent")

LOOK_SECONDS = 1.0  # between looks at the broker
SIGN_SECONDS = 10.0  # between two signs of life for the portal
CERTIFICATES_SECONDS, PROBE_SECONDS = 60.0, 60.0
AGAIN_SECONDS, REFUSED_SECONDS = 1.0, 10.0
SAME_PROBLEM_SECONDS = 60.0
MAX_SESSIONS = 1000  # that are ended with a proof; more are ended before it, as many at a time
LINE_BYTES = 55  # of a device in the journal
KEPT_SECONDS = 10.0  # between two notes of when the portal was heard, which `agent status` shows
# New CRLs are fetched so seldom that they are no burden on a thin link: a second for each 100 kB, a minute at most.
CRL_BYTES_A_SECOND, MAX_CRL_PAUSE = 100_000, 60.0


@dataclass(slots=True)
class _Loading:
    """A draft that is not installed yet, and the last page in it; ``page`` once that is the one to install it with."""

    draft: GuardDraft
    mark: Mark
    page: ReadPage | None = None


@dataclass(slots=True)
class _Proof:
    """What was installed and is to be proven: the page, whose sessions must end, and whether there are new CRLs.

    ``ends`` is up to which generation it is known whose sessions must end, 0 if that is what the portal has recorded.
    """

    mark: Mark = NOTHING
    sessions: Sessions = field(default_factory=Sessions)
    ends: int = 0
    has_crls: bool = False
    in_doubt: bool = True  # at first: what the broker has obeyed before is not known


class Agent:
    """One agent. ``follow`` asks for changes and ``look`` after the broker, each again and again in its own thread."""

    def __init__(self, settings: Settings, folder: AgentFolder) -> None:
        self._settings = settings
        self._folder = folder
        self._identity = folder.identity()
        self._given = folder.settings_of_portal()
        self.has_other_settings = threading.Event()
        self._broker = BrokerProvisioning(settings)
        if not isinstance(self._broker.control, GuardControl):
            raise StartupError("An agent needs the guard: set PORTAL_BROKER_CONTROL=guard.")
        self._control = self._broker.control
        self._certificates = AgentCertificates(settings, folder, self._broker)
        # Kept on no disk: a copy of the folder that is started is another run, which the portal tells by it.
        self._run = secrets.token_hex(16)
        self._client = PortalClient(folder, self._identity, self._run)
        self.presence = AgentPresence(self._broker, lambda: self._client)
        self._lock = threading.RLock()  # of the journal, and of all below
        self._state = folder.state()
        self._trust: tuple[TrustNames, Trust] | None = folder.trust()
        self._seen = self._trust[0] if self._trust else TrustNames(NOTHING.digest, NOTHING.digest)
        self._installed = self._state.mark
        self._loading: _Loading | None = None
        self._is_closed = False
        self._restarts = BrokerRestarts(
            settings, lambda deadline: self._broker.waits(folder.probes, deadline), self._lines
        )
        goes_on = self._state.mark != NOTHING and not self._state.denies_all
        self._proof = _Proof(self._state.mark) if goes_on else None
        self._reported = NOTHING
        self._heard = boot_seconds() - self._state.age(utc_seconds())  # by the clock since the boot
        self._problem = ("", 0.0)
        self._next: dict[str, float] = {}

    @property
    def state(self) -> State:
        """How far it has come."""
        return self._state

    def run(self, stopping: threading.Event) -> None:
        """Follow and look until ``stopping`` is set, or the portal has told of other settings."""
        ended = threading.Event()
        bodies = (self._look_once, self._follow_once, self.presence.follow)
        threads = [threading.Thread(target=self._repeat, args=(body, ended), daemon=True) for body in bodies]
        for thread in threads:
            thread.start()
        while not stopping.wait(LOOK_SECONDS) and not self.has_other_settings.is_set():
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
            self._is_closed = True
            self._discard()
            if self._proof is not None:
                self._proof.sessions.close()

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
        self._say(error.detail)
        return REFUSED_SECONDS if isinstance(error, ClientCertificateRefused) else AGAIN_SECONDS

    def _say(self, problem: str) -> None:
        """Log a problem when it is new, and then once a minute; keep it for ``agent status``."""
        said, when = self._problem
        if problem != said or time.monotonic() - when >= SAME_PROBLEM_SECONDS:
            self._problem = (problem, time.monotonic())
            age = round(min(self._age(), utc_seconds()))
            knowledge = {"generation": self._state.mark.generation, "age_seconds": age}
            log.error("the broker may not have all changes", extra={"problem": problem, **knowledge})
            with self._lock:
                self._keep(problem=problem)

    def _keep(self, **changes: object) -> None:
        state = dataclasses.replace(self._state, **changes)  # type: ignore[arg-type]
        if state != self._state:
            self._write_state(state)

    def _write_state(self, state: State) -> None:
        """Note how far it has come; with an older note, as on a full disk, it begins with more after a restart."""
        self._state = state
        try:
            self._folder.keep_state(state)
        except OSError as error:
            log.error("how far the agent has come is not noted", extra={"problem": error.strerror})

    # --- Following the portal

    def _follow_once(self) -> float:
        if not self._folder.probes.good.certificate.exists() or self._is_time("certificates", CERTIFICATES_SECONDS):
            self.renew_certificates()
        self.follow(WAIT_SECONDS)
        return 0.0

    def renew_certificates(self) -> None:
        """Have the certificates renewed that are due; raise as ``follow`` does."""
        if "agent" in self._certificates.renew(self._client):
            self._client.close()
            self._client = PortalClient(self._folder, self._identity, self._run)

    def _is_time(self, what: str, seconds: float) -> bool:
        now = time.monotonic()
        if now < self._next.get(what, 0.0):
            return False
        self._next[what] = now + seconds
        return True

    def follow(self, wait: int) -> bool:
        """Ask for changes, wait some seconds for them if there are none, and take them in; return whether there were.

        Raise ``Unavailable`` if the portal does not answer, ``ClientCertificateRefused`` if it knows the agent no more,
        ``ProjectionInvalid`` for what it should not have sent, ``BrokerUnavailable`` if the broker does not obey yet.
        """
        with self._lock:
            if self._loading is not None and self._loading.page is not None:
                self._install(self._loading, self._loading.page)
            self._check_certificate()
            asked, ends = self._asked(), self._proof.ends if self._proof is not None else 0
        with self._client.changes(asked, self._seen, wait, ends=ends) as lines:
            reader = PageReader()
            reader.read(next(lines, b""))
            if reader.page is not None:
                self._heard_of_portal(reader.page.names)
                return False
            with self._lock:
                if self._is_closed or asked != self._asked():
                    return True  # repaired meanwhile: it is asked again
                page, sessions = self._take(reader, lines)
                failpoint("agent.page_read")
        self._heard_of_portal(page.names)
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
        if self._loading is not None:
            return self._loading.mark
        position = self._control.files.position()
        mark = self._installed
        goes_on = position is not None and position.generation >= mark.generation > 0
        return mark if goes_on and not self._broker.begins_again and not self._state.denies_all else NOTHING

    def _heard_of_portal(self, names: TrustNames) -> None:
        self._seen = names
        self._heard = boot_seconds()
        if not 0 <= self._state.age(utc_seconds()) < KEPT_SECONDS:
            with self._lock:
                self._write_state(self._state.heard(utc_seconds()))

    def _age(self) -> float:
        """Return how old its knowledge is, in seconds: by the time of day, too, if that says more."""
        return max(boot_seconds() - self._heard, utc_seconds() - self._state.heard_at - KEPT_SECONDS)

    def _take(self, reader: PageReader, lines: Iterator[bytes]) -> tuple[ReadPage, Sessions]:
        """Read a page into the draft of the next journal, or of the lines to append; the caller holds the lock."""
        if self._loading is None:
            self._loading = _Loading(self._draft(from_nothing=reader.since == 0), NOTHING)
        elif reader.since != self._loading.mark.generation:
            self._begin_again()
            raise ProjectionInvalid("The portal has begun its list of changes again; so does the agent.")
        draft, sessions = self._loading.draft, Sessions()
        try:
            for text in _with_suspensions(self._texts(reader, lines)):
                if isinstance(text, TenantOnBroker):
                    self._tell_tenant(draft, text)
                elif not sessions.take(text):
                    draft.add_line(text, urgent=self._is_awaited(text))
        except BaseException as error:
            sessions.close()
            # If the link was lost, a new journal goes on with the same page again.
            if draft.since > 0 or isinstance(error, BrokerUnavailable):
                self._discard()
            raise
        if reader.page is None:
            raise ProjectionInvalid("The portal's list of changes was cut; it is asked for again.")
        return reader.page, sessions

    def _tell_tenant(self, draft: GuardDraft, tenant: TenantOnBroker) -> None:
        """Add a tenant; if the journal has another one in its place that was removed since, all begins again."""
        try:
            draft.tell_tenant(tenant)
        except ProjectionInvalid:
            self._begin_again()
            self._installed = NOTHING
            raise

    @staticmethod
    def _texts(reader: PageReader, lines: Iterator[bytes]) -> Iterator[str]:
        while reader.page is None:
            line = next(lines, None)
            if line is None:
                raise ProjectionInvalid("The portal's list of changes was cut; it is asked for again.")
            text = reader.read(line)
            if text is not None:
                yield text

    def _is_awaited(self, text: str) -> bool:
        serial = self._certificates.awaited_serial
        return serial is not None and text.startswith("serial ") and text.split(" ")[2] == serial

    def _draft(self, *, from_nothing: bool) -> GuardDraft:
        if from_nothing:
            self._broker.begin_again()
        draft = self._control.draft(0 if from_nothing else self._installed.generation)
        if not from_nothing and draft.since == 0:
            draft.discard()
            self._broker.begin_again()
            raise ProjectionInvalid("The journal is begun again; all changes are asked for.")
        return draft

    def _begin_again(self) -> None:
        self._discard()
        self._broker.begin_again()

    def _discard(self) -> None:
        if self._loading is not None:
            self._loading.draft.discard()
            self._loading = None

    # --- Having the broker obey

    def _taken(self, page: ReadPage, sessions: Sessions) -> None:
        """Install a page that is whole, and have it proven if it is the last one."""
        if self._loading is None:
            sessions.close()
            return
        loading, proof = self._loading, self._proof or _Proof(in_doubt=self._reported == NOTHING)
        proof.sessions.add(sessions)
        if page.is_last:
            proof.ends = page.mark.generation
        self._proof = proof
        if loading.draft.since == 0 and not page.is_last:
            loading.mark = page.mark  # the next page goes into the same journal
            return
        loading.page = page
        self._install(loading, page)
        if page.is_last:
            self.prove()

    def _install(self, loading: _Loading, page: ReadPage) -> None:
        """Write a draft for the broker; if the CRLs for it cannot be fetched it waits for the next attempt."""
        known, draft, generation = self._trust, loading.draft, page.mark.generation
        is_known = known is not None and known[0].cas == page.names.cas
        if known is not None and is_known and draft.puts_off_crls(known[1].ca, known[1].tenants):
            trust = None
        else:
            trust = self._fetch_trust()
        self._loading, proof = None, self._proof or _Proof()
        proof.has_crls |= draft.install(generation, trust)
        if trust is not None:
            self._certificates.crl_installed(generation)
        proof.mark = self._installed = page.mark
        self._proof = proof
        self._keep(denies_all=False)

    def _fetch_trust(self) -> Trust:
        names, said = self._client.trust()
        failpoint("agent.trust_fetched")
        try:
            trust = self._folder.keep_trust(names, said)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ProjectionInvalid("The portal's CAs and CRLs cannot be read; they are asked for again.") from error
        failpoint("agent.trust_kept")
        self._trust = (names, trust)
        if self._folder.settings_of_portal() != self._given:
            self.has_other_settings.set()
            raise Unavailable("The portal has other settings now; the agent begins again with them.")
        self._next["crls"] = time.monotonic() + min(MAX_CRL_PAUSE, 2 + len(trust.crl) / CRL_BYTES_A_SECOND)
        return trust

    def prove(self) -> None:
        """Have the broker prove what was installed, and report it; the caller holds the lock.

        Raise ``BrokerUnavailable`` if it does not obey yet, and ``Unavailable`` if the portal cannot be told.
        """
        proof = self._proof
        if proof is None or proof.mark == NOTHING or self._loading is not None:
            return
        started = time.monotonic()
        deadline = started + self._settings.enforce_timeout
        try:
            self._end_many(proof, deadline)
            those = proof.sessions.first(MAX_SESSIONS)
            changes = those.changes(proof.mark.generation, in_doubt=proof.in_doubt or proof.has_crls)
            self._broker.bring_into_force(
                changes, self._folder.probes, deadline, lambda *_steps: None, has_crls=proof.has_crls or proof.in_doubt
            )
        except PortalError as error:
            self._tell(error.detail)
            raise
        failpoint("agent.proven")
        proof.sessions.close()
        self._proof = None
        self._problem = ("", 0.0)
        self._keep(mark=proof.mark, problem="")
        took = round((time.monotonic() - started) * 1000, 1)
        figures = {"generation": changes.generation, "cut": len(changes.sessions_to_end), "ms": took}
        log.info("broker enforces", extra=figures)
        failpoint("agent.before_report")
        self._report()
        failpoint("agent.after_report")

    def _end_many(self, proof: _Proof, deadline: float) -> None:
        """End sessions until few are left, which are ended with the proof; raise ``BrokerUnavailable`` if time is up.

        Then the next attempt goes on with those that are left.
        """
        count, generation = 0, proof.mark.generation
        while proof.sessions.left > MAX_SESSIONS:
            if count == 0:  # nobody comes back who is denied
                self._control.enforce(generation, deadline)
            those = proof.sessions.first(MAX_SESSIONS)
            changes = those.changes(generation, in_doubt=False)
            narrowed, revoked = frozenset(changes.narrowed), changes.revoked
            if count and time.monotonic() > deadline:
                raise BrokerUnavailable(f"{proof.sessions.left} sessions are still to be ended; that takes a while.")
            least = time.monotonic() + self._settings.enforce_timeout
            self._broker.disconnect(changes.sessions_to_end, least, revoked=revoked, narrowed=narrowed)
            proof.sessions.ended(those)
            count += those.lines

    def _report(self) -> None:
        """Say how far the broker was seen to obey."""
        self._tell_portal(None)
        self._reported = self._state.mark
        self._next["sign"] = time.monotonic() + SIGN_SECONDS

    def _tell(self, problem: str) -> None:
        """Tell the portal what is wrong, as often as it is given a sign of life."""
        if self._is_time("sign", SIGN_SECONDS):
            with contextlib.suppress(PortalError):
                self._tell_portal(problem)

    def _tell_portal(self, problem: str | None) -> None:
        session = self.presence.known_session
        if not self._client.report(self._state.mark, problem, session) and session is not None:
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
            if self._loading is None and (problems := self._broker.files.damage()) and self._installed != NOTHING:
                log.error(
                    "the broker's files were damaged and are written again", extra={"problem": " ".join(problems)}
                )
                self._begin_again()
                self._installed = NOTHING
                return
            try:
                self.prove()
            except BrokerUnavailable:
                self._restart_if_due()  # until then it may show a certificate without a name that it was given since
                raise
            self._renew_crls()
            if self._state.mark == NOTHING or self._proof is not None:
                return
            self._restart_if_due()
            if self._reported != self._state.mark or self._is_time("sign", SIGN_SECONDS):
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
        """Restart the broker if something waits for that, by the command in the settings; or ask for it in the log."""
        if not self._is_time("restart", PROBE_SECONDS) or (reason := self._reason_to_restart()) is None:
            return
        seconds = self._restarts.seconds_until_due()
        if seconds == math.inf:
            self._restarts.ask_for(reason)
        elif seconds == 0:
            log.warning("the broker is restarted", extra={"because": str(reason)})
            self._restarts.restart(reason)
            proof = self._proof = self._proof or _Proof(self._state.mark)
            proof.in_doubt = True  # it has to prove all again, with what it had not proven before

    def _reason_to_restart(self) -> RestartReason | None:
        """Return why the broker has to be restarted: also if it shows an older certificate than it was given."""
        deadline, probes = time.monotonic() + self._settings.enforce_timeout, self._folder.probes
        with contextlib.suppress(BrokerUnavailable, OSError, ValueError):  # one that does not run
            if (reason := self._broker.waits(probes, deadline)) is not None:
                return reason
            newest = x509.load_pem_x509_certificate(server_files(self._settings)[0].read_bytes())
            if self._broker.server_certificate(probes, deadline) != newest.public_bytes(Encoding.DER):
                return RestartReason.CERTIFICATE
        return None

    def _lines(self) -> int:
        """Return about how many devices the journal has, as many as may be connected."""
        position = self._control.files.position()
        return 0 if position is None else position.size // LINE_BYTES

    def _renew_crls(self) -> None:
        """Give the broker the newest CRLs, if there are any that it does not have."""
        known = self._trust
        if known is None or self._installed == NOTHING or self._state.denies_all or self._loading is not None:
            return
        if known[0].crls == self._seen.crls and not self._control.crls_are_due:
            return
        if time.monotonic() < self._next.get("crls", 0.0):
            return
        trust = self._fetch_trust()
        if self._control.publish_crls(trust) and self._broker.reachable():
            self._broker.probe(self._folder.probes, time.monotonic() + self._settings.enforce_timeout)

    def _denies_all_now(self) -> bool:
        """Have the broker deny everybody if the portal was not heard for long; return whether it does."""
        limit, state = self._settings.agent_deny_all_after, self._state
        if not limit or self._age() < limit:
            return False
        if not state.denies_all:
            self._discard()
            if self._proof is not None:
                self._proof.sessions.close()
            self._proof = None
            log.error("the portal was not heard for long, so the broker denies every device")
            with contextlib.suppress(ProjectionInvalid):  # a damaged journal denies everybody anyway
                self._control.deny_everybody()
            self._keep(denies_all=True)
            self._next["deny"] = 0.0
        position = self._control.files.position()
        if position is not None and self._is_time("deny", PROBE_SECONDS):
            try:
                self._control.enforce(position.generation, time.monotonic() + self._settings.enforce_timeout)
            except BrokerUnavailable:  # one that does not run reads the journal at its start
                self._next["deny"] = 0.0
        return True


def _with_suspensions(texts: Iterator[str]) -> Iterator[str | TenantOnBroker]:
    """Yield lines, and instead of those about a tenant how it stands: its suspension is the line that follows."""
    told: TenantOnBroker | None = None
    for text in texts:
        if told is not None:
            is_suspension = text == f"suspend {told.name}"
            yield dataclasses.replace(told, suspended=is_suspension)
            told = None
            if is_suspension:
                continue
        match text.split(" "):
            case ["tenant", name, prefix]:
                told = TenantOnBroker(name, decode(prefix), suspended=False)
            case _:
                yield text
    if told is not None:
        yield told
