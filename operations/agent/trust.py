"""The CAs and CRLs that an agent was given, which the portal names with each answer, and when to fetch newer ones."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from broker.crl import Trust
from broker.guard.feed import NOTHING, TrustNames
from core.errors import ProjectionInvalid, Unavailable
from core.failpoints import failpoint
from operations.agent.client import PortalClient
from operations.agent.folder import AgentFolder

# New CRLs are fetched so seldom that they are no burden on a thin link: a second for each 100 kB, a minute at most.
CRL_BYTES_A_SECOND, MAX_CRL_PAUSE = 100_000, 60.0


class AgentTrust:
    """The newest CAs and CRLs in the agent's folder; ``seen`` names those that the portal had at its last answer."""

    def __init__(self, folder: AgentFolder, client: Callable[[], PortalClient]) -> None:
        self._folder = folder
        self._client = client
        self._kept = folder.trust()
        self._settings = folder.settings_of_portal()
        self.seen = self._kept[0] if self._kept else TrustNames(NOTHING.digest, NOTHING.digest)
        self.has_other_settings = threading.Event()
        self._not_before = 0.0

    @property
    def known(self) -> Trust | None:
        """The CAs and CRLs, ``None`` if none were fetched yet."""
        return self._kept[1] if self._kept else None

    def has_cas(self, names: TrustNames) -> bool:
        """Return whether the CAs are those of these names."""
        return self._kept is not None and self._kept[0].cas == names.cas

    @property
    def lacks_crls(self) -> bool:
        """Whether the portal has other CRLs."""
        return self._kept is not None and self._kept[0].crls != self.seen.crls

    @property
    def may_be_fetched(self) -> bool:
        """Whether they were fetched long enough ago."""
        return time.monotonic() >= self._not_before

    def fetch(self) -> Trust:
        """Fetch and keep the newest; raise ``Unavailable``, ``ProjectionInvalid`` if they cannot be read.

        ``Unavailable`` too if the portal has decided of other settings, with which the agent begins again.
        """
        names, said = self._client().trust()
        failpoint("agent.trust_fetched")
        try:
            trust = self._folder.keep_trust(names, said)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ProjectionInvalid("The portal's CAs and CRLs cannot be read; they are asked for again.") from error
        failpoint("agent.trust_kept")
        self._kept = (names, trust)
        if self._folder.settings_of_portal() != self._settings:
            self.has_other_settings.set()
            raise Unavailable("The portal has other settings now; the agent begins again with them.")
        self._not_before = time.monotonic() + min(MAX_CRL_PAUSE, 2 + len(trust.crl) / CRL_BYTES_A_SECOND)
        return trust
