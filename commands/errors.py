"""The errors of the command line and their exit statuses.

CliError 1
├── CheckFailed 1
│   └── BundleLocked 1
├── Misused 2
├── Unreachable 3
│   └── ConnectionLost 3
└── Refused 1
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar


class CliError(Exception):
    """A sentence for the user; ``hints`` are further lines that say what to do. Never contains a secret."""

    exit_status: ClassVar[int] = 1

    def __init__(self, sentence: str, *, hints: Iterable[str] = ()) -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.hints = tuple(hints)

    def as_json(self) -> dict[str, Any]:
        """Return the error as ``--json`` prints it on standard error."""
        error: dict[str, Any] = {"detail": self.sentence}
        if self.hints:
            error["hints"] = list(self.hints)
        return {"error": error, "exit_status": self.exit_status}


class CheckFailed(CliError):
    """A file or an answer is not valid."""


class BundleLocked(CheckFailed):
    """The bundle password is wrong."""


class Misused(CliError):
    """The command was called incorrectly: a setting is missing or invalid."""

    exit_status = 2


class Unreachable(CliError):
    """The portal does not answer, or another server does."""

    exit_status = 3


class ConnectionLost(Unreachable):
    """The connection was lost after it was established, so the request may have been carried out or not."""


class Refused(CliError):
    """The portal answered with an error (RFC 9457)."""

    def __init__(
        self,
        sentence: str,
        *,
        status: int,
        code: str = "",
        fields: Iterable[tuple[str, str]] = (),
        request_id: str = "",
        retry_after: int | None = None,
        hints: Iterable[str] = (),
    ) -> None:
        super().__init__(sentence, hints=hints)
        self.status = status
        self.code = code
        self.fields = tuple(fields)
        self.request_id = request_id
        self.retry_after = retry_after  # seconds

    def as_json(self) -> dict[str, Any]:
        """Return the error as ``--json`` prints it on standard error."""
        shown = super().as_json()
        shown["error"] |= {"status": self.status, "code": self.code, "request_id": self.request_id}
        if self.fields:
            shown["error"]["errors"] = [{"field": field, "message": message} for field, message in self.fields]
        return shown
