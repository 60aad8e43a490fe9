"""The shapes of requests that change a device's state with those of their answers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from web.api.fields import (
    BundleFormatName,
    BundlePassword,
    DeviceId,
    Fingerprint,
    Hex,
    Input,
    KeyTypeName,
    Output,
    Timestamp,
    WholeNumber,
)


class SuspensionAnswer(Output):
    """`enforced`: the broker was seen to obey; `pending`: it is recorded, and the broker has yet to be told."""

    device_id: DeviceId
    status: Literal["suspended", "active"]
    suspended_at: Timestamp | None
    broker: Literal["enforced", "pending"]
    broker_problem: str | None = None


class RenewRequest(Input):
    """How to renew. With a `csr` the device keeps its own key, and no bundle is made.

    The certificate before goes on for `overlap_hours`; with `when_used` it ends earlier, once the device has shown the
    new one to the portal in a TLS handshake.
    """

    csr: Annotated[str, Field(max_length=16384, description="PEM, PKCS#10")] | None = None
    key_type: KeyTypeName | None = None
    validity_days: Annotated[int, Field(ge=1, le=36500), WholeNumber] | None = None
    bundle_password: BundlePassword | None = None
    bundle_format: BundleFormatName | None = None
    overlap_hours: Annotated[int, Field(ge=0, le=8760), WholeNumber] | None = None
    revoke_previous: Literal["after_overlap", "when_used"] = "after_overlap"


class RenewAnswer(Output):
    """The new certificate; a link and a password, or with a `csr` the certificate and its chain.

    `previous_valid_until`: until when a certificate before it goes on, if any does. `broker` is there where older
    ones were to end at once: `enforced` once the broker was seen to refuse them.
    """

    device_id: DeviceId
    fingerprint: Fingerprint
    serial_number: Hex
    issued_at: Timestamp
    expires_at: Timestamp
    previous_valid_until: Timestamp | None = None
    download_url: str | None = None
    download_expires_at: Timestamp | None = None
    bundle_password: str | None = None
    certificate: str | None = None
    chain: str | None = None
    broker: Literal["enforced", "pending"] | None = None
    broker_problem: str | None = None
