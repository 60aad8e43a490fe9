"""Checks of a RabbitMQ cluster: whether its nodes run, what they listen on and how, and that they are answered."""

from __future__ import annotations

import contextlib
import http.client
import re
import ssl
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from broker.probe import ProbeCertificate
from broker.rabbitmq.answers import IN_FLIGHT_SECONDS, LATE_SECONDS
from broker.rabbitmq.control import SETTLE_SECONDS
from broker.rabbitmq.management import Management, all_nodes, of_node
from broker.rabbitmq.probe import NodeProbe, NodeStopped
from broker.rabbitmq.vhosts import Vhosts
from config import Settings
from core.errors import BrokerNotEnforcing, BrokerUnavailable
from core.rabbitmq_nodes import RabbitmqNode
from core.tenants import TenantStatus
from operations.doctor.base import SECONDS, Finding, Findings, Installation, combine, problem, summarize
from store import tenants

OLDEST = (3, 10)
NOT_ADMITTING = (4, 0)  # see broker/rabbitmq/answers.py
PLUGINS = ("rabbitmq_auth_backend_cache", "rabbitmq_auth_backend_http", "rabbitmq_management", "rabbitmq_mqtt")
MQTT = "mqtt/ssl"
_SERVED = (MQTT, "clustering", "http", "https", "http/prometheus", "https/prometheus")
_TLS = {"verify": "verify_peer", "fail_if_no_peer_cert": True, "crl_check": "peer", "reuse_sessions": False}
_COMPARE = "Compare the node's configuration with that in rabbitmq/ of the portal, then restart the node."
_START = "Start the node, or see its log, PORTAL_RABBITMQ_NODES and PORTAL_RABBITMQ_USER."
_ANSWER = (
    "Check that the portal runs, PORTAL_RABBITMQ_BIND and PORTAL_RABBITMQ_URL, and that the folder is the one that the"
    " node reads; the portal writes its files again."
)
_NO_GUEST = "At any node: rabbitmqctl delete_user guest."
_AS_SHIPPED = "as in rabbitmq/rabbitmq.conf of the portal, and restart the node"
_MAX_BYTES = 1000
_LATE_ANSWERS = 3
_NOBODY = "00000000-0000-0000-0000-000000000000"


def nodes(installation: Installation) -> Finding:
    """Check that each node runs, with the plugins and listeners that it needs and no others, and without alarms."""
    settings = installation.settings
    found, seen = Findings(), list[str]()
    with contextlib.ExitStack() as stack:
        asked = all_nodes(settings)
        for management in asked:
            stack.callback(management.close)
            node = management.node
            try:
                overview = management.get("/api/overview", time.monotonic() + SECONDS)
                states = management.get("/api/nodes", time.monotonic() + SECONDS)
                seen.append(examine(node, overview, states, found, settings.rabbitmq_tenant_ports))
            except BrokerUnavailable as error:
                found.problem(error.detail, _START)
            except (TypeError, KeyError, AttributeError, ValueError):
                found.problem(f"The management API of {node.name} answers otherwise than RabbitMQ's.", _START)
        if seen:
            _examine_tenants(installation, asked, found)
            _examine_guest(settings, asked, found)
    return combine(found, f"{', '.join(seen)} run as they must.")


def _examine_guest(settings: Settings, asked: Sequence[Management], found: Findings) -> None:
    """Add that the user is there with whom each RabbitMQ begins, and where its password admits whoever knows that."""
    with contextlib.suppress(BrokerUnavailable):  # which is said already
        if not any(management.get("/api/users/guest", time.monotonic() + SECONDS) for management in asked):
            return
    admitting = [management.node.name for management in asked if _admits_guest(settings, management.node)]
    said = "RabbitMQ has the user guest, with which it was installed"
    if admitting:
        found.problem(f"{said}, and admits it by its default password at {', '.join(admitting)}.", _NO_GUEST)
    else:
        found.warning(f"{said}.", _NO_GUEST)


def _admits_guest(settings: Settings, node: RabbitmqNode) -> bool:
    with contextlib.suppress(BrokerUnavailable):
        management = of_node(settings, node, "guest", "guest")
        try:
            return management.get("/api/whoami", time.monotonic() + SECONDS) is not None
        finally:
            management.close()
    return False


def _examine_tenants(installation: Installation, asked: Sequence[Management], found: Findings) -> None:
    with installation.snapshot() as tx:
        names = [
            record.id
            for record in tenants.list_tenants(tx)
            if record.id != installation.first_tenant and record.status is not TenantStatus.REMOVED
        ]
    if names:
        vhosts = Vhosts(lambda: asked, installation.settings.rabbitmq_user, installation.settings.rabbitmq_tenant_ports)
        try:
            for problem in vhosts.problems(time.monotonic() + SECONDS, names):
                found.problem(problem, "The portal makes it with its next change.")
        except BrokerUnavailable as error:
            found.problem(error.detail, _START)


def examine(
    node: RabbitmqNode,
    overview: Mapping[str, Any],
    states: Sequence[Any],
    found: Findings,
    tenant_ports: Mapping[str, int],
) -> str:
    """Add what is wrong with a node by what it says; return its name and version."""
    version = str(overview["rabbitmq_version"])
    numbers = tuple(map(int, re.findall(r"[0-9]+", version)[:2]))
    if numbers < OLDEST or numbers == NOT_ADMITTING:
        found.problem(
            f"{node.name} is RabbitMQ {version[:20]}.", "Use 3.10 or later, but not 4.0, which admits nobody."
        )
    if overview["node"] != node.name:
        said = f"The node at {node.management} is {str(overview['node'])[:80]}, not {node.name}."
        found.problem(said, "Correct PORTAL_RABBITMQ_NODES.")
    by_name = {state["name"]: state for state in states}
    state = by_name.get(node.name, {"running": False})
    if not state.get("running"):
        found.problem(f"{node.name} does not run in its cluster.", _START)
        return f"{node.name} ({version[:20]})"
    if "mem_alarm" not in state:
        found.warning(f"{node.name} was started just now, and says little of itself yet.", "Run this again soon.")
        return f"{node.name} ({version[:20]})"
    for alarm, what in (("mem_alarm", "memory"), ("disk_free_alarm", "disk space")):
        if state[alarm]:
            said = f"{node.name} is short of {what}, and accepts no messages."
            found.problem(said, f"Give it more {what}, or see why its queues grow.")
    if state["partitions"]:
        found.problem(f"{node.name} has lost sight of other nodes, and did not follow them.", "Restart it.")
    if missing := sorted({*PLUGINS} - {*state["enabled_plugins"]}):
        found.problem(f"{node.name} runs without {', '.join(missing)}.", _COMPARE)
    listeners = [one for one in overview["listeners"] if one["node"] == node.name]
    _examine_listeners(node, listeners, found)
    ports = {one["port"] for one in listeners if one["protocol"] == MQTT}
    if without := [f"{tenant} ({port})" for tenant, port in tenant_ports.items() if port not in ports]:
        found.problem(f"{node.name} has no listener for the tenants {summarize(without)}.", _COMPARE)
    return f"{node.name} ({version[:20]})"


def _examine_listeners(node: RabbitmqNode, listeners: Sequence[Mapping[str, Any]], found: Findings) -> None:
    others = sorted({str(one["protocol"]) for one in listeners} - {*_SERVED})
    if others:
        found.problem(f"{node.name} serves {', '.join(others)[:80]}, too, where no certificate is asked for.", _COMPARE)
    mqtt = [one for one in listeners if one["protocol"] == MQTT]
    if not mqtt:
        found.problem(f"{node.name} has no listener for MQTT over TLS.", _COMPARE)
    for one in mqtt:
        options = one["socket_opts"]
        wrong = [name for name, wanted in _TLS.items() if options.get(name) != wanted]
        if wrong:
            found.problem(f"{node.name} serves MQTT at port {one['port']} with another {', '.join(wrong)}.", _COMPARE)


def answers(installation: Installation) -> Finding:
    """Check that the portal answers at PORTAL_RABBITMQ_URL, each node by the files that it reads."""
    settings, found = installation.settings, Findings()
    for folder in dict.fromkeys(node.folder or settings.broker_dir for node in settings.rabbitmq_nodes):
        try:
            said = _asked(settings.rabbitmq_url, folder)
        except OSError as error:
            why = error.strerror or str(error) or type(error).__name__
            found.problem(f"With the files in {folder} nobody answers at {settings.rabbitmq_url} ({why}).", _ANSWER)
            continue
        if said != "deny":
            found.problem(f"With the files in {folder} the answer at {settings.rabbitmq_url} is: {said}", _ANSWER)
    return combine(found, f"Questions are answered at {settings.rabbitmq_url}.")


def times(installation: Installation) -> Finding:
    """Measure at each node whether it waits for answers, and believes them, no longer than a proof allows for.

    No interface of a node says what it is configured to do.
    """
    settings, good = installation.settings, installation.probe_certificates.good
    probes = [NodeProbe(node, settings) for node in settings.rabbitmq_nodes]
    found, stopped = Findings(), list[str]()
    with ThreadPoolExecutor(2 * len(probes)) as pool:
        measured = [
            (one.node, pool.submit(_believes_too_long, one, good, settings), pool.submit(_waits_too_long, one, good))
            for one in probes
        ]
        for node, believes, waits in measured:
            try:
                if believes.result():
                    found.problem(
                        f"{node.name} believes answers for longer than {settings.rabbitmq_cache_seconds:g} s.",
                        f"Set auth_cache.cache_ttl {_AS_SHIPPED}, or PORTAL_RABBITMQ_CACHE_SECONDS.",
                    )
                if waits.result():
                    found.problem(
                        f"{node.name} waits for an answer for longer than {IN_FLIGHT_SECONDS:g} s.",
                        f"Set auth_http.request_timeout {_AS_SHIPPED}.",
                    )
            except NodeStopped:
                stopped.append(node.name)  # which is said elsewhere
            except BrokerUnavailable as error:
                found.problem(f"{node.name}: {error.detail}", _ANSWER)
    if len(stopped) == len(probes):
        return problem("No node runs.", _START)
    believed = f"{settings.rabbitmq_cache_seconds:g} s"
    return combine(
        found, f"Nodes wait for answers for {IN_FLIGHT_SECONDS:g} s at most, and believe them for {believed}."
    )


def _believes_too_long(one: NodeProbe, good: ProbeCertificate, settings: Settings) -> bool:
    cache = settings.rabbitmq_cache_seconds
    believed = one.prove(good, 0, time.monotonic() + SECONDS)
    forgotten_in = max(believed.at + cache - time.monotonic(), believed.ends / 1000 - time.time())
    time.sleep(max(0.0, forgotten_in) + SETTLE_SECONDS)
    try:
        return not one.see_forgotten(good, believed, time.monotonic() + SECONDS)
    except BrokerNotEnforcing:
        return True


def _waits_too_long(one: NodeProbe, good: ProbeCertificate) -> bool:
    """Measure it several times, if need be: a machine that had no time for the node may have kept it from giving up."""
    return all(one.takes_late_answers(good, time.monotonic() + SECONDS + LATE_SECONDS) for _ in range(_LATE_ANSWERS))


def _asked(url: str, folder: Path) -> str:
    """Return the answer about a client that is none; raise ``OSError``."""
    parts = urlsplit(url)
    context = ssl.create_default_context(cafile=folder / "portal-ca.pem")
    context.load_cert_chain(folder / "node.pem", folder / "node.key")
    connection = http.client.HTTPSConnection(parts.hostname or "", parts.port, timeout=SECONDS, context=context)
    try:
        connection.request("POST", f"{parts.path}/broker/rabbitmq/user", f"username={_NOBODY}")
        return connection.getresponse().read(_MAX_BYTES).decode("utf-8", "replace")
    except http.client.HTTPException as error:
        raise ConnectionError(f"not an HTTP response ({type(error).__name__})") from error
    finally:
        connection.close()
