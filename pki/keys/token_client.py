"""Ask the process that has the token's module, with a time limit, and notice by itself when the token is back."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from core.errors import TokenKeyUnavailable, TokenUnavailable
from core.pkcs11_uri import TOKEN_ATTRIBUTES, TokenUri
from core.processors import on_any

log = logging.getLogger("portal.token")

PROGRAM = Path(__file__).with_name("token_process.py")  # not imported here: it would import the module's library

Facts = dict[str, Any]
# Between attempts to reach a token that failed, the last one again and again.
PAUSES = (0.5, 1.0, 2.0)
# How long the attempts take at most, in turn: what was sent to a token that has gone for good must not keep it from
# being tried again, but some take long to be opened.
ATTEMPT_SECONDS = (3.0, 3.0, 3.0, 30.0)
PATIENT_SECONDS = 30.0  # for a root's token, which no request waits for
START_SECONDS = 30.0
MAX_ANSWER_BYTES = 1 << 16
_ENDED = "made the process of its module end; see its own log"


class _Gone(Exception):
    """The process has ended, or was killed because it did not answer in time."""


@dataclass(slots=True)
class _Process:
    """A process that was started; it ends when this one does, because its standard input is closed then."""

    popen: subprocess.Popen[bytes]
    connection: Connection

    def ask(self, request: Facts, deadline: float) -> Facts:
        """Send a request and wait for its answer; raises ``TimeoutError`` or ``_Gone``."""
        try:
            self.connection.send_bytes(json.dumps(request).encode())
            if not self.connection.poll(max(0.0, deadline - time.monotonic())):
                raise TimeoutError
            answer: Facts = json.loads(self.connection.recv_bytes(MAX_ANSWER_BYTES))
        except (EOFError, ConnectionError) as error:
            raise _Gone from error
        return answer

    def end(self) -> None:
        self.connection.close()
        self.popen.kill()
        with contextlib.suppress(OSError):
            self.popen.stdin.close()  # type: ignore[union-attr]  # it is a pipe
        self.popen.wait()


class TokenClient:
    """One token as this process reaches it: one request at a time, each within the time limit.

    While the token fails, requests fail at once, and a thread tries until it is back. Without ``is_watched`` nobody
    tries but the next request: a root's token is kept elsewhere most of the time. After a fork the child has a process
    of its own.
    """

    def __init__(
        self, uri: TokenUri, folder: Path, *, timeout: float, is_watched: bool, known: Callable[[], list[Facts]]
    ) -> None:
        """``folder`` is where the markers of refused PINs are, ``known`` returns the keys that the token must have."""
        self.uri = uri
        self._markers = folder
        self._timeout = timeout
        self._is_watched = is_watched
        self._known = known
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._process: _Process | None = None
        self._problem: str | None = None
        self._closed = threading.Event()
        self._needs_patience = False  # since a try of the PIN was not answered, and there may be one more

    @property
    def problem(self) -> str | None:
        """What keeps the token from being used, as far as known; a sentence."""
        return self._problem

    def ask(self, request: Facts, *, seconds: float | None = None) -> Facts:
        """Return the answer to a request; raises ``TokenUnavailable`` with what is wrong.

        That is ``TokenKeyUnavailable`` if the token is of use for other keys.

        That takes as long as the time limit, or ``seconds``, at most: half of it may pass with requests before this.
        One that is not watched is given more time.
        """
        limit = seconds or (self._timeout if self._is_watched else max(self._timeout, PATIENT_SECONDS))
        deadline = time.monotonic() + limit
        if self._pid != os.getpid():
            self._begin()  # what was inherited belongs to the parent
        self._raise_problem()
        if not self._lock.acquire(timeout=limit / 2):
            raise TokenUnavailable(self._sentence("has more to sign than it can in time; try again later"))
        try:
            self._raise_problem()  # of the request before this one
            answer = self._answer(request | {"patient": not self._is_watched}, deadline)
        except TokenUnavailable as failure:
            self._fail(failure.detail)
            raise
        finally:
            self._lock.release()
        if "refused" in answer:  # for the key, which does not keep others from being used
            raise TokenKeyUnavailable(self._sentence(answer["refused"]))
        return answer

    def _raise_problem(self) -> None:
        if self._problem is not None:
            raise TokenUnavailable(self._problem)

    def _answer(self, request: Facts, deadline: float) -> Facts:
        """Return the answer, which may refuse the key; raises ``TokenUnavailable`` if the token itself is of no use."""
        was_running = self._process is not None
        try:
            answer = self._ask_process(request, deadline)
        except _Gone:
            if not was_running:
                raise TokenUnavailable(self._sentence(_ENDED)) from None
            try:
                answer = self._ask_process(request, deadline)
            except _Gone:
                raise TokenUnavailable(self._sentence(_ENDED)) from None
        self._needs_patience = answer.get("needs_patience", False)
        if "refused" in answer and not answer["is_of_key"]:
            raise TokenUnavailable(self._sentence(answer["refused"]))
        if "failed" in answer:
            raise TokenUnavailable(self._sentence(f"failed ({answer['failed']}); see its own log"))
        return answer

    def _ask_process(self, request: Facts, deadline: float) -> Facts:
        with self._ending_process():
            return self._running(deadline).ask(request, deadline)

    @contextlib.contextmanager
    def _ending_process(self) -> Iterator[None]:
        """End the process if the body of the ``with`` finds that it hangs or has ended."""
        try:
            yield
        except (TimeoutError, _Gone) as error:
            self._end_process()
            if isinstance(error, TimeoutError):
                raise TokenUnavailable(self._sentence("did not answer in time; it is tried again")) from None
            raise

    def _running(self, deadline: float) -> _Process:
        if self._closed.is_set():
            raise TokenUnavailable(self._sentence("is not used any more by this process, which ends"))
        if self._process is None:
            self._process = self._start()
            self._process.ask(self._setup(), deadline)
        return self._process

    def _end_process(self) -> None:
        if self._process is not None:
            self._process.end()
            self._process = None

    def _start(self) -> _Process:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            # The settings may hold secrets; the rest of the environment may be for the module.
            environment = {name: value for name, value in os.environ.items() if not name.startswith("PORTAL_")}
            try:
                with on_any():
                    popen = subprocess.Popen(  # noqa: S603 - the interpreter, and a program of the portal
                        [sys.executable, "-I", str(PROGRAM), str(theirs.fileno())],
                        stdin=subprocess.PIPE,
                        stdout=subprocess.DEVNULL,
                        stderr=subprocess.DEVNULL,
                        pass_fds=[theirs.fileno()],
                        env=environment,
                        start_new_session=True,
                    )
            except OSError as error:
                raise TokenUnavailable(
                    self._sentence(f"cannot be asked: no process can be started ({error.strerror})")
                ) from error
            return _Process(popen, Connection(ours.detach()))

    def _setup(self) -> Facts:
        return {
            "module": str(self.uri.module),
            "token": {name: getattr(self.uri, name) for name in (*TOKEN_ATTRIBUTES, "slot_id")},
            "pin_file": str(self.uri.pin_file),
            "markers": str(self._markers),
            "known": self._known(),
        }

    def _sentence(self, end: str) -> str:
        return f"The token {self.uri.of_token} {end}."

    # --- Recovery

    def _fail(self, problem: str) -> None:
        """Let requests fail at once from now on, until the token is back; called with the lock."""
        if self._closed.is_set():
            return
        if not self._is_watched:
            log.debug("the token of the root's key is not used", extra={"problem": problem})
        else:
            log.error("the token of CA keys fails", extra={"problem": problem})
            self._problem = problem
            threading.Thread(target=self._recover, name="token", daemon=True).start()

    def _recover(self) -> None:
        since, attempts = time.monotonic(), 0
        while not self._closed.wait(PAUSES[min(attempts, len(PAUSES) - 1)]):
            seconds = ATTEMPT_SECONDS[attempts % len(ATTEMPT_SECONDS)]
            attempts += 1
            with self._lock:
                try:
                    self._try_to_open(seconds)
                except (TokenUnavailable, _Gone) as failure:
                    problem = failure.detail if isinstance(failure, TokenUnavailable) else self._sentence(_ENDED)
                    if problem != self._problem and not self._closed.is_set():
                        log.error("the token of CA keys fails", extra={"problem": problem})
                    self._problem = problem
                    continue
                self._problem = None
            log.warning("the token of CA keys is back", extra={"seconds": round(time.monotonic() - since, 1)})
            return

    def _try_to_open(self, seconds: float) -> None:
        """Begin anew with the token; a busy machine has its time to start a process, and the token no less for it."""
        with self._ending_process():
            self._running(time.monotonic() + START_SECONDS)
        seconds = PATIENT_SECONDS if self._needs_patience else seconds
        self._answer({"do": "open", "patient": self._needs_patience}, time.monotonic() + seconds)

    def close(self) -> None:
        """End the process, whatever it is at; nothing can be asked any more."""
        self._closed.set()
        if self._pid != os.getpid():
            return  # the process is the parent's
        if (process := self._process) is not None:
            process.popen.kill()  # so that whoever waits for it leaves the lock
        with self._lock:
            self._end_process()
