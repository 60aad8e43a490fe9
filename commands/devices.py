"""The commands that list, show and change devices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import click

from commands.context import (
    Remote,
    command,
    option_group,
    paging_options,
)
from commands.listing import COLUMNS, column, connection_in_words, lines_of, output_options
from commands.names import GroupName, ProfileName, device_argument
from commands.output import Cell, Column, ago, date_of, moment, state, status_of, text
from commands.snippets import SNIPPETS, snippet_for
from commands.times import Time

VERDICTS = ("passed", "failed", "outdated", "none")
STATUSES = ("pending", "active", "suspended", "revoked")


CONNECTIONS = {"--connected": "true", "--offline": "false", "--never-seen": "never"}


def _only_one(ctx: click.Context, param: click.Parameter, given: bool) -> None:
    """Set the filter ``connected`` by one of the three flags."""
    before = ctx.params.setdefault("connected", None)
    if given and before is not None:
        raise click.UsageError("Use only one of --connected, --offline and --never-seen.")
    if given:
        ctx.params["connected"] = CONNECTIONS[param.opts[0]]


def _connection_flag(name: str, what: str) -> Callable[[Any], Any]:
    return click.option(name, is_flag=True, expose_value=False, callback=_only_one, help=what)


connection_options = option_group(
    _connection_flag("--connected", "Only devices that are connected to the broker now."),
    _connection_flag("--offline", "Only devices seen before that are not connected."),
    _connection_flag("--never-seen", "Only devices that were never connected."),
)
# The options that select devices, named as the portal names them.
filter_options = option_group(
    click.option("--status", type=click.Choice(STATUSES), help="Only devices with this status."),
    click.option("--type", metavar="TYPE", help="Only devices of this type."),
    click.option("--location", metavar="PLACE", help="Only devices at this location."),
    click.option("--name", metavar="NAME", help="Only devices with exactly this name."),
    click.option(
        *("--search", "--q", "q"),
        metavar="TEXT",
        help="Only devices with TEXT in the name, the external id or the metadata, or with exactly this id.",
    ),
    click.option("--metadata", metavar="KEY=VALUE", help="Only devices with this value in their metadata."),
    click.option(
        *("--expires-before", "--expiring", "expires_before"),
        type=Time(),
        metavar="TIME",
        help="Only devices whose certificate expires before a date, a time, or 30d from now.",
    ),
    click.option("--external-id", metavar="TEXT", help="Only the device with this external id."),
    click.option("--profile", type=ProfileName(), metavar="NAME", help="Only devices with this certificate profile."),
    click.option("--group", type=GroupName(), metavar="NAME", help="Only devices of this group."),
    click.option("--attested", type=click.Choice(VERDICTS), help="Only devices with this verdict on their evidence."),
    connection_options,
)

SORTS = {
    "newest": None,
    "oldest": "created",
    "name": "name",
    "-name": "-name",
    "expires": "expires",
    "last-seen": "-last_seen",
    "longest-unseen": "last_seen",
}


@command(
    "list",
    examples=[
        "portal list --status active --location 'Hall 2'",
        "portal list --expires-before 30d --all",
        "portal list --offline --sort longest-unseen",
        "portal list --search north --columns name,external_id,metadata.owner,topics",
        "portal list --all -o csv > fleet.csv",
        "portal list --all | cut -f1",
        "portal list --json | jq '.devices[].device_id'",
    ],
)
@filter_options
@click.option("--sort", type=click.Choice(list(SORTS)), help="Which come first.  [default: newest]")
@output_options
@paging_options
def list_devices(
    portal: Remote,
    /,
    limit: int,
    all_: bool,
    cursor: str | None,
    sort: str | None,
    columns: tuple[str, ...] | None,
    wide: bool,
    format_: str | None,
    **filters: str | None,
) -> None:
    """List devices, newest first.

    When piped, prints tab-separated lines: id, name, type, location, status, expiry, last seen (now, a time, never, or
    empty if not known), certificate profile. A terminal has no column for the profile if all are default. --columns
    takes any field of a device as --json shows it, such as external_id or metadata.owner.
    """
    filters["sort"] = None if sort is None else SORTS[sort]
    answer = portal.client.read_pages("/devices", "devices", limit=None if all_ else limit, cursor=cursor, **filters)
    filtered = any(value for name, value in filters.items() if name != "sort")
    if not answer["devices"] and filters["profile"]:
        portal.client.get(f"/profiles/{filters['profile']}")  # which says so if there is no such profile
    if format_ == "json":
        portal.out.json(answer)
        return
    if format_ in ("csv", "ndjson"):
        portal.out.raw("".join(lines_of(answer["devices"], format_, columns or COLUMNS)), as_it_is=True)
        return
    if columns:
        shown: dict[str, Column] = {name: column(name) for name in columns}
        portal.out.table(answer, "devices", shown, empty="No matching devices.", wide=wide)
        return
    has_profiles = any(device.get("profile", "default") != "default" for device in answer["devices"])
    with_profile: dict[str, Column] = {"profile": "profile"} if has_profiles or not portal.out.for_people else {}
    portal.out.table(
        answer,
        "devices",
        {
            "id": "device_id",
            "name": "name",
            "type": "type",
            "location": "location",
            "status": status_of,
            "expires": lambda row: moment(row.get("expires_at"), expiry=row.get("status") != "revoked", short=True),
            "seen": seen,
            **with_profile,
        },
        empty="No matching devices." if filtered else "No devices yet.",
        spare=("location", "type", "seen", *with_profile),
        wide=wide,
    )
    if not answer["devices"] and not filtered:
        portal.out.next_step("portal register NAME --type … --location … --firmware …")


def seen(device: Mapping[str, Any]) -> Cell:
    """Return the cell for when a device was last connected, empty if that is not known."""
    connection = connection_in_words(device)
    if connection["connected"] == "never":
        return Cell("never", style="dim")
    return Cell("now", style="green") if connection["connected"] == "yes" else ago(connection["last_seen"])


@command(
    "expiring",
    examples=[
        "portal expiring",
        "portal expiring --within 90d",
        "portal expiring | cut -f1 | portal renew - --results renewed.ndjson --yes",
    ],
)
@click.option("--within", type=Time(), default="30d", show_default=True, metavar="TIME", help="A date, a time, or 30d.")
def expiring(portal: Remote, within: str) -> None:
    """List devices whose certificates expire soon, soonest first.

    When piped, prints tab-separated lines: id, name, location, expiry, earliest time at which the device may renew by
    itself.
    """
    answer = portal.client.read_pages("/devices", "devices", status="active", expires_before=within)
    devices = sorted(answer["devices"], key=lambda device: str(device.get("expires_at")))
    portal.out.table(
        {"devices": devices},
        "devices",
        {
            "id": "device_id",
            "name": "name",
            "location": "location",
            "expires": date_of("expires_at", expiry=True),
            "renewable": _renewable,
        },
        empty=f"No active device has a certificate that expires before {within[:10]}.",
        spare=("location", "renewable"),
    )
    if devices:
        portal.out.next_step("portal renew ID")


def _renewable(row: Mapping[str, Any]) -> Cell:
    """Return the cell for when a device may renew by itself; ``now`` for people if that time has come."""
    start = row.get("renewable_from")
    cell = moment(start, short=True)
    try:
        begun = datetime.fromisoformat(str(start)) <= datetime.now(UTC)
    except (ValueError, TypeError):
        return cell
    return Cell(cell.plain, "now", "green") if begun else cell


@command("show", examples=["portal show sensor-7", "portal show sensor-7 --snippet python > device.py"])
@device_argument()
@click.option("--snippet", type=click.Choice(SNIPPETS), help="Print a program for the device.")
def show(portal: Remote, device_id: str, snippet: str | None) -> None:
    """Show a device: certificate, broker state, topics."""
    device = portal.client.get(f"/devices/{device_id}")
    if snippet is None:
        show_client(portal, device)
    elif portal.out.as_json:
        portal.out.json({"snippet": snippet, "program": snippet_for(device, snippet)})
    else:
        portal.out.raw(snippet_for(device, snippet))


def show_client(portal: Remote, device: dict[str, Any], *, done: str = "", about: str = "device_id") -> None:
    """Show a device, or an application; ``about`` is the name of its id."""
    fields: dict[str, Cell] = {about: text(device.get(about))}
    shown_below = {about, "certificate", "topics", "metadata", "connection", "attestation", "brokers"}
    for name, value in device.items():
        if name not in shown_below:
            fields[name] = _value(name, value, device)
    fields |= {name: _value(name, value, device) for name, value in connection_in_words(device).items()}
    for key, value in _items(device.get("metadata")):
        fields[f"metadata.{key}"] = text(value)
    for index, topic in enumerate(topics_in_words(device)):
        fields[f"topics.{index}"] = Cell(topic)
    for name, value in _items(device.get("attestation")):
        shown = "; ".join(map(str, value)) if isinstance(value, list) else value
        if name != "claims":
            fields[f"attestation.{name}"] = _value(name, shown, device)
    for name, value in _items(device.get("certificate")):
        if name not in ("pem", "certificate", "chain"):
            fields[f"certificate.{name}"] = _value(name, value, device)
    portal.out.result(device, fields, done=done)


def topics_in_words(device: Mapping[str, Any]) -> list[str]:
    """Return the topics of a device or application as --topic takes them."""
    topics = device.get("topics") or ()
    return [f"{topic.get('filter')}:{topic.get('access')}" for topic in topics if isinstance(topic, dict)]


def _items(value: object) -> list[tuple[str, Any]]:
    return list(value.items()) if isinstance(value, dict) else []


def _value(name: str, value: object, device: dict[str, Any]) -> Cell:
    if name in ("status", "broker"):
        return state(value)
    if name in ("expires_at", "not_after"):
        return moment(value, expiry=device.get("status") != "revoked")
    if name.endswith("_at") or name in ("not_before", "renewable_from", "connected_since", "last_seen"):
        return moment(value)
    if isinstance(value, list):
        return text(" ".join(map(str, value)) or None)
    return text(value)


@command("certificates", examples=["portal certificates sensor-7"])
@device_argument()
def certificates(portal: Remote, device_id: str) -> None:
    """List a device's certificates, newest first.

    When piped, prints tab-separated lines: serial number, status, issued, expiry, revoked, reason, fingerprint.
    """
    answer = portal.client.get(f"/devices/{device_id}/certificates")
    portal.out.table(
        answer,
        "certificates",
        {
            "serial number": "serial_number",
            "status": status_of,
            "issued": date_of("issued_at"),
            "expires": lambda row: moment(row.get("not_after"), expiry=row.get("status") == "active", short=True),
            "revoked": date_of("revoked_at"),
            "reason": "revocation_reason",
            "fingerprint": "fingerprint",
        },
        empty="This device has no certificates.",
        spare=("reason", "fingerprint"),
    )
