"""An operator who has lost the token keeps no way in by the enrolment tokens that it made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from core.roles import Role
from tests.support.est import Device, certificates_of, refused
from tests.support.harness import Api, problem_of

AsRole = Callable[[Role | None], Api]


def operator_of(api: Api, as_role: AsRole) -> tuple[str, Api]:
    """The id of an operator's token, and a client with it."""
    known = {token["token_id"] for token in api.get("/tokens").json["tokens"]}
    operator = as_role(Role.OPERATOR)
    [token_id] = {token["token_id"] for token in api.get("/tokens").json["tokens"]} - known
    return token_id, operator


def made_by(operator: Api, **fields: Any) -> str:
    answer = operator.post("/enrolment-tokens", {"name": "a batch", "type": "pump"} | fields)
    assert answer.status_code == 201, answer.text
    return str(answer.json["token"])


def test_the_list_shows_which_operator_token_made_each_enrolment_token(api: Api, as_role: AsRole) -> None:
    token_id, operator = operator_of(api, as_role)
    made_by(operator)
    [shown] = api.get("/enrolment-tokens").json["enrolment_tokens"]
    assert shown["operator_token_id"] == token_id


def test_a_plain_revocation_says_how_many_ways_in_are_left(api: Api, as_role: AsRole) -> None:
    token_id, operator = operator_of(api, as_role)
    secrets = [made_by(operator) for _ in range(3)]
    certificates_of(Device(api, secrets[0]).enrol())  # used up
    made_by(api)
    answer = api.delete(f"/tokens/{token_id}").json
    assert (answer["enrolment_tokens_revoked"], answer["enrolment_tokens_left"]) == (0, 2)
    certificates_of(Device(api, secrets[1]).enrol())


def test_an_operator_who_is_dismissed_cannot_enrol_with_the_tokens_made_before(api: Api, as_role: AsRole) -> None:
    token_id, operator = operator_of(api, as_role)
    secret, other = made_by(operator, count=10), made_by(api)
    path = f"/tokens/{token_id}?enrolment_tokens=revoke"
    answer = api.delete(path).json
    assert (answer["enrolment_tokens_revoked"], answer["enrolment_tokens_left"]) == (1, 0)
    assert api.delete(path).json["enrolment_tokens_revoked"] == 0
    assert "revoked" in refused(Device(api, secret).enrol(), 403)
    certificates_of(Device(api, other).enrol())
    entry = api.get("/audit?action=enrolment_token:revoke").json["entries"][0]
    assert entry["detail"] == {"because": f"token {token_id} is revoked"}


def test_enrolment_tokens_can_be_revoked_after_the_token_that_made_them(api: Api, as_role: AsRole) -> None:
    token_id, operator = operator_of(api, as_role)
    made_by(operator)
    api.delete(f"/tokens/{token_id}")
    assert api.delete(f"/tokens/{token_id}?enrolment_tokens=revoke").json["enrolment_tokens_revoked"] == 1


@pytest.mark.parametrize("fields", [{"count": 1001}, {"expires_in_hours": 721}])
def test_an_operator_cannot_make_a_way_in_for_a_year_or_for_a_million_devices(
    api: Api, as_role: AsRole, fields: dict[str, int]
) -> None:
    operator = as_role(Role.OPERATOR)
    problem = problem_of(operator.post("/enrolment-tokens", {"name": "a batch"} | fields), 403, "forbidden")
    assert "at most 1000 devices and 720 hours" in problem["detail"]
    made_by(operator, count=1000, expires_in_hours=720)
    made_by(api, **fields)
