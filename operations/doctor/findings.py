"""What a check finds: well or not, what was seen, what to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """How a check ended, from good to bad."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


_BY_GRAVITY = list(State)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a check says: sentences on what was seen and, unless all is well, on what to do."""

    state: State
    detail: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Finding:
    """The verdict of the check of that name."""

    name: str
    state: State
    detail: str
    advice: str


def well(detail: str) -> Verdict:
    """Nothing is wrong."""
    return Verdict(State.OK, detail)


def warning(detail: str, advice: str) -> Verdict:
    """Something works, but will not for ever, or not as well as it should."""
    return Verdict(State.WARNING, detail, advice)


def problem(detail: str, advice: str) -> Verdict:
    """Something is broken or not safe."""
    return Verdict(State.PROBLEM, detail, advice)


def together(verdicts: Sequence[Verdict], otherwise: str) -> Verdict:
    """One verdict in place of several complaints, as grave as the gravest; ``otherwise`` where there are none."""
    if not verdicts:
        return well(otherwise)
    state = max((verdict.state for verdict in verdicts), key=_BY_GRAVITY.index)
    advice = dict.fromkeys(verdict.advice for verdict in verdicts if verdict.advice)
    return Verdict(state, " ".join(verdict.detail for verdict in verdicts), " ".join(advice))


def exit_status(findings: Sequence[Finding]) -> int:
    """0 where all is well, 1 where there is a problem, 2 where there are warnings only."""
    states = {finding.state for finding in findings}
    if State.PROBLEM in states:
        return 1
    return 2 if State.WARNING in states else 0


def some(things: Sequence[str], most: int = 3) -> str:
    """The first few of a list, with how many more there are."""
    shown = ", ".join(things[:most])
    return shown if len(things) <= most else f"{shown} and {len(things) - most} more"
