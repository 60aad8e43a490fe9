"""Writes the log: one line for each event, as text or as JSON."""

from __future__ import annotations

import json
import logging
import re
import sys
from datetime import UTC, datetime
from typing import Any

_BARE = re.compile(r"[!#-<>-~]+")  # printable ASCII without space, quote and equals sign
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def set_up(*, level: str, as_json: bool) -> None:
    """Send every event to standard error, in place of all present handlers."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if as_json else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for chatty in ("alembic", "sqlalchemy"):  # rows and statements must not be logged, at any level
        logging.getLogger(chatty).setLevel(logging.WARNING)


def show_fields_in_commands() -> None:
    """Have warnings of a command, for which no log is set up, say all that they know on standard error."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(TextFormatter())


def hide_links() -> None:
    """Drop the access log lines of Flask's own server for downloads, whose path contains the token of the link."""
    logging.getLogger("werkzeug").addFilter(_shows_no_link)


def _shows_no_link(record: logging.LogRecord) -> bool:
    return "/download/" not in record.getMessage()


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """Return the values that were given as ``extra`` to the event."""
    return {name: value for name, value in vars(record).items() if name not in _STANDARD}


class JsonFormatter(logging.Formatter):
    """An event as one JSON object: time (RFC 3339), level, logger, event, its fields, and the traceback if any."""

    def format(self, record: logging.LogRecord) -> str:
        """Render one line."""
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **fields_of(record),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


class TextFormatter(logging.Formatter):
    """An event for a person: time, level, event, its fields as ``name=value``."""

    def format(self, record: logging.LogRecord) -> str:
        """Render one line; a traceback, if any, is its last field, with its line ends escaped."""
        time = datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
        fields = "".join(f" {name}={_plain(value)}" for name, value in fields_of(record).items() if value is not None)
        if record.exc_info:
            fields += f" traceback={_plain(self.formatException(record.exc_info))}"
        return f"{time} {record.levelname.lower():7} {_plain_text(record.getMessage())}{fields}"


def _plain(value: Any) -> str:
    text = str(value)
    # Quoted as JSON, so that no text from a client can start a line of its own.
    return text if _BARE.fullmatch(text) else json.dumps(text)


def _plain_text(text: str) -> str:
    return text if text.isprintable() else json.dumps(text)
