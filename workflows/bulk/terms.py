"""What bulk registration is asked with and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

from core.errors import FieldProblem, InputInvalid, PortalError
from workflows.terms import Registration


@dataclass(frozen=True, slots=True)
class Candidate:
    """A row that asks for a device, or what is wrong with it; ``external_id`` as far as it could be read."""

    row: int
    wanted: Registration | None
    problem: PortalError | None = None
    external_id: str | None = None


class Source(Protocol):
    """Where the rows come from."""

    @property
    def next_row(self) -> int:
        """The number of the row that comes after all that were taken."""

    def take(self, most: int, *, wait: bool) -> Sequence[Candidate] | None:
        """At most so many rows; none at the end, ``None`` where there is none yet and none was to be waited for.

        Raises ``PortalError`` where there can be no more, ``ConnectionError`` where whoever sends them is gone.
        """


@dataclass(frozen=True, slots=True)
class RowDone:
    """A device is registered, durably, now or by an earlier row; link and password where there are new ones."""

    row: int
    device_id: str
    fingerprint: str
    serial_number: str
    expires_at: datetime | None
    external_id: str | None = None
    repeated: bool = False
    download_url: str | None = field(default=None, repr=False)
    download_expires_at: datetime | None = None
    bundle_password: str | None = field(default=None, repr=False)
    certificate: str | None = None
    chain: str | None = None


@dataclass(frozen=True, slots=True)
class RowFailed:
    """Nothing came of a row; ``stopped``: of those after it neither, and there are no answers for them."""

    row: int
    code: str
    detail: str
    errors: Sequence[FieldProblem] = ()
    external_id: str | None = None
    stopped: bool = False


def failed(row: int, error: PortalError, *, external_id: str | None = None, stopped: bool = False) -> RowFailed:
    """The answer to a row that fails for ``error``."""
    problems = error.errors if isinstance(error, InputInvalid) else ()
    return RowFailed(row, error.code, error.detail, problems, external_id, stopped)
