"""What devices and applications may do, as the lines of a journal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

from broker.guard import journal
from core.errors import TopicRefused
from core.tenants import TenantOnBroker
from core.topics import Topic, check_application_topics, check_device_id, check_topics, expand


class LineWriter(Protocol):
    """Takes the lines of a journal."""

    def add(self, text: str) -> None:
        """Add a line."""

    def discard(self) -> None:
        """Drop what was not committed."""


class NoJournal:
    """Drops the lines: who grants topics only asks whether they can be granted."""

    def add(self, text: str) -> None:
        """Do nothing."""

    def discard(self) -> None:
        """Do nothing."""


class GuardAccess:
    """What devices and applications may do, as lines of a journal."""

    keeps_suspended = False

    def __init__(
        self,
        prefixes: Sequence[str],
        writer: LineWriter,
        *,
        whole: bool,
        check: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Write to ``writer``; ``whole`` if the journal is a new one, which knows no device.

        Below the first of ``prefixes`` are the devices' topics, below all of them what applications may have. These
        are the first tenant's; of another tenant both are below its own prefix alone. ``check`` raises ``TopicRefused``
        for a filter that the broker cannot grant.
        """
        self._check = check
        self._prefixes = prefixes
        self._writer = writer
        self._whole = whole
        self._closed: dict[str, str] = {}

    @property
    def closed(self) -> Mapping[str, str]:
        """Devices that are denied everything because their topics cannot be granted, each with the reason."""
        return MappingProxyType(self._closed)

    def grant(self, device_id: str, topics: Sequence[Topic] | None, tenant: TenantOnBroker | None = None) -> None:
        """Allow the device ``topics``, the default ones if ``None``."""
        check_device_id(device_id)
        if topics is None:
            self._add(journal.allow_line(device_id, tenant=_name(tenant)), tenant)
        else:
            prefix = self._prefixes_of(tenant)[0]
            self._grant(device_id, lambda: check_topics(topics, device_id=device_id, prefix=prefix), tenant)

    def grant_application(
        self, application_id: str, topics: Sequence[Topic], tenant: TenantOnBroker | None = None
    ) -> None:
        """Allow an application ``topics``, which may cover those of all devices of its tenant."""
        check_device_id(application_id)
        prefixes = self._prefixes_of(tenant)
        self._grant(application_id, lambda: check_application_topics(topics, prefixes=prefixes), tenant)

    def _prefixes_of(self, tenant: TenantOnBroker | None) -> Sequence[str]:
        return self._prefixes if tenant is None else (tenant.prefix,)

    def _grant(self, identity: str, checked: Callable[[], Sequence[Topic]], tenant: TenantOnBroker | None) -> None:
        try:
            filters = [(expand(topic, identity), topic.access) for topic in checked()]
            for text, _ in filters:
                self._check(text)
        except TopicRefused as error:
            self._closed[identity] = error.detail
            self.deny(identity, tenant)
            return
        self._add(journal.allow_line(identity, filters, tenant=_name(tenant)), tenant)

    def deny(self, device_id: str, tenant: TenantOnBroker | None = None) -> None:
        """Deny the device everything, until it is allowed or forgotten."""
        check_device_id(device_id)
        self._add(journal.deny_line(device_id, tenant=_name(tenant)), tenant)

    def _add(self, text: str, tenant: TenantOnBroker | None) -> None:
        """Add a line that names a tenant, if it is not the first one."""
        self._writer.add(text)

    def forget(self, device_id: str) -> None:
        """Make the device unknown: it is refused as any other that is not allowed."""
        check_device_id(device_id)
        if not self._whole:
            self._writer.add(journal.forget_line(device_id))


def _name(tenant: TenantOnBroker | None) -> str | None:
    return None if tenant is None else tenant.name
