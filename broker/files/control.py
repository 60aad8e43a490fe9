"""The control by files: an ACL beside the CRLs, which the broker is told to read again."""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from broker.crl import Trust
from broker.files.acl import DENIED_FOR, GENERATION_TOPIC, MAX_DENIALS, REFUSED_TOPIC, Acl, validate_acl
from broker.folder import CA_FILE, CRL_FILE, BrokerFolder
from broker.process import run_command, signal_broker
from broker.session import (
    FAILURE,
    NOT_AUTHORISED,
    PORTAL_USER,
    SUCCESS,
    Session,
    client_id,
    connect_unix,
    password_refused,
    peer_process,
    unavailable,
)
from config import Settings
from core.broker_control import ACL_FILE, AclStyle
from core.errors import BrokerNotEnforcing, BrokerUnavailable
from core.failpoints import failpoint
from core.topics import Topic

# Mosquitto's default number of iterations; the password has 256 random bits, so more would not help.
PASSWORD_FILE, PASSWORD_ITERATIONS = "passwords", 101
_FIRST_PAUSE, _LONGEST_PAUSE = 0.001, 0.05
_SIGNAL_AGAIN_SECONDS = 0.1  # a reload takes the broker 4 to 8 ms; a signal that arrives during one may be lost


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
        """Check all of ``projection``, then write it to the broker's folder; the broker is not reloaded.

        Raise ``ProjectionInvalid`` if a check fails or a newer generation is installed (unless ``even_older``), and
        ``BrokerUnavailable`` if a file cannot be written; then no file is changed. Files that already have the content
        stay untouched. One process at a time: the caller holds the lock.
        """
        generation, settings, trust = projection.generation, self._settings, projection.trust
        if trust is not None:
            self._check(generation, trust)
        validate_acl(projection.acl, generation, style=settings.acl_style, prefix=settings.topic_prefix)
        if not even_older:
            self._check_order(generation)
        contents = {ACL_FILE: projection.acl}
        if trust is not None:
            self.publish(trust)
            contents |= {CA_FILE: trust.ca, CRL_FILE: trust.crl}
        self._write(generation, contents, {"style": settings.acl_style})
        self.password()

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


class _FilesDraft:
    """The ACL that a process keeps from one generation to the next."""

    lists_certificates = False  # an ACL knows names only; certificates are refused by the CRL

    def __init__(self, acl: Acl, since: int, install: Callable[[int, Trust | None], bool]) -> None:
        self.since = since
        self.lists_every_device = acl.style is AclStyle.PER_DEVICE
        self.install = install
        self._acl = acl

    @property
    def closed(self) -> Mapping[str, str]:
        return self._acl.closed

    def grant(self, device_id: str, topics: Sequence[Topic] | None) -> None:
        self._acl.grant(device_id, topics)

    def grant_application(self, application_id: str, topics: Sequence[Topic]) -> None:
        self._acl.grant_application(application_id, topics)

    def deny(self, device_id: str, at: datetime | None = None) -> None:
        self._acl.deny(device_id, at)

    def forget(self, device_id: str) -> None:
        self._acl.forget(device_id)

    def revoke_certificate(self, issuer: bytes, serial_number: str, identity: str | None, *, is_probe: bool) -> None:
        pass

    def puts_off_crls(self, ca: bytes) -> bool:
        return False

    def discard(self) -> None:
        pass  # the ACL in memory has all changes of a snapshot; to add them again does no harm


class FilesControl:
    """Makes the broker read ACL and CRLs again, and sees by the topics that it grants the portal whether it has."""

    def __init__(self, settings: Settings, clock: Callable[[], datetime]) -> None:
        self.files = BrokerFiles(settings, clock)
        self._settings = settings
        self._clock = clock
        self._acl = Acl(settings.acl_style, settings.topic_prefix)
        self._generation = 0  # of the ACL in memory

    def draft(self, enforced: int = 0) -> _FilesDraft:
        """Begin the next generation with the ACL of the last one that this process has made."""
        return _FilesDraft(self._acl, self._generation, self._install)

    def _install(self, generation: int, trust: Trust | None) -> bool:
        self._generation = generation
        if self._acl.style is AclStyle.PATTERN:
            self._acl.prune(newest=MAX_DENIALS, since=self._clock() - DENIED_FOR)
        self.files.install(Projection(generation, self._acl.render(generation), trust))
        return trust is not None

    publishes_crls = False
    clears_retained = False  # check_retain_source withholds them from the portal, too

    def publish_crls(self, trust: Trust) -> bool:
        """Do nothing: the broker reads the CRLs with the ACL."""
        return False

    def enforce(self, generation: int, deadline: float, *, reload: bool = False, refused: str | None = None) -> int:
        """Make the running broker load the installed files; return the generation that is then in force.

        That is ``generation``, or a newer one installed meanwhile. Return at once if the generation is in force
        already, unless ``reload`` demands a reload: after a repair that kept the generation, or with a new server
        certificate. This broker cannot be asked about ``refused``. Raise ``BrokerUnavailable`` if the broker does not
        answer or does not load the files by the deadline, ``BrokerNotEnforcing`` if it runs without its ACL.
        """
        answered, login = False, SUCCESS
        while True:
            try:
                sock = connect_unix(self._settings.broker_socket, deadline)
                with Session(sock, deadline) as session:
                    # Any CONNACK, even a refusal, shows that the broker has started: a signal cannot kill it now.
                    reason = session.connect(client_id(), PORTAL_USER, self.files.password())
                    answered, broker = True, peer_process(sock)
                    if reason == SUCCESS:
                        return self._await_generation(session, broker, generation, deadline, reload=reload)
                    if login == SUCCESS:  # once: it may hold the password of an older file
                        self._reload(broker, deadline)
                    login = reason
            except OSError as error:
                if login != SUCCESS and isinstance(error, TimeoutError):
                    raise BrokerUnavailable(password_refused(login)) from error
                # Never answered: give up now. Disconnected after an answer: it may be restarting.
                if not answered or time.monotonic() >= deadline:
                    raise unavailable(self._settings, error) from error
            time.sleep(_LONGEST_PAUSE)

    def follow_presence(self, deadline: float) -> None:
        """Return ``None``: nothing tells who is connected; see ``broker.control.BrokerControl``."""

    def _await_generation(
        self, session: Session, broker: int, generation: int, deadline: float, *, reload: bool
    ) -> int:
        """Signal the broker, then query it repeatedly until the answers show that it has reloaded."""
        if reload:
            self._reload(broker, deadline)
            # The broker looks at its reload flag after each round of packets: at the second answer it has reloaded.
            for _ in range(2):
                session.publish(REFUSED_TOPIC)
        pause, signalled = _FIRST_PAUSE, time.monotonic() if reload else None
        while True:
            newest = max(generation, self.files.installed_generation() or 0)
            allowed = session.publish(f"{GENERATION_TOPIC}/{newest}") < FAILURE
            # A broker that could not read its ACL allows everything, this topic as well.
            open_to_all = allowed and session.publish(REFUSED_TOPIC) != NOT_AUTHORISED
            if allowed and not open_to_all:
                return newest
            if signalled is None or time.monotonic() - signalled >= _SIGNAL_AGAIN_SECONDS:
                self._reload(broker, deadline)
                signalled = time.monotonic()
            else:
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
            if time.monotonic() >= deadline:
                if open_to_all:
                    raise BrokerNotEnforcing("The broker runs without an ACL: stop it, then repair its ACL file.")
                raise BrokerUnavailable(
                    f"The broker did not load generation {newest} in time: see its log,"
                    " and that acl_file in its configuration names the portal's file."
                )

    def _reload(self, broker: int, deadline: float) -> None:
        failpoint("apply.before_reload")
        if self._settings.broker_reload:
            run_command("PORTAL_BROKER_RELOAD", self._settings.broker_reload, deadline)
        else:
            signal_broker(self._settings.broker_pid_file, broker)
