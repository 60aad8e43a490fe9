"""A portal with a broker of any engine, and clients that use of MQTT what each engine has: 3.1.1 over mutual TLS."""

from __future__ import annotations

import ssl
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec

from config import Settings
from tests.support.deployment import Deployment
from tests.support.harness import csr_pem
from tests.support.mqtt import SECONDS, MqttClient, Will, connect_socket, connect_tls, tls_context
from tests.support.pki import key_pem
from tests.support.rabbitmq_deployment import RabbitmqDeployment

ENGINES = ("files", "guard", "rabbitmq")
SUBSCRIBED = 1


@dataclass(frozen=True)
class Member:
    """A device or an application, with a certificate of its own, and the port of the broker that it connects to."""

    id: str
    context: ssl.SSLContext
    port: int
    host: str = "localhost"

    def at(self, port: int) -> Member:
        """The same, as it connects to another broker, or node of one."""
        return replace(self, port=port)

    def topic(self, word: str) -> str:
        """One of its own topics."""
        return f"devices/{self.id}/{word}"

    def tls(self, seconds: float = SECONDS) -> MqttClient:
        """Shake hands within so many seconds; CONNECT is still to be sent."""
        return MqttClient(connect_tls(self.port, self.context, host=self.host, seconds=seconds), version=4)

    @contextmanager
    def connected(self, *, clean: bool = True, will: Will | None = None) -> Iterator[MqttClient]:
        with self.tls() as client:
            assert client.connect(self.id, clean=clean, will=will) == 0
            yield client

    def is_admitted(self, seconds: float = SECONDS) -> bool:
        """Tell whether it shakes hands in so many seconds, and gets a message of its own back."""
        try:
            with self.tls(seconds) as client:
                client.seconds = seconds
                if client.connect(self.id) != 0 or client.subscribe(self.topic("#")) != SUBSCRIBED:
                    return False
                client.publish(self.topic("echo"), b"echo")
                return client.receive().payload == b"echo"
        except OSError:  # by TLS, or by the end of the connection
            return False


@dataclass
class Engine:
    """A running portal with one broker, and what the broker can do."""

    deployment: Deployment

    @property
    def name(self) -> str:
        return self.deployment.environment["PORTAL_BROKER_CONTROL"]

    @property
    def is_by_journal(self) -> bool:
        """Whether each client may do just what the portal says of it, which Mosquitto's files cannot say."""
        return self.name != "files"

    @property
    def asks_portal(self) -> bool:
        """Whether the broker asks the portal about a client that connects, or uses a topic for the first time."""
        return self.name == "rabbitmq"

    # --- Clients

    def device(self, *topics: tuple[str, str]) -> Member:
        """Register a device, with topics of its own if some are given, each with its access."""
        wanted = {"topics": [{"filter": pattern, "access": access} for pattern, access in topics]} if topics else {}
        key = ec.generate_private_key(ec.SECP256R1())
        answer = self.deployment.register(csr=csr_pem(key), **wanted)
        return self.member(answer["device_id"], answer["chain"], key)

    def application(self, *topics: tuple[str, str]) -> Member:
        """Register an application."""
        key = ec.generate_private_key(ec.SECP256R1())
        wanted = [{"filter": pattern, "access": access} for pattern, access in topics]
        body = {"name": f"application {uuid.uuid4()}", "topics": wanted, "csr": csr_pem(key)}
        answer = self.deployment.call("POST", "/applications", body)
        assert answer.status_code == 201, answer.text
        return self.member(answer.json()["application_id"], answer.json()["chain"], key)

    def member(self, identity: str, chain: str, key: ec.EllipticCurvePrivateKey) -> Member:
        """A client with this certificate."""
        files = [self.deployment.folder / f"{uuid.uuid4()}.{kind}" for kind in ("pem", "key")]
        files[0].write_text(chain)
        files[1].write_bytes(key_pem(key))
        context = tls_context(Path(self.deployment.operator["PORTAL_CA"]), *files)
        return Member(identity, context, self.deployment.mqtt_port, self.deployment.mqtt_host)

    def renew(self, device: Member, overlap_hours: int) -> tuple[Member, dict[str, Any]]:
        """Give the device a further certificate; return it with that, and the answer."""
        key = ec.generate_private_key(ec.SECP256R1())
        answer = self.post(f"/devices/{device.id}/renew", {"csr": csr_pem(key), "overlap_hours": overlap_hours})
        return self.member(device.id, answer["chain"], key), answer

    # --- What the operator does

    def post(self, path: str, body: Any = None) -> dict[str, Any]:
        answer = self.deployment.call("POST", path, body or {})
        assert answer.status_code in (200, 201), answer.text
        said: dict[str, Any] = answer.json()
        return said

    def revoke(self, device: Member) -> None:
        assert self.post(f"/revoke/{device.id}")["broker"] == "enforced"

    def change(self, device: Member, *topics: tuple[str, str]) -> str:
        """Give the device other topics; return whether that is enforced."""
        wanted = {"topics": [{"filter": pattern, "access": access} for pattern, access in topics]}
        answer = self.deployment.call("PATCH", f"/devices/{device.id}", wanted)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["broker"])

    # --- What the broker does

    def restart(self) -> None:
        """Restart the broker as a service's manager does."""
        if isinstance(self.deployment, RabbitmqDeployment):
            (node,) = self.deployment.cluster.nodes
            node.stop()
            node.launch()
            node.wait()
            return
        assert self.deployment.broker is not None
        self.deployment.broker.restart()

    def keeps_session(self, device: Member) -> bool:
        """Tell whether the broker has a session of a client that is away, with its subscriptions and messages."""
        if isinstance(self.deployment, RabbitmqDeployment):
            queues = self.deployment.cluster.nodes[0].get("/api/queues?columns=name")
            return any(device.id in queue["name"] for queue in queues)
        settings = Settings.from_env(
            {name: value for name, value in self.deployment.environment.items() if name.startswith("PORTAL_")}
        )
        password = (settings.secrets_dir / "broker-password").read_text().strip()
        with MqttClient(connect_socket(settings.broker_socket), version=4) as client:
            assert client.connect(device.id, clean=False, username="portal", password=password) == 0
            return client.session_present


@contextmanager
def engine(name: str) -> Iterator[Engine]:
    """A portal with a broker of the engine; nothing restarts the broker but a test."""
    of_engine = (
        RabbitmqDeployment(PORTAL_BROKER_RESTART="")
        if name == "rabbitmq"
        else Deployment(PORTAL_BROKER_CONTROL=name, PORTAL_BROKER_RESTART="")
    )
    with of_engine as deployment:
        deployment.wait_ready()
        yield Engine(deployment)
