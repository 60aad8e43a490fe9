"""Login profiles: logins at several portals, saved under names, and never mixed."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from commands.logins import Login, login_path, save_login
from tests.support.cli_session import Session
from tests.support.pki import Pki
from tests.support.portal_stub import TOKEN, PortalStub, Reply, running

pytest_plugins = ("tests.support.cli_fixtures",)


@pytest.fixture
def factory(cli_pki: Pki) -> Iterator[PortalStub]:
    """A second portal."""
    with running(PortalStub(cli_pki)) as portal_stub:
        yield portal_stub


@pytest.fixture
def saved(session: Session, stub: PortalStub, factory: PortalStub) -> Session:
    """Two logins: at ``stub`` as ``default``, at ``factory`` under that name; the environment names no portal."""
    assert session.run("login").exit_code == 0
    assert session.run("login", "--profile", "factory", "--url", factory.url).exit_code == 0
    session.environment |= {"PORTAL_URL": "", "PORTAL_TOKEN": ""}
    stub.requests.clear()
    factory.requests.clear()
    return session


def test_a_profile_chooses_portal_and_token_by_option_or_environment(
    saved: Session, stub: PortalStub, factory: PortalStub
) -> None:
    assert saved.run("list").exit_code == 0
    assert (len(stub.requests), len(factory.requests)) == (1, 0)
    assert saved.run("--profile", "factory", "list").exit_code == 0
    assert saved.run("list", env={"PORTAL_PROFILE": "factory"}).exit_code == 0
    assert (len(stub.requests), len(factory.requests)) == (1, 2)
    assert saved.run("--profile", "default", "list", env={"PORTAL_PROFILE": "factory"}).exit_code == 0
    assert len(stub.requests) == 2


def test_an_option_uses_the_profile_whatever_the_environment_says(
    saved: Session, stub: PortalStub, factory: PortalStub
) -> None:
    environment = {"PORTAL_URL": stub.url, "PORTAL_TOKEN": "another", "PORTAL_CA": "missing.pem"}
    assert saved.run("--profile", "factory", "list", env=environment | {"PORTAL_CA": ""}).exit_code == 0
    assert [request.headers["Authorization"] for request in factory.requests] == [f"Bearer {TOKEN}"]
    assert stub.requests == []


@pytest.mark.parametrize("name", ["PORTAL_URL", "PORTAL_TOKEN"])
def test_an_environment_that_names_two_portals_is_refused(name: str, saved: Session, factory: PortalStub) -> None:
    result = saved.run("list", env={"PORTAL_PROFILE": "factory", name: factory.url})
    assert (result.exit_code, factory.requests) == (2, [])
    assert f"PORTAL_PROFILE and {name} are both set" in result.stderr


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--profile", "other", "list"), "There is no login profile other.\nThere are: default, factory"),
        (("--profile", "factory", "--token", "x", "list"), "Use either --profile"),
        (("--profile", "factory", "list", "--url", "https://127.0.0.1:1"), "use either --profile or --url"),
        (("--profile", "../login", "list"), "letters, digits, dots"),
        (("--profile", "a\x1b[31m", "list"), "letters, digits, dots"),
        (("--profile", "factory", "--tenant", "acme", "list"), "no saved login of the tenant acme"),
        (("logout", "--all", "--profile", "factory"), "either --all or --profile"),
    ],
)
def test_a_profile_that_cannot_be_used_is_a_sentence(
    args: tuple[str, ...], said: str, saved: Session, stub: PortalStub, factory: PortalStub
) -> None:
    result = saved.run(*args)
    assert (result.exit_code, stub.requests, factory.requests) == (2, [], [])
    assert said in result.stderr


def test_a_profile_of_the_environment_that_is_missing_never_falls_back_to_another(
    saved: Session, stub: PortalStub
) -> None:
    result = saved.run("list", env={"PORTAL_PROFILE": "other"})
    assert (result.exit_code, stub.requests) == (2, [])
    assert "portal login --profile other" in result.stderr


def test_what_is_saved_is_listed_without_the_tokens(saved: Session, stub: PortalStub, factory: PortalStub) -> None:
    result = saved.run("login", "--list")
    assert result.stdout.splitlines() == [
        f"default\t{stub.url}\tdefault\t\tyes",
        f"factory\t{factory.url}\tdefault\t\t",
    ]
    listed = saved.json("--profile", "factory", "login", "--list")["logins"]
    assert [row["profile"] for row in listed if row["chosen"]] == ["factory"]
    assert TOKEN not in result.output + json.dumps(listed)
    assert (stub.requests, factory.requests) == ([], [])


def test_a_file_that_cannot_be_used_does_not_hide_the_others(saved: Session) -> None:
    login_path(saved.environment, "factory").chmod(0o644)
    result = saved.run("login", "--list")
    assert result.exit_code == 0
    assert [line.split("\t")[0] for line in result.stdout.splitlines()] == ["default"]
    assert "is readable by others" in result.stderr


def test_each_profile_is_a_file_for_its_owner_only(saved: Session) -> None:
    path = login_path(saved.environment, "factory")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in list(path.parents)[:2]] == [0o700, 0o700]


def test_a_file_of_a_version_before_is_the_profile_default(session: Session, stub: PortalStub) -> None:
    path = login_path(session.environment)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"url": stub.url, "ca_file": None, "token": TOKEN}))
    path.chmod(0o600)
    session.environment |= {"PORTAL_URL": "", "PORTAL_TOKEN": ""}
    assert session.run("list").exit_code == 0
    assert session.run("--profile", "default", "list").exit_code == 0
    assert session.json("login", "--list")["logins"][0]["profile"] == "default"


def test_logout_deletes_one_or_all(saved: Session) -> None:
    assert saved.json("logout", "--profile", "factory") == {"removed": True}
    assert saved.json("logout", "--profile", "factory") == {"removed": False}
    assert saved.run("list").exit_code == 0
    assert saved.json("logout", "--all") == {"removed": True}
    assert saved.json("login", "--list") == {"logins": []}
    assert "There is no login profile x." in saved.run("logout", "--profile", "x").stderr


def test_another_token_is_saved_for_the_portal_of_the_profile(saved: Session, factory: PortalStub) -> None:
    assert saved.run("login", "--profile", "factory", "--token", TOKEN).exit_code == 0
    assert len(factory.requests) > 0


def test_what_is_suggested_is_done_with_the_same_profile(saved: Session, factory: PortalStub) -> None:
    result = saved.run("--profile", "factory", "login", "--token", TOKEN, "--url", factory.url)
    assert "Next: portal --profile factory list" in result.stderr
    assert Path(login_path(saved.environment, "factory")).exists()


def test_a_profile_remembers_the_tenants_of_its_portal(saved: Session, factory: PortalStub) -> None:
    factory.replies["GET", "/whoami"] = Reply(body={"tenant": "acme"})
    assert saved.run("login", "--profile", "factory", "--url", factory.url, "--token", TOKEN).exit_code == 0
    assert saved.run("--profile", "factory", "--tenant", "acme", "list").exit_code == 0
    assert saved.run("--tenant", "acme", "list").exit_code == 2
    assert saved.run("list", "--tenant", "default", env={"PORTAL_PROFILE": "factory"}).exit_code == 0


def test_the_command_to_save_a_login_profile_names_it_once(saved: Session) -> None:
    assert "To save it, run: portal login --profile other --url URL" in saved.run("--profile", "other", "list").stderr


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"PORTAL_TOKEN": "another"}, "the token of PORTAL_TOKEN at {url}"),
        ({"PORTAL_URL": "https://127.0.0.1:1"}, "no token at https://127.0.0.1:1"),
        ({"PORTAL_URL": "https://127.0.0.1:1", "PORTAL_TOKEN": "x"}, "unset PORTAL_URL PORTAL_TOKEN"),
        ({"PORTAL_PROFILE": "factory", "PORTAL_TOKEN": "x"}, "PORTAL_PROFILE and PORTAL_TOKEN are both set"),
        ({"PORTAL_PROFILE": "other"}, "There is no login profile other."),
    ],
)
def test_no_login_is_listed_as_chosen_if_commands_use_none(
    environment: dict[str, str], said: str, saved: Session, stub: PortalStub
) -> None:
    result = saved.run("login", "--list", env=environment)
    assert [line.split("\t")[4] for line in result.stdout.splitlines()] == ["", ""]
    assert said.format(url=stub.url) in result.stderr


def test_a_profile_of_the_environment_is_listed_as_chosen(saved: Session) -> None:
    listed = saved.json("login", "--list", env={"PORTAL_PROFILE": "factory"})["logins"]
    assert [row["profile"] for row in listed if row["chosen"]] == ["factory"]


def test_of_several_tenants_of_a_login_one_is_chosen(saved: Session, stub: PortalStub) -> None:
    save_login(login_path(saved.environment), Login(stub.url, None, "a-token-of-acme", "acme"))
    assert [row["tenant"] for row in saved.json("login", "--list")["logins"] if row["chosen"]] == ["acme"]
    chosen = saved.json("--tenant", "default", "login", "--list")["logins"]
    assert [row["tenant"] for row in chosen if row["chosen"]] == ["default"]


def test_a_login_profile_after_the_command_is_told_from_a_certificate_profile(
    saved: Session, stub: PortalStub, factory: PortalStub
) -> None:
    stub.replies["GET", "/profiles/factory"] = Reply(404, {"code": "not_found", "detail": "There is none."})
    result = saved.run("list", "--profile", "factory")
    assert result.exit_code == 2
    assert "There is no certificate profile factory, but a login of that name." in result.stderr
    assert "before the command: portal --profile factory list" in result.stderr
    stub.replies["GET", "/profiles/factory"] = Reply(body={"name": "factory"})
    assert saved.run("list", "--profile", "factory").exit_code == 0
    assert stub.calls("GET", "/devices")[-1].query["profile"] == "factory"
    assert factory.requests == []


def test_what_a_profile_of_the_other_kind_needs_is_said(saved: Session) -> None:
    assert "after the command, as in: list --profile tls-server" in saved.run("--profile", "tls-server", "list").stderr
    result = saved.run("status", "--profile", "factory")
    assert result.exit_code == 2
    assert "No such option '--profile'. A login profile stands before the command" in result.stderr
