"""Sequences of calls, generated from the OpenAPI text: every answer is described there.

``STATEFUL_RUNS`` asks for more than the few runs of the suite.
"""

from __future__ import annotations

import itertools
import os
import secrets
from typing import Any, ClassVar

import hypothesis
import schemathesis
from flask import Flask
from hypothesis import HealthCheck
from hypothesis.errors import Flaky
from hypothesis.stateful import Bundle, initialize
from schemathesis.config import SchemathesisConfig
from schemathesis.core.parameters import ParameterLocation
from schemathesis.engine.errors import is_inconsistent_replay
from schemathesis.generation.stateful.state_machine import StepInput, StepOutput

from app import ROUTES, portal_of
from core.roles import Role
from core.states import DeviceStatus
from tests.support.harness import ALL, ON_SQLITE, Api, api_as
from tests.web.api.test_schemathesis import CONFIG, Application, fit, name_it, things
from web.api.openapi import openapi

RUNS = int(os.environ.get("STATEFUL_RUNS", "60" if ALL else "15"))
STEPS = 8
TOGETHER = 20  # runs that hypothesis makes from what it has learnt in those before

# Who may call what is decided in test_roles.py; here the check takes the admin's own token for one made up.
CHECKS = {**CONFIG["checks"], "ignored_auth": {"enabled": False}}


def described() -> dict[str, Any]:
    """The OpenAPI text with one more link, which it cannot express: the token is a part of ``download_url``."""
    text = openapi(ROUTES, server_url="http://localhost")
    made = text["paths"]["/register"]["post"]["responses"]["201"]
    made["links"]["download"] = {"operationId": "download", "parameters": {"token": "$response.body#/device_id"}}
    return text


application = Application()
whole = schemathesis.openapi.from_dict(described(), config=SchemathesisConfig.from_dict({**CONFIG, "checks": CHECKS}))
# Left to test_schemathesis.py: what nobody can make up (a proof of a CA's key), what devices ask by their own
# credentials, and what has no links to follow.
schema: Any = whole.exclude(path_regex=r"^/(manufacturers/.*/proof|\.well-known/est|enroll|attestation/nonce|ocsp)")
schema.app = application
# A body's ``external_id`` is taken for the identifier of a thing that nothing makes, and a call with such a field for
# one that is bound to fail, from which no run begins: ``POST /register``, of all calls.
for call in schema.analysis.dependency_graph.operations.values():
    call.inputs[:] = [one for one in call.inputs if one.parameter_location is ParameterLocation.PATH]
FINAL = {DeviceStatus.REVOKED.value}


class Calls(schema.as_state_machine()):  # type: ignore[misc]  # made at run time
    """The newest devices, links, tokens and webhooks of answers are used in later calls."""

    app: ClassVar[Flask]
    answered: ClassVar[dict[str, int]]
    failed: ClassVar[list[Exception]]
    runs: ClassVar[int]

    def setup(self) -> None:
        """Begin each run with new things, so that the same calls get the same answers."""
        Calls.runs += 1
        self.there = things(self.app)
        self.calls = itertools.count()

    def teardown(self) -> None:
        """Delete webhooks: a portal may have only a few."""
        for webhook in self.there.api.get("/webhooks").json["webhooks"]:
            self.there.api.delete(f"/webhooks/{webhook['webhook_id']}")

    @initialize(target=Bundle("catch_all"))
    def begin_with_a_device(self) -> StepOutput:
        """Register a device in every run, whatever call comes first."""
        body: Any = {"name": "pump-1", "type": "pump", "location": "hall 1", "firmware": "1.0"}
        case = schema["/register"]["POST"].Case(body=body, media_type="application/json")
        step: StepOutput = self.RANDOM__POST_register(StepInput.initial(case))
        return step

    def before_call(self, case: schemathesis.Case[Any]) -> None:
        """Make generated values valid, and use the newest thing in every other path."""
        if case.meta is not None and case.meta.generation.mode.is_positive:
            followed = dict(case.path_parameters)
            fit(case, self.there)
            case.headers.pop("Idempotency-Key", None)
            if isinstance(case.body, dict) and case.body.get("external_id"):
                case.body["external_id"] = secrets.token_hex(8)  # of one device only
            if next(self.calls) % 2 and "token" not in followed:
                case.path_parameters.update(followed)
                name_it(case)

    def after_call(self, response: schemathesis.Response, case: schemathesis.Case[Any]) -> None:
        """Count the call, and remember the newest things."""
        name = f"{case.operation.method.upper()} {case.operation.path} {response.status_code}"
        self.answered[name] = self.answered.get(name, 0) + 1
        if response.status_code != 201:
            return
        answer = response.json()
        parts = self.there.parts_of_paths
        for part in ("device_id", "token_id", "webhook_id", "enrolment_token_id", "manufacturer_id"):
            parts[part] = answer.get(part, parts.get(part, ""))
        if "download_url" in answer:
            parts["token"] = answer["download_url"].rpartition("/")[2]

    def get_call_kwargs(self, case: schemathesis.Case[Any]) -> dict[str, Any]:
        """Every call is made by an admin."""
        return {"headers": {"Authorization": f"Bearer {self.there.api.token}"}}

    def validate_response(self, *arguments: Any, **options: Any) -> None:
        """Remember the failure, whatever hypothesis does with it."""
        try:
            super().validate_response(*arguments, **options)
        except Exception as failure:
            self.failed.append(failure)
            raise


def explore(runs: int) -> None:
    """Make ``runs`` runs, a few at a time.

    Hypothesis ends where calls that it makes again are answered otherwise, which a portal that lives on may do; what is
    left is then made with another seed. Raises what failed.
    """
    for seed in range(runs):
        if Calls.runs >= runs:
            break
        settings = hypothesis.settings(
            max_examples=min(TOGETHER, runs - Calls.runs),
            stateful_step_count=STEPS,
            deadline=None,
            database=None,
            phases=[hypothesis.Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        try:
            hypothesis.seed(seed)(Calls).run(settings=settings)
        except Exception as error:
            if Calls.failed or not (isinstance(error, Flaky) or is_inconsistent_replay(error)):
                raise
    assert Calls.failed == []
    assert Calls.runs >= runs


@ON_SQLITE
def test_sequences_of_calls_are_answered_as_described(shared_app: Flask) -> None:
    application.made = Calls.app = shared_app
    Calls.answered, Calls.failed, Calls.runs = {}, [], 0
    admin = api_as(shared_app, Role.ADMIN)
    admin.post(f"/revoke/{admin.register()['device_id']}")  # the runs may not happen to
    explore(RUNS)
    # Which calls are made up changes with every route; that each run begins with a device and continues does not.
    done = {name.rpartition(" ")[0] for name in Calls.answered if name.endswith((" 200", " 201"))}
    assert "POST /register" in done
    assert len(done) >= 12, sorted(Calls.answered.items())
    revoked_is_final(shared_app, admin)


def revoked_is_final(app: Flask, admin: Api) -> None:
    """Assert that each device which the record says was revoked still is."""
    entries = portal_of(app).operators.audit("default", limit=1000, before=None, filters={"action": "device:revoke"})[0]
    revoked = {entry.object.removeprefix("device:") for entry in entries if entry.outcome == "done"}
    assert revoked
    assert {admin.get(f"/devices/{device_id}").json["status"] for device_id in revoked} == FINAL
