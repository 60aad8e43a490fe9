"""What operators read about devices and applications: lists, details, certificates; and the CRLs that are published."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from sqlalchemy.engine import Connection

import db
from broker_provisioning import BrokerProvisioning
from config import Settings
from core.errors import (
    ApplicationNotFound,
    BrokerUnavailable,
    DeviceNotFound,
    FieldProblem,
    GuardNeeded,
    InputInvalid,
    NameAmbiguous,
    PortalError,
)
from core.states import ClientKind, DeviceStatus, PresenceState
from core.topics import Access, Topic, default_topics, is_device_id
from store import certificates as store_certificates
from store import devices as store_devices
from store import generations, groups, issuers, references
from store.attestation import AttestationRecord, find_attestation
from store.certificates import CertificateRecord
from store.database import Database
from store.devices import BY_NAME, BY_SEEN, DeviceFilter, DeviceRecord, ListedDevice, ListOrder, Place, place_of
from store.issuers import CrlHead, CrlRecord
from store.presences import presence_of
from workflows.connections import Contacts, DeviceConnection, KnownContacts, connection_of
from workflows.groups import expanded
from workflows.tenants import TenantDirectory, TenantTerms

log = logging.getLogger("portal.devices")


@dataclass(frozen=True, slots=True)
class DeviceDetails:
    """A device with its current or last certificate; ``applied``: the broker enforces its latest change.

    It does not while its topics wait for a restart of the broker. ``problem`` is why the broker denies it everything
    although it is in use, ``connection`` is ``None`` for a device that was never seen, ``attestation`` for one that has
    shown no evidence. It is in ``groups``, and has the topics of ``topics_group``, if it is not ``None``.
    """

    device: DeviceRecord
    certificate: CertificateRecord | None
    topics: tuple[Topic, ...]
    applied: bool
    problem: str | None
    connection: DeviceConnection | None
    attestation: AttestationRecord | None
    groups: Sequence[str]
    topics_group: str | None


@dataclass(frozen=True, slots=True)
class Page:
    """A page of devices; ``contacts`` say how current their connections are, ``cursor`` leads to the next page.

    Of applications, and devices with topics of their own, it has these: pairs of filter and access by id; and
    ``problems`` has why the broker denies some of them everything, ``groups`` in which groups they are.
    """

    devices: Sequence[ListedDevice]
    contacts: Contacts
    cursor: str | None
    topics: Mapping[str, Sequence[tuple[str, str]]]
    problems: Mapping[str, str | None]
    default_topics: Sequence[tuple[str, str]]  # of the others
    groups: Mapping[str, Sequence[str]]


MAX_TOLD = 10  # devices that an ambiguous name may mean
MAX_NAME = 128  # characters of a device's name
PAGE, MOST_AT_ONCE = 500, 10_000  # devices that one action is done to
MOST_RENEWED = 1000  # for each of which a key is made, and a bundle encrypted


@dataclass(eq=False, repr=False)
class Inventory:
    """Reads only, and each answer from one state of the database."""

    _settings: Settings
    _database: Database
    _tenants: TenantDirectory
    _sign_crls: Callable[[], None]
    _contacts: KnownContacts
    _broker: BrokerProvisioning
    _clock: Callable[[], datetime]
    _crls: dict[int, tuple[CrlHead, CrlRecord]] = field(init=False, default_factory=dict)  # by issuer, as read last

    def device(self, tenant_id: str, device_id: str, *, kind: ClientKind = ClientKind.DEVICE) -> DeviceDetails:
        """Return one device, or application; raises ``DeviceNotFound``, ``ApplicationNotFound``."""
        contacts = self._contacts.read()  # first: what is read then is at least as new
        with self._database.snapshot() as tx:
            device = db.get_device(tx, tenant_id, device_id, kind=kind)
            presence = presence_of(tx, tenant_id, device_id)
            certificate = store_certificates.current_certificate(tx, tenant_id, device_id)
            own = store_devices.device_topics(tx, tenant_id, device_id) if device.own_topics else ()
            state = generations.get_broker_state(tx)
            shown = None if device.attested is None else find_attestation(tx, tenant_id, device_id)
            of_groups = groups.groups_of_device(tx, tenant_id, device_id)
        topics = _as_topics(own)
        return DeviceDetails(
            device=device,
            certificate=certificate,
            topics=topics or default_topics(self._tenants.of(tenant_id).topic_prefix),
            applied=device.generation <= state.applied_generation and not self._waits_for_restart(device),
            problem=self._problem(self._tenants.of(tenant_id), device, topics),
            connection=None if presence is None else connection_of(presence, contacts),
            attestation=shown,
            groups=[group.name for group in of_groups],
            topics_group=next((group.name for group in of_groups if group.id == device.topics_group_id), None),
        )

    def _problem(self, tenant: TenantTerms, device: DeviceRecord, own: Sequence[Topic]) -> str | None:
        if device.status not in (DeviceStatus.ACTIVE, DeviceStatus.SUSPENDED) or not own:
            return None
        problem = self._broker.topics_problem(device.id, own, device.kind, tenant.on_broker)
        if problem is None:
            return None
        return f"{problem} So the broker denies it everything: change its topics, or the settings."

    def _waits_for_restart(self, device: DeviceRecord) -> bool:
        return device.generation > 0 and self._broker.lacks_change_of(device.updated_at)

    def waits_for_broker(self, tenant_id: str, device_id: str, generation: int) -> bool:
        """Return whether a device that was registered now, at ``generation``, has to wait for a restart of the broker.

        With the generation 0 the broker need not learn of it.
        """
        if not generation or self._broker.control.narrows_at_once:  # within milliseconds; its link waits for that
            return False
        with self._database.snapshot() as tx:
            device = db.get_device(tx, tenant_id, device_id)
            state = generations.get_broker_state(tx)
        return device.generation > state.applied_generation or self._waits_for_restart(device)

    def certified(self, tenant_id: str, device_id: str, der: bytes) -> tuple[DeviceRecord, CertificateRecord]:
        """Return a device with the certificate (DER) that it was given."""
        with self._database.snapshot() as tx:
            device = db.get_device(tx, tenant_id, device_id)
            records = store_certificates.device_certificates(tx, tenant_id, device_id)
        return device, next(record for record in records if record.der == der)

    def certificates(self, tenant_id: str, device_id: str) -> Sequence[CertificateRecord]:
        """Return every certificate the device has had, newest first; raises ``DeviceNotFound``."""
        with self._database.snapshot() as tx:
            db.get_device(tx, tenant_id, device_id)
            return store_certificates.device_certificates(tx, tenant_id, device_id)

    def devices(self, tenant_id: str, wanted: DeviceFilter, *, limit: int, cursor: str | None) -> Page:
        """Return a page of devices, or applications, newest first if ``wanted`` has no other order.

        Where several things narrow the list, a page may hold fewer than ``limit``, or none, and lead to another.
        Raises ``NotFound`` for a group, ``InputInvalid`` for a cursor that no page of this list gave; ``GuardNeeded``
        and ``BrokerUnavailable`` if ``wanted`` asks who is connected, and that is never known, or not known now.
        """
        contacts = self._contacts.read()  # first: what is read then is at least as new
        tenant = self._tenants.of(tenant_id)
        with self._database.snapshot() as tx:
            inner = self._expanded(tx, tenant_id, wanted, contacts)
            after = None if cursor is None else _read_cursor(cursor, tenant_id, wanted, inner)
            found = store_devices.list_devices(tx, tenant_id, inner, limit=limit + 1, after=after)
            page, next_place = found.devices[:limit], found.end
            if len(found.devices) > limit:
                next_place = place_of(page[-1], inner)
            cursor = None if next_place is None else _make_cursor(next_place, tenant_id, wanted)
            return self._page(tx, tenant, page, contacts, cursor)

    def _expanded(self, tx: Connection, tenant_id: str, wanted: DeviceFilter, contacts: Contacts) -> DeviceFilter:
        """Return a filter with what its group stands for; raises if it asks who is connected, and that is not known."""
        inner = expanded(tx, tenant_id, wanted, now=self._clock())
        if inner.connected is not None and not contacts.heard:
            raise _not_known(self._settings)
        return dataclasses.replace(inner, at_brokers=contacts.narrowed)

    def _page(
        self, tx: Connection, tenant: TenantTerms, page: Sequence[ListedDevice], contacts: Contacts, cursor: str | None
    ) -> Page:
        topics = store_devices.topics_of(tx, tenant.id, [one.device.id for one in page if one.device.own_topics])
        known = [one.device for one in page if one.device.id in topics]
        problems = {device.id: self._problem(tenant, device, _as_topics(topics[device.id])) for device in known}
        default = [(topic.filter, topic.access.value) for topic in default_topics(tenant.topic_prefix)]
        names = groups.group_names_of(tx, tenant.id, [one.device.id for one in page])
        return Page(page, contacts, cursor, topics, problems, default, names)

    def found(self, tenant_id: str, wanted: DeviceFilter, *, most: int) -> list[str]:
        """Return the ids of all devices that fit; raises ``InputInvalid`` if there are more than ``most``."""
        found: list[str] = []
        cursor: str | None = None
        while True:
            page = self.devices(tenant_id, wanted, limit=PAGE, cursor=cursor)
            found += [device.id for device, *_ in page.devices]
            if len(found) > most:
                problem = FieldProblem("filter", f"matches more than {most} devices")
                raise InputInvalid("The filter matches too many devices; narrow it, or name devices by ids.", [problem])
            if (cursor := page.cursor) is None:
                return found

    def named(self, tenant_id: str, text: str, wanted: DeviceFilter, *, limit: int) -> Page:
        """Return the devices that a text may mean (an id or its beginning, a name, an external id), by their ids.

        Of them those that are ``wanted``. Raises ``GuardNeeded`` and ``BrokerUnavailable`` as ``devices`` does.
        """
        contacts = self._contacts.read()
        tenant = self._tenants.of(tenant_id)
        with self._database.snapshot() as tx:
            found = self._meant(tx, tenant_id, text, self._expanded(tx, tenant_id, wanted, contacts))
            return self._page(tx, tenant, found[:limit], contacts, None)

    def _meant(self, tx: Connection, tenant_id: str, text: str, wanted: DeviceFilter) -> list[ListedDevice]:
        meant = [dataclasses.replace(wanted, id=one.id) for one in references.candidates(tx, tenant_id, text)]
        return [device for one in meant for device in store_devices.list_devices(tx, tenant_id, one, limit=1).devices]

    def suggested(self, tenant_id: str, text: str, wanted: DeviceFilter, *, limit: int) -> Page:
        """Return the devices that a reader most likely means by a text that is typed: ``named``, then by their names.

        Of the names those count that follow the text in the index of names and have it in them: of a fleet of any size,
        those that begin so. Raises as ``named`` does.
        """
        contacts = self._contacts.read()
        tenant = self._tenants.of(tenant_id)
        with self._database.snapshot() as tx:
            inner = self._expanded(tx, tenant_id, wanted, contacts)
            found = {one.device.id: one for one in self._meant(tx, tenant_id, text, inner)}
            by_name = dataclasses.replace(inner, q=text, sort=ListOrder.NAME)
            before = (text, datetime.min.replace(tzinfo=UTC), "")  # each device of this very name comes after it
            begun = store_devices.list_devices(tx, tenant_id, by_name, limit=limit, after=before)
            found |= {one.device.id: one for one in begun.devices if one.device.id not in found}
            return self._page(tx, tenant, [*found.values()][:limit], contacts, None)

    def identified(self, tenant_id: str, kind: ClientKind, by: str, text: str) -> str:
        """Return the id of the device, or application, with a ``name`` or ``external_id``, or whose ``id`` begins so.

        Raises ``DeviceNotFound``, ``ApplicationNotFound``, and ``NameAmbiguous`` with those that may be meant.
        """
        with self._database.snapshot() as tx:
            found = references.identified(tx, tenant_id, kind, by, text)
        if len(found) == 1:
            return found[0].id
        words = {"name": "this name", "external_id": "this external_id", "id": "an id that begins so"}[by]
        if not found:
            missing = ApplicationNotFound if kind is ClientKind.APPLICATION else DeviceNotFound
            raise missing(f"No {kind} has {words}; list them with GET /{kind}s.")
        shown = [" ".join(filter(None, (one.id, one.name, one.external_id))) for one in found[:MAX_TOLD]]
        more = " …" if len(found) > MAX_TOLD else ""
        raise NameAmbiguous(f"Several {kind}s have {words} ({', '.join(shown)}{more}); use the id of one of them.")

    def crl(self, issuer_id: int) -> CrlRecord | None:
        """Return the newest CRL of an issuer, ``None`` before the first.

        What is asked of the database each time is only which one that is: so it is never an old one, and is read once.
        If a revocation is not on it yet, a newer one is signed first.
        """
        with self._database.snapshot() as tx:
            put_off = issuers.crl_is_put_off(tx, issuer_id)
        if put_off:
            try:
                self._sign_crls()
            except PortalError as error:
                log.warning("a CRL that was asked for was not signed", extra={"problem": error.detail})
        with self._database.snapshot() as tx:
            head = issuers.get_crl_head(tx, issuer_id)
            if head is None:
                return None
            seen, record = self._crls.get(issuer_id, (None, None))
            if seen != head:
                record = issuers.get_crl(tx, issuer_id)
                if record is not None:
                    self._crls[issuer_id] = (head, record)
        return record


def _as_topics(pairs: Sequence[tuple[str, str]]) -> tuple[Topic, ...]:
    return tuple(Topic(pattern, Access(access)) for pattern, access in pairs)


def _not_known(settings: Settings) -> PortalError:
    if not settings.broker_control.by_journal:
        return GuardNeeded(
            "Which devices are connected is known only with PORTAL_BROKER_CONTROL=guard; list them without that filter."
        )
    return BrokerUnavailable(
        "It is not known which devices are connected, because the broker does not report it now; try again shortly, and"
        " see GET /readyz."
    )


def _make_cursor(place: Place, tenant_id: str, wanted: DeviceFilter) -> str:
    values = [value.isoformat() if isinstance(value, datetime) else value for value in place]
    text = json.dumps([wanted.order, _digest(tenant_id, wanted), *values], separators=(",", ":"), ensure_ascii=False)
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def _read_cursor(cursor: str, tenant_id: str, wanted: DeviceFilter, inner: DeviceFilter) -> Place:
    try:
        text = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4))
        order, digest, *lead, at, device_id = json.loads(text)
        time = datetime.fromisoformat(at).astimezone(UTC)
        if order != wanted.order or digest != _digest(tenant_id, wanted) or not is_device_id(device_id):
            raise ValueError("not of the form that a page gives")
        return *_read_lead(lead, inner), time, device_id
    except (ValueError, TypeError, OverflowError, RecursionError):
        problem = FieldProblem("cursor", "must be the next_cursor of the page before, of the same filters and sort")
        raise InputInvalid(
            "The cursor is not one that a page of these filters gave; begin again without it.", [problem]
        ) from None


def _digest(tenant_id: str, wanted: DeviceFilter) -> str:
    """Return what tells a tenant's list by some filters from any other list, by which its cursor is bound to them.

    A time in ``expires_before`` counts as any other: the next 30 days are other ones a minute later.
    """
    values = dataclasses.asdict(dataclasses.replace(wanted, sort=None, expires_before=None))
    told = json.dumps([tenant_id, values, wanted.expires_before is not None], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _read_lead(lead: list[Any], wanted: DeviceFilter) -> list[Any]:
    """Return what stands before the time in a cursor: a name, a state, or nothing; raises ``ValueError``."""
    if wanted.order in BY_NAME:
        [name] = lead
        if not isinstance(name, str) or not 1 <= len(name) <= MAX_NAME or "\0" in name:
            raise ValueError("not a name")
        name.encode()  # raises it for half of a character
        return [name]
    known = [int(PresenceState(state)) for state in lead]
    if len(known) != (wanted.connected is None and wanted.order in BY_SEEN):
        raise ValueError("not a state")
    return known
