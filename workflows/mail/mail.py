"""Tells people by mail what they must act on: all that is new in one message, each matter once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import datetime, timedelta

from config import Settings
from core.errors import Unavailable
from store import mail
from store.database import Database
from workflows.mail.matters import Absence, Kind, unsaid
from workflows.mail.messages import message_of
from workflows.mail.smtp import SmtpServer

log = logging.getLogger("portal.mail")

REMINDED_AFTER = timedelta(days=60)
FIRST_PAUSE, LONGEST_PAUSE = timedelta(seconds=30), timedelta(hours=1)  # doubled with each attempt that fails


class Mail:
    """Sends the matters of one tenant, and of the installation, to ``PORTAL_MAIL_TO``."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        broker_answers: Callable[[], bool],
        clock: Callable[[], datetime],
        tenant_id: str,
    ) -> None:
        self._settings, self._database, self._clock, self._tenant_id = settings, database, clock, tenant_id
        self._absence = Absence(broker_answers)
        self._problem: str | None = None  # logged already
        self._failed_at: datetime | None = None
        self._pause = FIRST_PAUSE

    def send_due(self) -> None:
        """Send what is new, at most one message in ``PORTAL_MAIL_MINUTES``; nothing without a server.

        A message that could not be sent is tried again, after a pause of at most an hour. One that was sent by a
        process that died before it was recorded is sent again, with the same ``Message-ID``.
        """
        if self._settings.mail_server is None:
            return
        away, now, own = self._absence.is_long(), self._clock(), self._tenant_id
        if self._failed_at is not None and abs(now - self._failed_at) < self._pause:
            return
        with self._database.snapshot() as tx:
            last = mail.last_message(tx, own)
            is_back = away is None and bool(mail.said(tx, own, Kind.BROKER, [""]))
            due = last is None or abs(now - last) >= timedelta(minutes=self._settings.mail_minutes)
            matters = unsaid(tx, own, now=now, broker_is_away=bool(away)) if due else []
        if is_back:
            with self._database.transaction() as tx:
                mail.forget(tx, own, Kind.BROKER)
        if not matters:
            return
        try:
            refused = SmtpServer(self._settings).send(message_of(self._settings, matters, now=now, last=last))
        except Unavailable as error:
            self._say(error.detail)
            self._pause = FIRST_PAUSE if self._failed_at is None else min(self._pause * 2, LONGEST_PAUSE)
            self._failed_at = now
            return
        self._failed_at = None
        with self._database.transaction() as tx:
            mail.forget_older(tx, own, before=now - REMINDED_AFTER)
            mail.record_message(tx, own, [(one.kind, one.subject) for one in matters], now=now)
        self._say(f"The mail server refused {', '.join(refused)} of PORTAL_MAIL_TO." if refused else None)
        log.info("people were told by mail what to act on", extra={"matters": len(matters)})

    def _say(self, problem: str | None) -> None:
        """Log a problem when it is new: attempts follow until one succeeds."""
        if problem is not None and problem != self._problem:
            log.error("mail cannot be sent, and is tried again", extra={"problem": problem})
        self._problem = problem
