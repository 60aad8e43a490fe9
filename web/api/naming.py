"""Devices and applications in paths by other names than their ids: the beginning of an id, or ``-`` with a query.

Example: ``GET /devices/-?name=pump-1``, ``POST /devices/-/renew?external_id=line-4/000217``, ``GET /devices/01a22df6``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from flask import Request
from werkzeug.datastructures import MultiDict

from core.errors import FieldProblem, InputInvalid
from core.states import ClientKind
from store.audit import Actor
from web.api.fields import BY_NAME, UUID, ExternalId, Name, names_in
from web.api.routing import RequestModel, read_fields

if TYPE_CHECKING:
    from operations.wiring import Portal

_KINDS = {"device_id": ClientKind.DEVICE, "application_id": ClientKind.APPLICATION}


class ByName(RequestModel):
    """What a device or an application is called."""

    name: Name | None = None
    external_id: ExternalId | None = None


def identify(portal: Portal, actor: Actor, request: Request, path: Mapping[str, str]) -> dict[str, str]:
    """Return the whole ids of the devices and applications that the parts of a path name.

    Raises ``DeviceNotFound``, ``ApplicationNotFound``, ``NameAmbiguous``, ``InputInvalid``.
    """
    found: dict[str, str] = {}
    for part, kind in _KINDS.items():
        if part in path:
            by, text = _named(request, path[part], names_in(f"{{{part}}}"))
            if by != "id" or not re.fullmatch(UUID, text):
                found[part] = portal.inventory.identified(actor.tenant_id, kind, by, text)
    return found


def _named(request: Request, part: str, names: tuple[str, ...]) -> tuple[str, str]:
    """Return by what a part of a path is named, ``id`` or one of ``names``, and how; raises ``InputInvalid``."""
    given = [(name, text) for name, text in request.args.items(multi=True) if name in names]
    if part != BY_NAME:
        if given:
            raise _refused(given[0][0], "goes with - in place of the id in the path")
        return "id", part
    if len(given) != 1:
        raise _refused(names[0], f"must be given once, as {' or '.join(names)}, with - in place of the id in the path")
    read_fields(ByName, MultiDict(given))
    return given[0]


def _refused(field: str, problem: str) -> InputInvalid:
    return InputInvalid(f"{field} {problem}.", [FieldProblem(field, problem)])
