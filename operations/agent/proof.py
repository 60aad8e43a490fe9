"""What a broker is to be seen to obey: the newest changes, and the end of sessions, however many."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from broker.control import Changes
from broker.guard.feed import NOTHING, Mark, Sessions
from broker.probe import ProbeCertificates
from broker_provisioning import BrokerProvisioning
from core.errors import BrokerUnavailable

MAX_SESSIONS = 1000  # that are ended with a proof; more are ended before it, as many at a time


@dataclass(slots=True)
class Proof:
    """What was installed and is to be proven: the page, whose sessions must end, and whether there are new CRLs.

    ``ends`` is up to which generation it is known whose sessions must end, 0 if that is what the portal has recorded.
    """

    mark: Mark = NOTHING
    sessions: Sessions = field(default_factory=Sessions)
    ends: int = 0
    has_crls: bool = False
    in_doubt: bool = True  # at first: what the broker has obeyed before is not known

    def make(self, broker: BrokerProvisioning, probes: ProbeCertificates, seconds: float) -> Changes:
        """Have the broker prove it within some seconds; return what it obeys. Raise ``BrokerUnavailable``.

        Then the next attempt goes on with the sessions that are left.
        """
        deadline = time.monotonic() + seconds
        self._end_many(broker, deadline, seconds)
        those = self.sessions.first(MAX_SESSIONS)
        changes = those.changes(self.mark.generation, in_doubt=self.in_doubt or self.has_crls)
        broker.bring_into_force(
            changes, probes, deadline, lambda *_steps: None, has_crls=self.has_crls or self.in_doubt
        )
        return changes

    def _end_many(self, broker: BrokerProvisioning, deadline: float, seconds: float) -> None:
        """End sessions until few are left, which are ended with the proof.

        Raise ``BrokerUnavailable`` if time is up.
        """
        count, generation = 0, self.mark.generation
        while self.sessions.left > MAX_SESSIONS:
            if count == 0:  # nobody comes back who is denied
                broker.enforce(generation, deadline)
            those = self.sessions.first(MAX_SESSIONS)
            changes = those.changes(generation, in_doubt=False)
            narrowed, revoked = frozenset(changes.narrowed), changes.revoked
            if count and time.monotonic() > deadline:
                raise BrokerUnavailable(f"{self.sessions.left} sessions are still to be ended; that takes a while.")
            least = time.monotonic() + seconds
            broker.disconnect(changes.sessions_to_end, least, revoked=revoked, narrowed=narrowed)
            self.sessions.ended(those)
            count += those.lines

    def close(self) -> None:
        """Drop it, with the file of its sessions."""
        self.sessions.close()
