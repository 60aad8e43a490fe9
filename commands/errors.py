"""What can go wrong at the command line, each with its exit status."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar


class CliError(Exception):
    """One plain sentence for a person; ``hints`` are further lines that say what to do next. Never holds a secret."""

    exit_status: ClassVar[int] = 1

    def __init__(self, sentence: str, *, hints: Iterable[str] = ()) -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.hints = tuple(hints)

    def as_json(self) -> dict[str, Any]:
        """The error as ``--json`` shows it on standard error."""
        error: dict[str, Any] = {"detail": self.sentence}
        if self.hints:
            error["hints"] = list(self.hints)
        return {"error": error, "exit_status": self.exit_status}


class CheckFailed(CliError):
    """What was received or found on this machine is not fit for use."""


class BundleLocked(CheckFailed):
    """The password does not open the bundle."""


class Misused(CliError):
    """The command cannot start as it was called: a setting is missing or makes no sense."""

    exit_status = 2


class Unreachable(CliError):
    """The portal does not answer, or what answers is not the portal."""

    exit_status = 3


class ConnectionLost(Unreachable):
    """The connection broke after it stood, so the portal may or may not have done what was asked."""


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
        """The error as ``--json`` shows it on standard error."""
        shown = super().as_json()
        shown["error"] |= {"status": self.status, "code": self.code, "request_id": self.request_id}
        if self.fields:
            shown["error"]["errors"] = [{"field": field, "message": message} for field, message in self.fields]
        return shown
