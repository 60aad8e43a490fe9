"""The commands about tenants, against a small portal."""

from __future__ import annotations

from pathlib import Path

from tests.support.cli_session import Session
from tests.support.portal_stub import PortalStub, Reply

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
    result = session.run("tenant", "suspend", "acme")
    assert result.exit_code == 0
    assert "The broker does not answer." in result.stderr


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
