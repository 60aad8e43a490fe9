"""The command that changes what is known of devices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from commands.context import (
    PROFILE,
    YES,
    Remote,
    command,
    metadata_from,
    option_group,
    topics_from,
    warn_of_restart,
)
from commands.devices import STATUSES, VERDICTS, show_client
from commands.many import RESULTS, Act, act_on_many, devices_argument, single
from commands.names import GroupName
from commands.times import Time

WHERE = ("type", "location", "name", "profile", "external_id", "metadata")
_OF_ONE = ("name", "external_id")


def _where(_ctx: click.Context, _param: click.Parameter, texts: tuple[str, ...]) -> dict[str, str]:
    """Return the filters that --where sets, by their names."""
    filters: dict[str, str] = {}
    for text in texts:
        name, separator, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if name not in WHERE or not separator or name in filters:
            names = ", ".join(name.replace("_", "-") for name in WHERE)
            raise click.BadParameter(f"use NAME=VALUE, each NAME only once; there are {names}.")
        filters[name] = value
    return filters


# The filters of the other commands, but for those whose names say what to change here.
where_options = option_group(
    click.option(
        "--where",
        metavar="NAME=VALUE",
        multiple=True,
        callback=_where,
        help="Change devices with this type, location, metadata (metadata=KEY=VALUE) … Repeatable.",
    ),
    click.option("--group", type=GroupName(), metavar="NAME", help="Change the devices of this group."),
    click.option("--status", type=click.Choice(STATUSES), help="Change devices with this status."),
    click.option("--search", "--q", "q", metavar="TEXT", help="Change devices with TEXT in name, id or metadata."),
    click.option(
        *("--expires-before", "--expiring", "expires_before"),
        type=Time(),
        metavar="TIME",
        help="Change devices whose certificate expires before a date, a time, or 30d from now.",
    ),
    click.option("--attested", type=click.Choice(VERDICTS), help="Change devices with this verdict on their evidence."),
)


@command(
    "update",
    examples=[
        "portal update sensor-7 --firmware 1.5.0",
        "portal update sensor-7 --topic 'devices/{id}/#:write' --topic devices/news:read",
        "portal update --where location='Hall 2' --location 'Hall 3' --metadata moved=2027",
        "cut -f1 pumps.txt | portal update - --add-to-group pilots --yes",
    ],
)
@devices_argument
@click.option("--name", metavar="NAME", help="New name.")
@click.option("--type", metavar="TYPE", help="New type.")
@click.option("--location", metavar="PLACE", help="New location.")
@click.option("--firmware", metavar="VERSION", help="New firmware version.")
@click.option("--metadata", metavar="KEY=VALUE", multiple=True, help="Set a key of the metadata. Repeatable.")
@click.option("--remove-metadata", metavar="KEY", multiple=True, help="Remove a key of the metadata. Repeatable.")
@click.option("--no-metadata", is_flag=True, help="Remove all metadata, but for what --metadata sets.")
@click.option("--topic", "topics", metavar="FILTER:ACCESS", multiple=True, help="Replaces all topics. Repeatable.")
@click.option("--default-topics", is_flag=True, help="Restore the topics of its group, or the default ones.")
@PROFILE
@click.option("--add-to-group", type=GroupName(), metavar="NAME", help="Add to this group.")
@click.option("--remove-from-group", type=GroupName(), metavar="NAME", help="Remove from this group.")
@click.option("--external-id", metavar="TEXT", help="Your own id for the device, if it has none yet.")
@click.option("--free-external-id", is_flag=True, help="Free the external id of a revoked device for its successor.")
@where_options
@RESULTS
@YES
def update(
    portal: Remote,
    /,
    devices: tuple[str, ...],
    results: Path | None,
    yes: bool,
    free_external_id: bool,
    where: dict[str, str],
    **options: Any,
) -> None:
    """Change descriptions or topics of devices, or their groups.

    A new profile, and new values that names in the certificate are made of, count from the next certificate on: see
    portal renew. Several devices are named, or found by a filter; they are changed in one pass, after one question.
    """
    filters = {name: options.pop(name) for name in ("group", "status", "q", "expires_before", "attested")} | where
    changes = _changes(options)
    if free_external_id and changes:
        raise click.UsageError("Use --free-external-id alone.")
    if free_external_id:
        changes["external_id"] = None
    if not changes:
        raise click.UsageError("Nothing to change: use at least one of --name, --type, --location, --firmware, …")
    in_groups = {"add_to_group", "remove_from_group"} & set(changes)
    device_id = None if in_groups and len(devices) == 1 else single(portal, devices, filters, results)
    if device_id is not None:
        _update_one(portal, device_id, changes)
        return
    if "external_id" in changes or "name" in changes or "metadata" in changes:
        raise click.UsageError("Use --name, --external-id, --free-external-id and --no-metadata for one device.")
    words = ", ".join(changes).replace("_changes", "").replace("_", " ")
    act = Act("update", f"Change {words} of", "Changing", "Changed", "", {"changes": changes})
    act_on_many(portal, act, devices, filters, results, yes=yes or len(devices) == 1)


def _changes(options: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a request by the options that were used; raises ``UsageError``."""
    metadata, remove, topics = options.pop("metadata"), options.pop("remove_metadata"), options.pop("topics")
    no_metadata, default_topics = options.pop("no_metadata"), options.pop("default_topics")
    if remove and no_metadata:
        raise click.UsageError("Use either --remove-metadata or --no-metadata.")
    if topics and default_topics:
        raise click.UsageError("Use either --topic or --default-topics.")
    changes: dict[str, Any] = {field: value for field, value in options.items() if value is not None}
    if no_metadata:
        changes["metadata"] = metadata_from(metadata)
    elif metadata or remove:
        changes["metadata_changes"] = dict.fromkeys(remove) | metadata_from(metadata)
    if topics or default_topics:
        changes["topics"] = topics_from(topics) or None
    return changes


def _update_one(portal: Remote, device_id: str, changes: dict[str, Any]) -> None:
    device = portal.client.call("PATCH", f"/devices/{device_id}", body=changes).json()
    changed = ", ".join(changes).replace("metadata_changes", "metadata")
    show_client(portal, device, done=f"Changed {changed} of {device.get('name') or device_id}")
    if "topics" in changes:
        warn_of_restart(portal, device)
