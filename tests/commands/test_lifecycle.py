"""The commands for a device's way through its life, against a small portal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from tests.support.cli_session import Session
from tests.support.harness import csr_pem
from tests.support.pki import PEM
from tests.support.portal_stub import PortalStub, Reply, problem, sign_key

pytest_plugins = ("tests.support.cli_fixtures",)


def suspension(device_id: str, **changed: Any) -> Reply:
    answer = {"device_id": device_id, "status": "suspended", "suspended_at": "2026-01-02T00:00:00Z"}
    return Reply(body=answer | {"broker": "enforced", "broker_problem": None} | changed)


def test_a_suspension_says_that_it_is_enforced(session: Session, stub: PortalStub) -> None:
    device_id = stub.add_device()
    stub.replies[("POST", f"/devices/{device_id}/suspend")] = suspension(device_id)
    result = session.run("suspend", device_id)
    assert "status\tsuspended" in result.stdout
    assert "Warning" not in result.stderr


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_suspension_that_is_not_enforced_yet_is_loud(
    options: tuple[str, ...], session: Session, stub: PortalStub
) -> None:
    device_id = stub.add_device()
    reply = suspension(device_id, broker="pending", broker_problem="The broker is not there.")
    stub.replies[("POST", f"/devices/{device_id}/suspend")] = reply
    result = session.run("suspend", device_id, *options)
    assert result.exit_code == 0
    assert "THE BROKER DOES NOT ENFORCE THIS YET" in result.stderr
    assert "The broker is not there." in result.stderr


def test_a_device_is_resumed(session: Session, stub: PortalStub) -> None:
    device_id = stub.add_device()
    reply = suspension(device_id, status="active", suspended_at=None)
    stub.replies[("POST", f"/devices/{device_id}/resume")] = reply
    assert session.run("resume", device_id).stdout.splitlines()[1:] == ["status\tactive", "broker\tenforced"]


def test_a_revoked_device_stays_out(session: Session, stub: PortalStub) -> None:
    device_id = stub.add_device()
    refused = problem(409, "state_conflict", "A device that is revoked cannot become active.")
    stub.replies[("POST", f"/devices/{device_id}/resume")] = refused
    result = session.run("resume", device_id)
    assert result.exit_code == 1
    assert "revoked cannot become active" in result.stderr


def renewal(stub: PortalStub, device_id: str, **changed: Any) -> Reply:
    answer = {"device_id": device_id, "fingerprint": "cd" * 32, "serial_number": "0a1b"}
    answer |= {"expires_at": "2036-01-01T00:00:00Z", "previous_valid_until": "2026-01-02T00:00:00Z"}
    return Reply(201, answer | changed)


def test_a_renewal_shows_the_link_and_until_when_the_old_one_goes_on(session: Session, stub: PortalStub) -> None:
    device_id = stub.add_device()
    reply = renewal(stub, device_id, download_url=f"{stub.url}/download/x", bundle_password="a-password-of-22-chars")
    stub.replies[("POST", f"/devices/{device_id}/renew")] = reply
    options = ("--password-out", "password.txt", "--overlap-hours", "0", "--when-used", "--days", "9")
    result = session.run("renew", device_id, *options)
    assert result.exit_code == 0, result.output
    assert "previous_valid_until\t2026-01-02T00:00:00Z" in result.stdout
    assert f"Renewed {device_id}" in result.stderr
    (request,) = stub.calls("POST", f"/devices/{device_id}/renew")
    assert request.body == {"overlap_hours": 0, "revoke_previous": "when_used", "validity_days": 9}
    assert len(request.headers["Idempotency-Key"]) == 32


def test_a_renewal_by_csr_is_checked_before_it_is_written(session: Session, stub: PortalStub, tmp_path: Path) -> None:
    device_id = stub.add_device()
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = sign_key(stub.pki.issuing, device_id, key.public_key()).decode()
    chain = certificate + stub.pki.issuing.certificate.public_bytes(PEM).decode()
    stub.replies[("POST", f"/devices/{device_id}/renew")] = renewal(
        stub, device_id, certificate=certificate, chain=chain
    )
    (tmp_path / "own.csr").write_text(csr_pem(key))
    (tmp_path / "others.csr").write_text(csr_pem())
    refused = session.run("renew", device_id, "--csr", str(tmp_path / "others.csr"), "--out", str(tmp_path / "no"))
    assert refused.exit_code == 1
    result = session.run("renew", device_id, "--csr", str(tmp_path / "own.csr"), "--out", str(tmp_path / "new"))
    assert result.exit_code == 0, result.output
    assert (tmp_path / "new" / "chain.pem").read_text() == chain


def test_what_ends_first_is_listed_first(session: Session, stub: PortalStub) -> None:
    def device(name: str, end: str) -> dict[str, Any]:
        return {"device_id": stub.add_device(), "name": name, "location": "hall 1"} | {
            "expires_at": end,
            "renewable_from": "2035-01-01T00:00:00Z",
        }

    page = [device("later", "2036-02-01T00:00:00Z"), device("sooner", "2036-01-01T00:00:00Z")]
    stub.replies[("GET", "/devices")] = Reply(body={"devices": page, "next_cursor": None})
    lines = session.run("expiring", "--within", "2036-03-01").stdout.splitlines()
    assert [line.split("\t")[1] for line in lines] == ["sooner", "later"]
    assert [line.split("\t")[4] for line in lines] == ["2035-01-01T00:00:00Z"] * 2
    assert stub.requests[-1].query["expires_before"] == "2036-03-01T00:00:00Z"
    assert stub.requests[-1].query["status"] == "active"
    stub.replies[("GET", "/devices")] = Reply(body={"devices": [], "next_cursor": None})
    assert "expires that soon" in session.run("expiring").stderr
