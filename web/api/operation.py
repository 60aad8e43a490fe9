"""The portal about itself: alive, ready, in figures."""

from __future__ import annotations

from typing import Literal

from core import metrics, roles
from core.roles import Permission
from web.api.fields import AnswerModel
from web.api.routing import ANYONE, Answers, Call, Reply, Route, tagged


class HealthModel(AnswerModel):
    """The portal is alive."""

    status: Literal["ok"]


class CheckModel(AnswerModel):
    """One thing the portal depends on; `code` is stable, `problem` tells operators what is wrong and what to do."""

    name: str
    ok: bool
    code: str | None = None
    problem: str | None = None


class ReadyModel(AnswerModel):
    """Whether the portal can do its work, each dependency by itself."""

    status: Literal["ready", "not ready"]
    checks: list[CheckModel]


FOR_OPERATORS = "The reason is told to operators: ask with an operator token, or run doctor on the portal's machine."


def healthz(_call: Call) -> Reply:
    """Say that the process is alive, with no work done."""
    return Reply(HealthModel(status="ok"))


def readyz(call: Call) -> Reply:
    """Say whether database, CA, CRL and broker let the portal do its work, and tell operators why not."""
    # The reasons name paths and generations: of use to who runs the portal, and to who looks for a way in.
    told = roles.may(call.actor.role, Permission.READ)
    checks = [
        CheckModel(name=check.name, ok=True)
        if check.problem is None
        else CheckModel(name=check.name, ok=False, code=check.code, problem=check.problem if told else FOR_OPERATORS)
        for check in call.portal.readiness.checks()
    ]
    ready = all(check.ok for check in checks)
    return Reply(ReadyModel(status="ready" if ready else "not ready", checks=checks), status=200 if ready else 503)


def read_metrics(call: Call) -> Reply:
    """Give figures of the fleet, the broker and the requests to Prometheus."""
    content = metrics.exposition(call.portal.monitoring.gauges())
    return Reply(content=content, media_type=metrics.MEDIA_TYPE)


ROUTES = tagged(
    "Operation",
    Route("GET", "/healthz", healthz, ANYONE, Answers(HealthModel)),
    Route("GET", "/readyz", readyz, ANYONE, Answers(ReadyModel), token_optional=True, errors=(401, 429, 503)),
    Route(
        "GET",
        "/metrics",
        read_metrics,
        Permission.READ,
        Answers(media_type="text/plain", description="The text format of Prometheus, version 0.0.4"),
    ),
)
