"""A portal in this process that controls real RabbitMQ nodes, as an operator sets them up, and its devices."""

from __future__ import annotations

import json
import shutil
import ssl
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self

from cryptography.hazmat.primitives.asymmetric import ec

from core.topics import Access
from operations.wiring import Portal, open_portal, prepare
from pki.algorithms import private_key_pem
from pki.csr import new_request, read_csr
from store.audit import Actor
from tests.support.harness import derived_quickly, settings_for
from tests.support.mosquitto import short_folder
from tests.support.mqtt import MqttClient, connect_tls, tls_context
from tests.support.ports import free_port
from tests.support.rabbitmq import USER, Node, RabbitmqCluster
from web import rabbitmq_listener
from workflows.credentials import DeviceRequest

NONE: Mapping[str, str] = MappingProxyType({})
OPERATOR = Actor("default", "somebody", "admin", "request-1", "192.0.2.1")


@dataclass(frozen=True)
class Device:
    """A device with its certificate."""

    id: str
    pair: tuple[Path, Path]


class RabbitmqSite:
    """``nodes`` in one cluster; each is given a folder of its own."""

    def __init__(
        self, nodes: int = 1, *, tenants: Sequence[str] = (), options: Mapping[str, str] = NONE, **environment: str
    ) -> None:
        self.folder = short_folder(in_memory=True)
        port = free_port()
        self.cluster = RabbitmqCluster(f"https://localhost:{port}", nodes, tenants=len(tenants))
        self.cluster.options.update(options)
        self.tenant_ports = dict(zip(tenants, self.cluster.nodes[0].tenant_ports, strict=True))
        password = self.folder / "management-password"
        password.touch(mode=0o600)
        password.write_text(self.cluster.password)
        listed = [
            {
                "name": node.name,
                "mqtt": f"127.0.0.1:{node.mqtt_port}",
                "management": node.management_url,
                "folder": str(node.portal_folder),
            }
            for node in self.cluster.nodes
        ]
        self.settings = settings_for(
            self.folder / "data",
            PORTAL_BROKER_CONTROL="rabbitmq",
            PORTAL_RABBITMQ_NODES=json.dumps(listed),
            PORTAL_RABBITMQ_TENANT_PORTS=json.dumps(self.tenant_ports) if tenants else "",
            PORTAL_RABBITMQ_USER=USER,
            PORTAL_RABBITMQ_PASSWORD_FILE=str(password),
            PORTAL_RABBITMQ_BIND=f"127.0.0.1:{port}",
            PORTAL_RABBITMQ_URL=self.cluster.answers_url,
            **environment,
        )
        self._stopping = threading.Event()

    def __enter__(self) -> Self:
        try:
            with derived_quickly():
                self.portal: Portal = open_portal(self.settings)
            prepare(self.portal)
            of = self.settings, self.portal.questioners, self._stopping
            self._listener = threading.Thread(target=rabbitmq_listener.run, args=of)
            self._listener.start()
            self.cluster.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self.cluster.stop()
        self._stopping.set()
        if hasattr(self, "_listener"):
            self._listener.join()
        if hasattr(self, "portal"):
            self.portal.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def device(self, *topics: tuple[str, Access], actor: Actor = OPERATOR) -> Device:
        """Register a device with a key of its own, in the tenant of an actor."""
        key = ec.generate_private_key(ec.SECP256R1())
        request = DeviceRequest(
            name=f"pump-{uuid.uuid4().hex[:8]}",
            type="pump",
            location="hall 1",
            firmware="1.0",
            csr=read_csr(new_request(key)),
            topics=topics or None,
        )
        registered = self.portal.registrations.register(actor, request)
        certificate = self.folder / f"{registered.device_id}.pem"
        certificate.write_text((registered.certificate or "") + (registered.chain or ""))
        certificate.with_suffix(".key").write_bytes(private_key_pem(key))
        return Device(registered.device_id, (certificate, certificate.with_suffix(".key")))

    def client(self, device: Device, node: Node | None = None, tenant: str = "") -> MqttClient:
        """A client that has done its handshake, at the listener of a tenant."""
        context = tls_context(self.settings.data_dir / "ca.pem", *device.pair)
        port = self.tenant_ports.get(tenant, (node or self.cluster.nodes[0]).mqtt_port)
        return MqttClient(connect_tls(port, context), 4)

    def refusal(self, device: Device, node: Node | None = None, tenant: str = "") -> str:
        """Connect a client that may be refused; return why, "return code 0" if it is not."""
        try:
            with self.client(device, node, tenant) as client:
                return f"return code {client.connect(device.id)}"
        except ssl.SSLError as error:
            return error.reason or ""

    def soon(self, seconds: float = 5) -> float:
        return time.monotonic() + seconds
