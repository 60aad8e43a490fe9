"""Which portal the command line trusts, as whom."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from commands.logins import login_path
from tests.support.cli_session import Session, session_for
from tests.support.pki import PEM, Authority, Pki
from tests.support.portal_stub import TOKEN, PortalStub, Reply, running

pytest_plugins = ("tests.support.cli_fixtures",)


@pytest.fixture(scope="module")
def tls_portal(cli_pki: Pki, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PortalStub]:
    folder = tmp_path_factory.mktemp("tls")
    credentials = cli_pki.issuing.issue("server", server_names=["localhost"])
    certificate, key = credentials.write(folder, "server")
    certificate.write_bytes(certificate.read_bytes() + cli_pki.issuing.certificate.public_bytes(PEM))
    with running(PortalStub(cli_pki), tls=(certificate, key)) as portal_stub:
        yield portal_stub


@pytest.fixture
def tls_session(tls_portal: PortalStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Session:
    return session_for(tls_portal, tmp_path, monkeypatch)


def test_the_portal_is_trusted_by_its_ca_file(tls_session: Session, cli_pki: Pki) -> None:
    Path("ca.pem").write_bytes(cli_pki.ca_bundle)
    assert tls_session.run("list", "--ca-file", "ca.pem").exit_code == 0
    assert tls_session.run("list", env={"PORTAL_CA": "ca.pem"}).exit_code == 0


def test_another_ca_with_the_same_name_is_refused_by_its_file_s_name(tls_session: Session) -> None:
    Path("other.pem").write_bytes(Authority("Test root").certificate.public_bytes(PEM))
    result = tls_session.run("list", "--ca-file", "other.pem")
    assert result.exit_code == 3
    assert "is not signed by the CA in" in result.stderr
    assert "other.pem" in result.stderr


def test_without_a_ca_file_the_portal_is_not_trusted(tls_session: Session, cli_pki: Pki) -> None:
    Path("ca.pem").write_bytes(cli_pki.ca_bundle)
    # What other programs take from the environment does not weaken this one.
    result = tls_session.run("list", env={"CURL_CA_BUNDLE": ""})
    assert result.exit_code == 3
    assert "--ca-file or PORTAL_CA" in result.stderr


def test_a_certificate_for_another_name_is_refused(tls_session: Session, tls_portal: PortalStub, cli_pki: Pki) -> None:
    Path("ca.pem").write_bytes(cli_pki.ca_bundle)
    url = tls_portal.url.replace("localhost", "127.0.0.1")
    result = tls_session.run("list", "--ca-file", "ca.pem", "--url", url)
    assert result.exit_code == 3
    assert "is for another name" in result.stderr


def test_a_port_without_tls_is_named(session: Session, stub: PortalStub) -> None:
    result = session.run("list", "--url", stub.url.replace("http:", "https:"))
    assert result.exit_code == 3
    assert "does not speak TLS" in result.stderr


@pytest.mark.parametrize("content", [None, b"", b"not a certificate"])
def test_an_unusable_ca_file_is_named(content: bytes | None, session: Session) -> None:
    if content is not None:
        Path("ca.pem").write_bytes(content)
    result = session.run("list", "--ca-file", "ca.pem")
    assert result.exit_code == 2
    assert "ca.pem" in result.stderr


@pytest.mark.parametrize(
    "url",
    [
        "http://portal.example.com",
        "portal.example.com",
        "ftp://x",
        "https://",
        "https://a:b@x",
        "https://x:y",
        "https://x/?a=b",
    ],
)
def test_a_url_that_would_not_be_safe_is_refused(url: str, session: Session) -> None:
    assert session.run("list", "--url", url).exit_code == 2


def test_an_option_overrides_the_environment_before_and_after_the_command(session: Session, stub: PortalStub) -> None:
    Path("token").write_text("from-a-file\n")
    session.run("list", "--token-file", "token")
    session.run("--token-file", "token", "list")
    session.run("--token", "before", "list", "--token-file", "token")
    session.run("list", "--token-file", "-", stdin="from-a-file\n")
    session.run("list", "--token", "-", stdin="from-a-file\n")
    assert [request.headers["Authorization"] for request in stub.requests] == ["Bearer from-a-file"] * 5


def test_a_token_on_the_command_line_causes_a_note(session: Session) -> None:
    assert "can see a token on the command line" in session.run("list", "--token", TOKEN).stderr


@pytest.mark.parametrize("token", ["two words", "line\nbreak", "ümlaut"])
def test_an_invalid_token_is_refused_without_being_shown(token: str, session: Session, stub: PortalStub) -> None:
    result = session.run("list", env={"PORTAL_TOKEN": token})
    assert (result.exit_code, stub.requests) == (2, [])
    assert token not in result.output


def test_without_a_token_the_error_says_how_to_get_one(session: Session) -> None:
    result = session.run("list", env={"PORTAL_TOKEN": ""})
    assert result.exit_code == 2
    assert "portal login" in result.stderr
    assert "data/operator.env" in result.stderr


def test_login_saves_what_works_for_its_owner_only(session: Session, stub: PortalStub, cli_pki: Pki) -> None:
    Path("ca.pem").write_bytes(cli_pki.ca_bundle)
    result = session.run("login", "--ca-file", "ca.pem")
    assert result.exit_code == 0, result.output
    assert TOKEN not in result.output
    path = login_path(session.environment)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert json.loads(path.read_text()) == {
        "url": stub.url,
        "ca_file": str(Path("ca.pem").absolute()),
        "token": TOKEN,
    }
    session.environment |= {"PORTAL_URL": "", "PORTAL_TOKEN": ""}
    assert session.run("list").exit_code == 0
    assert session.json("logout") == {"removed": True}
    assert session.json("logout") == {"removed": False}
    assert session.run("list", "--url", stub.url).exit_code == 2


def test_login_refuses_a_token_that_does_not_work(session: Session) -> None:
    assert session.run("login", env={"PORTAL_TOKEN": "wrong"}).exit_code == 1
    assert not login_path(session.environment).exists()
    assert session.run("login", env={"PORTAL_TOKEN": ""}).exit_code == 2


def test_a_saved_token_is_not_sent_to_another_portal(session: Session, cli_pki: Pki) -> None:
    assert session.run("login").exit_code == 0
    with running(PortalStub(cli_pki)) as other:
        result = session.run("list", env={"PORTAL_URL": other.url, "PORTAL_TOKEN": ""})
        assert (result.exit_code, other.requests) == (2, [])


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_login_that_others_can_read_is_refused(mode: int, session: Session) -> None:
    session.run("login")
    login_path(session.environment).chmod(mode)
    result = session.run("list", env={"PORTAL_TOKEN": ""})
    assert result.exit_code == 2
    assert "is readable by others" in result.stderr


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"url": 1, "ca_file": null, "token": "x"}', "[" * 9999])
def test_a_damaged_login_is_one_sentence(content: str, session: Session) -> None:
    session.run("login")
    login_path(session.environment).write_text(content)
    result = session.run("list", env={"PORTAL_TOKEN": ""})
    assert result.exit_code == 2
    assert "is damaged" in result.stderr


def test_a_login_that_is_a_symbolic_link_is_refused(session: Session, tmp_path: Path) -> None:
    session.run("login")
    path = login_path(session.environment)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert session.run("list", env={"PORTAL_TOKEN": ""}).exit_code == 2


def test_http_where_the_portal_speaks_https_is_told(tls_session: Session, tls_portal: PortalStub) -> None:
    result = tls_session.run("list", "--url", tls_portal.url.replace("https:", "http:"))
    assert result.exit_code == 3
    assert f"The portal speaks HTTPS; try {tls_portal.url} (--url" in result.stderr


def test_http_that_a_proxy_answers_in_plain_text_is_told(session: Session, stub: PortalStub) -> None:
    said = b"The plain HTTP request was sent to HTTPS port"
    stub.replies["GET", "/devices"] = Reply(400, said, {"Content-Type": "text/html"})
    result = session.run("list")
    assert f"The portal speaks HTTPS; try {stub.url.replace('http:', 'https:')} (" in result.stderr
