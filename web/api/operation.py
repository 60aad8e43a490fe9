"""Health, readiness and metrics of the portal."""

from __future__ import annotations

from typing import Literal

from core import metrics, roles
from core.roles import Permission
from web.api.fields import AnswerModel
from web.api.routing import ANYONE, Answers, Call, Reply, Route, tagged


class HealthModel(AnswerModel):
    """The process is alive."""

    status: Literal["ok"]


class CheckModel(AnswerModel):
    """One dependency of the portal; `code` is stable, `problem` tells operators what is wrong and what to do."""

    name: str
    ok: bool
    code: str | None = None
    problem: str | None = None


class ReadyModel(AnswerModel):
    """Whether the portal can do its work, and each of its dependencies."""

    status: Literal["ready", "not ready"]
    checks: list[CheckModel]


FOR_OPERATORS = "Only operators see the reason: send an operator token, or run doctor on the portal's machine."


def healthz(_call: Call) -> Reply:
    """Report that the process is alive, without doing any work."""
    return Reply(HealthModel(status="ok"))


def readyz(call: Call) -> Reply:
    """Report whether database, CA, CRL and broker are usable, and tell operators why not."""
    # The reasons name paths and generations, which help an attacker as much as an operator.
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
    """Return metrics of devices, broker and requests for Prometheus."""
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
