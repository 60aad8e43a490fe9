"""The shapes of requests that change a device's state with those of their answers."""

from __future__ import annotations

from typing import Literal

from api.fields import DeviceId, Output, Timestamp


class SuspensionAnswer(Output):
    """`enforced`: the broker was seen to obey; `pending`: it is recorded, and the broker has yet to be told."""

    device_id: DeviceId
    status: Literal["suspended", "active"]
    suspended_at: Timestamp | None
    broker: Literal["enforced", "pending"]
    broker_problem: str | None = None
