"""A Mosquitto with the guard, and a journal that is written by hand, so that neither is judged by the portal's code."""

from __future__ import annotations

import hashlib
import shutil
import ssl
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509

from tests.support.mosquitto import Mosquitto, guard_library, short_folder
from tests.support.mqtt import NOT_AUTHORISED, MqttClient, connect_socket, connect_tls, tls_context
from tests.support.pki import PEM, Authority, Credentials, Pki, key_pem
from tests.support.ports import free_port

GRANTED_QOS_1 = 1
DELIVERED = (0x00, 0x10)  # success; success with nobody subscribed
PASSWORD = "the portal's password"


def hash_of(name: x509.Name) -> str:
    """How a journal names an issuer."""
    return hashlib.sha256(name.public_bytes()).hexdigest()


def key_hashes_of(authority: Authority) -> list[str]:
    """How a journal names the key of an issuer, and says that it does."""
    name = bytes.fromhex(hash_of(authority.certificate.subject))
    identifier = x509.SubjectKeyIdentifier.from_public_key(authority.key.public_key()).digest
    of_key = hashlib.sha256(name + hashlib.sha256(identifier).digest())
    return [of_key.hexdigest(), hashlib.sha256(name).hexdigest()]


class Journal:
    """A journal of one epoch; each method appends a line, in force once the guard has read it."""

    def __init__(self, path: Path, epoch: int = 1, base: int = 0) -> None:
        self.path, self.epoch, self.sequence, self.checksum = path, epoch, base, 0
        self.content = self._end(f"portal-guard 1 {epoch} {base}")

    def _end(self, text: str) -> bytes:
        self.checksum = zlib.crc32(text.encode(), self.checksum)
        return f"{text} {self.checksum:08x}\n".encode()

    def write(self) -> Journal:
        """Write the whole file beside the old one, and rename it over that."""
        temporary = self.path.with_suffix(".new")
        temporary.write_bytes(self.content)
        temporary.chmod(0o644)
        temporary.rename(self.path)
        return self

    def render(self, text: str) -> bytes:
        """Render the next line, for a file that is too long to be kept here."""
        self.sequence += 1
        return self._end(f"{self.sequence} {text}")

    def line(self, text: str) -> bytes:
        """Render the next line without writing it to the file."""
        line = self.render(text)
        self.content += line
        return line

    def append(self, *texts: str) -> None:
        """Append lines to the file."""
        lines = b"".join(self.line(text) for text in texts)
        with self.path.open("ab") as file:
            file.write(lines)


@dataclass
class GuardedBroker(Mosquitto):
    """A broker with the guard, its journal and its certificates. ``extra`` goes to the end of its configuration."""

    root: Path
    pki: Pki = field(default_factory=Pki)
    extra: str = ""
    log_types: str = "all"
    under: tuple[str, ...] = ()  # a command that runs it

    def __post_init__(self) -> None:
        self.home = self.root / "broker"
        self.home.mkdir(mode=0o777)
        self.home.chmod(0o777)
        super().__init__(self.home, free_port())
        server = self.pki.issuing.issue("localhost", server_names=["localhost"])
        self.ca = self.root / "ca.pem"
        self.ca.write_bytes(self.pki.ca_bundle)
        (self.root / "server.pem").write_bytes(
            server.certificate.public_bytes(PEM) + self.pki.issuing.certificate.public_bytes(PEM)
        )
        (self.root / "server.key").write_bytes(key_pem(server.key))
        (self.root / "server.key").chmod(0o644)
        self.journal = self.new_journal(1).write()
        self._probe_id = f"probe-{uuid.uuid4()}"

    def new_journal(self, epoch: int) -> Journal:
        """A journal with what each begins with; it is not written."""
        journal = Journal(self.root / "guard.journal", epoch)
        journal.line(f"portal {hashlib.sha256(PASSWORD.encode()).hexdigest()}")
        for each in (self.issuer, *key_hashes_of(self.pki.issuing)):
            journal.line(f"issuer {each}")
        return journal

    @property
    def issuer(self) -> str:
        return hash_of(self.pki.issuing.certificate.subject)

    @property
    def variables(self) -> dict[str, str]:
        return {}  # TLS sessions can be resumed, which the guard has to see through

    def command(self) -> list[str]:
        return [*self.under, *super().command()]

    def configuration_text(self) -> str:
        return f"""
            per_listener_settings false
            plugin {guard_library()}
            plugin_opt_journal {self.journal.path}
            check_retain_source true
            listener 0 {self.socket}
            listener {self.port} 127.0.0.1
            cafile {self.ca}
            certfile {self.root}/server.pem
            keyfile {self.root}/server.key
            require_certificate true
            use_identity_as_username true
            use_username_as_clientid true
            set_tcp_nodelay true
            persistence true
            persistence_location {self.home}
            log_dest stderr
            log_type {self.log_types}
            {self.extra}
        """.replace("            ", "")

    def terminate(self) -> None:
        """End the broker by SIGTERM; an abort at its exit is the early sign of damaged memory."""
        assert self._process is not None
        self._process.terminate()
        assert self._process.wait(60) == 0, self.log

    # --- Clients ------------------------------------------------------------------------------------------------

    def issue(self, identity: str, authority: Authority | None = None) -> Credentials:
        """A certificate with the identity as its common name."""
        return (authority or self.pki.issuing).issue(identity)

    def context(self, credentials: Credentials) -> ssl.SSLContext:
        """What a client with this certificate connects with."""
        return tls_context(self.ca, *credentials.write(self.root, uuid.uuid4().hex))

    def tls(self, credentials: Credentials, *, version: int = 5) -> MqttClient:
        """A TLS connection with the certificate; CONNECT is still to be sent."""
        return MqttClient(connect_tls(self.port, self.context(credentials)), version)

    @contextmanager
    def device(self, credentials: Credentials, identity: str = "", **options: object) -> Iterator[MqttClient]:
        """A device that has connected."""
        with self.tls(credentials) as client:
            assert client.connect(identity or "any", **options) == 0  # type: ignore[arg-type]
            yield client

    @contextmanager
    def portal(self, client_id: str = "portal-0", password: str = PASSWORD) -> Iterator[MqttClient]:
        """The portal, connected on the internal listener."""
        with MqttClient(connect_socket(self.socket)) as client:
            assert client.connect(client_id, username="portal", password=password) == 0
            yield client

    def ask(self, question: str) -> bool:
        """Ask the guard as the portal does."""
        with self.portal(f"portal-{uuid.uuid4()}") as portal:
            code = portal.publish(f"portal/guard/{question}")
        assert code in (0x00, 0x10, 0x87)
        return code != 0x87

    def proven(self) -> bool:
        """Say whether all that the journal says is in force."""
        return self.ask(f"prove/{self.journal.epoch}/{self.journal.sequence}")

    def tell(self, *texts: str) -> None:
        """Append lines, and see them in force."""
        self.journal.append(*texts)
        assert self.proven()

    def wait_until_closed(self, identity: str) -> None:
        """Wait until the broker has noticed that the connection of an identity was dropped."""
        self._wait_for(
            lambda log: any(self._says_closed(line, identity) for line in log.splitlines()), f"the end of {identity}"
        )

    @staticmethod
    def _says_closed(line: str, identity: str) -> bool:
        """Mosquitto 2.0 and 2.1 say it differently."""
        return f"Client {identity} " in line and ("closed its connection" in line or "disconnected" in line)

    def admit(self, *filters: str) -> tuple[str, Credentials]:
        """A new device, known to the guard, with its certificate."""
        identity = str(uuid.uuid4())
        self.tell(" ".join(["allow", identity, *filters]))
        return identity, self.issue(identity)


@contextmanager
def guarded_broker(extra: str = "", *, start: bool = True) -> Iterator[GuardedBroker]:
    """A running broker in a folder of its own."""
    folder = short_folder()
    broker = GuardedBroker(folder, extra=extra)
    try:
        if start:
            broker.start()
        yield broker
    finally:
        broker.stop()
        shutil.rmtree(folder)


def may_publish(client: MqttClient, topic: str) -> bool:
    """Publish; say whether that is granted: it is not if the client is cut, as 2.1 may do before."""
    try:
        code = client.publish(topic)
    except ConnectionError:
        return False
    assert code in (*DELIVERED, NOT_AUTHORISED)
    return code in DELIVERED


def may_subscribe(client: MqttClient, filter_: str) -> bool:
    code = client.subscribe(filter_)
    assert code in (GRANTED_QOS_1, NOT_AUTHORISED)
    return code == GRANTED_QOS_1


def is_admitted(broker: GuardedBroker, identity: str, credentials: Credentials) -> bool:
    with broker.device(credentials) as device:
        return may_publish(device, f"devices/{identity}/probe")


def serial_line(broker: GuardedBroker, word: str, identity: str, credentials: Credentials) -> str:
    line = f"{word} {broker.issuer} {credentials.certificate.serial_number:x}"
    return line if word == "unserial" else f"{line} {identity}"
