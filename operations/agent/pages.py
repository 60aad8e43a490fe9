"""Takes pages of the portal's changes into the journal's next lines, or one after the other into a new journal."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from broker.crl import Trust
from broker.guard.control import GuardControl
from broker.guard.draft import GuardDraft
from broker.guard.feed import NOTHING, Mark, PageReader, ReadPage, Sessions
from broker.guard.journal import decode
from core.errors import BrokerUnavailable, ProjectionInvalid
from core.tenants import TenantOnBroker
from operations.agent.certificates import AgentCertificates


@dataclass(slots=True)
class Loading:
    """A draft that is not installed yet, and the last page in it; ``page`` once that is the one to install it with."""

    draft: GuardDraft
    mark: Mark
    page: ReadPage | None = None

    def complete(self, page: ReadPage) -> bool:
        """Take in that a page is whole; return whether the draft is to be installed now."""
        if self.draft.since == 0 and not page.is_last:
            self.mark = page.mark  # the next page goes into the same journal
            return False
        self.page = page
        return True


class Pages:
    """What was installed for the broker, and what is still being taken in; the caller holds the lock of the journal."""

    def __init__(self, control: GuardControl, certificates: AgentCertificates, installed: Mark) -> None:
        self._control = control
        self._certificates = certificates
        self.installed = installed
        self.loading: Loading | None = None
        self.is_closed = False

    def last(self, *, denies_all: bool) -> Mark:
        """Return after which page to go on, ``NOTHING`` to begin again, as after the broker was told to deny all."""
        if self.loading is not None:
            return self.loading.mark
        position = self._control.files.position()
        mark = self.installed
        goes_on = position is not None and position.generation >= mark.generation > 0
        return mark if goes_on and not self._control.is_distrusted and not denies_all else NOTHING

    def take(self, reader: PageReader, lines: Iterator[bytes]) -> tuple[ReadPage, Sessions]:
        """Read a page into the draft of the next journal, or of the lines to append; return whose sessions must end.

        Raise ``ProjectionInvalid`` if it does not fit, or was cut, ``BrokerUnavailable`` if it cannot be written.
        """
        if self.loading is None:
            self.loading = Loading(self._draft(from_nothing=reader.since == 0), NOTHING)
        elif reader.since != self.loading.mark.generation:
            self.begin_again()
            raise ProjectionInvalid("The portal has begun its list of changes again; so does the agent.")
        draft, sessions = self.loading.draft, Sessions()
        try:
            for text in _with_suspensions(_texts(reader, lines)):
                if isinstance(text, TenantOnBroker):
                    self._tell_tenant(draft, text)
                elif not sessions.take(text):
                    draft.add_line(text, urgent=self._is_awaited(text))
        except BaseException as error:
            sessions.close()
            # If the link was lost, a new journal goes on with the same page again.
            if draft.since > 0 or isinstance(error, BrokerUnavailable):
                self.discard()
            raise
        if reader.page is None:
            raise ProjectionInvalid("The portal's list of changes was cut; it is asked for again.")
        return reader.page, sessions

    def install(self, loading: Loading, page: ReadPage, trust: Trust | None) -> bool:
        """Write a draft for the broker; return whether that was given the CRLs."""
        self.loading = None
        given = loading.draft.install(page.mark.generation, trust)
        if trust is not None:
            self._certificates.crl_installed(page.mark.generation)
        self.installed = page.mark
        return given

    def begin_again(self) -> None:
        """Drop the draft; the next one is a new journal."""
        self.discard()
        self._control.distrust()

    def forget(self) -> None:
        """Begin again with all that there is, as after a journal was damaged."""
        self.begin_again()
        self.installed = NOTHING

    def discard(self) -> None:
        """Drop the draft."""
        if self.loading is not None:
            self.loading.draft.discard()
            self.loading = None

    def close(self) -> None:
        """Drop the draft, and begin no other."""
        self.is_closed = True
        self.discard()

    def _tell_tenant(self, draft: GuardDraft, tenant: TenantOnBroker) -> None:
        """Add a tenant; if the journal has another one in its place that was removed since, all begins again."""
        try:
            draft.tell_tenant(tenant)
        except ProjectionInvalid:
            self.forget()
            raise

    def _is_awaited(self, text: str) -> bool:
        serial = self._certificates.awaited_serial
        return serial is not None and text.startswith("serial ") and text.split(" ")[2] == serial

    def _draft(self, *, from_nothing: bool) -> GuardDraft:
        if from_nothing:
            self._control.distrust()
        draft = self._control.draft(0 if from_nothing else self.installed.generation)
        if not from_nothing and draft.since == 0:
            draft.discard()
            self._control.distrust()
            raise ProjectionInvalid("The journal is begun again; all changes are asked for.")
        return draft


def _texts(reader: PageReader, lines: Iterator[bytes]) -> Iterator[str]:
    while reader.page is None:
        line = next(lines, None)
        if line is None:
            raise ProjectionInvalid("The portal's list of changes was cut; it is asked for again.")
        text = reader.read(line)
        if text is not None:
            yield text


def _with_suspensions(texts: Iterator[str]) -> Iterator[str | TenantOnBroker]:
    """Yield lines, and instead of those about a tenant how it stands: its suspension is the line that follows."""
    told: TenantOnBroker | None = None
    for text in texts:
        if told is not None:
            is_suspension = text == f"suspend {told.name}"
            yield dataclasses.replace(told, suspended=is_suspension)
            told = None
            if is_suspension:
                continue
        match text.split(" "):
            case ["tenant", name, prefix]:
                told = TenantOnBroker(name, decode(prefix), suspended=False)
            case _:
                yield text
    if told is not None:
        yield told
