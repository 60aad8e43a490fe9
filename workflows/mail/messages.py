"""Makes messages of matters, from the templates in ``templates/mail``."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import datetime
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import format_datetime
from itertools import groupby
from pathlib import Path
from string import Template
from urllib.parse import urlsplit

from config import Settings
from core.server_command import client_command, server_command
from workflows.mail.matters import Kind, Matter

TEMPLATES = Path(__file__).parents[2] / "templates" / "mail"
MAX_LINES = 20  # of matters of one kind; of more their number is said
TITLES = {
    Kind.REVOCATION: ("the broker is behind", "the broker is behind"),
    Kind.BROKER: ("the broker is away", "the broker is away"),
    Kind.REQUEST: ("a device waits", "{} devices wait"),
    Kind.CERTIFICATE: ("a certificate ends", "{} certificates end"),
    Kind.CA: ("a CA ends", "{} CAs end"),
}


def message_of(settings: Settings, matters: Sequence[Matter], *, now: datetime, last: datetime | None) -> EmailMessage:
    """Return one message of all ``matters``, which are not empty.

    Its id is the same if it is made again for the same matters after the same ``last`` message, so that a receiver
    knows one that comes twice.
    """
    order = list(TITLES)
    by_kind = [
        (kind, list(group))
        for kind, group in groupby(sorted(matters, key=lambda one: order.index(one.kind)), lambda one: one.kind)
    ]
    titles = [TITLES[kind][len(of_kind) > 1].format(len(of_kind)) for kind, of_kind in by_kind]
    text = "\n".join(_section(kind, of_kind) for kind, of_kind in by_kind)
    named = "\n".join([str(last), *sorted(f"{one.kind} {one.subject}" for one in matters)])
    return _message(settings, ", ".join(titles), _filled("message", settings, matters=text), named, now)


def trial_message(settings: Settings, *, now: datetime) -> EmailMessage:
    """Return a message that says nothing but that mail arrives."""
    return _message(settings, "a test", _filled("test", settings), now.isoformat(), now)


def _section(kind: Kind, matters: Sequence[Matter]) -> str:
    lines = [f"  {matter.line}" for matter in matters[:MAX_LINES]]
    if len(matters) > MAX_LINES:
        lines.append(f"  and {len(matters) - MAX_LINES} more")
    return Template(_read(kind)).substitute(
        count=len(matters),
        lines="\n".join(lines),
        portal_command=client_command("").strip(),
        server_command=server_command("").strip(),
    )


def _filled(name: str, settings: Settings, **values: str) -> str:
    return Template(_read(name)).substitute(portal=_own_name(settings), **values)


def _read(name: str) -> str:
    return (TEMPLATES / f"{name}.txt").read_text(encoding="utf-8")


def _own_name(settings: Settings) -> str:
    return urlsplit(settings.public_url).hostname or "localhost"


def _message(settings: Settings, title: str, text: str, named: str, now: datetime) -> EmailMessage:
    host = _own_name(settings)
    message = EmailMessage(policy=SMTP)
    message["From"] = settings.mail_from[0]
    message["To"] = ", ".join(settings.mail_to)
    message["Subject"] = f"Onboarding portal {host}: {title}"
    message["Date"] = format_datetime(now)
    message["Message-ID"] = f"<{hashlib.sha256(named.encode()).hexdigest()[:32]}@{host}>"
    message["Auto-Submitted"] = "auto-generated"  # RFC 3834: nobody's holiday notice answers it
    message.set_content(text)
    return message
