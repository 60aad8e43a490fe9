"""The control of a RabbitMQ cluster: it asks the portal about its clients, and what it was answered is waited out.

A denial is proven in steps at each node, since a node believes for some time what it was answered before, and a client
that is connected goes on: the node asks a portal that has the change; connections are closed; once no answer of before
can be on its way any more, the node is told something, and is seen to have forgotten that, and with it all that it was
told before; connections that were made meanwhile are closed, and none are left.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime
from types import MappingProxyType
from typing import Any, TypeVar

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from broker.control import PresenceReports
from broker.crl import Trust
from broker.folder import SERVER_CERTIFICATE_FILE
from broker.guard.ended import EndedSessions
from broker.guard.journal import Position
from broker.guard.writing import JournalControl
from broker.probe import ProbeCertificate, ProbeCertificates, ProbeResult, Resumption
from broker.rabbitmq.answers import IN_FLIGHT_SECONDS, check_filter
from broker.rabbitmq.cluster import Cluster
from broker.rabbitmq.folder import RabbitmqFiles
from broker.rabbitmq.presence import RabbitmqReports
from broker.rabbitmq.probe import Believed, NodeProbe, NodeStopped
from broker.rabbitmq.vhosts import Vhosts
from config import Settings
from core.errors import BrokerNotEnforcing, BrokerUnavailable

SETTLE_SECONDS = 0.1  # until a connection that was let in is listed
HEALTH_SECONDS = 1.0
_NONE_RUNS = "No node of RabbitMQ runs: start them, or correct PORTAL_RABBITMQ_NODES."

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class _Denial:
    """What was seen of a denial before sessions are ended: what each node that runs believes, since ``at``."""

    at: float
    good: ProbeCertificate
    generation: int
    believed: Mapping[NodeProbe, Believed]


class RabbitmqControl(JournalControl):
    """Writes the journal and the nodes' folders, asks each node, and ends sessions by the management API of one."""

    publishes_crls = crls_are_due = False
    asks_whom_it_refuses = False  # the revoked probe certificate shows that
    clears_retained = False
    reads_certificate_at_start = False

    files: RabbitmqFiles

    def __init__(self, settings: Settings, clock: Callable[[], datetime]) -> None:
        super().__init__(settings, RabbitmqFiles(settings, clock), clock)
        self._probes = tuple(NodeProbe(node, settings) for node in settings.rabbitmq_nodes)
        self._cluster = Cluster(settings)
        self._vhosts = Vhosts(self._cluster.nodes, settings.rabbitmq_user, settings.rabbitmq_tenant_ports)
        self._unwritten: Mapping[str, str] = {}  # nodes that lack the newest CRLs, with the reason
        self._names = {node.name for node in settings.rabbitmq_nodes}
        self._ended = EndedSessions(self.files.journal)
        self._tenants: Sequence[str] = ()  # those that are to have a vhost, by the journal as it was installed
        self._denial: _Denial | None = None

    # --- Writing

    def check_knows_tenants(self) -> None:
        """Do nothing: until a tenant has its vhost, its clients are refused; see ``enforce``."""

    def check_filter(self, text: str) -> None:
        """Raise ``TopicRefused`` if RabbitMQ cannot grant a topic filter as it is meant."""
        check_filter(text)

    def give_crls(
        self, trust: Trust, position: Position, before: Mapping[str, Any], *, urgent: bool
    ) -> tuple[bool, Mapping[str, Any]]:
        """Write the CRLs into each node's folder, where they count from the next handshake on."""
        self._tenants = [one.name for one in self._told.at(position).tenants.values() if not one.suspended]
        self._unwritten = self.files.publish_to_nodes(trust)
        return True, {}

    def publish_crls(self, trust: Trust, *, at_once: bool = False) -> bool:
        """Do nothing: each installation gives the nodes the CRLs."""
        return False

    def grants_up_to(self) -> int | None:
        """Return the generation of the journal, from which nodes are answered that ask about a client."""
        position = self.files.position()
        return None if position is None else position.generation

    # --- Proving

    def enforce(
        self, generation: int, deadline: float, *, refused: str | None = None, shows: ProbeCertificate | None = None
    ) -> int:
        """See that each node asks a portal that has the change, if somebody is denied something by it.

        See ``broker.control.BrokerControl``. Whoever is only granted something is answered so from now on.
        """
        started = time.monotonic()
        position = self.files.position()
        if position is None or position.generation < generation:
            self._distrusted = True
            raise BrokerUnavailable(f"{self.files.journal} is not what the portal wrote; it is written again.")
        self._denial = None
        self._sync()
        if self._unwritten:
            raise BrokerUnavailable(" ".join(self._unwritten.values()))
        if self._settings.rabbitmq_tenant_ports:
            self._vhosts.make_all(self._tenants, deadline)
        if shows is not None:
            proven = self._at_each(lambda one: one.prove(shows, position.generation, deadline), self._probes, deadline)
            self._denial = _Denial(started, shows, position.generation, proven)
        return position.generation

    def end_sessions(
        self,
        device_ids: Sequence[str],
        deadline: float,
        *,
        revoked: Mapping[str, str] = MappingProxyType({}),
        narrowed: Set[str] = frozenset(),
    ) -> None:
        """End connections and delete queues, at once and again once no node believes older answers any more.

        A pass for many goes on where the one before had no more time.
        """
        denial, self._denial = self._denial, None
        if denial is None:
            self._cluster.for_each(device_ids, lambda identity: self._cluster.end(identity, deadline))
            return
        left, none_in_flight_at = self._ended.left(device_ids), denial.at + IN_FLIGHT_SECONDS
        self._check_time(none_in_flight_at, deadline)
        ended = self._end_until(none_in_flight_at, left)
        denial = self._ask_again(denial, deadline)
        forgotten_at = self._forgotten_at(denial, deadline)
        ended |= self._end_until(forgotten_at, [identity for identity in left if identity not in ended])
        seen_by = self._see_forgotten(denial, deadline)
        if narrowed and (without := sorted(self._names - seen_by)):
            raise BrokerUnavailable(
                f"{without[0]} does not run, and may have kept sessions of clients that lost topics: start it, or take"
                " it out of the cluster and of PORTAL_RABBITMQ_NODES."
            )

        def finish(identity: str) -> None:
            if identity not in ended or identity in narrowed:
                self._cluster.end(identity, deadline)
            self._cluster.see_none(identity, seen_by, deadline)
            self._ended.add(identity)

        self._cluster.for_each(left, finish)

    def _end_until(self, deadline: float, identities: Sequence[str]) -> Set[str]:
        """End sessions until a time, and wait for it; return whose sessions were ended."""
        ended = self._cluster.end_until(deadline, identities)
        time.sleep(max(0.0, deadline - time.monotonic()))
        return ended

    def _ask_again(self, denial: _Denial, deadline: float) -> _Denial:
        """Have each node believe something anew, when it has given up all questions of before the denial.

        A node that was held up meanwhile takes late what was on its way, but before it answers this.
        """
        probes = [*denial.believed]
        proven = self._at_each(lambda one: one.prove(denial.good, denial.generation, deadline), probes, deadline)
        return replace(denial, believed=proven)

    def _forgotten_at(self, denial: _Denial, deadline: float) -> float:
        """Return when no node can go by an answer of before the denial; raise ``BrokerUnavailable`` if that is late."""
        cache, now = self._settings.rabbitmq_cache_seconds, time.monotonic()
        ends = (max(one.at + cache, now + one.ends / 1000 - time.time()) for one in denial.believed.values())
        at = max(ends) + SETTLE_SECONDS
        self._check_time(at - cache, deadline)
        return at

    def _check_time(self, asked_at: float, deadline: float) -> None:
        """Raise ``BrokerUnavailable`` if what a node is told at a time cannot be forgotten by the deadline."""
        cache = self._settings.rabbitmq_cache_seconds
        if asked_at + cache >= deadline:
            raise BrokerUnavailable(
                "There was no time to wait until RabbitMQ has forgotten what it was answered before: set"
                f" PORTAL_ENFORCE_TIMEOUT to {IN_FLIGHT_SECONDS + cache + 2:g} or more."
            )

    def _see_forgotten(self, denial: _Denial, deadline: float) -> Set[str]:
        """See that each node has forgotten what it was answered before the denial; return the nodes, which all run."""
        at_once = self._at_each(
            lambda one: one.see_forgotten(denial.good, denial.believed[one], deadline), [*denial.believed], deadline
        )
        if not all(at_once.values()):
            time.sleep(IN_FLIGHT_SECONDS)  # it believes answers for longer than it should, those that came late, too
        seen = {one.node.name for one in at_once}
        if others := sorted(self._cluster.running(deadline) ^ seen):
            raise BrokerUnavailable(f"{others[0]} was just started or stopped: this is tried again.")
        return seen

    def probe(self, certificates: ProbeCertificates, deadline: float) -> ProbeResult:
        """Check that each node refuses the revoked certificate as revoked, and accepts the good one."""

        def run(one: NodeProbe) -> ProbeResult:
            if not _listens(one, deadline):
                raise NodeStopped
            return one.run(certificates, deadline)

        return next(iter(self._at_each(run, self._probes, deadline).values()))

    def _at_each(
        self, do: Callable[[NodeProbe], _T], probes: Sequence[NodeProbe], deadline: float
    ) -> Mapping[NodeProbe, _T]:
        """Do something at each node at once; leave out nodes that certainly do not run, which begin with nothing.

        Raise ``BrokerNotEnforcing`` or ``BrokerUnavailable`` with the names of all other nodes at which it failed.
        """
        done: dict[NodeProbe, _T] = {}
        stopped, failed = list[NodeProbe](), dict[str, BrokerUnavailable]()
        with ThreadPoolExecutor(max_workers=len(probes), thread_name_prefix="rabbitmq") as pool:
            for one, future in [(one, pool.submit(do, one)) for one in probes]:
                try:
                    done[one] = future.result()
                except NodeStopped:
                    stopped.append(one)
                except BrokerUnavailable as error:
                    failed[one.node.name] = error
        if stopped and done:
            still_running = self._cluster.running(deadline)
            for one in stopped:
                if one.node.name in still_running:
                    failed[one.node.name] = BrokerUnavailable(
                        f"Nothing listens at {one.node.mqtt}, although the cluster has this node running."
                    )
        if failed:
            is_wrong = any(isinstance(error, BrokerNotEnforcing) for error in failed.values())
            kind = BrokerNotEnforcing if is_wrong else BrokerUnavailable
            raise kind(" ".join(f"{name}: {error.detail}" for name, error in failed.items()))
        if not done:
            raise BrokerUnavailable(_NONE_RUNS)
        return done

    # --- Looking

    def server_certificate(self, certificates: ProbeCertificates, deadline: float) -> bytes:
        """Return the certificate that the nodes show: one that is not the newest, if there is such a node."""
        newest = x509.load_pem_x509_certificate(self._settings.broker_file(SERVER_CERTIFICATE_FILE).read_bytes())
        shown = b""
        for one in self._probes:
            if _listens(one, deadline):
                shown = one.server_certificate(certificates.good, deadline)
                if shown != newest.public_bytes(Encoding.DER):
                    return shown
        if not shown:
            raise BrokerUnavailable(_NONE_RUNS)
        return shown

    def resumption(self, certificates: ProbeCertificates, deadline: float) -> Resumption:
        """Return ``NONE``: doctor looks whether nodes resume TLS sessions."""
        return Resumption.NONE

    def check_resumption(self, generation: int, how: Callable[[], Resumption]) -> None:
        """Do nothing: ``reuse_sessions`` is off."""

    def waits(self, deadline: float) -> None:
        """Return ``None``: a node reads all by itself."""

    def knows_tenants(self, deadline: float) -> bool:
        """Return ``True``: each has its vhost."""
        return True

    def forget_tenant(self, name: str, deadline: float) -> None:
        """Remove the vhost of a tenant, with all that is in it."""
        if name in self._settings.rabbitmq_tenant_ports:
            self._vhosts.remove(name, deadline)

    def reachable(self) -> bool:
        """Return whether any node answers the portal within a second."""
        return self._cluster.answers(time.monotonic() + HEALTH_SECONDS)

    def nodes(self) -> Mapping[str, bool]:
        """Return each node with whether it accepts connections for MQTT within a second."""
        deadline = time.monotonic() + HEALTH_SECONDS
        with ThreadPoolExecutor(max_workers=len(self._probes), thread_name_prefix="rabbitmq") as pool:
            up = pool.map(lambda one: _is_up(one, deadline), self._probes)
            return dict(zip((one.node.name for one in self._probes), up, strict=True))

    def is_stopped(self) -> bool:
        """Return whether certainly no node runs, and not only ones that are slow to answer."""
        deadline = time.monotonic() + HEALTH_SECONDS
        try:
            return not any(_listens(one, deadline) for one in self._probes)
        except BrokerUnavailable:
            return False

    def follow_presence(self, deadline: float) -> PresenceReports | None:
        """Ask the nodes again and again who is connected; see ``broker.control.BrokerControl``."""
        return RabbitmqReports(self._cluster)


def _listens(one: NodeProbe, deadline: float) -> bool:
    try:
        return one.listens(deadline)
    except OSError as error:
        said = error.strerror or str(error)
        raise BrokerUnavailable(f"{one.node.name} does not answer at {one.node.mqtt}: {said}.") from error


def _is_up(one: NodeProbe, deadline: float) -> bool:
    try:
        return _listens(one, deadline)
    except BrokerUnavailable:
        return False
