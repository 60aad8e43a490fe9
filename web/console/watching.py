"""How a change takes hold at the broker, step by step, for pages that watch it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from broker.control import Step
from core.roles import Permission
from web.api.fields import IntegerText
from web.api.routing import RequestModel
from web.console.pages import HOME, Moved, Pages, Shown, Visit
from workflows.enforcement import TakingHold

PAGES = Pages()
PATH = "/ui/broker"
_RECORDED = "Recorded", "The database and the audit record have it."
_PENDING_ORDER = (Step.DENIED, Step.CUT, Step.REFUSED, Step.ENFORCED)
StepTexts = Mapping[Step, tuple[str, str, str]]
# What each step says once it was proven, and before: of a device, and of whatever a generation has changed.
OF_DEVICE: StepTexts = {
    Step.DENIED: ("Denied", "The broker has proved that it denies the device everything.", "Waits for its proof."),
    Step.REFUSED: ("Refused", "A revoked certificate was tried on the broker, and refused.", "Waits to be tried."),
    Step.CUT: ("Cut", "The device's session on the broker was ended.", "A connection may still be there."),
    Step.ENFORCED: ("Enforced", "All of this was proven, and that is recorded.", "Comes last."),
}
_OF_CHANGE: StepTexts = {
    **OF_DEVICE,
    Step.DENIED: ("Denied", "The broker has proved that it has the change.", "Waits for its proof."),
    Step.CUT: ("Cut", "Sessions that have to end were ended.", "Connections may still be there."),
}


class WatchQuery(RequestModel):
    """Up to which generation changes are watched."""

    generation: Annotated[int, Field(ge=1), IntegerText]


@dataclass(frozen=True, slots=True)
class ShownStep:
    """A step of a change; ``seconds`` after it was recorded, ``None`` while it is pending."""

    title: str
    text: str
    seconds: float | None


def watched(visit: Visit, generation: int) -> dict[str, Any]:
    """Return what ``broker_watch.html`` shows of the changes up to a generation; 0 is that of none."""
    if not generation:
        return {"watched_generation": 0}
    found = visit.portal.enforcements.of_generation(generation, visit.now)
    return {"watched_generation": generation, "change": found, "change_steps": steps_of(found, _OF_CHANGE)}


def steps_of(found: TakingHold, texts: StepTexts = OF_DEVICE) -> list[ShownStep]:
    """Return the steps in the order in which they were proven, then those that are pending.

    Of what is enforced, but whose steps are not known any more, that it was recorded; a change that revokes nothing is
    enforced without that the broker has refused a certificate.
    """
    steps = [ShownStep(*_RECORDED, 0.0)]
    if found.is_enforced and Step.ENFORCED not in found.proven:
        return steps
    for step, at in sorted(found.proven.items(), key=lambda pair: pair[1]):
        title, text, _ = texts[step]
        seconds = max(0.0, (at - found.recorded_at).total_seconds())  # the clocks of nodes may differ
        steps.append(ShownStep(title, text, seconds))
    for step in _PENDING_ORDER:
        if step not in found.proven and not found.is_enforced:
            title, _, text = texts[step]
            steps.append(ShownStep(title, text, None))
    return steps


@PAGES.add("GET", PATH, Permission.READ)
def broker(visit: Visit) -> Shown | Moved:
    """Show how far the changes up to a generation have taken hold, for a page that watches it."""
    query = visit.query(WatchQuery)
    if not visit.wants_fragment:
        return Moved(HOME)
    return Shown("broker_watch.html", watched(visit, query.generation))
