"""What is done to many devices at once: named one by one, on standard input, or by a filter."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from commands.connection import STDIN
from commands.context import YES, Remote, confirm, option_group, require_confirmable
from commands.devices import filter_options
from commands.errors import CheckFailed, Misused, Unreachable
from commands.files import read_input, replace_file, writing
from commands.links import new_idempotency_key
from commands.names import DEVICE, find_device, find_row, in_a_line, whole_id
from commands.output import Column, state, text

AT_ONCE = 1000  # devices that the portal takes in one call
MAX_RESULTS = 64 << 20  # bytes of a file of results
SHOWN = 10  # devices that a question names

devices_argument = click.argument(
    "devices",
    metavar="[DEVICE]...",
    nargs=-1,
    type=DEVICE,
    required=False,
    help="Name, id, external id, or the beginning of the id; - for one a line on standard input.",
)
RESULTS = click.option(
    "--results",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write what became of each device to FILE (NDJSON); run the command again with FILE to finish it.",
)
many_devices = option_group(devices_argument, filter_options, RESULTS, YES)


@dataclass(frozen=True, slots=True)
class Act:
    """What is done: its name at the portal, as an order, while it is done, and when it is; with what else is sent.

    ``status`` is that of a device to which it is done, empty for what is done to devices of any status but revoked
    ones. The portal takes ``at_once`` in one call. With ``is_kept`` each device has an idempotency key in the file of
    results, and a repeat gets the same answer.
    """

    name: str
    order: str
    doing: str
    done: str
    status: str
    more: Mapping[str, Any] = field(default_factory=dict)
    at_once: int = AT_ONCE
    is_kept: bool = False


def single(portal: Remote, devices: Sequence[str], filters: Mapping[str, Any], results: Path | None) -> str | None:
    """Return the id of the device if there is one name alone, ``None`` if many are meant; raises ``UsageError``."""
    filtered = any(value is not None for value in filters.values())
    if filtered and devices:
        raise click.UsageError("Give either devices or a filter.")
    if not filtered and not devices and (results is None or not results.exists()):
        raise click.UsageError("Name at least one device, or give a filter such as --location.")
    if len(devices) != 1 or devices[0] == STDIN or results is not None:
        return None
    return find_device(portal.client, devices[0])


def act_on_many(
    portal: Remote,
    act: Act,
    devices: Sequence[str],
    filters: Mapping[str, Any],
    results: Path | None,
    *,
    yes: bool,
) -> None:
    """Say which devices are meant, ask once, do it in calls of ``AT_ONCE``, and show what became of each.

    The file of results has every device before the first call, so that a command which ended midway can be repeated
    with it. Raises ``CheckFailed`` if a device was refused.
    """
    outcome = _read_results(results, act)
    known = {} if results is not None and outcome and not devices and _no(filters) else _found(portal, devices, filters)
    if not act.status and not devices:
        known = {device_id: row for device_id, row in known.items() if row.get("status") != "revoked"}
    key = {"idempotency_key": new_idempotency_key()} if act.is_kept else {}
    for device_id, row in known.items():
        new = {"device_id": device_id, "name": row.get("name", ""), "action": act.name, "done": False, **key}
        outcome.setdefault(device_id, new)
    waiting = [device_id for device_id, one in outcome.items() if not one["done"]]
    if not waiting:
        portal.out.note("No matching devices." if not outcome else "Everything in the file of results is done.")
        portal.out.result({"devices": list(outcome.values())})
        return
    _ask(portal, act, [known.get(device_id) or outcome[device_id] for device_id in waiting], yes=yes)
    _write_results(results, outcome)
    with portal.out.progress(act.doing, len(waiting)) as advance:
        for key_, part in _calls(act, waiting, outcome):
            for answer in _answers(portal, act, part, key_, advance):
                done = answer.get("code") is None and answer.get("broker") != "pending"
                outcome[str(answer["device_id"])] |= answer | {"done": done}
            _write_results(results, outcome)
    _show(portal, act, [outcome[device_id] for device_id in waiting])


def _calls(
    act: Act, waiting: Sequence[str], outcome: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[str | None, list[str]]]:
    """Yield the devices of each call, with its idempotency key, which those of an earlier run have kept."""
    by_key: dict[str | None, list[str]] = {}
    for device_id in waiting:
        by_key.setdefault(outcome[device_id].get("idempotency_key"), []).append(device_id)
    for key, device_ids in by_key.items():
        for start in range(0, len(device_ids), min(act.at_once, AT_ONCE)):
            yield key, device_ids[start : start + min(act.at_once, AT_ONCE)]


def _no(filters: Mapping[str, Any]) -> bool:
    return all(value is None for value in filters.values())


def _found(portal: Remote, devices: Sequence[str], filters: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return what is known of the devices that are meant, by their ids; raises ``CheckFailed`` if one is not known."""
    if not devices:
        pages = portal.client.pages("/devices", "devices", **filters)
        named = {str(one.get("device_id")): one for page in pages for one in page["devices"]}
        if not all(map(whole_id, named)):
            raise Unreachable("The portal's list of devices cannot be read; its version may differ.")
        return named
    return named_devices(portal, devices)


def named_devices(portal: Remote, devices: Sequence[str]) -> dict[str, Mapping[str, Any]]:
    """Return what is known of devices, by their ids, that are named, or one a line on standard input for a ``-``.

    Raises ``CheckFailed`` if one is not known.
    """
    names: list[str] = []
    for device in devices:
        names += _lines(read_input(STDIN)) if device == STDIN else [device]
    found: dict[str, Mapping[str, Any]] = {}
    for name in names:
        try:
            row = find_row(portal.client, name)
        except CheckFailed as error:
            raise CheckFailed(f"{name}: {error.sentence} Nothing was changed.", hints=error.hints) from None
        found[str(row["device_id"])] = row
    return found


def _lines(content: bytes) -> list[str]:
    try:
        lines = [line.strip() for line in content.decode().splitlines()]
    except UnicodeDecodeError:
        raise Misused("Standard input is not UTF-8.") from None
    if not all(line.isprintable() for line in lines):
        raise Misused("Standard input must have the name or the id of a device a line.")
    return [line for line in lines if line]


def _ask(portal: Remote, act: Act, rows: Sequence[Mapping[str, Any]], *, yes: bool) -> None:
    if yes:
        return
    require_confirmable()
    new = [row for row in rows if row.get("status") != act.status]
    for row in new[:SHOWN]:
        portal.out.note(in_a_line(row))
    if len(new) > SHOWN:
        portal.out.note(f"… and {len(new) - SHOWN} more")
    if before := len(rows) - len(new):
        portal.out.note(f"{_devices(before)} {'is' if before == 1 else 'are'} {act.status} already.")
    end = " This cannot be undone." if act.name == "revoke" else ""
    confirm(f"{act.order} {_devices(len(new))}?{end}", yes=False)


def _devices(number: int) -> str:
    return f"{number} device{'s' * (number != 1)}"


def _answers(
    portal: Remote, act: Act, device_ids: Sequence[str], key: str | None, advance: Callable[[], None]
) -> Iterator[dict[str, Any]]:
    body = {"action": act.name, "ids": device_ids, **act.more}
    headers = {} if key is None else {"Idempotency-Key": key}
    # What is done to a device a second time changes nothing; but for a renewal, which has a key.
    answer = portal.client.call("POST", "/devices/actions", body=body, headers=headers, repeatable=True)
    for line in answer.body.splitlines():
        try:
            done = json.loads(line)
        except ValueError:
            done = None
        if not isinstance(done, dict) or done.get("device_id") not in device_ids:
            raise Unreachable("The portal's answer about a device cannot be read; its version may differ.")
        yield done
        advance()


def _show(portal: Remote, act: Act, rows: Sequence[Mapping[str, Any]]) -> None:
    numbers = Counter(map(_outcome, rows))
    columns: dict[str, Column] = {
        "id": "device_id",
        "name": "name",
        "status": lambda row: state(row.get("status", row.get("code", ""))),
        "broker": lambda row: text(row.get("detail") or row.get("broker")),
    }
    portal.out.table({"devices": rows}, "devices", columns, empty="", whole=("broker",))
    if numbers["done"] or numbers["repeated"]:
        before = f"; {_devices(numbers['repeated'])} had been {act.status} before" if numbers["repeated"] else ""
        portal.out.done(f"{act.done} {numbers['done']} of {len(rows)} devices{before}")
    if numbers["pending"]:
        portal.out.warning(
            f"THE BROKER DOES NOT ENFORCE THIS YET for {numbers['pending']} of them. The portal keeps trying; for the"
            " cause, see: portal status"
        )
    if numbers["refused"]:
        raise CheckFailed(f"{numbers['refused']} of {len(rows)} devices were refused, and are as they were.")


def _outcome(row: Mapping[str, Any]) -> str:
    if not row["done"]:
        return "refused" if row.get("code") else "pending"
    return "repeated" if row.get("repeated") else "done"


# --- The file of results ---------------------------------------------------------------------------------------------


def _read_results(path: Path | None, act: Act) -> dict[str, dict[str, Any]]:
    """Return what an earlier run has recorded, by device; raises ``Misused`` if the file is of something else."""
    if path is None or not path.exists():
        return {}
    try:
        rows = [json.loads(line) for line in read_input(str(path), limit=MAX_RESULTS).splitlines()]
        known = {row["device_id"]: row for row in rows}
        fits = all(
            row["action"] == act.name and row["done"] in (True, False) and whole_id(row["device_id"]) for row in rows
        )
    except (ValueError, TypeError, KeyError, AttributeError):
        fits = False
    if not fits:
        raise Misused(f"{path} is not a file of results of portal {act.name}; name another one.")
    return known


def _write_results(path: Path | None, outcome: Mapping[str, Mapping[str, Any]]) -> None:
    if path is not None:
        with writing(path):
            replace_file(path, "".join(json.dumps(row) + "\n" for row in outcome.values()).encode(), mode=0o600)
