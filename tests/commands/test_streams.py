"""Standard streams that are closed or full end a command with a sentence and a status."""

from __future__ import annotations

import subprocess

import pytest

from tests.support.cli_session import Session
from tests.support.portal_stub import PortalStub

pytest_plugins = ("tests.support.cli_fixtures",)


def in_shell(session: Session, line: str) -> subprocess.CompletedProcess[str]:
    """Run a line of shell in which ``$@`` is the command line."""
    return subprocess.run(
        ["sh", "-c", line, *session.command()],
        capture_output=True,
        text=True,
        env=session.full_environment(),
        cwd=session.folder,
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize(
    ("end", "why"), [(">/dev/full", "no space left on device"), (">&-", "bad file descriptor")], ids=["full", "closed"]
)
@pytest.mark.parametrize("command", ["--help", "list", "list --json", "export", "show --help", "completion bash"])
def test_output_that_nobody_gets_is_a_sentence(
    session: Session, stub: PortalStub, command: str, end: str, why: str
) -> None:
    stub.add_device()
    result = in_shell(session, f'"$0" "$@" {command} {end}')
    assert (result.returncode, result.stderr) == (1, f"Error: Standard output cannot be written to: {why}.\n")


@pytest.mark.parametrize("end", ["2>/dev/full", "2>&-"])
def test_messages_that_nobody_gets_leave_the_status_as_it_is(session: Session, stub: PortalStub, end: str) -> None:
    device_id = stub.add_device()
    done = in_shell(session, f'"$0" "$@" revoke {device_id} --yes {end}')
    assert (done.returncode, stub.devices[device_id]["status"]) == (0, "revoked")
    assert device_id in done.stdout
    assert in_shell(session, f'"$0" "$@" show {end}').returncode == 2
    assert in_shell(session, f'"$0" "$@" list --url http://127.0.0.1:9 {end}').returncode == 3


def test_no_file_gets_the_number_of_a_closed_stream(session: Session, stub: PortalStub) -> None:
    stub.add_device()
    result = in_shell(session, '"$0" "$@" export --out fleet.csv <&- >&- 2>&-')
    content = (session.folder / "fleet.csv").read_text()
    assert result.returncode == 0
    assert content.startswith("device_id,")
    assert "Wrote 1" not in content


def test_a_token_from_a_closed_input_is_missed(session: Session) -> None:
    result = in_shell(session, '"$0" "$@" list --token - <&-')
    assert (result.returncode, result.stderr) == (2, "Error: Standard input contains no token.\n")
