"""The commands about tenants, for the role system: several fleets in one installation, apart from each other."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from commands.completing import Listed
from commands.context import (
    FORCE_HELP,
    YES,
    Number,
    Remote,
    command,
    confirm,
    create_with_secret,
    group,
    option_group,
    output_file,
    require_confirmable,
    saved_in,
)
from commands.errors import CheckFailed, CliError
from commands.files import whole_file
from commands.lifecycle import show_outcome
from commands.names import Label
from commands.output import Cell, date_of, moment, state, text
from commands.times import Span
from commands.vocabulary import FORMATS, KEY_TYPES

CHOICES = ("device_days", "key_type", "bundle_format", "link_hours")
QUOTAS = ("devices", "registrations_per_minute", "bulk_uploads", "webhook_deliveries_per_minute")
_NUMBER = Number(1, 1_000_000_000)


class TenantName(Label):
    """The name of a tenant, which is a DNS label."""

    listed = Listed("/tenants", "tenants", "name", "status")


def choice_options() -> Callable[[Any], Any]:
    """Return the options of what a tenant chooses, and how much it may take."""
    return option_group(
        click.option(
            "--validity",
            "device_days",
            type=Span("d", 36500),
            metavar="DURATION",
            help="Validity of certificates if none is asked for, such as 90d.",
        ),
        click.option("--key-type", type=click.Choice(KEY_TYPES), help="Type of the devices' keys."),
        click.option(
            "--format", "bundle_format", type=click.Choice(FORMATS), help="Bundle format if none is asked for."
        ),
        click.option(
            "--link-validity",
            "link_hours",
            type=Span("h", 8760),
            metavar="DURATION",
            help="Validity of download links, such as 12h.",
        ),
        click.option(
            "--max-devices", "devices", type=_NUMBER, metavar="N", help="Maximum number of devices and applications."
        ),
        click.option(
            "--max-registrations",
            "registrations_per_minute",
            type=_NUMBER,
            metavar="N",
            help="Maximum registrations a minute.",
        ),
        click.option("--max-uploads", "bulk_uploads", type=_NUMBER, metavar="N", help="Maximum imports at a time."),
        click.option(
            "--max-deliveries",
            "webhook_deliveries_per_minute",
            type=_NUMBER,
            metavar="N",
            help="Maximum events sent to its webhooks a minute.",
        ),
    )


def _parts(options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return choices and quotas of a request: the options that were used."""
    used = {name: value for name, value in options.items() if value is not None}
    parts = {
        part: {name: used[name] for name in names if name in used}
        for part, names in (("choices", CHOICES), ("quotas", QUOTAS))
    }
    return {part: values for part, values in parts.items() if values}


@group("tenant")
def tenant() -> None:
    """Tenants: list, show, add, update, suspend, resume, remove."""


@command("list", tenant, examples=["portal tenant list"])
def tenant_list(portal: Remote) -> None:
    """List tenants by name.

    When piped, prints tab-separated lines: name, status, topic prefix, created.
    """
    portal.out.table(
        portal.client.get("/tenants"),
        "tenants",
        {
            "name": "name",
            "status": lambda row: state(row.get("status")),
            "topics": "topic_prefix",
            "created": date_of("created_at"),
        },
        empty="No tenants.",
        spare=("created",),
    )


@command("show", tenant, examples=["portal tenant show acme"])
@click.argument("name", type=TenantName(), help="Name of the tenant.")
def tenant_show(portal: Remote, name: str) -> None:
    """Show a tenant."""
    _show(portal, portal.client.get(f"/tenants/{name}"))


@command(
    "add",
    tenant,
    examples=[
        "portal tenant add acme --topic-prefix sites/acme --token-out acme.token",
        "portal tenant add test --validity 30d --max-devices 100 --own-root",
    ],
)
@click.argument("name", type=TenantName(), help="Name of the tenant: a DNS label.")
@click.option("--topic-prefix", metavar="PREFIX", help="What its devices' topics begin with.  [default: its name]")
@choice_options()
@click.option("--own-root", is_flag=True, help="Create a root CA of its own, too.")
@click.option("--token-out", metavar="FILE", help="Write its admin's token to FILE (new, 0600).")
def tenant_add(
    portal: Remote, /, name: str, topic_prefix: str | None, own_root: bool, token_out: str | None, **options: Any
) -> None:
    """Add a tenant with a CA, topics and operators of its own.

    The token of its first admin is shown once, and valid for a day. The broker needs the guard.
    """
    body: dict[str, Any] = {"name": name, **_parts(options)}
    body |= {"topic_prefix": topic_prefix} if topic_prefix is not None else {}
    body |= {"own_root": True} if own_root else {}

    def fields(answer: dict[str, Any]) -> dict[str, Cell]:
        known = {field: text(answer.get(field)) for field in ("name", "topic_prefix", "est_label")}
        return known | {"token_expires_at": moment(answer.get("token_expires_at"), expiry=True)}

    done = f"Added the tenant {name}"
    answer = create_with_secret(
        portal, "/tenants", body, shown_once="token", save_in=token_out, done=done, fields=fields
    )
    for problem in ("ca_problem", "broker_problem"):
        if answer.get(problem):
            portal.out.warning(str(answer[problem]))
    portal.out.next_step(f"portal login --token-file {shlex.quote(token_out or 'FILE')}")


@command(
    "update",
    tenant,
    examples=["portal tenant update acme --max-devices 5000", "portal tenant update acme --clear link_hours"],
)
@click.argument("name", type=TenantName(), help="Name of the tenant.")
@choice_options()
@click.option(
    "--clear",
    type=click.Choice((*CHOICES, *QUOTAS)),
    multiple=True,
    metavar="NAME",
    help="Remove this choice or quota. Repeatable.",
)
def tenant_update(portal: Remote, /, name: str, clear: tuple[str, ...], **options: Any) -> None:
    """Change what a tenant chooses, and how much it may take.

    It applies to what is asked for from then on.
    """
    if any(options[field] is not None for field in clear):
        raise click.UsageError("Use either an option or --clear for the same field.")
    changes = _parts(options)
    for field in clear:
        changes.setdefault("choices" if field in CHOICES else "quotas", {})[field] = None
    if not changes:
        raise click.UsageError("Nothing to change: use at least one of --validity, --max-devices, --clear, …")
    answer = portal.client.call("PATCH", f"/tenants/{name}", body=changes).json()
    _show(portal, answer, done=f"Changed {', '.join(field for part in changes.values() for field in part)} of {name}")


@command("suspend", tenant, examples=["portal tenant suspend acme", "portal tenant suspend acme --yes"])
@click.argument("name", type=TenantName(), help="Name of the tenant.")
@YES
def tenant_suspend(portal: Remote, name: str, yes: bool) -> None:
    """Serve nobody of a tenant, and disconnect its devices.

    Resuming it brings all of them back.
    """
    if not yes:
        _ask_whether_to_suspend(portal, name)
    _move(portal, name, "suspend", "Suspended")


@command("resume", tenant, examples=["portal tenant resume acme"])
@click.argument("name", type=TenantName(), help="Name of the tenant.")
def tenant_resume(portal: Remote, name: str) -> None:
    """Resume a suspended tenant, with all that it had."""
    _move(portal, name, "resume", "Resumed")


def _ask_whether_to_suspend(portal: Remote, name: str) -> None:
    """Say what suspending a tenant does, and ask once, unless it is suspended already."""
    require_confirmable()
    known = portal.client.get(f"/tenants/{name}")
    if known.get("status") != "active":
        return  # the portal says what is wrong, or nothing changes
    portal.out.question({"Name": text(known.get("name")), "Topics": text(known.get("topic_prefix"))})
    portal.out.warning(
        "The broker will disconnect all its devices and applications, and the portal will refuse its operators,"
        " enrolments and links, until it is resumed."
    )
    confirm("Suspend this tenant?", yes=False)


def _move(portal: Remote, name: str, action: str, done: str) -> None:
    with portal.out.working("Waiting for the broker…"):
        answer = portal.client.call("POST", f"/tenants/{name}/{action}", repeatable=True).json()
    show_outcome(portal, f"{done} the tenant {name}", answer, about="name")
    _warn_if_pending(portal, answer)


@command(
    "remove",
    tenant,
    examples=["portal tenant remove acme --export acme.ndjson", "portal tenant remove acme --confirm acme"],
)
@click.argument("name", type=TenantName(), help="Name of the tenant.")
@click.option("--confirm", "typed", metavar="NAME", help="The name again; asked for if it is left out.")
@click.option("--export", "file", type=click.Path(path_type=Path, dir_okay=False), help="Save what is known of it.")
@click.option("--force", is_flag=True, help=FORCE_HELP)
def tenant_remove(portal: Remote, name: str, typed: str | None, file: Path | None, force: bool) -> None:
    """Remove a tenant permanently.

    All its devices are revoked at once; its data is deleted after a time of grace, until which it can be exported. This
    cannot be undone.
    """
    if file is not None and not force and file.exists():
        raise CheckFailed(f"{file} already exists; use --force to replace it.")
    if typed is None:
        if not sys.stdin.isatty():
            raise click.UsageError(f"There is no terminal to ask for confirmation; add --confirm {name}.")
        typed = click.prompt(f"This revokes all devices of {name} for good. Type the tenant's name", err=True)
    if typed != name:
        raise CliError("This is not the name of the tenant. Nothing was changed.")
    with portal.out.working("Removing; waiting for the broker…"):
        answer = portal.client.call("DELETE", f"/tenants/{name}", params={"confirm": typed}).json()
        if file is not None:
            _save_export(portal, name, file)
    show_outcome(portal, f"Removed the tenant {name}", answer, "devices_left", "deleted_after", about="name")
    _warn_if_pending(portal, answer)
    portal.out.note(f"Saved what was known of it in {file}." if file is not None else "It can still be exported.")


@command("export", tenant, examples=["portal tenant export acme --out acme.ndjson"])
@click.argument("name", type=TenantName(), help="Name of the tenant.")
@output_file("Save it in FILE.")
@click.option("--force", is_flag=True, help=FORCE_HELP)
def tenant_export(portal: Remote, name: str, out: Path | None, file: Path | None, force: bool) -> None:
    """Save a removed tenant's devices and audit record.

    With its certificates, a JSON object a line; without keys and bundles. It can be exported until its data is deleted.
    """
    path = saved_in(out, file, force=force)
    size = _save_export(portal, name, path)
    portal.out.result({"file": str(path), "size": size}, done=f"Saved the tenant {name} in {path}")


def _save_export(portal: Remote, name: str, file: Path) -> int:
    """Save what is known of a tenant; return how many bytes that is."""
    size = 0
    with whole_file(file) as writer:
        for part in portal.client.stream(f"/tenants/{name}/export"):
            writer.write(part)
            size += len(part)
    return size


def _warn_if_pending(portal: Remote, answer: dict[str, Any]) -> None:
    if answer.get("broker_problem"):
        portal.out.warning(str(answer["broker_problem"]))
    if answer.get("broker") != "enforced":
        portal.out.warning("The broker does not enforce this yet. The portal keeps trying; see: portal status")


def _show(portal: Remote, answer: dict[str, Any], *, done: str = "") -> None:
    fields = {name: text(answer.get(name)) for name in ("name", "topic_prefix", "est_label")}
    fields |= {"status": state(answer.get("status")), "created_at": moment(answer.get("created_at"))}
    for part in ("choices", "quotas"):
        set_ones = {name: value for name, value in (answer.get(part) or {}).items() if value is not None}
        fields[part] = text(", ".join(f"{name} {value}" for name, value in set_ones.items()))
    portal.out.result(answer, fields, done=done)
