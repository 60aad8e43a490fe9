"""The console's main navigation: its screens, for those whose role has the permission."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from core.roles import Permission
from web.console.pages import HOME, Visit


@dataclass(frozen=True, slots=True)
class Entry:
    """A screen in the navigation; ``icon`` is a macro's name in ``icons.html``.

    ``permissions``: one of them suffices.
    """

    title: str
    path: str
    icon: str
    permissions: tuple[Permission, ...]


@dataclass(frozen=True, slots=True)
class Shown:
    """An entry, and whether the page that is shown belongs to it."""

    entry: Entry
    is_current: bool


ENTRIES = (
    Entry("Overview", HOME, "overview", (Permission.READ,)),
    Entry("Fleet", "/ui/devices", "fleet", (Permission.READ,)),
    Entry("Waiting", "/ui/waiting", "waiting", (Permission.READ,)),
    Entry("Access", "/ui/access", "access", (Permission.READ,)),
    Entry("Record", "/ui/record", "record", (Permission.AUDIT,)),
)


def navigation_of(visit: Visit, paths: Collection[str]) -> Sequence[Shown]:
    """Return the entries that a visitor may use, of those whose pages are among ``paths``."""
    here = visit.request.path
    return [
        Shown(entry, here == entry.path or (entry.path != HOME and here.startswith(f"{entry.path}/")))
        for entry in ENTRIES
        if entry.path in paths and any(visit.may(permission) for permission in entry.permissions)
    ]
