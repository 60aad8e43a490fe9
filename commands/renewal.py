"""The command that gives devices new certificates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from commands.context import Remote, command
from commands.many import Act, act_on_many, many_devices, single
from commands.registration import Operation, issue, issuing_options
from commands.times import OVERLAP

RENEWED_AT_ONCE = 50  # in one call: each device gets a key and an encrypted bundle
_OF_ONE = ("csr", "out", "password_file", "password_out", "idempotency_key")


@command(
    "renew",
    examples=[
        "portal renew sensor-7 --out sensor-7-new",
        "portal renew sensor-7 --csr sensor-7.csr --out sensor-7-new",
        "portal renew sensor-7 --overlap 0",
        "portal renew --group pilots --expires-before 30d --results renewed.ndjson",
    ],
)
@many_devices
@OVERLAP
@click.option("--when-used", is_flag=True, help="Revoke the old certificate once the new one has been used.")
@issuing_options
def renew(
    portal: Remote,
    /,
    devices: tuple[str, ...],
    results: Path | None,
    yes: bool,
    when_used: bool,
    **options: Any,
) -> None:
    """Issue new certificates for devices.

    The new certificate is valid at once. It is delivered in a bundle as after a registration, or issued for the
    device's own CSR. The old certificate is revoked when the overlap ends, after 24 hours by default. Of many devices
    the links and bundle passwords are in FILE (0600), or with --json in the answer, and nowhere else.
    """
    wanted = {name: options.pop(name) for name in (*_RENEWAL, *_OF_ONE, "force")}
    device_id = single(portal, devices, options, results)
    wanted["revoke_previous"] = "when_used" if when_used else None
    if device_id is not None:
        path = f"/devices/{device_id}/renew"
        issue(portal, Operation(path, "Renewing…", "Renewed", "is renewed", names_known=True), wanted)
        return
    if any(wanted[name] is not None for name in _OF_ONE):
        raise click.UsageError("Use --csr, --out, --password-file, --password-out, --idempotency-key for one device.")
    if results is None and not portal.out.as_json:
        raise click.UsageError("Add --results FILE for the links and bundle passwords, which are shown only once.")
    renewal = {name: wanted[name] for name in (*_RENEWAL, "revoke_previous") if wanted[name] is not None}
    more = {"renewal": renewal} if renewal else {}
    act = Act("renew", "Renew", "Renewing", "Renewed", "", more, RENEWED_AT_ONCE, is_kept=True)
    act_on_many(portal, act, devices, options, results, yes=yes)
    if results is not None:
        portal.out.note(f"The links and bundle passwords are in {results}.")


_RENEWAL = ("key_type", "validity_days", "bundle_format", "overlap_hours")
