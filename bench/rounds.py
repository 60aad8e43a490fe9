"""What ``bench/compare`` measures in a round: a function for each part, which returns the figures of one contender."""

from __future__ import annotations

import contextlib
import json
import resource
import sqlite3
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from bench import harness
from bench.api import Api
from bench.cfssl import Cfssl
from bench.client import DEVICE
from bench.harness import Race, RunningPortal, race
from tests.support.harness import csr_pem
from tests.support.mqtt import MqttClient, connect_tls, tls_context

LOOP = harness.ROOT / "bench" / "shell_loop.sh"
CALLS = {"help": ["--help"], "list": ["list"]}
Figures = dict[str, float]
_CLIENT = [sys.executable, "-I", str(harness.CLIENT)]
_SAMPLE_SECONDS = 0.5


# --- Registration and download ------------------------------------------------------------------------------------


def bundles(portal: RunningPortal, folder: Path, requests: int, connections: int) -> Figures:
    """Register devices, each with a key of the portal's and a bundle, then fetch all bundles.

    ``cpu_ms`` and the like are the portal's processor time for one, ``database_bytes`` what one takes while its bundle
    waits.
    """
    answers, paths = folder / "answers", folder / "paths"
    size = _database_bytes(portal)
    registered = _portal_race(portal, ["--requests", str(requests), "--save", str(answers)], connections)
    waiting = _database_bytes(portal)
    urls = [json.loads(line)["download_url"] for line in answers.read_text().splitlines()]
    paths.write_text("\n".join(urlsplit(url).path for url in urls))
    fetched = _portal_race(portal, ["--method", "GET", "--paths", str(paths), "--status", "200"], connections)
    return {
        **registered,
        "database_bytes": (waiting - size) / requests,
        **{f"download_{name}": figure for name, figure in fetched.items()},
        "both_cpu_ms": registered["cpu_ms"] + fetched["cpu_ms"],
        "both_ms": 1000 / registered["per_second"] + 1000 / fetched["per_second"],
    }


def csrs(portal: RunningPortal, requests: int, connections: int) -> Figures:
    """Register devices, each with a CSR of its own."""
    options = ["--csr", "csr", "--requests", str(requests), "--csrs", str(requests)]
    return _portal_race(portal, options, connections)


def cfssl_certificates(cfssl: Cfssl, requests: int, connections: int, *, csr: bool) -> Figures:
    """Have cfssl make keys and certificates, or certificates for CSRs."""
    before = cfssl.cpu_seconds()
    options = ["--requests", str(requests), "--csrs", str(requests), "--connections", str(connections)]
    done = race([[*_CLIENT, *cfssl.racer(csr=csr), *options]], cfssl.access)
    return {**_figures(done), "cpu_ms": 1000 * (cfssl.cpu_seconds() - before) / len(done.times)}


def shell_loop(folder: Path, seconds: int) -> Figures:
    """Make keys, certificates and archives with openssl and 7z, one after the other."""
    return _figures(race([[str(LOOP), str(seconds), str(folder)]], {}))


def _portal_race(portal: RunningPortal, options: Sequence[str], connections: int) -> Figures:
    before = portal.cpu_seconds()
    done = race([[*_CLIENT, *options, "--connections", str(connections)]], portal.access)
    used = {name: 1000 * (seconds - before[name]) / len(done.times) for name, seconds in portal.cpu_seconds().items()}
    return {**_figures(done), "cpu_ms": used["portal"], "broker_cpu_ms": used["broker"]}


def _figures(done: Race) -> Figures:
    return {"per_second": done.rate, **harness.latency(done.times)}


def _database_bytes(portal: RunningPortal) -> int:
    """Return the bytes of the database's pages that are in use."""
    with contextlib.closing(sqlite3.connect(portal.data / "portal.db")) as database:
        pages, free, size = (
            database.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
        )
    return int((pages - free) * size)


# --- Upload -------------------------------------------------------------------------------------------------------


def upload(portal: RunningPortal, folder: Path, count: int, *, csr: bool) -> Figures:
    """Send rows of devices that are not registered yet to POST /register/bulk by curl; every row must become one.

    ``peak_pss_mb`` is the memory of all the portal's processes, each page counted once.
    """
    rows, answers, access = folder / "rows.ndjson", folder / "answers.ndjson", portal.access
    _write_rows(rows, count, csr=csr)
    headers = ["-H", f"Authorization: Bearer {access['PORTAL_TOKEN']}", "-H", "Content-Type: application/x-ndjson"]
    command = ["curl", "-sS", "--fail-with-body", "--cacert", access["PORTAL_CA"], *headers, "-o", str(answers)]
    before = portal.cpu_seconds()["portal"]
    with _Memory(portal) as memory:
        started = time.perf_counter()
        done = subprocess.run(
            [*command, "-T", str(rows), "-X", "POST", f"{access['PORTAL_URL']}/register/bulk"], check=False
        )
        seconds = time.perf_counter() - started
    if done.returncode:
        sys.exit(f"The upload failed: {answers.read_text()[:500] if answers.exists() else done.returncode}")
    outcomes: Counter[str] = Counter()
    with answers.open() as lines:
        outcomes.update(json.loads(line).get("code", "registered") for line in lines)
    if outcomes != {"registered": count}:
        sys.exit(f"Not every row became a device: {dict(outcomes)}")
    return {
        "per_second": count / seconds,
        "cpu_ms": 1000 * (portal.cpu_seconds()["portal"] - before) / count,
        "peak_pss_mb": memory.peak_pss / 1024,
        "processes": memory.most_processes,
    }


def _write_rows(path: Path, count: int, *, csr: bool) -> None:
    unique = time.time_ns()
    with path.open("w") as file:
        for number in range(count):
            row = {**DEVICE, "external_id": f"{unique}-{number:07}"} | ({"csr": csr_pem()} if csr else {})
            file.write(json.dumps(row) + "\n")


class _Memory:
    """Looks at the memory (KiB) of all of a portal's processes for as long as the body runs."""

    def __init__(self, portal: RunningPortal) -> None:
        self._portal = portal
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.peak_pss = self.most_processes = 0

    def __enter__(self) -> _Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        self._look()
        while not self._done.wait(_SAMPLE_SECONDS):
            self._look()

    def _look(self) -> None:
        pss = count = 0
        for pid in self._portal.pids():
            with contextlib.suppress(OSError):  # it has just ended
                fields = Path(f"/proc/{pid}/smaps_rollup").read_text().split()
                pss += int(fields[fields.index("Pss:") + 1])
                count += 1
        self.peak_pss, self.most_processes = max(self.peak_pss, pss), max(self.most_processes, count)


# --- The broker ---------------------------------------------------------------------------------------------------


def broker(portal: RunningPortal, folder: Path, devices: int) -> Figures:
    """Register devices one after the other, publish as each, and revoke it: medians.

    ``usable_ms`` is from the request to register until the broker has acknowledged the device's first message,
    ``enforced_ms`` from the request to revoke until the answer that the broker refuses the device.
    """
    api = Api(portal.access)
    usable, enforced = [], []
    for _ in range(devices):
        csr = harness.make_csr(folder).read_text()
        started = time.perf_counter()
        device = api.register("bench", csr)
        chain = folder / "device.pem"
        chain.write_text(device["chain"])
        _publish(portal, device["device_id"], chain)
        usable.append((time.perf_counter() - started) * 1000)
        started = time.perf_counter()
        answer = api.post(f"/revoke/{device['device_id']}", {"reason": "key_compromise"}, 200)
        enforced.append((time.perf_counter() - started) * 1000)
        if answer["broker"] != "enforced":
            sys.exit(f"The broker did not enforce a revocation: {answer.get('broker_problem')}")
    return {"usable_ms": statistics.median(usable), "enforced_ms": statistics.median(enforced)}


def _publish(portal: RunningPortal, device_id: str, chain: Path) -> None:
    context = tls_context(Path(portal.access["PORTAL_CA"]), chain, chain.with_suffix(".key"))
    with MqttClient(connect_tls(portal.mqtt_port, context)) as client:
        reasons = client.connect(device_id), client.publish(f"devices/{device_id}/up")
    if max(reasons) >= 0x80:  # 0x10 says that nobody has subscribed to the topic (MQTT 5, 3.4.2.1)
        sys.exit(f"The broker refused a device that was registered: {reasons}")


# --- Starts -------------------------------------------------------------------------------------------------------


def server_start(portal: RunningPortal) -> Figures:
    """Return what the start of a portal took that has just become ready: processor time and time, in seconds."""
    return {"ready_cpu_s": portal.cpu_seconds()["portal"], "ready_s": portal.start_seconds}


def command_starts(portal: RunningPortal) -> Figures:
    """Call commands of the portal's checkout beside it: the processor time of each, in seconds."""
    return {f"{name}_cpu_s": _command_cpu(portal, words) for name, words in CALLS.items()}


def _command_cpu(portal: RunningPortal, words: Sequence[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, str(portal.root / "cli.py"), *words]
    subprocess.run(
        command,
        env=portal.environment | portal.access,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
