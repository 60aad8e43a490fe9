"""What the use cases are asked with and what they answer."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from delivery.formats import BundleFormat


@dataclass(frozen=True, slots=True)
class Registration:
    """A device to be registered, checked as far as its form goes; ``topics`` are pairs of filter and access."""

    name: str
    type: str
    location: str
    firmware: str
    metadata: Mapping[str, Any]
    csr: str | None = None
    key_type: str | None = None
    validity_days: int | None = None
    topics: Sequence[tuple[str, str]] | None = None
    bundle_password: str | None = None
    bundle_format: str | None = None
    external_id: str | None = None


@dataclass(frozen=True, slots=True)
class Registered:
    """The answer to a registration: with a bundle's link and password, or with certificate and chain for a CSR."""

    device_id: str
    name: str
    status: str
    fingerprint: str
    serial_number: str
    issued_at: datetime
    expires_at: datetime
    download_url: str | None = None
    download_expires_at: datetime | None = None
    bundle_password: str | None = None
    certificate: str | None = None
    chain: str | None = None

    def to_json(self) -> bytes:
        """As it is sealed for a repeat; ``from_json`` reads it back."""
        return json.dumps(dataclasses.asdict(self), default=datetime.isoformat).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Registered:
        """Read what ``to_json`` wrote."""
        values = json.loads(text)
        for name in ("issued_at", "expires_at", "download_expires_at"):
            if values[name] is not None:
                values[name] = datetime.fromisoformat(values[name])
        return cls(**values)


@dataclass(frozen=True, slots=True)
class Revoked:
    """The answer to a revocation: whether the broker was seen to refuse the device, or the ``problem`` that remains."""

    device_id: str
    revoked_at: datetime
    reason: str
    enforced: bool
    problem: str | None


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle on its way out: whoever sends it says afterwards whether it arrived."""

    delivery_id: str
    device_id: str
    content: bytes
    format: BundleFormat = BundleFormat.ZIP
