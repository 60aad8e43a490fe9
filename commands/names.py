"""How devices are named at the command line: by name, id, external id, or the beginning of an id."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import click
from click.shell_completion import CompletionItem

from commands.completing import Listed
from commands.errors import CheckFailed

if TYPE_CHECKING:
    from commands.client import Client

MAX_NAME = 128  # characters of a name and of an external id
MAX_SHOWN = 10  # devices that an ambiguous name may mean
_TOLD = ("device_id", "name", "external_id", "location", "status")
_PREFIX = re.compile("[0-9a-f]{4,8}|[0-9a-f]{8}-[0-9a-f-]{0,27}")
_ID = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class DeviceName(click.ParamType[str]):
    """What a device is called. A command with such a parameter gets the id, once it is invoked."""

    name = "device"
    listed = Listed("/devices", "devices", "device_id", "name", {"limit": 200})

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the text; never shows a wrong one, which may be a token."""
        text = value.strip()
        if not text.isprintable() or not 1 <= len(text) <= MAX_NAME:
            self.fail("use the name, the id or the external id of a device (see: portal list).", param, ctx)
        return text

    def find(self, client: Client, text: str) -> str:
        """Return the id of what is called so; raises ``CliError``."""
        return find_device(client, text)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return the ids and names that the portal lists and that begin so."""
        return self.listed.starting_with_either(ctx, incomplete)


DEVICE = DeviceName()


class ApplicationName(DeviceName):
    """What an application is called. A command with such a parameter gets the id, once it is invoked."""

    name = "application"
    listed = Listed("/applications", "applications", "application_id", "name", {"limit": 200})

    def find(self, client: Client, text: str) -> str:
        """Return the id of the application that is called so; raises ``Refused`` if there is none, or more than one.

        A name comes before an id that begins so.
        """
        if (known := whole_id(text)) is not None:
            return known
        answer = client.call("GET", "/applications/-", params={"name": text}, accept=(404,))
        if answer.status == 404 and _PREFIX.fullmatch(text.lower()):
            answer = client.call("GET", f"/applications/{text.lower()}")
        elif answer.status == 404:
            raise client.refusal(answer)
        found = str(answer.json().get("application_id"))
        if whole_id(found) is None:
            raise CheckFailed("The portal's answer about an application cannot be read; its version may differ.")
        return found


class Label(click.ParamType[str]):
    """A name that stands in a path of the portal."""

    name = "name"
    listed: ClassVar[Listed]

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the name; others cannot be in a path."""
        if not re.fullmatch("[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", value):
            self.fail("use 1 to 63 lower-case letters, digits and inner hyphens.", param, ctx)
        return value

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return those that begin so."""
        return self.listed.starting_with(ctx, incomplete)


class GroupName(Label):
    """The name of a group of devices."""

    listed = Listed("/groups", "groups", "name", "description")


class ProfileName(Label):
    """The name of a certificate profile."""

    listed = Listed("/profiles", "profiles", "name", "name")


def device_argument(
    what: str = "Name, id, external id, or the beginning of the id.",
) -> Callable[[Any], Any]:
    """Return the argument of a command that is about one device."""
    return click.argument("device_id", metavar="DEVICE", type=DEVICE, help=what)


def whole_id(text: str) -> str | None:
    """Return a text as an id, ``None`` if it is something else."""
    return text.lower() if _ID.fullmatch(text.lower()) else None


def find_device(client: Client, text: str) -> str:
    """Return the id of the device that is called so; raises ``CheckFailed`` if there is none, or more than one.

    A whole id is taken as it is: the portal says whether there is such a device.
    """
    return str(find_row(client, text)["device_id"])


def find_row(client: Client, text: str) -> dict[str, Any]:
    """Return what the portal lists of the device that is called so, or its id alone; raises as ``find_device``."""
    if (known := whole_id(text)) is not None:
        return {"device_id": known}
    found = client.get("/devices", named=text, limit=MAX_SHOWN + 1).get("devices") or []
    if len(found) == 1 and isinstance(found[0], dict) and whole_id(str(found[0].get("device_id"))):
        return found[0]
    if not found:
        raise CheckFailed(
            "No device has this name, id or external id.",
            hints=["To look for it: portal list --search TEXT", "An id may be shortened to 4 digits or more."],
        )
    raise CheckFailed("Several devices may be meant; use the id of one of them:", hints=candidates(found))


def candidates(found: list[dict[str, Any]]) -> list[str]:
    """Return a line for each device that a text may mean."""
    return [*map(in_a_line, found[:MAX_SHOWN]), *(["…"] if len(found) > MAX_SHOWN else [])]


def in_a_line(device: Mapping[str, Any]) -> str:
    """Return by what people tell a device from others: its id, its names, where it is, and whether it is revoked."""
    return "  ".join(str(device[name]) for name in _TOLD if device.get(name))
