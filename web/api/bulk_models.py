"""The shape of the answer to a row of an upload."""

from __future__ import annotations

from typing import Literal

from web.api.fields import DeviceId, Fingerprint, Hex, Output, Timestamp
from web.api.problems import FieldErrorModel


class RowAnswer(Output):
    """A device, or with `code` and `detail` what is wrong with the row; `stopped`: no row after it was looked at.

    `repeated`: the device was there already. Link and password, or certificate and chain, are there where a row
    makes new ones: for a device that was there, where its bundle had not been fetched; the link before is dead then.
    """

    row: int
    device_id: DeviceId | None = None
    fingerprint: Fingerprint | None = None
    serial_number: Hex | None = None
    expires_at: Timestamp | None = None
    external_id: str | None = None
    download_url: str | None = None
    download_expires_at: Timestamp | None = None
    bundle_password: str | None = None
    certificate: str | None = None
    chain: str | None = None
    repeated: Literal[True] | None = None
    code: str | None = None
    detail: str | None = None
    errors: list[FieldErrorModel] | None = None
    stopped: Literal[True] | None = None
