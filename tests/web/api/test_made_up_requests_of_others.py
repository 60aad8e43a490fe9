"""Requests that schemathesis makes up about what another tenant has, by each role: none of it is there, or changed."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from flask import Flask
from schemathesis.config import SchemathesisConfig
from schemathesis.generation.feedback import FeedbackSources
from schemathesis.pytest._test_builder import build_operation_test
from schemathesis.python._constants.orchestrator import make_constants_value_source

from app import ROUTES, portal_of
from core.roles import MAY, Permission, Role
from tests.support.harness import ALL, ON_SQLITE, Api, api_as
from tests.web.api.test_other_tenants import rows_of
from tests.web.api.test_schemathesis import There, application, fit, things
from web.api.openapi import openapi

pytestmark = ON_SQLITE
PERMISSIONS: dict[str, Permission] = {
    f"{route.method} {route.path}": route.permission
    for route in ROUTES
    if route.permission is not None
    and "{" in route.path
    and not route.path.startswith(("/tenants", "/brokers"))
    and (route.method, route.path) != ("PATCH", "/applications/{application_id}")  # without the guard none is changed
}
CONFIG: dict[str, Any] = {
    "seed": 1,
    "generation": {"mode": "positive", "deterministic": True, "max-examples": 60 if ALL else 3, "database": "none"},
}
schema = schemathesis.openapi.from_dict(
    openapi(ROUTES, server_url="http://localhost"), config=SchemathesisConfig.from_dict(CONFIG)
)
schema.app = application
ABOUT_ONE = [made.ok() for made in list[Any](schema.get_all_operations()) if made.ok().label in PERMISSIONS]
ASKING = {"default": (Role.ADMIN, Role.OPERATOR, Role.AUDITOR), "another": tuple(Role)}  # by whose the things are


@pytest.fixture(scope="module", params=ASKING)
def others(request: pytest.FixtureRequest, shared_app: Flask) -> tuple[There, dict[Role, Api]]:
    """What a tenant has, and an operator of each role in the other one."""
    owner = request.param
    foreign = "another" if owner == "default" else "default"
    application.made = shared_app
    asking = {role: api_as(shared_app, role, foreign) for role in ASKING[owner]}
    return things(shared_app, owner), asking


@pytest.mark.parametrize("operation", ABOUT_ONE, ids=[operation.label for operation in ABOUT_ONE])
def test_what_is_another_tenants_is_not_there_whatever_is_sent(
    operation: Any, others: tuple[There, dict[Role, Api]], shared_app: Flask
) -> None:
    there, asking = others
    seen: set[tuple[Role, int]] = set()
    before = rows_of(portal_of(shared_app), there.parts_of_paths["tenant"])
    learnt = FeedbackSources(constants_value_source=make_constants_value_source(schema))
    build_operation_test(config=schema.config, operation=operation, test_func=ask, given_kwargs={}, feedback=learnt)(
        there=there, asking=asking, seen=seen
    )
    permission = PERMISSIONS[operation.label]
    assert seen == {(role, 404 if permission in MAY[role] else 403) for role in asking}
    assert rows_of(portal_of(shared_app), there.parts_of_paths["tenant"]) == before


def ask(case: schemathesis.Case[Any], there: There, asking: dict[Role, Api], seen: set[tuple[Role, int]]) -> None:
    fit(case, there)
    if isinstance(case.body, dict):
        of_group = case.path.startswith("/groups")
        case.body.pop("topics", None)  # judged first, by the prefix of who asks
        if of_group:
            case.body.pop("attestation", None)  # judged first, by the role
        if case.method == "PATCH" and not case.body:
            case.body["description" if of_group else "name"] = "another"
    for name in ("name", "external_id"):  # which go with no id in the path
        case.query.pop(name, None)
    case.path_parameters.update({name: there.parts_of_paths[name] for name in case.path_parameters})
    for role, api in asking.items():
        seen.add((role, case.call(headers={"Authorization": f"Bearer {api.token}"}).status_code))
