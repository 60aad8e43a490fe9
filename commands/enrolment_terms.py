"""What the commands of enrolment have in common: what becomes of a device, the ids of what lets it in."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import click

from commands.output import Cell, text
from commands.registration import KEY_TYPES

_ID = re.compile("[0-9a-f]{16}")


class MeansId(click.ParamType[str]):
    """The id of an enrolment token or of a manufacturer, in full."""

    name = "id"

    def __init__(self, listed_by: str) -> None:
        self.listed_by = listed_by

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the id, without showing a value that is none: it may be a secret."""
        text = value.strip().lower()
        if _ID.fullmatch(text) is None:
            self.fail(f"an id is given in full, as {self.listed_by} shows it.", param, ctx)
        return text


_OPTIONS = (
    click.option("--type", "type_", metavar="TYPE", help="What kind of device it is; device if not given."),
    click.option("--location", metavar="PLACE", help="Where it stands."),
    click.option("--firmware", metavar="VERSION", help="The firmware that it runs."),
    click.option(
        "--name-template",
        metavar="NAME",
        help="Its name; {serial} stands for its own number, {number} counts the devices of a token.",
    ),
    click.option("--key-type", "key_types", type=click.Choice(KEY_TYPES), multiple=True, help="Allowed. Repeatable."),
    click.option("--days", type=click.IntRange(1, 36500), metavar="DAYS", help="Life of its certificate."),
    click.option("--approval", type=click.Choice(("at_once", "operator")), help="Who decides; at_once if not given."),
)


def terms_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say what becomes of the devices that are let in; ``terms_from`` reads them."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def terms_from(options: dict[str, Any]) -> dict[str, Any]:
    """The fields of a request for the options that were given."""
    names = {"type_": "type", "days": "validity_days"}
    given = {names.get(name, name): value for name, value in options.items() if value not in (None, ())}
    if "key_types" in given:
        given["key_types"] = list(given["key_types"])
    return given


def terms_fields(answer: dict[str, Any]) -> dict[str, Cell]:
    """The same as an answer has them, to be shown."""
    plain = ("type", "location", "firmware", "name_template", "validity_days", "approval")
    fields = {name: text(answer.get(name)) for name in plain}
    return fields | {"key_types": text(" ".join(map(str, answer.get("key_types") or ())))}
