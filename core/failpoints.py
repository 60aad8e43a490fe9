"""Named steps at which a test makes the portal crash or fail.

``failpoint(NAME)`` raises an audit event of Python (PEP 578), which nothing hears unless ``PORTAL_FAILPOINT`` is set.
"""

from __future__ import annotations

import functools
import os
import re
import signal
import sys
import threading
import time

NAMES = (
    "register.before_commit",
    "register.after_commit",
    "register.before_answer",
    "enrol.before_commit",
    "enrol.after_commit",
    "bulk.before_commit",
    "bulk.after_commit",
    "revoke.before_commit",
    "revoke.after_commit",
    "suspend.before_commit",
    "suspend.after_commit",
    "resume.before_commit",
    "resume.after_commit",
    "actions.after_commit",
    "groups.after_commit",
    "renew.before_commit",
    "renew.after_commit",
    "apply.begin",
    "apply.after_snapshot",
    "apply.after_crl_signed",
    "apply.after_crl_committed",
    "install.staged",
    "install.renamed",
    "journal.written",
    "journal.staged",
    "journal.renamed",
    "apply.after_install",
    "apply.before_proof",
    "apply.before_reload",
    "apply.after_reload",
    "apply.after_cut",
    "apply.after_probe",
    "apply.before_recorded",
    "apply.after_recorded",
    "tenant_add.before_commit",
    "tenant_add.after_commit",
    "tenant_add.root_key_made",
    "tenant_add.key_made",
    "tenant_add.before_ca_commit",
    "tenant_add.after_ca_commit",
    "tenant_move.before_commit",
    "tenant_move.after_commit",
    "tenant_remove.before_commit",
    "tenant_remove.after_commit",
    "tenant_remove.some_revoked",
    "tenant_remove.issuers_retired",
    "tenant_remove.some_deleted",
    "tenant_remove.key_destroyed",
    "tenant_remove.before_gone",
    "tenant_remove.gone",
    "agent.page_read",
    "agent.trust_fetched",
    "agent.trust_kept",
    "guard.crl_published",
    "agent.proven",
    "agent.before_report",
    "agent.after_report",
    "agent.certified",
    "agent.key_written",
    "agents.before_given",
    "agents.after_given",
    "agents.after_report",
    "deliver.before_commit",
    "deliver.after_commit",
    "events.after_send",
    "move.begun",
    "move.imported",
    "move.recorded",
    "restore.journaled",
    "restore.filled",
    "restore.tenant_filled",
    "restore.moved",
    "restore.put",
    "restore.placed",
    "restore.linked",
    "restore.ended",
)
VARIABLE = "PORTAL_FAILPOINT"
EVENT = "portal.failpoint"
_FORM = re.compile(r"(?:(?P<after>[a-z._]+)>)?(?P<name>[a-z._]+)(?::(?P<times>[0-9]{1,6}))?(?:=(?P<act>.+))?")
_ACT = re.compile(r"kill|killgroup|error|sleep:(?P<seconds>[0-9]{1,4}(?:\.[0-9]{1,3})?)")


class Plan:
    """An action at the N-th time a step is reached: ``[AFTER>]NAME[:N][=kill|killgroup|error|sleep:SECONDS]``.

    The actions are to kill the process or its process group with SIGKILL, to raise ``OSError`` (EIO), and to wait.
    With ``AFTER>`` the count starts once the process has reached that other step.
    """

    def __init__(self, text: str) -> None:
        form = _FORM.fullmatch(text)
        act = _ACT.fullmatch((form and form["act"]) or "kill")
        if form is None or act is None or not {form["name"], form["after"] or form["name"]} <= set(NAMES):
            form_of_it = "[AFTER>]NAME[:N][=kill|killgroup|error|sleep:SECONDS]"
            raise SystemExit(f"{VARIABLE} must be {form_of_it}; the names are {', '.join(NAMES)}.")
        self._name, self._after = form["name"], form["after"]
        self._left = int(form["times"] or 1)
        self._act = act
        self._lock = threading.Lock()
        sys.stderr.write(f"{VARIABLE} is set: this portal will fail at {text}.\n")

    def __call__(self, event: str, arguments: tuple[str, ...]) -> None:
        """Act on an audit event if it is the step; Python calls this for its other events, too."""
        if event != EVENT:
            return
        name = arguments[0]
        with self._lock:
            if self._after is not None:
                if name == self._after:
                    self._after = None
                return
            if name != self._name:
                return
            self._left -= 1
            if self._left != 0:
                return
        if self._act["seconds"]:
            time.sleep(float(self._act["seconds"]))
        elif self._act[0] == "error":
            raise OSError(5, f"failpoint {name}")
        elif self._act[0] == "killgroup":
            os.killpg(os.getpgrp(), signal.SIGKILL)
        else:
            os.kill(os.getpid(), signal.SIGKILL)


failpoint = functools.partial(sys.audit, EVENT)
if os.environ.get(VARIABLE):
    sys.addaudithook(Plan(os.environ[VARIABLE]))
