"""The commands about tenants, against a small portal."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest

from commands.logins import login_path
from tests.support.cli_session import Session
from tests.support.portal_stub import TOKEN, PortalStub, Reply, problem
from tests.support.terminal import terminal

pytest_plugins = ("tests.support.cli_fixtures",)
ACME = {"name": "acme", "status": "active", "topic_prefix": "acme", "est_label": "acme", "broker": "enforced"}
REMOVED = ACME | {"status": "removed", "devices_left": 0, "deleted_after": "2027-01-01T00:00:00Z"}


def test_a_tenant_is_added_with_what_was_asked_for_and_its_token_is_in_no_pipe(
    session: Session, stub: PortalStub
) -> None:
    stub.replies["POST", "/tenants"] = Reply(201, ACME | {"token": "secret-of-its-admin", "ca_problem": "No root."})
    add = ("tenant", "add", "acme", "--topic-prefix", "sites/acme", "--validity", "4w", "--link-validity", "2d")
    assert session.run(*add).exit_code == 2
    assert stub.requests == []
    result = session.run(*add, "--max-devices", "5", "--own-root", "--token-out", "acme.token")
    assert result.exit_code == 0, result.output
    assert Path("acme.token").read_text() == "secret-of-its-admin\n"
    assert "secret-of-its-admin" not in result.output
    assert "No root." in result.stderr
    assert "portal login --token-file acme.token" in result.stderr
    assert stub.requests[0].body == {
        "name": "acme",
        "topic_prefix": "sites/acme",
        "choices": {"device_days": 28, "link_hours": 48},
        "quotas": {"devices": 5},
        "own_root": True,
    }


def test_only_what_was_named_is_changed(session: Session, stub: PortalStub) -> None:
    stub.replies["PATCH", "/tenants/acme"] = Reply(200, ACME)
    assert session.run("tenant", "update", "acme", "--max-uploads", "2", "--clear", "key_type").exit_code == 0
    assert stub.requests[-1].body == {"choices": {"key_type": None}, "quotas": {"bulk_uploads": 2}}
    for wrong in ([], ["--max-devices", "0"], ["--max-devices", "1", "--clear", "devices"], ["--clear", "name"]):
        assert session.run("tenant", "update", "acme", *wrong).exit_code == 2
    assert len(stub.requests) == 1


def test_names_that_no_tenant_can_have_are_not_sent(session: Session, stub: PortalStub) -> None:
    for name in ("Acme", "a.b", "-a", "../tokens", "a" * 64):
        assert session.run("tenant", "show", name).exit_code == 2
    assert stub.requests == []


def test_a_suspension_that_the_broker_has_not_confirmed_is_a_warning(session: Session, stub: PortalStub) -> None:
    answer = ACME | {"status": "suspended", "broker": "pending", "broker_problem": "The broker does not answer."}
    stub.replies["POST", "/tenants/acme/suspend"] = Reply(200, answer)
    result = session.run("tenant", "suspend", "acme", "--yes")
    assert result.exit_code == 0
    assert "The broker does not answer." in result.stderr


@pytest.mark.parametrize(("typed", "asked"), [("n", 0), ("y", 1)])
def test_a_suspension_says_what_it_does_and_asks_once(
    session: Session, stub: PortalStub, typed: str, asked: int
) -> None:
    stub.replies["GET", "/tenants/acme"] = Reply(200, ACME)
    stub.replies["POST", "/tenants/acme/suspend"] = Reply(200, ACME | {"status": "suspended"})
    with terminal(session, "tenant", "suspend", "acme", NO_COLOR="1", TERM="dumb", COLUMNS="200") as seen:
        seen.expect("Suspend this tenant? [y/N]: ")
        assert "disconnect all its devices and applications" in seen.seen
        seen.type(typed + "\n")
        assert seen.end() == (typed == "n")
    assert len(stub.calls("POST", "/tenants/acme/suspend")) == asked


def test_without_a_terminal_a_suspension_needs_yes(session: Session, stub: PortalStub) -> None:
    result = session.run("tenant", "suspend", "acme")
    assert (result.exit_code, stub.requests) == (2, [])
    assert "--yes" in result.stderr


def test_a_tenant_is_removed_only_with_its_name_typed_again(session: Session, stub: PortalStub) -> None:
    stub.replies["DELETE", "/tenants/acme"] = Reply(200, REMOVED)
    assert session.run("tenant", "remove", "acme").exit_code == 2
    assert "Nothing was changed" in session.run("tenant", "remove", "acme", "--confirm", "other").stderr
    assert stub.requests == []
    assert session.run("tenant", "remove", "acme", "--confirm", "acme").exit_code == 0
    assert [(one.method, one.query) for one in stub.requests] == [("DELETE", {"confirm": "acme"})]


def test_what_was_known_of_a_removed_tenant_is_saved_and_no_file_is_overwritten(
    session: Session, stub: PortalStub
) -> None:
    stub.replies["DELETE", "/tenants/acme"] = Reply(200, REMOVED)
    stub.replies["GET", "/tenants/acme/export"] = Reply(200, b'{"kind":"tenant"}\n')
    remove = ("tenant", "remove", "acme", "--confirm", "acme", "--export", "acme.ndjson")
    assert session.run(*remove).exit_code == 0
    assert Path("acme.ndjson").read_bytes() == b'{"kind":"tenant"}\n'
    before = len(stub.requests)
    assert session.run(*remove).exit_code == 1
    assert session.run("tenant", "export", "acme", "acme.ndjson").exit_code == 1
    assert len(stub.requests) == before
    assert session.run("tenant", "export", "acme", "acme.ndjson", "--force").exit_code == 0


# --- Logins of several tenants --------------------------------------------------------------------------------------


def logged_in(session: Session, stub: PortalStub, tenant: str, *options: str) -> str:
    stub.replies["GET", "/whoami"] = Reply(200, {"tenant": tenant, "role": "admin", "operator": "somebody"})
    result = session.run("login", *options)
    assert result.exit_code == 0, result.output
    return result.output


def saved(session: Session) -> dict[str, Any]:
    return dict(json.loads(login_path(session.environment).read_text()))


def test_a_login_with_one_tenant_is_saved_as_ever(session: Session, stub: PortalStub) -> None:
    for tenant in ("default", None):
        if tenant is None:  # a portal from before tenants
            stub.replies["GET", "/whoami"] = problem(404, "not_found", "Nothing is at this path.")
            assert session.run("login").exit_code == 0
        else:
            assert "in the tenant" not in logged_in(session, stub, tenant)
        assert saved(session).keys() == {"url", "ca_file", "token"}
        assert "tenant" not in session.run("list", "--help").output


def test_logins_are_remembered_by_tenant_and_chosen_by_an_option_that_overrides_the_environment(
    session: Session, stub: PortalStub
) -> None:
    logged_in(session, stub, "default")
    assert "in the tenant acme" in logged_in(session, stub, "acme")
    path = login_path(session.environment)
    content = saved(session)
    assert (content["tenant"], [one.get("tenant") for one in content["others"]]) == ("acme", [None])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    content["others"][0]["token"] = "of-the-default-tenant"
    path.write_text(json.dumps(content))
    for arguments, sent in (
        (("--tenant", "acme", "list"), TOKEN), (("list", "--tenant", "acme"), TOKEN),
        (("--tenant", "default", "list"), "of-the-default-tenant"),
    ):  # fmt: skip
        session.run(*arguments, env={"PORTAL_TOKEN": "of-the-environment", "PORTAL_URL": "https://127.0.0.1:1"})
        assert stub.requests[-1].headers["Authorization"] == f"Bearer {sent}"
    # The newest is that without an option; a further login replaces that of its own tenant.
    session.run("list", env={"PORTAL_TOKEN": ""})
    assert stub.requests[-1].headers["Authorization"] == f"Bearer {TOKEN}"
    logged_in(session, stub, "default")
    assert [one["tenant"] for one in saved(session)["others"]] == ["acme"]


def test_a_login_says_how_it_is_used_where_the_environment_has_another_token(
    session: Session, stub: PortalStub
) -> None:
    Path("token").write_text(TOKEN)
    for env, tenant, said in (
        ({"PORTAL_TOKEN": ""}, "default", "portal list"),
        ({"PORTAL_TOKEN": ""}, "acme", "portal --tenant acme list"),
        ({"PORTAL_TOKEN": "another"}, "default", "portal --tenant default list"),
    ):
        stub.replies["GET", "/whoami"] = Reply(200, {"tenant": tenant, "role": "admin", "operator": "somebody"})
        assert session.run("login", "--token-file", "token", env=env).stderr.splitlines()[-1].endswith(said)


def test_what_is_suggested_is_in_the_tenant_that_was_chosen(session: Session, stub: PortalStub) -> None:
    logged_in(session, stub, "acme")
    for arguments in (("list", "--tenant", "acme"), ("--tenant", "acme", "list")):
        said = session.run(*arguments, env={"PORTAL_COMMAND": "./portal"}).stderr
        assert "Next: ./portal --tenant acme register NAME" in said
    assert logged_in(session, stub, "acme", "--tenant", "acme").endswith("portal --tenant acme list\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--tenant", "other", "list"), "no saved login of the tenant other"),
        (("--tenant", "acme", "list", "--token", "x"), "either --tenant"),
        (("--tenant", "acme", "list", "--url", "https://127.0.0.1:1"), "no saved login of the tenant acme"),
        (("--tenant", "a\x1b[31m", "list"), "no saved login"),
    ],
)
def test_a_tenant_of_which_there_is_no_login_is_a_sentence(
    session: Session, stub: PortalStub, arguments: tuple[str, ...], said: str
) -> None:
    logged_in(session, stub, "acme")
    before = len(stub.requests)
    result = session.run(*arguments)
    assert (result.exit_code, len(stub.requests)) == (2, before)
    assert said in result.stderr
    assert "\x1b" not in result.stderr


def test_a_token_of_another_tenant_than_was_meant_is_not_saved(session: Session, stub: PortalStub) -> None:
    stub.replies["GET", "/whoami"] = Reply(200, {"tenant": "acme", "role": "admin", "operator": "somebody"})
    result = session.run("--tenant", "other", "login")
    assert result.exit_code == 2
    assert "one of the tenant acme" in result.stderr
    assert not login_path(session.environment).exists()


def test_a_login_at_another_portal_replaces_all(session: Session, stub: PortalStub) -> None:
    logged_in(session, stub, "acme")
    content = saved(session) | {"url": "https://elsewhere.example.com"}
    login_path(session.environment).write_text(json.dumps(content))
    logged_in(session, stub, "default")
    assert saved(session).keys() == {"url", "ca_file", "token"}
