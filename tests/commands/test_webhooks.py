"""Webhooks at the command line, against a small portal."""

from __future__ import annotations

from tests.support.cli_session import Session
from tests.support.portal_stub import PortalStub, Reply

pytest_plugins = ("tests.support.cli_fixtures",)

URL = "https://inventory.example.com/portal-events"
WEBHOOK = {
    "webhook_id": "1e66977361d81fe2",
    "name": "inventory",
    "url": URL,
    "events": [],
    "created_at": "2027-01-01T00:00:00.000000Z",
    "waiting": 2,
    "oldest_waiting_at": "2027-01-01T00:00:00.000000Z",
    "dead": 1,
}


def test_the_secret_is_written_to_a_file_or_to_json(session: Session, stub: PortalStub) -> None:
    stub.replies["POST", "/webhooks"] = Reply(201, WEBHOOK | {"secret": "whsec_c2VjcmV0"})
    create = ("webhook", "create", "inventory", "--target", URL, "--event", "revoked")
    assert session.run(*create).exit_code == 2, "standard output is no terminal"
    assert session.json(*create)["secret"] == "whsec_c2VjcmV0"
    path = session.folder / "secret"
    result = session.run(*create, "--secret-out", str(path))
    assert result.exit_code == 0
    assert "whsec_" not in result.output
    assert path.read_text().strip() == "whsec_c2VjcmV0"
    assert path.stat().st_mode & 0o777 == 0o600


def test_webhooks_and_their_deliveries_are_listed(session: Session, stub: PortalStub) -> None:
    delivery = {
        "delivery_id": 7,
        "event_id": "e",
        "type": "revoked",
        "device_id": None,
        "status": "dead",
        "attempts": 24,
    }
    delivery |= {"created_at": WEBHOOK["created_at"], "last_problem": "The receiver answered 500.", "next_at": None}
    stub.replies["GET", "/webhooks"] = Reply(body={"webhooks": [WEBHOOK]})
    path = f"/webhooks/{WEBHOOK['webhook_id']}"
    stub.replies["GET", f"{path}/deliveries"] = Reply(body={"deliveries": [delivery], "next_cursor": None})
    stub.replies["POST", f"{path}/redeliver"] = Reply(body={"redelivered": 1})
    stub.replies["DELETE", path] = Reply(body=WEBHOOK)
    listed = session.run("webhook", "list").stdout.rstrip("\n").split("\t")
    assert [listed[column] for column in (0, 1, 2, 3, 5, 6)] == ["1e66977361d81fe2", "inventory", "all", "2", "1", URL]
    assert "The receiver answered 500." in session.run("webhook", "deliveries", "1e66977361d81fe2").stdout
    assert session.json("webhook", "redeliver", "1e66977361d81fe2", "7") == {"redelivered": 1}
    assert session.run("webhook", "delete", "1e66977361d81fe2").exit_code == 2
    deleted = session.run("webhook", "delete", "1e66977361d81fe2", "--yes")
    assert "2 waiting and 1 dead" in deleted.stderr
    assert session.run("webhook", "delete", "short", "--yes").exit_code == 2


def test_a_test_that_fails_ends_with_status_1(session: Session, stub: PortalStub) -> None:
    path = "/webhooks/1e66977361d81fe2/test"
    stub.replies["POST", path] = Reply(body={"delivered": True, "status": 204, "problem": None, "milliseconds": 12})
    assert session.run("webhook", "test", "1e66977361d81fe2").exit_code == 0
    stub.replies["POST", path] = Reply(
        body={"delivered": False, "status": 500, "problem": "The receiver answered 500."}
    )
    failed = session.run("webhook", "test", "1e66977361d81fe2")
    assert failed.exit_code == 1
    assert "The receiver answered 500." in failed.stderr
