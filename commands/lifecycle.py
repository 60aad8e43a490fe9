"""The commands for a device's way through its life."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from commands.context import DEVICE_ID, Command, Portal
from commands.devices import Expiry, read_pages
from commands.files import read_input, read_secret
from commands.formats import FORMATS
from commands.output import Cell, moment, state, text
from commands.registration import KEY_TYPES, Asking, ask_by_csr, ask_for_bundle


@click.command("suspend", cls=Command, examples=["portal suspend 0f9d2c4e-5b1a-4c7d-9e8f-102030405060"])
@click.argument("device_id", metavar="ID", type=DEVICE_ID, help="The device's id, in full.")
@click.pass_obj
def suspend(portal: Portal, device_id: str) -> None:
    """Put a device out until it is resumed.

    Its certificate is put on hold, its session at the broker is cut. portal resume undoes it.
    """
    with portal.out.working("Suspending, until the broker obeys…"):
        answer = portal.client.call("POST", f"/devices/{device_id}/suspend").json()
    _show(portal, answer, done="Suspended")
    if answer.get("broker") == "enforced":
        portal.out.note("The broker has cut its session, and refuses its certificate until you resume it.")
    else:
        portal.out.warning(
            "THE BROKER DOES NOT ENFORCE THIS YET: the device may still be connected. "
            "The portal goes on trying; see what keeps it with: portal status"
        )


@click.command("resume", cls=Command, examples=["portal resume 0f9d2c4e-5b1a-4c7d-9e8f-102030405060"])
@click.argument("device_id", metavar="ID", type=DEVICE_ID, help="The device's id, in full.")
@click.pass_obj
def resume(portal: Portal, device_id: str) -> None:
    """Let a suspended device back in, with what it has."""
    with portal.out.working("Resuming, until the broker knows…"):
        answer = portal.client.call("POST", f"/devices/{device_id}/resume").json()
    _show(portal, answer, done="Resumed")
    if answer.get("broker") != "enforced":
        portal.out.warning("The broker does not know this yet; the portal goes on trying. See: portal status")


def _show(portal: Portal, answer: dict[str, Any], *, done: str) -> None:
    if portal.out.as_json:
        portal.out.json(answer)
    else:
        portal.out.done(f"{done} {answer.get('device_id')}")
        fields = {"device_id": text(answer.get("device_id")), "status": state(answer.get("status"))}
        if answer.get("suspended_at"):
            fields["suspended_at"] = moment(answer.get("suspended_at"))
        portal.out.fields(fields | {"broker": state(answer.get("broker"))})
    if answer.get("broker_problem"):
        portal.out.warning(str(answer["broker_problem"]))


@click.command(
    "renew",
    cls=Command,
    examples=[
        "portal renew 0f9d2c4e-5b1a-4c7d-9e8f-102030405060 --out sensor-7-new",
        "portal renew 0f9d2c4e-5b1a-4c7d-9e8f-102030405060 --csr sensor-7.csr --out sensor-7-new",
        "portal renew 0f9d2c4e-5b1a-4c7d-9e8f-102030405060 --overlap-hours 0",
    ],
)
@click.argument("device_id", metavar="ID", type=DEVICE_ID, help="The device's id, in full.")
@click.option("--key-type", type=click.Choice(KEY_TYPES), help="Kind of key; the portal's default if not given.")
@click.option("--days", type=click.IntRange(1, 36500), metavar="DAYS", help="Life of the new certificate.")
@click.option(
    "--overlap-hours",
    type=click.IntRange(0, 8760),
    metavar="HOURS",
    help="How long the old one goes on; 0: not at all.",
)
@click.option("--when-used", is_flag=True, help="End the old one once the portal has seen the new one in use.")
@click.option("--format", "format_", type=click.Choice(FORMATS), help="How the bundle is packed; zip if not given.")
@click.option("--csr", metavar="FILE", help="The device's own request (PKCS#10, PEM); its key stays where it is.")
@click.option(
    "--password-file", metavar="FILE", help="File with a password to use for the bundle; - for standard input."
)
@click.option("--password-out", metavar="FILE", help="New file (0600) for the password that the portal made.")
@click.option("--out", metavar="FOLDER", type=click.Path(path_type=Path), help="Fetch and unpack at once, into FOLDER.")
@click.option("--force", is_flag=True, help="Replace files that are there.")
@click.option(
    "--idempotency-key", metavar="KEY", help="Repeat an earlier call within 24 hours, to get its answer again."
)
@click.pass_obj
def renew(
    portal: Portal,
    device_id: str,
    key_type: str | None,
    days: int | None,
    overlap_hours: int | None,
    when_used: bool,
    format_: str | None,
    csr: str | None,
    password_file: str | None,
    password_out: str | None,
    out: Path | None,
    force: bool,
    idempotency_key: str | None,
) -> None:
    """Give a device a new certificate; the old one goes on.

    The new one works at once, in a bundle as after a registration or for the device's own CSR. The old one works on
    until the overlap is over, a day if not told otherwise, and is then revoked.
    """
    if csr is not None and (key_type or format_ or password_file or password_out):
        options = "--key-type, --format, --password-file or --password-out"
        raise click.UsageError(f"With --csr there is no bundle, so no {options}.")
    if password_file and password_out:
        raise click.UsageError("Give --password-file for a password of your own, or --password-out for the portal's.")
    optional = {
        "key_type": key_type,
        "validity_days": days,
        "overlap_hours": overlap_hours,
        "revoke_previous": "when_used" if when_used else None,
        "bundle_format": format_,
        "bundle_password": read_secret(password_file, "password") if password_file else None,
    }
    body = {field: value for field, value in optional.items() if value is not None}
    asking = Asking(f"/devices/{device_id}/renew", "Renewing…", "Renewed", "is renewed")
    if csr is not None:
        ask_by_csr(portal, asking, body, read_input(csr), out, force, idempotency_key)
    else:
        ask_for_bundle(portal, asking, body, password_out, out, force, idempotency_key)


@click.command(
    "expiring",
    cls=Command,
    examples=["portal expiring", "portal expiring --within 90d", "portal expiring | cut -f1 | xargs -n1 portal renew"],
)
@click.option("--within", type=Expiry(), default="30d", show_default=True, metavar="TIME", help="Days, date or time.")
@click.pass_obj
def expiring(portal: Portal, within: str) -> None:
    """List the devices whose certificates end soon, soonest first.

    Piped, each is a line of tab-separated columns: id, name, location, expiry, from when it may renew by itself.
    """
    filters: dict[str, str | None] = {"status": "active", "expires_before": within}
    devices, _ = read_pages(portal, "/devices", "devices", most=None, cursor=None, filters=filters)
    devices.sort(key=lambda device: str(device.get("expires_at")))
    if portal.out.as_json:
        portal.out.json({"devices": devices})
        return
    rows = [
        (
            text(device.get("device_id")),
            text(device.get("name")),
            text(device.get("location")),
            moment(device.get("expires_at"), expiry=True, short=True),
            _window(device.get("renewable_from")),
        )
        for device in devices
    ]
    portal.out.table(
        ("id", "name", "location", "expires", "renews"),
        rows,
        empty="No certificate of a device that is in ends that soon.",
        spare=("location", "renews"),
    )
    if rows:
        portal.out.next_step("portal renew ID")


def _window(opens: object) -> Cell:
    """From when a device may renew by itself, for people ``now`` where that time has come."""
    cell = moment(opens, short=True)
    try:
        begun = datetime.fromisoformat(str(opens)) <= datetime.now(UTC)
    except (ValueError, TypeError):
        return cell
    return Cell(cell.plain, "now", "green") if begun else cell
