"""What the portal tells Prometheus: facts of the database, and counts of all its processes together."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa
from flask import Flask
from prometheus_client.parser import text_string_to_metric_families

from app import ROUTES, portal_of
from core import metrics
from core.roles import Role
from operations import authority
from store import brokers, generations
from store.tables import METADATA
from tests.support.exposition import Samples, samples_of, total_of, value_of
from tests.support.harness import PER_DEVICE, Api, Clock, api_as, csr_pem

ROOT = Path(__file__).parents[2]


def scrape(api: Api) -> Samples:
    answer = api.get("/metrics")
    assert answer.status_code == 200, answer.text
    assert answer.content_type == "text/plain; version=0.0.4; charset=utf-8"
    return samples_of(answer.text)


# --- Facts --------------------------------------------------------------------------------------------------------


def test_devices_are_counted_by_status_every_status_always(api: Api) -> None:
    ids = [api.register()["device_id"] for _ in range(3)]
    api.post(f"/revoke/{ids[0]}")
    samples = scrape(api)
    told = {status: value_of(samples, "portal_devices", status=status) for status in ("active", "revoked")}
    assert told == {"active": 2, "revoked": 1}
    assert ("portal_devices", frozenset({("status", "suspended")})) in samples


def test_bundles_that_wait_and_entries_of_the_record_are_counted(api: Api) -> None:
    before = scrape(api)
    path = api.register()["download_url"].partition("/download/")[2]
    api.register(csr=csr_pem())
    during = scrape(api)
    assert value_of(during, "portal_bundles_undelivered") == value_of(before, "portal_bundles_undelivered") + 1
    assert value_of(during, "portal_audit_entries") > value_of(before, "portal_audit_entries")
    assert api.get(f"/download/{path}", buffered=True).status_code == 200
    assert value_of(scrape(api), "portal_bundles_undelivered") == value_of(before, "portal_bundles_undelivered")


def test_certificates_about_to_expire_are_counted_as_long_as_they_are_in_use(api: Api, clock: Clock) -> None:
    for days in (5, 20, 200):
        api.register(validity_days=days)
    revoked = api.register(validity_days=5)["device_id"]
    api.post(f"/revoke/{revoked}")

    def told() -> tuple[float, float]:
        samples = scrape(api)
        seven, thirty = (value_of(samples, "portal_certificates_expiring", within=name) for name in ("7d", "30d"))
        return seven, thirty

    assert told() == (1, 2)
    clock.advance(days=6)
    assert told() == (0, 1)


@PER_DEVICE
def test_how_long_the_broker_has_lagged_behind_is_reported(api: Api, app: Flask, clock: Clock) -> None:
    portal = portal_of(app)
    with portal.database.transaction() as tx:
        newest = generations.get_broker_state(tx).generation
        brokers.set_applied_generation(tx, 1, newest, applied_at=clock())
    assert value_of(scrape(api), "portal_generation_pending_seconds") == 0
    api.register()
    clock.advance(minutes=5)
    api.register()  # the age is that of the first change that the broker does not know
    samples = scrape(api)
    assert 300 <= value_of(samples, "portal_generation_pending_seconds") < 330
    assert value_of(samples, "portal_generation") - value_of(samples, "portal_generation_enforced") == 2
    with portal.database.transaction() as tx:
        brokers.set_applied_generation(tx, 1, newest + 1, applied_at=clock())
    clock.advance(minutes=1)
    assert 60 <= value_of(scrape(api), "portal_generation_pending_seconds") < 90
    with portal.database.transaction() as tx:
        brokers.set_applied_generation(tx, 1, newest + 2, applied_at=clock())
    assert value_of(scrape(api), "portal_generation_pending_seconds") == 0


def test_the_remaining_time_of_crls_and_certificates_is_reported_and_falls(api: Api, app: Flask, clock: Clock) -> None:
    days = 86400
    first = scrape(api)
    assert 6.9 * days < value_of(first, "portal_crl_life_left_seconds", issuer="issuing-1") <= 7 * days
    assert 364 * days < value_of(first, "portal_crl_life_left_seconds", issuer="root") <= 365 * days
    assert 1824 * days < value_of(first, "portal_ca_life_left_seconds", issuer="issuing-1") <= 1825 * days
    for server in ("portal", "broker"):
        assert 89 * days < value_of(first, "portal_server_certificate_life_left_seconds", server=server) <= 90 * days
    clock.advance(days=8)
    assert value_of(scrape(api), "portal_crl_life_left_seconds", issuer="issuing-1") < 0
    authority.renew_crls(portal_of(app))
    assert value_of(scrape(api), "portal_crl_life_left_seconds", issuer="issuing-1") > 6.9 * days


def test_a_server_certificate_that_is_gone_hides_nothing_else(api: Api, app: Flask) -> None:
    portal_of(app).settings.broker_file("server.pem").unlink()
    samples = scrape(api)
    assert ("portal_server_certificate_life_left_seconds", frozenset({("server", "broker")})) not in samples
    assert value_of(samples, "portal_server_certificate_life_left_seconds", server="portal") > 0


def test_a_broker_that_does_not_run_is_down(api: Api) -> None:
    assert ("portal_broker_up", frozenset()) in scrape(api)
    assert value_of(scrape(api), "portal_broker_up") == 0


def test_looking_at_the_figures_changes_nothing(api: Api, app: Flask) -> None:
    def rows() -> dict[str, int]:
        with portal_of(app).database.snapshot() as tx:
            counts = sa.select(sa.func.count())
            return {table.name: tx.execute(counts.select_from(table)).scalar_one() for table in METADATA.sorted_tables}

    before = rows()
    scrape(api)
    assert rows() == before


# --- Counts -------------------------------------------------------------------------------------------------------


def difference(api: Api, before: Samples, name: str, **labels: str) -> float:
    return total_of(scrape(api), name, **labels) - total_of(before, name, **labels)


def test_registrations_and_revocations_are_counted_once_however_often_they_are_asked_for(api: Api) -> None:
    before = scrape(api)
    key = {"headers": {"Idempotency-Key": "0123456789abcdef"}}
    body = {"name": "pump-1", "type": "pump", "location": "hall 1", "firmware": "1.0"}
    ids = {api.post("/register", body, **key).json["device_id"] for _ in range(2)}
    api.register(csr=csr_pem())
    for _ in range(2):
        api.post(f"/revoke/{ids.copy().pop()}")
    assert difference(api, before, "portal_registrations_total", key="portal") == 1
    assert difference(api, before, "portal_registrations_total", key="device") == 1
    assert difference(api, before, "portal_revocations_total") == 1
    assert difference(api, before, "portal_enforce_seconds_count") == 0  # no broker runs
    assert difference(api, before, "portal_broker_passes_total", outcome="failed") >= 1


def test_requests_are_counted_by_route_method_and_status_with_the_time_they_take(api: Api) -> None:
    before = scrape(api)
    device = api.register()["device_id"]
    for path in (device, device, "no-id"):
        api.get(f"/devices/{path}")
    route = "/devices/{device_id}"
    assert difference(api, before, "portal_http_requests_total", route=route, method="GET", status="200") == 2
    assert difference(api, before, "portal_http_requests_total", route=route, method="GET", status="404") == 1
    assert difference(api, before, "portal_http_request_seconds_count", route=route) == 3
    assert difference(api, before, "portal_http_request_seconds_bucket", route=route, le="+Inf") == 3
    assert difference(api, before, "portal_http_request_seconds_sum", route=route) > 0
    assert difference(api, before, "portal_refusals_total", code="device_not_found") == 1


def test_labels_have_few_values_and_never_one_that_a_client_made_up(api: Api, app: Flask) -> None:
    device, link = (api.register()[name] for name in ("device_id", "download_url"))
    anyone = api_as(app, None)
    for method, path in [
        ("BREW", "/devices"), ("get", "/nowhere/op_secret"), ("GET", f"/devices/{device}"), ("POST", "/download/x"),
        ("GET", link.partition("8443")[2] or "/download/a.b.c"), ("PROPFIND", "/"),
    ]:  # fmt: skip
        anyone.call(method, path)
        api.call(method, path)
    text = api.get("/metrics").text
    assert device not in text
    assert "op_" not in text
    of_console = {rule.rule.replace("<", "{").replace(">", "}") for rule in app.url_map.iter_rules()}
    templates = {route.path for route in ROUTES} | of_console | {"none"}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert sample.labels.get("route", "none") in templates
            assert sample.labels.get("method", "other") in metrics.METHODS | {"other"}
            assert set(sample.labels) <= {
                "route", "method", "status", "le", "code", "key", "outcome", "within", "issuer", "server",
                "answer", "kept", "by", "verdict", "broker",
            }  # fmt: skip


def test_every_metric_has_the_portals_name_and_a_sentence(api: Api) -> None:
    families = [*text_string_to_metric_families(api.get("/metrics").text)]
    assert len(families) > 15
    for family in families:
        assert family.name.startswith("portal_")
        assert family.documentation.endswith(".")


def test_every_metric_is_in_the_operators_guide_and_every_one_there_exists(app: Flask) -> None:
    api_as(app, Role.ADMIN, "acme")  # some are there with several tenants only
    guide = (ROOT / "docs" / "operating.md").read_text()
    told = {
        family.name + ("_total" if family.type == "counter" else "")
        for family in text_string_to_metric_families(api_as(app, Role.SYSTEM).get("/metrics").text)
    }
    rows = [line.split("|")[1] for line in guide.splitlines() if line.startswith("| `portal_")]
    assert {name for row in rows for name in re.findall("portal_[a-z_]+", row)} == told


@pytest.mark.parametrize("role", [*Role])
def test_every_role_may_look_and_a_stranger_may_not(app: Flask, role: Role) -> None:
    assert api_as(app, role).get("/metrics").status_code == 200
    assert api_as(app, None).get("/metrics").status_code == 401


# --- Several processes --------------------------------------------------------------------------------------------

COUNTING = """
import sys
from pathlib import Path
from core import metrics
folder = Path(sys.argv[1])
metrics.share(folder)
print("sharing", flush=True)
for line in sys.stdin:
    word, _, times = line.strip().partition(" ")
    for _ in range(int(times or 1)):
        if word == "revoked":
            metrics.counts.revocations.inc()
            metrics.counts.enforce_seconds.observe(0.3)
        elif word == "refused":
            metrics.counts.refusals.labels("forbidden").inc()
    print(metrics.exposition([]).decode() if word == "show" else word, end="\\0", flush=True)
"""


class Process:
    """A process that counts what it is told to."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", COUNTING, str(folder)],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "sharing\n"

    def do(self, what: str) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        said = ""
        while not said.endswith("\0"):
            said += self.process.stdout.read(1)
        return said[:-1]

    def show(self) -> Samples:
        return samples_of(self.do("show"))

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()


@contextmanager
def counting(folder: Path, count: int) -> Iterator[list[Process]]:
    processes = [Process(folder) for _ in range(count)]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    metrics.forget(tmp_path / "metrics")
    return tmp_path / "metrics"


def test_the_counts_of_all_processes_add_up_whichever_is_asked(folder: Path) -> None:
    with counting(folder, 3) as processes:
        for number, process in enumerate(processes, start=1):
            process.do(f"revoked {number}")
            process.do("refused 10")
        for process in processes:
            samples = process.show()
            assert value_of(samples, "portal_revocations_total") == 6
            assert value_of(samples, "portal_enforce_seconds_count") == 6
            assert value_of(samples, "portal_enforce_seconds_bucket", le="0.5") == 6
            assert value_of(samples, "portal_enforce_seconds_bucket", le="0.25") == 0
            assert value_of(samples, "portal_refusals_total", code="forbidden") == 30


def test_a_killed_process_takes_nothing_with_it_and_its_successor_continues_in_its_files(folder: Path) -> None:
    with counting(folder, 2) as processes:
        for process in processes:
            process.do("revoked 5")
        for _ in range(5):
            processes.pop().kill()
            processes.append(Process(folder))
            processes[-1].do("revoked 1")
        assert value_of(processes[0].show(), "portal_revocations_total") == 15
        assert len([*folder.glob("*.db")]) == 4


def test_a_start_forgets_the_processes_that_ended_and_no_others(folder: Path) -> None:
    with counting(folder, 2) as processes:
        for process in processes:
            process.do("revoked 5")
        processes.pop().kill()
        metrics.forget(folder)
        assert value_of(processes[0].show(), "portal_revocations_total") == 5
    metrics.forget(folder)
    assert [*folder.glob("*.db")] == []


def test_the_files_are_private_and_have_their_room_on_the_disk_from_the_start(folder: Path) -> None:
    with counting(folder, 1):
        for path in folder.glob("*.db"):
            assert path.stat().st_mode & 0o777 == 0o600
            assert path.stat().st_size == metrics.FILE_BYTES
            assert path.stat().st_blocks * 512 >= metrics.FILE_BYTES  # else a full disk would kill who counts


def test_without_room_for_the_files_a_process_counts_for_itself_and_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with caplog.at_level(logging.ERROR):
        metrics.share(folder)
    assert "missing from /metrics" in caplog.text
    before = value_of(samples_of(metrics.exposition([]).decode()), "portal_revocations_total")
    metrics.counts.revocations.inc()
    assert value_of(samples_of(metrics.exposition([]).decode()), "portal_revocations_total") == before + 1
