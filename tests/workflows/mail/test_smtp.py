"""What the SMTP server must be for the portal to give it anything, and what is said if it is not."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app import create_app
from config import Settings
from core.errors import SettingInvalid, Unavailable
from operations.doctor.base import Installation, State
from operations.doctor.mail import mail as check_mail
from operations.wiring import utc_now
from tests.support.mail_server import PASSWORD, USER, MailServer, mail_server
from tests.support.ports import free_port
from workflows.mail.messages import trial_message
from workflows.mail.smtp import SmtpServer


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MailServer]:
    with mail_server(tmp_path) as serving:
        yield serving


def settings_of(server: MailServer, **more: str) -> Settings:
    return Settings.from_env({"PORTAL_DATA_DIR": str(server.folder / "data"), **server.environment(**more)})


def send(settings: Settings) -> tuple[str, ...]:
    return SmtpServer(settings).send(trial_message(settings, now=utc_now()))


def problem(settings: Settings) -> str:
    with pytest.raises(Unavailable) as refused:
        send(settings)
    assert PASSWORD not in refused.value.detail
    return refused.value.detail


def test_a_message_goes_encrypted_and_after_a_login_to_each_address(server: MailServer) -> None:
    assert send(settings_of(server)) == ()
    (message,) = server.messages
    assert server.encrypted == [True]
    assert server.logins == [(USER.encode(), PASSWORD.encode())]
    assert server.recipients == [["ada@example.com", "grace@example.com"]]
    assert (message["From"], message["To"]) == ("portal@example.com", "ada@example.com, grace@example.com")
    assert message["Auto-Submitted"] == "auto-generated"


def test_nothing_is_sent_to_a_server_without_starttls(tmp_path: Path) -> None:
    with mail_server(tmp_path, starttls=False) as server:
        assert "does not offer STARTTLS" in problem(settings_of(server))
        assert (server.logins, server.messages) == ([], [])
        settings = settings_of(server, PORTAL_MAIL_TLS="none", PORTAL_MAIL_LOGIN_FILE="")
        send(settings)
        assert server.encrypted == [False]


def test_a_certificate_that_is_not_trusted_or_of_another_name_gets_no_password(server: MailServer) -> None:
    assert "certificate that is not trusted" in problem(settings_of(server, PORTAL_MAIL_CA_FILE=""))
    assert "IP address mismatch" in problem(settings_of(server, PORTAL_MAIL_SERVER=f"127.0.0.1:{server.port}"))
    assert server.logins == []


def test_a_wrong_password_is_said_and_not_shown(server: MailServer) -> None:
    settings = settings_of(server)
    (server.folder / "login").write_text(f"{USER}\nanother password\n", encoding="utf-8")
    assert "refused the login (535)" in problem(settings)


@pytest.mark.parametrize("content", ["", "user", "user\n\n", "user\npassword\nmore\n", "user\np\x00\n"])
def test_a_file_that_is_no_login_is_refused_without_a_connection(server: MailServer, content: str) -> None:
    settings = settings_of(server)
    (server.folder / "login").write_text(content, encoding="utf-8")
    assert "must have two lines" in problem(settings)
    assert server.connections == 0


def test_a_login_that_others_can_read_is_refused_without_a_connection(server: MailServer) -> None:
    settings = settings_of(server)
    (server.folder / "login").chmod(0o604)
    assert "chmod 600" in problem(settings)
    assert server.connections == 0


def test_what_the_server_refuses_is_named(server: MailServer) -> None:
    settings = settings_of(server)
    server.refuses = {"ada@example.com": "550 nobody of that name"}
    assert send(settings) == ("ada@example.com",)
    server.refuses["grace@example.com"] = "452 full"
    assert "refused every address of PORTAL_MAIL_TO (452, 550)" in problem(settings)
    server.refuses, server.answer = {}, f"554 {PASSWORD}"
    assert "refused the message (554)" in problem(settings)


def test_a_server_that_is_down_is_said_to_be(server: MailServer) -> None:
    settings = settings_of(server, PORTAL_MAIL_SERVER=f"localhost:{free_port()}")
    assert "cannot be reached (Connection refused)" in problem(settings)


def test_a_server_that_sends_a_byte_now_and_then_is_left_in_time(server: MailServer) -> None:
    """Each byte comes within the time limit of one read, the line never ends."""
    stopped = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def drip() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.sendall(b"220 hello\r\n")
                while not stopped.wait(0.01):
                    try:
                        connection.sendall(b"2")
                    except OSError:
                        return

        thread = threading.Thread(target=drip)
        thread.start()
        settings = settings_of(server, PORTAL_MAIL_SERVER=f"localhost:{listening.getsockname()[1]}")
        try:
            with pytest.raises(Unavailable, match="did not answer in time"):
                SmtpServer(settings, total_seconds=0.2).check()
        finally:
            stopped.set()
            thread.join()


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"PORTAL_MAIL_TO": ""}, "PORTAL_MAIL_SERVER needs"),
        ({"PORTAL_MAIL_FROM": ""}, "PORTAL_MAIL_SERVER needs"),
        ({"PORTAL_MAIL_FROM": "a@example.com,b@example.com"}, "one address"),
        ({"PORTAL_MAIL_TO": "a@example.com\r\nBcc: b@example.com"}, "PORTAL_MAIL_TO must be addresses"),
        ({"PORTAL_MAIL_TO": "Ada <a@example.com>"}, "PORTAL_MAIL_TO must be addresses"),
        ({"PORTAL_MAIL_TLS": "none"}, "not sent in the clear"),
    ],
)
def test_settings_that_do_not_go_together_stop_the_start(
    server: MailServer, changed: dict[str, str], says: str
) -> None:
    with pytest.raises(SettingInvalid, match=says):
        settings_of(server, **changed)


def test_the_doctor_tries_the_login_and_sends_nothing(server: MailServer) -> None:
    settings = settings_of(server)
    assert check_mail(Installation(settings, utc_now)).state is State.OK
    assert (len(server.logins), server.messages) == (1, [])
    (server.folder / "login").write_text(f"{USER}\nanother password\n", encoding="utf-8")
    found = check_mail(Installation(settings, utc_now))
    assert found.state is State.PROBLEM
    assert "refused the login" in found.detail
    assert check_mail(Installation(Settings.from_env({}), utc_now)).state is State.OK


def test_the_command_sends_a_message_or_says_what_is_wrong(
    make_settings: Callable[..., Settings], server: MailServer
) -> None:
    app = create_app(make_settings(**server.environment()), background=False)
    with app.app_context():
        sent = app.test_cli_runner().invoke(args=["mail", "test"])
        server.refuses = {"ada@example.com": "550 nobody of that name"}
        in_part = app.test_cli_runner().invoke(args=["mail", "test"])
        server.answer = "554 no"
        failed = app.test_cli_runner().invoke(args=["mail", "test"])
    assert (sent.exit_code, in_part.exit_code, failed.exit_code) == (0, 1, 1)
    assert "took a message to ada@example.com, grace@example.com" in sent.output
    assert "not for ada@example.com" in in_part.output
    assert "refused the message (554)" in failed.output
    assert "Onboarding portal 127.0.0.1: a test" in str(server.messages[0]["Subject"])
