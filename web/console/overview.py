"""The overview: whether all is well, what expires, what happened, and what somebody has to look after."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from core.roles import Permission, Role
from operations.tenant_readiness import Check
from store.overview import MAX_CONNECTED, MAX_OF_WEEK, MAX_WAITING
from web.api.operation import FOR_OPERATORS
from web.console.charts import at_most, histogram
from web.console.pages import HOME, Pages, Shown, Visit
from workflows.overview import Overview

PAGES = Pages()
_EVENTS = (
    ("Registered", ("device:register", "application:register")),
    ("Enrolled", ("device:enrol",)),
    ("Renewed", ("device:renew", "device:enrol_again", "application:renew")),
    ("Suspended", ("device:suspend",)),
    ("Resumed", ("device:resume",)),
    ("Revoked", ("device:revoke", "application:revoke")),
)
_NAMES = {"ca": "CA", "crl": "CRL"}


@dataclass(frozen=True, slots=True)
class ToDo:
    """Something that somebody has to look after; ``path`` leads to it, if there is a page for it."""

    text: str
    kind: str
    path: str = ""


@PAGES.add("GET", HOME, Permission.READ)
def overview(visit: Visit) -> Shown:
    """Show whether all is well, and what needs attention."""
    contacts = visit.portal.contacts.read()  # first: what is read then is at least as new
    found = visit.portal.overviews.of(visit.actor.tenant_id, contacts.narrowed)
    checks = _checks(visit)
    weeks = [(f"{start:%b %-d}", count) for (start, _), count in zip(found.weeks, found.figures.weeks, strict=True)]
    values = {
        "overview": found,
        "checks": checks,
        "problems": [check for check in checks if check.problem is not None],
        "todo": list(_to_do(visit, found)),
        "chart": histogram(weeks, limit=MAX_OF_WEEK),
        "events": _events(found),
        "connected": at_most(found.figures.connected, MAX_CONNECTED) if contacts.heard else None,
        "control": visit.portal.settings.broker_control,
    }
    return Shown("overview.html", values, fragment="overview_body.html")


def _checks(visit: Visit) -> list[Check]:
    """Return what ``/readyz`` says: the reasons for who runs the installation, and for a tenant those of its own."""
    portal, actor = visit.portal, visit.actor
    several = portal.tenant_terms.are_several
    runs_it = actor.role == Role.SYSTEM if several else actor.tenant_id == portal.first_tenant
    checks = [_named(check, tell=runs_it) for check in portal.readiness.checks()]
    checks += [*portal.readiness.brokers(), *portal.readiness.nodes()] if runs_it else []
    if several and (own := portal.tenant_readiness.failed().get(actor.tenant_id)) is not None:
        checks.append(own)
    return checks


def _named(check: Check, *, tell: bool) -> Check:
    problem = check.problem if tell or check.problem is None else FOR_OPERATORS
    return Check(_NAMES.get(check.name, check.name.capitalize()), check.code, problem)


def _to_do(visit: Visit, found: Overview) -> Iterator[ToDo]:
    figures = found.figures
    if figures.waiting:
        wait = "request waits" if figures.waiting == 1 else "requests wait"
        yield ToDo(f"{at_most(figures.waiting, MAX_WAITING)} {wait} for a decision", "busy", "/ui/waiting")
    if figures.not_enforced:
        text = f"{at_most(figures.not_enforced, MAX_WAITING)} revoked or suspended, not enforced yet"
        yield ToDo(text, "bad", "/ui/devices?status=revoked")
    for ca in found.cas_that_end:
        yield ToDo(f"The CA {ca.record.name} ends on {ca.record.not_after:%Y-%m-%d}", "warn")
    if figures.ended:
        yield ToDo(f"{at_most(figures.ended, MAX_OF_WEEK)} with a certificate that has ended", "warn", _ENDING)
    if soon := figures.weeks[0]:
        yield ToDo(f"{at_most(soon, MAX_OF_WEEK)} with a certificate that ends within 7 days", "warn", _ENDING)
    if figures.failed_evidence:
        text = f"{at_most(figures.failed_evidence, MAX_WAITING)} whose evidence has failed"
        yield ToDo(text, "bad", "/ui/devices?attested=failed")
    if figures.undelivered_events and visit.may(Permission.WEBHOOKS):
        text = f"{at_most(figures.undelivered_events, MAX_WAITING)} events that a receiver did not take"
        yield ToDo(text, "warn", "/ui/record")


_ENDING = "/ui/devices?expires_within=7&sort=expires"


def _events(found: Overview) -> Sequence[tuple[str, int]]:
    """Return how often what happened in the last day, by a name for several actions."""
    counted: Mapping[tuple[str, str], int] = found.figures.events
    named = [(name, sum(counted.get((action, "done"), 0) for action in actions)) for name, actions in _EVENTS]
    refused = sum(number for (_, outcome), number in counted.items() if outcome != "done")
    return [*named, ("Refused", refused)]
