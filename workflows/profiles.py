"""The use cases of certificate profiles: add, show, list, update and remove them, and find the one of a device."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy.engine import Connection
from sqlalchemy.exc import IntegrityError

from core.errors import NotFound, ProfileInUse
from pki.profiles import BUILT_IN, DEFAULT, CertificateProfile, CertificateTerms, check_profile
from store import audit, enrolment
from store import profiles as store_profiles
from store.audit import Actor
from store.database import Database
from store.devices import DeviceRecord
from store.profiles import ProfileRecord
from workflows.authority.issuers import Authority
from workflows.credentials import DeviceRequest, check_servers_of_tenant

_DESCRIBED = ("name", "external_id", "type", "location", "firmware", "metadata")


@dataclass(frozen=True, slots=True)
class ListedProfile:
    """A certificate profile with its dates; the built-in one has none."""

    profile: CertificateProfile
    created_at: datetime | None = None
    updated_at: datetime | None = None


@dataclass(eq=False, repr=False)
class CertificateProfiles:
    """Named rules for the certificates of devices; a change counts for the certificates issued from then on."""

    _database: Database
    _authority: Authority
    _clock: Callable[[], datetime]

    def add(self, actor: Actor, profile: CertificateProfile) -> ListedProfile:
        """Add a profile; raises ``ProfileInvalid``, ``ProfileRefused``, ``ProfileInUse`` for a name that is taken."""
        self._check(actor.tenant_id, profile)
        taken = ProfileInUse(f"There is a certificate profile {profile.name} already; choose another name.")
        if profile.name == DEFAULT:
            raise taken
        now, values = self._clock(), _values(profile)
        try:
            with self._database.transaction() as tx:
                store_profiles.add_profile(tx, actor.tenant_id, secrets.token_hex(8), values, now=now)
                rules = {name: value for name, value in values.items() if value not in (None, [])}
                audit.record(tx, actor, "profile:add", f"profile:{profile.name}", at=now, **rules)
        except IntegrityError:
            raise taken from None
        return ListedProfile(profile, now, now)

    def profile(self, tenant_id: str, name: str) -> ListedProfile:
        """Return a profile; raises ``NotFound``."""
        if name == DEFAULT:
            return ListedProfile(BUILT_IN)
        with self._database.snapshot() as tx:
            record = store_profiles.find_profile(tx, tenant_id, name)
        if record is None:
            raise NotFound(f"There is no certificate profile {name}; list them with GET /profiles.")
        return _listed(record)

    def profiles(self, tenant_id: str) -> Sequence[ListedProfile]:
        """Return every profile: first the built-in one, then the others by name."""
        with self._database.snapshot() as tx:
            return [ListedProfile(BUILT_IN), *list_profiles(tx, tenant_id)]

    def update(self, actor: Actor, name: str, changes: Mapping[str, Any]) -> ListedProfile:
        """Change rules of a profile, by the names of its fields; certificates that were issued stay as they are.

        Raises ``NotFound``, ``ProfileInvalid``, ``ProfileRefused``, ``ProfileInUse`` for the built-in one.
        """
        now = self._clock()
        _check_not_built_in(name)
        with self._database.transaction() as tx:
            record = store_profiles.lock_profile(tx, actor.tenant_id, name)
            profile = dataclasses.replace(_listed(record).profile, **changes)
            self._check(actor.tenant_id, profile)
            values = _values(profile)
            changed = {field: values[field] for field in sorted(changes)}
            store_profiles.update_profile(tx, record.id, changed, now=now)
            audit.record(tx, actor, "profile:update", f"profile:{name}", at=now, **changed)
        return ListedProfile(profile, record.created_at, now)

    def remove(self, actor: Actor, name: str) -> ListedProfile:
        """Remove a profile that is not used any more; raises ``NotFound``, ``ProfileInUse``."""
        now = self._clock()
        _check_not_built_in(name)
        with self._database.transaction() as tx:
            record = store_profiles.lock_profile(tx, actor.tenant_id, name)
            users = store_profiles.users_of(tx, actor.tenant_id, record.id, now=now)
            if users:
                having = " and ".join(f"{count} {what}{'s' * (count != 1)}" for what, count in users.items())
                raise ProfileInUse(
                    f"The certificate profile {name} is used by {having}; give them another one before you remove it."
                )
            store_profiles.remove_profile(tx, record.id, now=now)
            audit.record(tx, actor, "profile:remove", f"profile:{name}", at=now)
        return _listed(record)

    def _check(self, tenant_id: str, profile: CertificateProfile) -> None:
        issuer = self._authority.issuing_of(tenant_id).issuer
        check_profile(profile, (issuer.certificate, *issuer.above))
        check_servers_of_tenant(self._authority, tenant_id, profile)


def _check_not_built_in(name: str) -> None:
    if name == DEFAULT:
        raise ProfileInUse("The certificate profile default is built in and stays as it is; add another one.")


def _values(profile: CertificateProfile) -> dict[str, Any]:
    """Return the columns of a profile."""
    values = dataclasses.asdict(profile)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _profile(record: ProfileRecord) -> CertificateProfile:
    values: dict[str, Any] = {}
    for field in dataclasses.fields(CertificateProfile):
        value = getattr(record, field.name)
        values[field.name] = tuple(value) if isinstance(value, list) else value
    return CertificateProfile(**values)


def _listed(record: ProfileRecord) -> ListedProfile:
    return ListedProfile(_profile(record), record.created_at, record.updated_at)


def list_profiles(tx: Connection, tenant_id: str) -> Sequence[ListedProfile]:
    """Return every profile but the built-in one, by name."""
    return [_listed(record) for record in store_profiles.list_profiles(tx, tenant_id)]


# --- The profile of a device --------------------------------------------------------------------------------------


def find_profiles(tx: Connection, tenant_id: str, names: Iterable[str | None]) -> Mapping[str, CertificateProfile]:
    """Return the profiles that have these names, by name, without the default one and unknown ones."""
    found: dict[str, CertificateProfile] = {}
    for name in set(names) - {None, DEFAULT}:
        record = store_profiles.find_profile(tx, tenant_id, name or "")
        if record is not None:
            found[record.name] = _profile(record)
    return found


def terms_of(
    profiles: Mapping[str, CertificateProfile],
    name: str | None,
    device_id: str,
    device: DeviceRequest | DeviceRecord,
    *,
    serial: str | None = None,
) -> CertificateTerms | None:
    """Return the terms for a device by the name of its profile, ``None`` for the default one.

    ``serial`` is the serial number that it has enrolled with. Raises ``ProfileRefused`` if ``profiles`` lacks the name.
    """
    if name is None or name == DEFAULT:
        return None
    if name not in profiles:
        raise store_profiles.unknown(name)
    fields = {field: getattr(device, field) for field in _DESCRIBED}
    return CertificateTerms(profiles[name], {**fields, "id": device_id, "serial": serial})


def terms_of_device(tx: Connection, device: DeviceRecord) -> CertificateTerms | None:
    """Return the terms for a device that is known, by its profile as it is now; ``None`` for the default one."""
    if device.profile == DEFAULT:
        return None
    profiles, serial = find_profiles(tx, device.tenant_id, [device.profile]), None
    if any(profile.uses("serial") for profile in profiles.values()):
        asked = enrolment.last_enrolment(tx, device.tenant_id, device.id)
        serial = None if asked is None else asked.serial
    return terms_of(profiles, device.profile, device.id, device, serial=serial)
