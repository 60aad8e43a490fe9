"""The commands about groups: named sets of devices, which --group takes wherever devices are filtered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from commands.context import YES, Remote, command, confirm, option_group, topics_from
from commands.context import group as command_group
from commands.devices import STATUSES, VERDICTS, connection_options, topics_in_words
from commands.enrolment import ATTESTATION_HELP, policy_from
from commands.many import AT_ONCE, named_devices
from commands.names import DEVICE, GroupName, ProfileName
from commands.output import Cell, text
from commands.times import VALIDITY, Span

NAME = click.argument("name", type=GroupName(), help="Name of the group.")
MEMBERS = click.argument(
    "devices",
    metavar="DEVICE...",
    nargs=-1,
    type=DEVICE,
    required=True,
    help="Name, id, external id, or the beginning of the id; - for one a line on standard input.",
)
TOPICS = click.option(
    "--topic", "topics", metavar="FILTER:ACCESS", multiple=True, help="Topics of its members. Repeatable."
)
# A saved filter: the options of a list that say the same tomorrow.
saved_filter_options = option_group(
    click.option("--status", type=click.Choice(STATUSES), help="Devices with this status."),
    click.option("--type", metavar="TYPE", help="Devices of this type."),
    click.option("--location", metavar="PLACE", help="Devices at this location."),
    click.option("--search", "q", metavar="TEXT", help="Devices with TEXT in name, external id or metadata."),
    click.option("--metadata", metavar="KEY=VALUE", help="Devices with this value in their metadata."),
    click.option("--profile", type=ProfileName(), metavar="NAME", help="Devices with this certificate profile."),
    click.option("--attested", type=click.Choice(VERDICTS), help="Devices with this verdict on their evidence."),
    click.option(
        "--expires-within",
        "expires_within_days",
        type=Span("d", 36500),
        metavar="DURATION",
        help="Devices whose certificate ends within so many days, such as 30d.",
    ),
    connection_options,
)


@command_group("group")
def group() -> None:
    """Groups: list, show, add, update, remove, and their members."""


@command("list", group, examples=["portal group list"])
def group_list(portal: Remote) -> None:
    """List groups.

    When piped, prints tab-separated lines: name, number of members or the filter, description, topics separated by
    spaces, days that members' certificates are valid.
    """
    portal.out.table(
        portal.client.get("/groups"),
        "groups",
        {
            "name": "name",
            "devices": _devices,
            "description": "description",
            "topics": lambda row: text(" ".join(topics_in_words(row))),
            "days": "validity_days",
        },
        empty="No groups yet.",
        spare=("description", "topics", "days"),
    )


@command("show", group, examples=["portal group show pilots"])
@NAME
def group_show(portal: Remote, name: str) -> None:
    """Show a group: who is in it, and what it sets for them."""
    _show(portal, portal.client.get(f"/groups/{name}"))
    portal.out.next_step(f"portal list --group {name}")


@command(
    "add",
    group,
    examples=[
        "portal group add pilots --description 'First to get new firmware'",
        "portal group add hall-2 --location 'Hall 2' --status active",
        "portal group add gateways --topic 'devices/{id}/#:readwrite' --topic devices/news:read --validity 90d",
    ],
)
@NAME
@click.option("--description", metavar="TEXT", help="What it is for.")
@saved_filter_options
@TOPICS
@VALIDITY
def group_add(
    portal: Remote,
    /,
    name: str,
    description: str | None,
    topics: tuple[str, ...],
    validity_days: int | None,
    **conditions: str | int | None,
) -> None:
    """Add a group of devices.

    With conditions its devices are those that fit them when they are asked for. Without, it has the members that portal
    group add-members gives it, and can set topics and the life of certificates for them: for topics, where a device has
    none of its own, at once; for certificates, from the next one on.
    """
    body: dict[str, Any] = {"name": name, "description": description, "validity_days": validity_days}
    body |= {"topics": topics_from(topics) or None, "filter": _given(conditions) or None}
    answer = portal.client.call("POST", "/groups", body=_given(body)).json()
    _show(portal, answer, done=f"Added the group {name}")
    portal.out.next_step(
        f"portal list --group {name}" if body["filter"] else f"portal group add-members {name} DEVICE…"
    )


@command(
    "update",
    group,
    examples=[
        "portal group update gateways --topic 'devices/{id}/#:write'",
        "portal group update gateways --no-topics",
    ],
)
@NAME
@click.option("--description", metavar="TEXT", help="What it is for.")
@TOPICS
@click.option("--no-topics", is_flag=True, help="Set no topics any more: members have the default ones.")
@VALIDITY
@click.option("--no-validity", is_flag=True, help="Set no life of certificates any more.")
@click.option("--attestation", metavar="FILE", help=ATTESTATION_HELP)
@click.option("--no-attestation", is_flag=True, help="Set no appraisal policy any more.")
@saved_filter_options
def group_update(
    portal: Remote,
    /,
    name: str,
    description: str | None,
    topics: tuple[str, ...],
    no_topics: bool,
    validity_days: int | None,
    no_validity: bool,
    attestation: str | None,
    no_attestation: bool,
    **conditions: str | int | None,
) -> None:
    """Change a group.

    Conditions replace those that it has. Members have other topics at once; what they lose is refused by the broker.
    """
    if (topics and no_topics) or (validity_days and no_validity) or (attestation and no_attestation):
        raise click.UsageError("Use an option or the one that takes it away, not both.")
    changes: dict[str, Any] = _given({"description": description, "validity_days": validity_days})
    changes |= {"filter": _given(conditions)} if _given(conditions) else {}
    changes |= {"topics": topics_from(topics) or None} if topics or no_topics else {}
    changes |= {"validity_days": None} if no_validity else {}
    if attestation or no_attestation:
        changes["attestation"] = policy_from(attestation) if attestation else None
    if not changes:
        raise click.UsageError("Nothing to change: use at least one of --description, --topic, --validity, …")
    with portal.out.working("Changing; waiting for the broker…"):
        answer = portal.client.call("PATCH", f"/groups/{name}", body=changes).json()
    _show(portal, answer, done=f"Changed {', '.join(changes)} of {name}")
    _say_whether_enforced(portal, answer)


@command(
    "add-members",
    group,
    examples=["portal group add-members pilots pump-1 pump-2", "portal group add-members pilots -"],
)
@NAME
@MEMBERS
def group_add_members(portal: Remote, /, name: str, devices: tuple[str, ...]) -> None:
    """Add devices to a group."""
    _change_members(portal, name, "add", devices)


@command("remove-members", group, examples=["portal group remove-members pilots pump-1"])
@NAME
@MEMBERS
def group_remove_members(portal: Remote, /, name: str, devices: tuple[str, ...]) -> None:
    """Remove devices from a group, with its topics."""
    _change_members(portal, name, "remove", devices)


def _change_members(portal: Remote, name: str, act: str, devices: Sequence[str]) -> None:
    ids = list(named_devices(portal, devices))
    answer: dict[str, Any] = {}
    total = {"added": 0, "removed": 0}
    with portal.out.working("Changing; waiting for the broker…"):
        for start in range(0, len(ids), AT_ONCE):
            body = {act: ids[start : start + AT_ONCE]}
            answer = portal.client.call("POST", f"/groups/{name}/members", body=body, repeatable=True).json()
            total = {done: count + int(answer.get(done) or 0) for done, count in total.items()}
    answer |= total
    changed = total["added"] or total["removed"]
    word = "Added" if act == "add" else "Removed"
    _show(
        portal, answer, done=f"{word} {changed} device{'s' * (changed != 1)} {'to' if act == 'add' else 'from'} {name}"
    )
    _say_whether_enforced(portal, answer)


@command("remove", group, examples=["portal group remove pilots"])
@NAME
@YES
def group_remove(portal: Remote, name: str, yes: bool) -> None:
    """Remove a group; its devices stay as they are.

    A group that sets topics or the life of certificates for members is removed once it has none.
    """
    confirm(f"Remove the group {name}?", yes=yes)
    _show(portal, portal.client.call("DELETE", f"/groups/{name}").json(), done=f"Removed the group {name}")


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _devices(row: Mapping[str, Any]) -> Cell:
    conditions = row.get("filter")
    if isinstance(conditions, dict):
        return text(" ".join(f"{name}={value}" for name, value in conditions.items() if value is not None))
    return text(row.get("members"))


def _show(portal: Remote, answer: dict[str, Any], *, done: str = "") -> None:
    fields: dict[str, Cell] = {"name": text(answer.get("name")), "description": text(answer.get("description"))}
    fields["filter" if isinstance(answer.get("filter"), dict) else "members"] = _devices(answer)
    for index, topic in enumerate(topics_in_words(answer)):
        fields[f"topics.{index}"] = Cell(topic)
    fields["validity_days"] = text(answer.get("validity_days"))
    if isinstance(policy := answer.get("attestation"), dict):
        fields["attestation"] = text(
            f"{policy.get('mode')}, version {policy.get('version')}, {policy.get('policy_id')}"
        )
    portal.out.result(answer, fields, done=done)


def _say_whether_enforced(portal: Remote, answer: Mapping[str, Any]) -> None:
    if answer.get("broker") == "pending":
        if answer.get("broker_problem"):
            portal.out.warning(str(answer["broker_problem"]))
        portal.out.warning("The broker does not enforce this yet. The portal keeps trying; see: portal status")
