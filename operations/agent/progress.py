"""How far an agent has come, and how old its knowledge is: kept in its folder for the next start."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time

from broker.guard.feed import Mark
from core.boot import boot_seconds
from operations.agent.folder import AgentFolder, State, utc_seconds

log = logging.getLogger("portal.agent")

SAME_PROBLEM_SECONDS = 60.0
KEPT_SECONDS = 10.0  # between two notes of when the portal was heard, which `agent status` shows


class Progress:
    """The state of one agent, in memory and in its folder; ``lock`` is held by who changes it."""

    def __init__(self, folder: AgentFolder, lock: threading.RLock) -> None:
        self._folder = folder
        self._lock = lock
        self.state = folder.state()
        self._heard = boot_seconds() - self.state.age(utc_seconds())  # by the clock since the boot
        self._problem = ("", 0.0)

    @property
    def age(self) -> float:
        """How old its knowledge is, in seconds: by the time of day, too, if that says more."""
        return max(boot_seconds() - self._heard, utc_seconds() - self.state.heard_at - KEPT_SECONDS)

    def heard_of_portal(self) -> None:
        """Note that the portal was heard just now."""
        self._heard = boot_seconds()
        if not 0 <= self.state.age(utc_seconds()) < KEPT_SECONDS:
            with self._lock:
                self._write(self.state.heard(utc_seconds()))

    def installed(self) -> None:
        """Note that the broker was given what devices may do."""
        self._keep(dataclasses.replace(self.state, denies_all=False))

    def proven(self, mark: Mark) -> None:
        """Note that the broker obeys up to a page."""
        self._problem = ("", 0.0)
        self._keep(dataclasses.replace(self.state, mark=mark, problem=""))

    def denies_all(self) -> None:
        """Note that the broker was told to deny everybody."""
        self._keep(dataclasses.replace(self.state, denies_all=True))

    def failed(self, problem: str) -> None:
        """Log a problem when it is new, and then once a minute; keep it for ``agent status``."""
        said, when = self._problem
        if problem != said or time.monotonic() - when >= SAME_PROBLEM_SECONDS:
            self._problem = (problem, time.monotonic())
            age = round(min(self.age, utc_seconds()))
            knowledge = {"generation": self.state.mark.generation, "age_seconds": age}
            log.error("the broker may not have all changes", extra={"problem": problem, **knowledge})
            with self._lock:
                self._keep(dataclasses.replace(self.state, problem=problem))

    def _keep(self, state: State) -> None:
        if state != self.state:
            self._write(state)

    def _write(self, state: State) -> None:
        """Note how far it has come; with an older note, as on a full disk, it begins with more after a restart."""
        self.state = state
        try:
            self._folder.keep_state(state)
        except OSError as error:
            log.error("how far the agent has come is not noted", extra={"problem": error.strerror})
