"""Certificate profiles at the command line, against a small portal."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.cli_session import Session
from tests.support.portal_stub import PortalStub, Reply

pytest_plugins = ("tests.support.cli_fixtures",)

DEVICE = "0f9d2c4e-5b1a-4c7d-9e8f-102030405060"
PROFILE: dict[str, Any] = {
    "name": "tls-server",
    "built_in": False,
    "default_days": None,
    "max_days": 90,
    "key_types": ["ec-p256", "ec-p384"],
    "extended_key_usage": ["client_auth", "server_auth"],
    "dns_names": ["{name}.devices.example.com"],
    "ip_addresses": [],
    "organization": "ACME",
    "organizational_unit": None,
    "serial_number": None,
    "created_at": "2027-01-01T00:00:00Z",
    "updated_at": "2027-01-01T00:00:00Z",
}
DESCRIBED = ("--type", "pump", "--location", "hall 1", "--firmware", "1")


def test_a_profile_is_added_with_the_rules_that_were_given(session: Session, stub: PortalStub) -> None:
    stub.replies["POST", "/profiles"] = Reply(201, PROFILE)
    result = session.run(
        *("profile", "add", "tls-server", "--server-auth", "--dns-name", "{name}.devices.example.com"),
        *("--max-days", "90", "--key-type", "ec-p256", "--key-type", "ec-p384", "--organization", "ACME"),
    )
    assert result.exit_code == 0, result.output
    assert stub.requests[-1].body == {
        "name": "tls-server",
        "max_days": 90,
        "key_types": ["ec-p256", "ec-p384"],
        "extended_key_usage": ["client_auth", "server_auth"],
        "dns_names": ["{name}.devices.example.com"],
        "organization": "ACME",
    }
    assert "--profile tls-server" in result.stderr


def test_a_profile_is_changed_rule_by_rule(session: Session, stub: PortalStub) -> None:
    stub.replies["PATCH", "/profiles/tls-server"] = Reply(200, PROFILE)
    clear = ("--clear", "dns_names", "--clear", "organization")
    assert session.run("profile", "update", "tls-server", "--no-server-auth", *clear).exit_code == 0
    assert stub.requests[-1].body == {"extended_key_usage": ["client_auth"], "dns_names": [], "organization": None}
    both = ("--organization", "ACME", "--clear", "organization")
    assert session.run("profile", "update", "tls-server", *both).exit_code == 2
    assert session.run("profile", "update", "tls-server").exit_code == 2


def test_profiles_are_listed_shown_and_removed(session: Session, stub: PortalStub) -> None:
    stub.replies["GET", "/profiles"] = Reply(200, {"profiles": [PROFILE]})
    listed = session.run("profile", "list").stdout
    assert listed == "tls-server\tclient_auth server_auth\t90\t{name}.devices.example.com\t\n"
    stub.replies["GET", "/profiles/tls-server"] = Reply(200, PROFILE)
    assert "key_types\tec-p256 ec-p384" in session.run("profile", "show", "tls-server").stdout
    stub.replies["DELETE", "/profiles/tls-server"] = Reply(200, PROFILE)
    assert session.run("profile", "remove", "tls-server", "--yes").exit_code == 0
    assert stub.calls("DELETE", "/profiles/tls-server")


def test_a_name_that_no_profile_can_have_is_not_sent(session: Session, stub: PortalStub) -> None:
    for name in ("../tokens", "TLS", "-x", "x" * 64):
        assert session.run("profile", "show", "--", name).exit_code == 2
    assert not stub.requests


@pytest.mark.parametrize(
    ("command", "method", "path"),
    [
        (("expect", "pump-9", *DESCRIBED), "POST", "/devices"),
        (("update", DEVICE), "PATCH", f"/devices/{DEVICE}"),
        (("manufacturer", "update", "1e66977361d81fe2"), "PATCH", "/manufacturers/1e66977361d81fe2"),
    ],
)
def test_a_profile_is_chosen_by_its_name(
    session: Session, stub: PortalStub, command: tuple[str, ...], method: str, path: str
) -> None:
    stub.replies[method, path] = Reply(200, {"device_id": DEVICE, "manufacturer_id": "1e66977361d81fe2"})
    result = session.run(*command, "--profile", "tls-server")
    assert result.exit_code == 0, result.output
    assert stub.requests[-1].body["profile"] == "tls-server"


def test_a_device_is_registered_under_a_profile(session: Session, stub: PortalStub) -> None:
    session.json("register", "pump-9", *DESCRIBED, "--profile", "tls-server")
    assert stub.requests[-1].body["profile"] == "tls-server"
