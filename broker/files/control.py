"""The control by files: an ACL that the broker reads at its start, and CRLs that it reads by itself."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import hmac
import math
import re
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass
from datetime import datetime

from broker.control import RestartReason
from broker.crl import NO_TENANTS, Trust
from broker.files.acl import NUMBER_TOPIC, REFUSED_TOPIC, VERSION_TOPIC, Acl, number_of, validate_acl
from broker.folder import CA_FILE, CRL_FILE, CRLS_READ, BrokerFolder
from broker.mosquitto import HEALTH_SECONDS, Mosquitto
from broker.probe import ProbeCertificate, Resumption
from broker.process import run_command, signal_broker, started_at
from broker.session import (
    FAILURE,
    NOT_AUTHORISED,
    PORTAL_USER,
    SUCCESS,
    Session,
    client_id,
    connect_unix,
    password_refused,
    unavailable,
)
from config import Settings
from core.broker_control import ACL_FILE, AclStyle
from core.errors import BrokerNotEnforcing, BrokerUnavailable
from core.failpoints import failpoint
from core.tenants import TenantOnBroker

# Mosquitto's default number of iterations; the password has 256 random bits, so more would not help.
PASSWORD_FILE, PASSWORD_ITERATIONS = "passwords", 101
_FIRST_PAUSE, _LONGEST_PAUSE = 0.001, 0.05
_SIGNAL_AGAIN_SECONDS = 0.1  # a reload takes the broker 4 to 8 ms; a signal that arrives during one may be lost


_RESUMABLE = "resumable"  # in the record
_MAX_CRL_BYTES = 25 << 20  # of the CRLs, in PEM, that a running broker has read: it takes four times that of memory
SESSION_SECONDS = 7200  # for which OpenSSL takes a session id of TLS 1.2


@dataclass(frozen=True, slots=True)
class Resumable:
    """The newest revocation past which a TLS session might be resumed: its generation, and the time of its CRL.

    ``ends`` is when no such session lives any more, ``None`` if only a restart of the broker ends them. Times are in
    seconds of the epoch.
    """

    generation: int
    at: float
    ends: float | None


@dataclass(frozen=True, slots=True)
class Projection:
    """What the broker must enforce, of one generation: the ACL's content, and CRLs and CAs unless they stay."""

    generation: int
    acl: bytes
    trust: Trust | None


class BrokerFiles(BrokerFolder):
    """The broker's folder with an ACL and with the portal's password for the internal listener."""

    _RECORDED = (CA_FILE, CRL_FILE, ACL_FILE)

    def install(self, projection: Projection, *, even_older: bool = False) -> None:
        """Check all of ``projection``, then write it to the broker's folder, and give the CRLs to a running broker.

        Raise ``ProjectionInvalid`` if a check fails or a newer generation is installed (unless ``even_older``), and
        ``BrokerUnavailable`` if a file cannot be written; then no file is changed. Files that already have the content
        stay untouched. One process at a time: the caller holds the lock.
        """
        generation, settings, trust = projection.generation, self._settings, projection.trust
        if trust is not None:
            self._check(generation, trust)
        number = validate_acl(projection.acl, generation, style=settings.acl_style, prefix=settings.topic_prefix)
        if not even_older:
            self._check_order(generation)
        contents: dict[str, bytes] = {}
        kept = {name: value for name, value in self.stated().items() if name in (_RESUMABLE, CRLS_READ)}
        if trust is not None:
            if self.publish(trust):
                kept |= self.with_crls_read(trust)
            contents = {CA_FILE: trust.ca, CRL_FILE: trust.crl}
        contents[ACL_FILE] = projection.acl
        self._write(generation, contents, {**kept, "style": settings.acl_style, "acl": number})
        self.password()

    def installed_acl(self) -> bytes | None:
        """Return the ACL, ``None`` if it is missing or damaged."""
        record = self._record()
        if record is None or self._digest(ACL_FILE) != record[1].get(ACL_FILE):
            return None
        try:
            return self._path(ACL_FILE).read_bytes()
        except OSError:
            return None

    def acl_number(self) -> int:
        """Return the number of the ACL that was written last, 0 if none was."""
        stated = self.stated()
        number = stated.get("acl", stated.get("generation"))
        return number if type(number) is int else 0

    def resumable(self) -> Resumable | None:
        """Return since when sessions may be resumed past a revocation, ``None`` if they never could."""
        try:
            return Resumable(**self.stated()[_RESUMABLE])
        except (KeyError, TypeError):
            return None

    def state_resumable(self, resumable: Resumable) -> None:
        """Write down since when sessions may be resumed past a revocation."""
        stated = {name: value for name, value in self.stated().items() if name not in ("generation", "sha256")}
        self._write(self.installed_generation() or 0, {}, {**stated, _RESUMABLE: dataclasses.asdict(resumable)})

    def password(self) -> str:
        """Return the portal's password on the internal listener; it is in the broker's password file then."""
        password = super().password()
        if self._other_damage(password):
            self.write_password_file(password)
        return password

    def write_password_file(self, password: str) -> None:
        """Write the broker's password file with the one user of the internal listener, as mosquitto_passwd would.

        Format: ``user:$7$iterations$salt$hash``, PBKDF2-HMAC-SHA512, salt and hash in base64.
        """
        salt = secrets.token_bytes(12)
        line = f"{PORTAL_USER}:{_password_hash(password, salt, PASSWORD_ITERATIONS)}\n"
        with self._lock:
            self._replace({PASSWORD_FILE: line.encode()})

    def _other_damage(self, password: str | None = None) -> str | None:
        """Return what is wrong with the password file."""
        path = self._path(PASSWORD_FILE)
        if problem := self._file_problem(PASSWORD_FILE):
            return problem
        try:
            text = path.read_text(encoding="ascii")
            password = password or (self._settings.secrets_dir / "broker-password").read_text(encoding="ascii").strip()
            parts = re.fullmatch(rf"{PORTAL_USER}:(\$7\$([0-9]{{1,6}})\$([A-Za-z0-9+/=]{{8,64}})\$\S{{88}})\n", text)
            if parts and hmac.compare_digest(
                parts[1], _password_hash(password, base64.b64decode(parts[3]), int(parts[2]))
            ):
                return None
        except (OSError, ValueError):
            pass
        return f"{path} is not what the portal wrote."


def _password_hash(password: str, salt: bytes, iterations: int) -> str:
    digest = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, iterations)
    return f"$7${iterations}${base64.b64encode(salt).decode()}${base64.b64encode(digest).decode()}"


class FilesDraft:
    """The ACL that a process keeps from one generation to the next."""

    keeps_suspended = True
    lists_certificates = False  # an ACL knows names only; certificates are refused by the CRL

    def __init__(self, acl: Acl, since: int, install: Callable[[int, Trust | None], bool]) -> None:
        self.since = since
        self.lists_every_device = acl.style is AclStyle.PER_DEVICE
        self.install = install
        self._acl = acl
        self.grant, self.grant_application = acl.grant, acl.grant_application
        self.deny, self.forget = acl.deny, acl.forget

    @property
    def closed(self) -> Mapping[str, str]:
        """Devices that are denied everything because their topics cannot be granted, each with the reason."""
        return self._acl.closed

    def revoke_certificate(self, issuer: bytes, serial_number: str, identity: str | None, *, is_probe: bool) -> None:
        """Do nothing: the CRL lists it."""

    lists_tenants = False

    def tell_tenant(self, tenant: TenantOnBroker) -> None:
        """Do nothing: what is granted to other tenants than the first is denied."""

    def unknown_tenants(self, names: Iterable[str]) -> Set[str]:
        """Return none; see ``tell_tenant``."""
        return set()

    def puts_off_crls(self, ca: bytes, tenants: Mapping[str, str] = NO_TENANTS) -> bool:
        """Return ``False``: only the CRL refuses who is revoked."""
        return False

    def grants_ahead(self, ca: bytes, tenants: Mapping[str, str] = NO_TENANTS) -> bool:
        """Return ``False``: the broker has to be told of new files."""
        return False

    def discard(self) -> None:
        """Do nothing: the ACL in memory has all changes of a snapshot, and to add them again does no harm."""


class FilesControl(Mosquitto):
    """Writes the ACL, and sees by the topics that the portal is granted whether the broker has it.

    The broker reads its ACL at its start. Mosquitto 2.1 is told to read a new one; to 2.0 that would harm sessions
    which are asleep, so there it waits for a restart.
    """

    def __init__(self, settings: Settings, clock: Callable[[], datetime]) -> None:
        self.files = BrokerFiles(settings, clock)
        super().__init__(settings, self.files)
        self._clock = clock
        self._acl = self.access()
        self._generation = 0  # of the ACL in memory
        self._settled: object = None  # the state in which the broker had all
        self._resumption = (0.0, Resumption.TICKETS)  # of the broker that was started then

    def draft(self, enforced: int = 0) -> FilesDraft:
        """Begin the next generation with the ACL of the last one that this process has made."""
        return FilesDraft(self._acl, self._generation, self._install)

    def grants_up_to(self) -> None:
        """Return ``None``: the broker reads its ACL at its start."""

    def _install(self, generation: int, trust: Trust | None) -> bool:
        self._generation = generation
        installed = self.files.installed_acl()
        number = generation
        if installed is not None and not self._acl.must_be_loaded(installed):
            number = number_of(installed)
        self.files.install(Projection(generation, self._acl.render(number), trust))
        self._acl.settle()
        return trust is not None

    def access(self) -> Acl:
        """Return what devices may do, as long as it is of none."""
        return Acl(self._settings.acl_style, self._settings.topic_prefix)

    publishes_crls = crls_are_due = False
    asks_whom_it_refuses = False
    narrows_at_once = False  # after the restart the broker asks before it hands over what it has kept for a session
    clears_retained = False  # the ACL gives the portal no device's topics
    is_distrusted = False

    def distrust(self) -> None:
        """Do nothing: the ACL is written anew from what is in the database whenever that has changed."""

    def lacks_change_of(self, changed_at: datetime) -> bool:
        """Return whether topics may wait for a restart; see ``broker.control.BrokerControl``.

        The broker has what was changed before its start. Those that were changed later wait together.
        """
        if changed_at.timestamp() < started_at(self._settings):
            return False
        try:
            return self.waits(time.monotonic() + HEALTH_SECONDS) is RestartReason.TOPICS
        except BrokerUnavailable:
            return False  # it reads all at its start

    def publish_crls(self, trust: Trust, *, at_once: bool = False) -> bool:
        """Do nothing: each installation gives the broker the CRLs."""
        return False

    def enforce(
        self, generation: int, deadline: float, *, refused: str | None = None, shows: ProbeCertificate | None = None
    ) -> int:
        """See that the broker obeys an ACL of the portal's; see ``broker.control.BrokerControl``.

        That it has the newest one ``waits`` says, unless it can be told to read that. This broker cannot be asked about
        ``refused``: the probe certificate shows that.
        """
        try:
            with Session(connect_unix(self._settings.broker_socket, deadline), deadline) as session:
                waits = self._ask(session)
                if waits is not None:
                    self._settled = None
                if waits is RestartReason.PASSWORD:
                    raise BrokerUnavailable(password_refused(NOT_AUTHORISED))
                if waits is RestartReason.NO_ACL:
                    raise BrokerNotEnforcing("The broker runs without an ACL: it has to be restarted.")
                if waits is RestartReason.TOPICS and may_reload(session.retained(VERSION_TOPIC, REFUSED_TOPIC)):
                    self._reload(session, deadline)
        except OSError as error:
            raise unavailable(self._settings, error) from error
        return generation

    def follow_presence(self, deadline: float) -> None:
        """Return ``None``: nothing tells who is connected; see ``broker.control.BrokerControl``."""

    def waits(self, deadline: float) -> RestartReason | None:
        """Return why the broker has to be restarted; see ``broker.control.BrokerControl``.

        A broker that has all is not asked again before there is more, or it is another one.
        """
        resumable, too_many = self.files.resumable(), self.files.crl_bytes() > _MAX_CRL_BYTES
        state = self.files.acl_number(), resumable, too_many, started_at(self._settings)
        if state == self._settled:
            return None
        try:
            with Session(connect_unix(self._settings.broker_socket, deadline), deadline) as session:
                waits = self._ask(session)
        except OSError as error:
            raise unavailable(self._settings, error) from error
        if waits is None and resumable is not None and self._is_open(resumable):
            return RestartReason.SESSIONS
        if waits is None and too_many:
            return RestartReason.CRLS
        self._settled = state if waits is None else None
        return waits

    def knows_tenants(self, deadline: float) -> bool:
        """Return ``False``: an ACL cannot tell whose CA has issued a certificate."""
        return False

    def check_resumption(self, generation: int, how: Callable[[], Resumption]) -> None:
        """See that no TLS session is resumed past a revocation; see ``broker.control.BrokerControl``."""
        resumable = self.files.resumable()
        if resumable is None or resumable.generation < generation:
            started = started_at(self._settings)
            if self._resumption[0] != started:  # what it was started with does not change
                self._resumption = started, how()
            if (found := self._resumption[1]) is Resumption.NONE:
                return
            # The running broker had the CRL, or one that was started later has it: no session began after that.
            written = self._settings.broker_file(CRL_FILE).stat().st_mtime
            ends = time.time() + SESSION_SECONDS if found is Resumption.SESSION_IDS else None
            resumable = Resumable(generation, written, ends)
            self.files.state_resumable(resumable)
        if self._is_open(resumable):
            raise BrokerUnavailable(
                "A device that was revoked or suspended may come back by resuming a TLS session, which the CRL does not"
                " see: restart the broker, or wait for two hours if it accepts TLS 1.2 without tickets."
            )

    def _is_open(self, resumable: Resumable) -> bool:
        """Return whether the broker may still know a session that began before."""
        over = resumable.ends is not None and time.time() >= resumable.ends
        return not over and started_at(self._settings) <= resumable.at

    def _ask(self, session: Session) -> RestartReason | None:
        password = BrokerFolder.password(self.files)  # and no file is written for it
        # A broker that could not read its ACL allows everything.
        if session.connect(client_id(), PORTAL_USER, password) != SUCCESS:
            return RestartReason.PASSWORD
        if session.publish(REFUSED_TOPIC) != NOT_AUTHORISED:
            return RestartReason.NO_ACL
        if not self._has_loaded(session):
            return RestartReason.TOPICS
        return None

    def _has_loaded(self, session: Session) -> bool:
        return session.publish(f"{NUMBER_TOPIC}/{self.files.acl_number()}") < FAILURE

    def _reload(self, session: Session, deadline: float) -> None:
        """Have the broker read its ACL, and wait until it has."""
        pause, signalled = _FIRST_PAUSE, -math.inf
        while not self._has_loaded(session):
            if time.monotonic() >= deadline:
                raise BrokerUnavailable(
                    "The broker did not load its ACL in time: see its log, and that acl_file in its configuration names"
                    " the portal's file."
                )
            if time.monotonic() - signalled >= _SIGNAL_AGAIN_SECONDS:
                signalled = time.monotonic()
                failpoint("apply.before_reload")
                if self._settings.broker_reload:
                    run_command("PORTAL_BROKER_RELOAD", self._settings.broker_reload, deadline)
                else:
                    signal_broker(self._settings.broker_pid_file, session.process)
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)


def may_reload(version: bytes | None) -> bool:
    """Return whether a broker of this version, as it states it, keeps sessions that are asleep when it is reloaded.

    All versions of Mosquitto before 2.1 harm them: messages are lost, and memory is used after it was freed.
    """
    stated = re.fullmatch(rb"mosquitto version ([0-9]{1,4})\.([0-9]{1,4})\.[0-9].*", version or b"")
    return stated is not None and (int(stated[1]), int(stated[2])) >= (2, 1)
