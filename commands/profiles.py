"""The commands about certificate profiles: which certificates devices may have, and which names these hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import click

from commands.context import YES, Remote, command, confirm, group, option_group
from commands.names import ProfileName
from commands.output import Cell, moment, text
from commands.times import Span
from commands.vocabulary import KEY_TYPES

FIELDS = (
    "name", "default_days", "max_days", "key_types", "extended_key_usage", "dns_names", "ip_addresses",
    "organization", "organizational_unit", "serial_number", "updated_at",
)  # fmt: skip
CLEARED: Mapping[str, Any] = {
    "default_days": None,
    "max_days": None,
    "dns_names": [],
    "ip_addresses": [],
    "organization": None,
    "organizational_unit": None,
    "serial_number": None,
}


_SPAN = Span("d", 36500)


def rule_options(*, new: bool) -> Callable[[Any], Any]:
    """Return the options of a profile's rules; those of a ``new`` one have defaults."""
    return option_group(
        click.option(
            *("--default-validity", "--default-days", "default_days"),
            type=_SPAN,
            metavar="DURATION",
            help="Validity if none is asked for, such as 90d.",
        ),
        click.option(
            *("--max-validity", "--max-days", "max_days"),
            type=_SPAN,
            metavar="DURATION",
            help="Longest validity, such as 365d.",
        ),
        click.option(
            "--key-type",
            "key_types",
            type=click.Choice(KEY_TYPES),
            multiple=True,
            help="Allowed type of key. Repeatable.",
        ),
        click.option(
            "--server-auth/--no-server-auth",
            default=None,
            help=f"Whether devices may also be TLS servers.{'  [default: not]' if new else ''}",
        ),
        click.option(
            "--dns-name",
            "dns_names",
            metavar="NAME",
            multiple=True,
            help="DNS name, such as {name}.devices.example.com. Repeatable.",
        ),
        click.option(
            "--ip-address", "ip_addresses", metavar="ADDRESS", multiple=True, help="Such as {metadata.ip}. Repeatable."
        ),
        click.option("--organization", metavar="TEXT", help="O in the subject."),
        click.option("--organizational-unit", metavar="TEXT", help="OU in the subject, such as {location}."),
        click.option("--serial-number", metavar="TEXT", help="serialNumber in the subject, such as {serial}."),
    )


def _rules(options: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a request: the options that were used."""
    server_auth = options.pop("server_auth")
    rules = {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
    rules = {name: value for name, value in rules.items() if value not in (None, [])}
    if server_auth is not None:
        rules["extended_key_usage"] = ["client_auth", *(["server_auth"] if server_auth else [])]
    return rules


@group("profile")
def profile() -> None:
    """Certificate profiles: list, show, add, update, remove."""


@command("list", profile, examples=["portal profile list"])
def profile_list(portal: Remote) -> None:
    """List certificate profiles, the built-in one first.

    When piped, prints tab-separated lines: name, extended key usage, longest validity in days, DNS names, IP addresses.
    """
    portal.out.table(
        portal.client.get("/profiles"),
        "profiles",
        {
            "name": "name",
            "usage": lambda row: _words(row.get("extended_key_usage")),
            "max days": "max_days",
            "dns names": lambda row: _words(row.get("dns_names")),
            "addresses": lambda row: _words(row.get("ip_addresses")),
        },
        empty="No certificate profiles.",
        spare=("addresses", "max days", "usage"),
    )


@command("show", profile, examples=["portal profile show tls-server"])
@click.argument("name", type=ProfileName(), help="Name of the profile.")
def profile_show(portal: Remote, name: str) -> None:
    """Show a certificate profile."""
    _show(portal, portal.client.get(f"/profiles/{name}"))


@command(
    "add",
    profile,
    examples=[
        "portal profile add tls-server --server-auth --dns-name '{name}.devices.example.com' --max-validity 90d",
        "portal profile add plant-4 --organization ACME --serial-number '{external_id}' --key-type ec-p384",
    ],
)
@click.argument("name", type=ProfileName(), help="Name of the profile.")
@rule_options(new=True)
def profile_add(portal: Remote, /, name: str, **options: Any) -> None:
    """Add a certificate profile.

    In names and attributes {id}, {name}, {external_id}, {type}, {location}, {firmware}, {metadata.KEY} and {serial}
    (the serial number that a device enrolled with) are replaced by the device's values.
    """
    answer = portal.client.call("POST", "/profiles", body={"name": name, **_rules(options)}).json()
    _show(portal, answer, done=f"Added the certificate profile {name}")
    portal.out.next_step(f"portal register NAME --type … --location … --firmware … --profile {name}")


@command(
    "update",
    profile,
    examples=[
        "portal profile update tls-server --max-validity 30d",
        "portal profile update tls-server --clear max_days",
    ],
)
@click.argument("name", type=ProfileName(), help="Name of the profile.")
@rule_options(new=False)
@click.option("--clear", type=click.Choice(list(CLEARED)), multiple=True, help="Remove this rule. Repeatable.")
def profile_update(portal: Remote, /, name: str, clear: tuple[str, ...], **options: Any) -> None:
    """Change a certificate profile.

    It applies to certificates that are issued from then on, also by renewals. An option that is repeatable replaces all
    values of its kind.
    """
    rules = _rules(options)
    if set(rules) & set(clear):
        raise click.UsageError("Use either a rule's option or --clear.")
    changes = rules | {field: CLEARED[field] for field in clear}
    if not changes:
        raise click.UsageError("Nothing to change: use at least one of --max-validity, --dns-name, --clear, …")
    answer = portal.client.call("PATCH", f"/profiles/{name}", body=changes).json()
    _show(portal, answer, done=f"Changed {', '.join(changes)} of {name}")


@command("remove", profile, examples=["portal profile remove tls-server"])
@click.argument("name", type=ProfileName(), help="Name of the profile.")
@YES
def profile_remove(portal: Remote, name: str, yes: bool) -> None:
    """Remove a certificate profile that is not used any more."""
    confirm(f"Remove the certificate profile {name}?", yes=yes)
    answer = portal.client.call("DELETE", f"/profiles/{name}").json()
    portal.out.result(answer, done=f"Removed the certificate profile {name}")


def _words(values: Any) -> Cell:
    return text(" ".join(map(str, values or ())))


def _show(portal: Remote, answer: dict[str, Any], *, done: str = "") -> None:
    fields = {name: _words(answer[name]) if isinstance(answer.get(name), list) else text(answer.get(name))
              for name in FIELDS}  # fmt: skip
    portal.out.result(answer, fields | {"updated_at": moment(answer.get("updated_at"))}, done=done)
