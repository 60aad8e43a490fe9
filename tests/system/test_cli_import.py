"""The import of a file at the command line, against the running portal: whole, interrupted, wrong."""

from __future__ import annotations

import csv
import json
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.deployment import ROOT, Deployment, wait_until

pytestmark = pytest.mark.system

HEADER = "name,type,location,firmware,external_id,metadata\n"


@pytest.fixture(scope="module")
def deployment() -> Iterator[Deployment]:
    with Deployment() as running:
        yield running


def fleet(path: Path, count: int, own: str = "") -> Path:
    """A file of devices, with external ids that begin with ``own``, or with none."""
    cells = [
        (f"pump-{n}", "pump", '"hall 1, left"', "1.0", f"{own}{n}" if own else "", '"{""n"": 1}"') for n in range(count)
    ]
    path.write_text(HEADER + "".join(",".join(row) + "\n" for row in cells))
    return path


def results(folder: Path) -> list[dict[str, str]]:
    assert stat.S_IMODE((folder / "results.csv").stat().st_mode) == 0o600
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def imported(deployment: Deployment, *arguments: str, check: bool = True) -> tuple[dict[str, Any], int]:
    done = deployment.cli("import", *arguments, "--json", check=check)
    return (json.loads(done.stdout) if done.stdout else {}), done.returncode


def test_an_import_brings_links_passwords_and_bundles(deployment: Deployment, tmp_path: Path) -> None:
    file, out = fleet(tmp_path / "fleet.csv", 30), tmp_path / "out"
    summary, _ = imported(deployment, str(file), "--out", str(out), "--download")
    assert (summary["rows"], summary["registered"], summary["failed"], summary["downloaded"]) == (30, 30, 0, 30)
    rows = results(out)
    assert [row["name"] for row in rows] == [f"pump-{n}" for n in range(30)]
    assert [row["line"] for row in rows] == [str(n + 2) for n in range(30)]
    row = rows[-1]
    bundle = out / "bundles" / f"{row['device_id']}.zip"
    subprocess.run(["7z", "t", f"-p{row['bundle_password']}", bundle], check=True, stdout=subprocess.DEVNULL)
    assert deployment.call("GET", f"/devices/{row['device_id']}").json()["location"] == "hall 1, left"
    # Once more: everything is there.
    again, _ = imported(deployment, str(file), "--out", str(out), "--download")
    assert (again["there_before"], again["registered"], again["downloaded"]) == (30, 0, 0)


def test_a_file_with_mistakes_is_not_sent(deployment: Deployment, tmp_path: Path) -> None:
    file = tmp_path / "fleet.csv"
    file.write_text(HEADER + 'a,b,c,1,x,\n,b,c,1,,\na,b,c,1,x,\n"two\nlines",b,c,1,,{\na,b,c,1\n')
    summary, status = imported(deployment, str(file), "--dry-run", check=False)
    assert status == 1
    assert summary["problems"] == 4
    assert [one["line"] for one in summary["found"]] == [3, 4, 5, 7]
    assert [one["problem"] for one in summary["found"]] == [
        "name is missing", "has the same external_id as line 2", "metadata is not JSON",
        "has 4 cells, but the first row names 6 columns",
    ]  # fmt: skip
    out = tmp_path / "out"
    assert deployment.cli("import", str(file), "--out", str(out), check=False).returncode == 1
    assert not out.exists()
    assert deployment.cli("import", str(fleet(file, 3)), "--dry-run").stderr.startswith("✓ Checked 3 rows")


def test_what_the_portal_refuses_is_said_and_tried_again(deployment: Deployment, tmp_path: Path) -> None:
    file, out = tmp_path / "fleet.ndjson", tmp_path / "out"
    device = {"name": "p", "type": "t", "location": "l", "firmware": "1"}
    file.write_text("".join(json.dumps(device | more) + "\n" for more in ({}, {"csr": "none"}, {})))
    summary, status = imported(deployment, str(file), "--out", str(out), check=False)
    assert (status, summary["registered"], summary["failures"]) == (1, 2, {"csr_invalid": 1})
    assert [row["result"] for row in results(out)] == ["registered", "failed", "registered"]
    summary, status = imported(deployment, str(file), "--out", str(out), check=False)
    assert (status, summary["there_before"], summary["failed"]) == (1, 2, 1)
    assert [row["result"] for row in results(out)] == ["registered", "registered", "failed"]


def test_the_summary_says_in_plain_text_what_was_done_and_what_failed_and_why(
    deployment: Deployment, tmp_path: Path
) -> None:
    file, out = tmp_path / "fleet.ndjson", tmp_path / "out"
    device = {"name": "q", "type": "t", "location": "l", "firmware": "1"}
    file.write_text("".join(json.dumps(device | more) + "\n" for more in ({}, {"csr": "none"})))
    done = deployment.cli("import", str(file), "--out", str(out), check=False)
    assert done.returncode == 1
    assert "line 2: " in done.stderr
    assert "1 registered, 0 registered before, 1 failed." in done.stderr
    fields = dict(line.split("\t", 1) for line in done.stdout.splitlines())
    assert (fields["registered"], fields["failed csr_invalid"]) == ("1", "1")
    assert fields["results"] == str(out / "results.csv")
    whole = deployment.cli(
        "import", str(fleet(tmp_path / "fleet.csv", 3)), "--out", str(tmp_path / "other"), "--batch", "other"
    )
    assert "3 registered, 0 registered before, 0 failed." in whole.stderr


def test_an_import_that_was_interrupted_continues_where_it_stopped(deployment: Deployment, tmp_path: Path) -> None:
    file, out = fleet(tmp_path / "fleet.csv", 1500), tmp_path / "out"
    command = [sys.executable, str(ROOT / "cli.py"), "import", str(file), "--out", str(out), "--batch", "2"]
    with subprocess.Popen(command, env=deployment.environment | deployment.operator, stderr=subprocess.PIPE) as process:
        wait_until(lambda: (out / "results.csv").exists() and (out / "results.csv").stat().st_size > 15_000)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=30)[1]
    assert process.returncode == 130
    assert b"Run the same command again" in said
    before = len(results(out))
    assert 0 < before < 1500
    summary, _ = imported(deployment, str(file), "--out", str(out), "--batch", "2")
    assert before - 1 <= summary["there_before"] <= before
    assert summary["registered"] + summary["repeated"] == 1500 - summary["there_before"]
    rows = results(out)
    assert len({row["device_id"] for row in rows}) == len(rows) == 1500
    assert all(row["download_url"] and row["bundle_password"] for row in rows)


def test_a_portal_that_goes_away_is_said_with_what_to_do(deployment: Deployment, tmp_path: Path) -> None:
    file, out = fleet(tmp_path / "fleet.csv", 1500, own="lost-"), tmp_path / "out"
    command = [sys.executable, str(ROOT / "cli.py"), "import", str(file), "--out", str(out)]
    with subprocess.Popen(command, env=deployment.environment | deployment.operator, stderr=subprocess.PIPE) as process:
        wait_until(lambda: (out / "results.csv").exists() and (out / "results.csv").stat().st_size > 15_000)
        deployment.stop_portal()
        said = process.communicate(timeout=30)[1]
    assert process.returncode == 3
    assert b"Run the same command again" in said
    deployment.start_portal()
    imported(deployment, str(file), "--out", str(out))
    rows = results(out)
    assert len({row["device_id"] for row in rows}) == len(rows) == 1500


def test_a_folder_of_another_file_is_left_alone(deployment: Deployment, tmp_path: Path) -> None:
    out = tmp_path / "out"
    imported(deployment, str(fleet(tmp_path / "one.csv", 1)), "--out", str(out))
    before = (out / "results.csv").read_bytes()
    done = deployment.cli("import", str(fleet(tmp_path / "two.csv", 2, own="b-")), "--out", str(out), check=False)
    assert done.returncode == 2
    assert "another file" in done.stderr
    assert (out / "results.csv").read_bytes() == before
