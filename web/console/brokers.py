"""Brokers in the console, for the role system: how each stands, declared away and back."""

from __future__ import annotations

from core.roles import Permission
from web.api.fields import ShortText
from web.api.routing import RequestModel
from web.console.access import ACCESS, access_values
from web.console.pages import Moved, Pages, Shown, Visit

PAGES = Pages()
BROKERS = f"{ACCESS}/brokers"
PATH = f"{BROKERS}/{{broker}}"


class AwayForm(RequestModel):
    """Why a broker is not to count."""

    reason: ShortText


@PAGES.add("GET", BROKERS, Permission.BROKERS)
def brokers(visit: Visit) -> Shown:
    """List the brokers, with what each was seen to enforce."""
    known = visit.portal.brokers.list()
    counting = sum(one.record.counts for one in known)  # the last one cannot be declared away
    return Shown("all_brokers.html", access_values({"brokers": known, "counting": counting}))


@PAGES.add("POST", f"{PATH}/away", Permission.BROKERS)
def declare_away(visit: Visit, broker: str) -> Moved:
    """Have changes enforced without a broker."""
    visit.portal.brokers.declare_away(visit.actor, broker, visit.form(AwayForm).reason)
    return Moved(BROKERS)


@PAGES.add("POST", f"{PATH}/back", Permission.BROKERS)
def declare_back(visit: Visit, broker: str) -> Moved:
    """Let a broker count again."""
    visit.portal.brokers.declare_back(visit.actor, broker)
    return Moved(BROKERS)
