"""The control of a portal that has no broker beside it: the guards are elsewhere, where others tell and ask them."""

from __future__ import annotations

from broker.control import RestartReason
from broker.crl import Trust
from broker.guard.control import GuardControl


class GuardElsewhere(GuardControl):
    """Knows what a guard can enforce, and writes and asks nothing; it is given no draft to install."""

    @property
    def crls_are_due(self) -> bool:
        """Never: they are signed soon after they were put off, and others give them to brokers."""
        return False

    def reachable(self) -> bool:
        """Return ``False``: there is none to be reached."""
        return False

    def waits(self, deadline: float) -> RestartReason | None:
        """Return ``None``: there is nothing to restart."""
        return None

    def knows_tenants(self, deadline: float) -> bool:
        """Return ``True``: a guard that is too old says so itself to its agent or node, and proves nothing."""
        return True

    def distrust(self) -> None:
        """Do nothing: there is no journal."""

    def publish_crls(self, trust: Trust, *, at_once: bool = False) -> bool:
        """Return ``False``: agents and other nodes read signed CRLs from the database."""
        return False

    def follow_presence(self, deadline: float) -> None:
        """Return ``None``: who is connected elsewhere is not known here."""
