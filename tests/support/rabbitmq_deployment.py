"""A whole portal for tests with a cluster of RabbitMQ, each node set up from rabbitmq/ as an operator does."""

from __future__ import annotations

import json
from contextlib import ExitStack
from typing import Any

from tests.support.deployment import Deployment
from tests.support.links import Link
from tests.support.nodes import JoinedNode
from tests.support.ports import free_port
from tests.support.rabbitmq import USER, Node, RabbitmqCluster


class RabbitmqDeployment(Deployment):
    """A portal whose broker is ``cluster``; its clients connect to the first node unless they are told another.

    ``linked``: portal and nodes reach each other through ``links``, which a test can cut; clients do not use them.
    ``at`` and ``answers_at`` are the addresses of the nodes, and of the portal for them. Nodes ask at the port
    ``asked_at``, if one is given, where somebody passes it on to the portal, or to several.
    """

    def __init__(
        self,
        nodes: int = 1,
        *,
        linked: bool = False,
        at: str = "127.0.0.1",
        answers_at: str = "127.0.0.1",
        asked_at: int = 0,
        **environment: str,
    ) -> None:
        self._stack = ExitStack()
        self._linked = linked
        self.links: dict[int, Link] = {}
        answers = free_port()
        host = "localhost" if answers_at == "127.0.0.1" else "portal.test"
        self.cluster = RabbitmqCluster(f"https://{host}:{asked_at or self._through(answers)}", nodes, address=at)
        self.cluster.hosts = {host: answers_at}
        self.answers_link = self.links.get(answers)
        first = self.cluster.nodes[0]
        password = self.cluster.folder / "password"
        password.touch(mode=0o600)
        password.write_text(self.cluster.password)
        super().__init__(
            PORTAL_BROKER_CONTROL="rabbitmq",
            PORTAL_MQTT_PORT=str(first.mqtt_port),
            PORTAL_RABBITMQ_NODES=json.dumps([self._described(node) for node in self.cluster.nodes]),
            PORTAL_RABBITMQ_USER=USER,
            PORTAL_RABBITMQ_PASSWORD_FILE=str(password),
            PORTAL_RABBITMQ_BIND=f"{answers_at}:{answers}",
            PORTAL_RABBITMQ_URL=self.cluster.answers_url,
            **environment,
        )
        self.mqtt_host = "localhost" if at == "127.0.0.1" else at
        self.mqtt_port = first.mqtt_port

    def _through(self, port: int) -> int:
        if not self._linked:
            return port
        self.links[port] = self._stack.enter_context(Link(port))
        return self.links[port].port

    def _described(self, node: Node) -> dict[str, str]:
        """The node as PORTAL_RABBITMQ_NODES has it."""
        at = self.cluster.address
        return {
            "name": node.name,
            "mqtt": f"{at}:{self._through(node.mqtt_port)}",
            "management": node.management_url.replace(
                f":{node.management_port}", f":{self._through(node.management_port)}"
            ),
            "folder": str(node.portal_folder),
        }

    def links_to(self, node: Node) -> list[Link]:
        """The links by which the portal reaches a node."""
        return [self.links[node.mqtt_port], self.links[node.management_port]]

    def start_broker(self) -> Any:
        """Start the first node, which serves devices once the portal answers; ``wait_ready`` starts the others."""
        self.cluster.launch()

    def wait_ready(self) -> None:
        """Wait until all nodes serve devices, and the portal is ready."""
        self.cluster.wait()
        super().wait_ready()

    def stop_broker(self) -> None:
        """Stop the nodes."""
        self.cluster.stop()
        self._stack.close()


class JoinedRabbitmqPortal(JoinedNode):
    """A portal that has joined another one's installation, and tells the same cluster; its devices are those."""

    def __init__(self, first: RabbitmqDeployment, **environment: str) -> None:
        of_cluster = {
            name: value
            for name, value in first.environment.items()
            if name.startswith("PORTAL_RABBITMQ_") or name in ("PORTAL_DATABASE_URL", "PORTAL_MQTT_PORT")
        }
        own = {"PORTAL_RABBITMQ_BIND": f"127.0.0.1:{free_port()}"}
        super().__init__(first, PORTAL_BROKER_CONTROL="rabbitmq", **{**of_cluster, **own, **environment})
        self.mqtt_port = first.mqtt_port

    def start_broker(self) -> Any:
        """Do nothing: the first portal's cluster runs."""
