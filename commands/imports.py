"""The command that registers the devices of a file."""

from __future__ import annotations

import functools
import itertools
import json
import operator
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from http import HTTPStatus
from pathlib import Path
from typing import Any

import click

from commands.context import Remote, command
from commands.errors import CliError, ConnectionLost, Misused, Refused
from commands.files import NewFile, write_new
from commands.handover import trust_at
from commands.import_cells import ENCODINGS
from commands.import_files import ExternalIds, FileRow, Reading, format_of, read_rows
from commands.import_results import Results
from commands.links import check_link, new_idempotency_key
from commands.output import text
from onboarding_portal.handover import base_of

BATCH_ROWS = 512  # two of the batches that the portal registers at once
# A batch is sent completely before an answer is read, and the portal may stop reading until its answers are read. So a
# batch must fit into the buffers of a TCP connection, with what the portal reads before it answers.
BATCH_BYTES = 128 * 1024
RETRY_PAUSES = (0.3, 1.0, 3.0)  # seconds before a batch is sent again after the connection was lost
BUSY_ATTEMPTS = 30  # at a portal that is busy with other uploads and says when to come back
COUNTS = ("rows", "registered", "registered_before", "failed")
SHOWN = 20  # problems that are shown one by one
TOO_LARGE = (
    "A proxy before the portal takes only shorter bodies: raise its limit (nginx: client_max_body_size) at"
    f" /register/bulk to {BATCH_BYTES // 1024}k or more, or make this row shorter."
)
SEE_ALL = "The portal has rules of its own, which are looked at now with --dry-run, else once these are corrected."
AGAIN = "Run the same command again to continue where this one stopped."


@dataclass(frozen=True, slots=True)
class _Row:
    """A row of the file as it is sent."""

    line: int
    external_id: str
    name: str
    sent: bytes


@dataclass(slots=True)
class Tally:
    """Counts the results of the rows."""

    rows: int = 0
    registered: int = 0
    repeated: int = 0
    there_before: int = 0
    failed: int = 0
    downloaded: int = 0
    not_downloaded: int = 0
    codes: Counter[str] = field(default_factory=Counter)

    @property
    def registered_before(self) -> int:
        """Rows that an earlier import has registered, by the answers of the portal or by the folder."""
        return self.repeated + self.there_before

    def as_json(self) -> dict[str, Any]:
        """Return the counts for JSON."""
        names = (*COUNTS, "repeated", "there_before", "downloaded", "not_downloaded")
        return {name: getattr(self, name) for name in names} | {"failures": dict(self.codes)}


@command("import", examples=["portal import fleet.csv --dry-run", "portal import fleet.csv --out fleet --download"])
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False), help="CSV or NDJSON file, one device per row.")
@click.option("--out", metavar="FOLDER", type=click.Path(path_type=Path), help="Folder for the results and bundles.")
@click.option("--format", "form", type=click.Choice(("csv", "ndjson")), help="Format of FILE.  [default: by its name]")
@click.option(
    "--encoding", type=click.Choice(ENCODINGS), help="Encoding of FILE.  [default: utf-8; utf-16 by its mark]"
)
@click.option("--metadata-columns", is_flag=True, help="Keep the cells of other columns of a CSV file as metadata.")
@click.option("--batch", default="", help="Registers rows without external_id once for each BATCH; any text.")
@click.option("--dry-run", is_flag=True, help="Only have the portal check the file; registers nothing.")
@click.option("--download", is_flag=True, help="Also download the encrypted bundles.")
def import_devices(
    portal: Remote,
    file: Path,
    out: Path | None,
    form: str | None,
    encoding: str | None,
    metadata_columns: bool,
    batch: str,
    dry_run: bool,
    download: bool,
) -> None:
    """Register a device for each row of a file.

    The first row of a CSV file names the columns: name, type, location, firmware, and optionally external_id,
    metadata, csr, key_type, validity_days, bundle_password, bundle_format, topics, profile, groups.

    FOLDER/results.csv gets the download link and the bundle password of each device. To continue an interrupted import,
    or after you corrected rows, run the same command again; a row that is the same registers no second device, whatever
    the folder, except with another --batch. The exit status is 1 if a row failed, 3 if the connection was lost.
    """
    if out is None and not dry_run:
        raise Misused("Give a folder for the results with --out, or only check the file with --dry-run.")
    how = Reading(format_of(file, form), encoding, metadata_columns)
    checked = _check(portal, file, how)
    if not checked.rows:
        portal.out.warning(f"{file} has no rows; nothing was registered.")
        if portal.out.as_json:
            portal.out.json(Tally().as_json() | {"problems": 0, "results": None})
        return
    if dry_run or out is None:
        _dry_run(portal, checked, _identified(file, how, batch))
        return
    checked.refuse(portal, hints=[SEE_ALL])
    rows = checked.rows
    portal.client.get("/devices", limit=1)  # reports a wrong address, CA file or token before the folder is created
    tally = Tally(rows)
    results = Results(out)
    tally.there_before = _there_before(portal, results, _identified(file, how, batch))
    with results, _said_to_be_repeatable(portal):
        _upload(portal, results, tally, _identified(file, how, batch))
        if download:
            _download(portal, results, tally)
    _show(portal, results, tally)
    if tally.failed or tally.not_downloaded:
        raise click.exceptions.Exit(1)


@contextmanager
def _said_to_be_repeatable(portal: Remote) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        portal.out.warning(AGAIN)
        raise
    except CliError as error:
        error.hints = (*error.hints, AGAIN)
        raise


@dataclass(slots=True)
class RowProblems:
    """What is wrong with the rows of a file: how many are, and the first of them."""

    rows: int = 0
    problems: int = 0
    found: list[dict[str, Any]] = field(default_factory=list)
    lines: set[int] = field(default_factory=set)

    def add(self, line: int, problem: str) -> None:
        """Note what is wrong with the row on a line."""
        self.problems += 1
        self.lines.add(line)
        if len(self.found) < SHOWN:
            self.found.append({"line": line, "problem": problem})

    def refuse(self, portal: Remote, hints: Iterable[str] = ()) -> None:
        """Show the problems and raise ``CliError``, if there are any."""
        if not self.problems:
            return
        self.found.sort(key=operator.itemgetter("line"))
        if portal.out.as_json:
            portal.out.json({"rows": self.rows, "problems": self.problems, "found": self.found})
        for one in self.found:
            portal.out.note(f"line {one['line']}: {one['problem']}")
        more = f" The first {SHOWN} are listed above." if self.problems > SHOWN else ""
        raise CliError(f"{self.problems} of {self.rows} rows have problems; nothing was registered.{more}", hints=hints)


def _check(portal: Remote, file: Path, how: Reading) -> RowProblems:
    """Check every row as far as that is possible without the portal."""
    seen: dict[bytes, int] = {}
    checked = RowProblems()
    with portal.out.working("Checking the file…"):
        for row in read_rows(file, how):
            checked.rows += 1
            problem = row.problem
            external_id = row.values.get("external_id")
            if problem is None and external_id is not None:
                first = seen.setdefault(_short(external_id), row.line)
                if first != row.line:
                    problem = f"has the same external_id as line {first}"
            if problem is not None:
                checked.add(row.line, problem)
    return checked


def _dry_run(portal: Remote, checked: RowProblems, rows: Iterator[tuple[FileRow, str]]) -> None:
    """Have the portal check the rows by its own rules; raises ``CliError`` if one is wrong."""
    for probe in portal.client.register_rows(b"{}\n", dry_run=True):
        if not probe.get("dry_run"):  # it would register what it is given to check
            raise CliError("This portal is too old to check a file without registering its rows.")
    before = 0
    with portal.out.progress("Checking", checked.rows - checked.problems) as advance:
        wrong = frozenset(checked.lines)
        for batch in _batches(set(), ((row, given) for row, given in rows if row.line not in wrong)):
            for row, answer in _send(functools.partial(portal.client.register_rows, dry_run=True), batch):
                if "code" in answer:
                    checked.add(row.line, str(answer.get("detail", "is refused.")))
                before += bool(answer.get("repeated"))
                advance()
    checked.refuse(portal)
    if portal.out.as_json:
        counts = {"rows": checked.rows, "problems": 0, "registered_before": before, "there_before": before}
        portal.out.json(counts)
    else:
        known = f"; {before} registered before" if before else ""
        portal.out.done(f"Checked {checked.rows} rows; found no problems{known}.")


def _short(external_id: str) -> bytes:
    return blake2b(external_id.encode("utf-8", "surrogatepass"), digest_size=12).digest()


def _identified(file: Path, how: Reading, batch: str) -> Iterator[tuple[FileRow, str]]:
    """Yield each row of the file with its external id."""
    ids = ExternalIds(batch)
    for row in read_rows(file, how):
        yield row, ids.of(row)


def _there_before(portal: Remote, results: Results, rows: Iterator[tuple[FileRow, str]]) -> int:
    """Return how many rows are done already; raises ``Misused`` where the folder is that of another import."""
    if not results.done:
        return 0
    found = results.done.intersection(external_id for _, external_id in rows)
    if not found:
        raise Misused(
            f"{results.folder} contains the import of another file, or of another --batch.",
            hints=["Choose another folder. A row that is the same as before never registers a second device."],
        )
    if gone := len(results.done) - len(found):
        portal.out.warning(
            f"{gone} devices in {results.path} are in no row of this file. If their rows were corrected, a second"
            " device is registered for each: change the first with portal update, or revoke it."
        )
    return len(found)


def _upload(portal: Remote, results: Results, tally: Tally, rows: Iterator[tuple[FileRow, str]]) -> None:
    """Register the rows that have no result yet, batch by batch; the results of one are durable before the next."""
    with portal.out.progress("Registering", tally.rows - tally.there_before) as advance:
        for batch in _batches(results.done, rows):
            for row, answer in _send(portal.client.register_rows, batch):
                results.add(row.line, row.external_id, row.name, answer)
                _count(tally, answer)
                advance()
            results.sync()


def _batches(done: Set[str], rows: Iterator[tuple[FileRow, str]]) -> Iterator[deque[_Row]]:
    batch, size = deque[_Row](), 0
    for row, external_id in rows:
        if external_id in done:
            continue
        sent = json.dumps({**row.values, "external_id": external_id}, separators=(",", ":")).encode() + b"\n"
        if len(batch) == BATCH_ROWS or (batch and size + len(sent) > BATCH_BYTES):
            yield batch
            batch, size = deque(), 0
        batch.append(_Row(row.line, external_id, str(row.values.get("name", "")), sent))
        size += len(sent)
    if batch:
        yield batch


def _send(
    send: Callable[[bytes], Iterator[dict[str, Any]]], rows: deque[_Row]
) -> Iterator[tuple[_Row, dict[str, Any]]]:
    """Send a batch; yield each row with its answer. Rows without an answer are sent again if that may help.

    What is too long for a proxy is sent in halves.
    """
    attempts, most = 0, len(rows)
    while rows:
        sent = list(itertools.islice(rows, most))
        try:
            for number, answer in enumerate(send(b"".join(row.sent for row in sent)), 1):
                if answer.get("stopped"):
                    raise ConnectionLost(f"The portal stopped the import: {answer.get('detail')}")
                if answer["row"] != number or number > len(sent):
                    raise CliError("The portal answered rows that were not sent; its version may differ.")
                attempts = 0
                yield rows.popleft(), answer
            if rows and rows[0] in sent:
                raise ConnectionLost("The answer ended before every row was answered.")
        except (ConnectionLost, Refused) as error:
            if isinstance(error, Refused) and error.status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
                if len(sent) > 1:
                    most = len(sent) // 2
                    continue
                error.hints = (*error.hints, TOO_LARGE)
            attempts += 1
            pause = _pause(error, attempts)
            if pause is None:
                raise
            time.sleep(pause)


def _pause(error: ConnectionLost | Refused, attempts: int) -> float | None:
    """Return the seconds to wait before a batch is sent again, ``None`` if it should not be."""
    if isinstance(error, ConnectionLost):
        return RETRY_PAUSES[attempts - 1] if attempts <= len(RETRY_PAUSES) else None
    return error.retry_after if error.retry_after is not None and attempts <= BUSY_ATTEMPTS else None


def _count(tally: Tally, answer: dict[str, Any]) -> None:
    if "device_id" not in answer:
        tally.failed += 1
        tally.codes[str(answer.get("code", "unknown"))] += 1
    elif answer.get("repeated"):
        tally.repeated += 1
    else:
        tally.registered += 1


def _download(portal: Remote, results: Results, tally: Tally) -> None:
    """Download every bundle that is missing; one that fails does not stop the others."""
    newest = {row["device_id"]: row["download_url"] for row in results.rows() if row["download_url"]}
    waiting = {device: link for device, link in newest.items() if not results.has_bundle(device)}
    with portal.out.progress("Downloading", len(waiting)) as advance:
        for device_id, link in waiting.items():
            try:
                content = portal.client.fetch_bundle(check_link(link), new_idempotency_key())
                write_new(results.bundle_path(device_id, content), NewFile(content, 0o600), force=False)
                tally.downloaded += 1
            except ConnectionLost:
                raise
            except CliError as error:
                tally.not_downloaded += 1
                if tally.not_downloaded <= SHOWN:
                    portal.out.warning(f"The bundle of {device_id} was not downloaded: {error.sentence}")
            advance()


def _about_secrets(portal: Remote, results: Results, tally: Tally) -> None:
    """Say what the results hold that must not be lost or read by others, and which devices have no link in them."""
    link, has_passwords, without = None, False, set[str]()
    for row in results.rows():
        link = link or row["download_url"]
        has_passwords |= bool(row["bundle_password"])
        if row["download_url"]:
            without.discard(row["device_id"])
        elif row["device_id"] and not results.has_credentials(row["device_id"]):
            without.add(row["device_id"])
    if without:
        which = "1 device has" if len(without) == 1 else f"{len(without)} devices have"
        portal.out.note(
            f"{which} no link here, since the bundle was downloaded before or a certificate came by another way."
            " For new credentials, which end the old: portal renew DEVICE --overlap 0"
        )
    if link or has_passwords:
        what = (
            "links and passwords: send them on different channels, then delete it."
            if has_passwords
            else "links: delete it once they are sent."
        )
        portal.out.note(f"{results.path.name} contains {what}")
    if link and not tally.downloaded:
        option = trust_at(portal, base_of(link)).option
        portal.out.note(
            f"The recipient of a link opens it in a browser, or fetches the bundle with: portal download LINK{option}"
        )


def _show(portal: Remote, results: Results, tally: Tally) -> None:
    if portal.out.as_json:
        portal.out.json(tally.as_json() | {"results": str(results.path.absolute())})
        return
    for row in itertools.islice((row for row in results.rows() if row["result"] == "failed"), SHOWN):
        portal.out.note(f"line {row['line']}: {row['detail']}")
    done = f"{tally.registered} registered, {tally.registered_before} registered before, {tally.failed} failed."
    portal.out.done(done)
    counts: dict[str, object] = {name: getattr(tally, name) for name in COUNTS}
    counts |= {f"failed {code}": number for code, number in tally.codes.most_common()}
    if tally.downloaded or tally.not_downloaded:
        counts |= {"downloaded": tally.downloaded, "not_downloaded": tally.not_downloaded}
    portal.out.fields({name: text(count) for name, count in counts.items()} | {"results": text(str(results.path))})
    _about_secrets(portal, results, tally)
