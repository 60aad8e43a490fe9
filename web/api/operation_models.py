"""The shapes of what the portal says about itself."""

from __future__ import annotations

from typing import Literal

from web.api.fields import Output


class HealthModel(Output):
    """The portal is alive."""

    status: Literal["ok"]


class CheckModel(Output):
    """One thing the portal depends on; `code` is stable, `problem` tells operators what is wrong and what to do."""

    name: str
    ok: bool
    code: str | None = None
    problem: str | None = None


class ReadyModel(Output):
    """Whether the portal can do its work, each dependency by itself."""

    status: Literal["ready", "not ready"]
    checks: list[CheckModel]
