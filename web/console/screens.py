"""All pages of the console, screen by screen."""

from __future__ import annotations

from core.errors import NotFound
from web.console import (
    access,
    actions,
    applications,
    brokers,
    device,
    device_changes,
    enrolment,
    fleet,
    login,
    manufacturers,
    overview,
    record,
    registration,
    sign_on,
    tenants,
    waiting,
    watching,
    webhooks,
)
from web.console.pages import Page, Pages, Shown, Visit

_REST = Pages()


@_REST.add("GET", "/ui/{rest}", None)
def nothing_here(_visit: Visit, rest: str) -> Shown:
    """Tell an operator that a path leads nowhere; who has no session learns no more than the way to log in."""
    raise NotFound(f"The console has no page /ui/{rest[:100]}.")


_SCREENS = (
    overview,
    fleet,
    actions,
    registration,
    device,
    device_changes,
    watching,
    waiting,
    access,
    enrolment,
    manufacturers,
    applications,
    tenants,
    brokers,
    record,
    webhooks,
    login,
    sign_on,
)
PAGES: list[Page] = [page for screen in _SCREENS for page in screen.PAGES] + _REST
