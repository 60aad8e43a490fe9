"""Health, readiness, metrics and the description of the interface."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any, Literal

from flask import render_template

from core import metrics
from core.errors import DatabaseUnavailable
from core.roles import MAY, Permission, Role
from operations.tenant_readiness import Check
from web.api.openapi import openapi
from web.api.routing import ANYONE, AnswerModel, Answers, Call, Reply, Route, Routes


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


ROUTES = Routes("Operation")
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'"
}
FOR_OPERATORS = "Only operators see the reason: send an operator token, or run doctor on the portal's machine."


@ROUTES.add("GET", "/healthz", ANYONE)
def healthz(_call: Call) -> HealthModel:
    """Report that the process is alive, without doing any work."""
    return HealthModel(status="ok")


@ROUTES.add(
    "GET",
    "/readyz",
    ANYONE,
    Answers(model=ReadyModel),
    also=(Answers(model=ReadyModel, status=503),),
    token_optional=True,
    errors=(401, 403, 429, 503),
)
def readyz(call: Call) -> Reply:
    """Report whether database, CA, CRL and broker are usable, and tell operators why not."""
    # The reasons name paths and generations, which help an attacker as much as an operator.
    is_operator = Permission.READ in MAY.get(call.actor.role, ()) and _runs_the_installation(call)
    shared = [_told(check, is_operator) for check in call.portal.readiness.checks()]
    failed = _of_tenants(call)
    own = failed.get(call.actor.tenant_id)
    ready = own is None and all(check.ok for check in shared)  # another's trouble is nobody else's
    others = [*_of_brokers(call, is_operator), *_of_provider(call, is_operator)]
    checks = [*shared, *(_told(check, True) for check in failed.values()), *others]
    return Reply(ReadyModel(status="ready" if ready else "not ready", checks=checks), status=200 if ready else 503)


def _told(check: Check, tell: bool) -> CheckModel:
    if check.problem is None:
        return CheckModel(name=check.name, ok=True)
    return CheckModel(name=check.name, ok=False, code=check.code, problem=check.problem if tell else FOR_OPERATORS)


def _of_brokers(call: Call, tell: bool) -> list[CheckModel]:
    """Return a check for each broker and one of the nodes, where there are several: a portal is ready without.

    Who may not know gets none.
    """
    try:
        if not tell:
            return []
        readiness = call.portal.readiness
        return [_told(check, True) for check in (*readiness.brokers(), *readiness.nodes())]
    except DatabaseUnavailable:
        return []


def _of_provider(call: Call, tell: bool) -> list[CheckModel]:
    """Return a check that fails if nobody can log in by the identity provider, without which the portal is ready."""
    problem = None if call.portal.sign_on is None else call.portal.sign_on.provider.problem
    if problem is None:
        return []
    return [_told(Check("identity provider", "identity_provider_unavailable", problem), tell)]


def _of_tenants(call: Call) -> dict[str, Check]:
    """Return the checks of further tenants that fail: all for the role system, for others their own tenant's."""
    if Permission.READ not in MAY.get(call.actor.role, ()) or not call.portal.tenant_terms.are_several:
        return {}
    try:
        failed = call.portal.tenant_readiness.failed()
    except DatabaseUnavailable:  # one of the installation's checks says so
        return {}
    own = call.actor.tenant_id
    return failed if call.actor.role == Role.SYSTEM else {name: failed[name] for name in failed if name == own}


@ROUTES.add(
    "GET", "/metrics", Permission.READ, Answers("The text format of Prometheus, version 0.0.4", media_type="text/plain")
)
def read_metrics(call: Call) -> Reply:
    """Return metrics for Prometheus: of devices, broker and requests, or of an operator's own tenant alone."""
    monitoring = call.portal.monitoring
    if _runs_the_installation(call):
        content = metrics.exposition(monitoring.gauges())
    else:
        content = metrics.exposition_of(monitoring.gauges_of(call.actor.tenant_id))
    return Reply(content=content, media_type=metrics.MEDIA_TYPE)


def _runs_the_installation(call: Call) -> bool:
    """Tell whether an operator may see the figures of the whole installation: with one tenant, all of its operators."""
    if call.portal.tenant_terms.are_several:
        return call.actor.role == Role.SYSTEM
    return call.actor.tenant_id == call.portal.first_tenant


def description_of(others: Sequence[Route]) -> tuple[Route, ...]:
    """Return the routes that describe ``others`` and themselves."""

    @functools.cache
    def described(server_url: str) -> dict[str, Any]:
        return openapi([*others, *routes], server_url=server_url)

    @functools.cache
    def text(server_url: str) -> bytes:
        return json.dumps(described(server_url)).encode()

    @functools.cache
    def page(server_url: str) -> bytes:
        return render_template("docs.html", api=described(server_url)).encode()

    routes = Routes("Operation")

    @routes.add("GET", "/openapi.json", ANYONE)
    def openapi_json(call: Call) -> Reply:
        """Return the OpenAPI 3.1 description of the interface."""
        return Reply(content=text(call.portal.settings.public_url))

    @routes.add("GET", "/docs", ANYONE, Answers(media_type="text/html"))
    def docs(call: Call) -> Reply:
        """Return the interface's documentation as a page."""
        content = page(call.portal.settings.public_url)
        return Reply(content=content, media_type="text/html; charset=utf-8", headers=PAGE_HEADERS)

    return tuple(routes)
