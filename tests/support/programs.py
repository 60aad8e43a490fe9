"""Starts the project's programs by a fork of a process that has imported them, which spares each start the import.

A process started here runs ``python -m flask --app app …`` or ``python cli.py …`` with an environment, a folder and
files of its own. What must begin with an exec (another program in front, a preloaded library, measured coverage) does.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import io
import json
import os
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, Any, NoReturn, Protocol

from core import failpoints

ROOT = Path(__file__).parents[2]
SERVER = ("-m", "flask", "--app", "app")
CLI = (str(ROOT / "cli.py"),)
NEEDS_EXEC = ("LD_PRELOAD", "COVERAGE_PROCESS_START", "COVERAGE_PROCESS_CONFIG", "PYTHONWARNINGS", "PYTHONIOENCODING")
LONGEST = 1 << 17  # bytes of a request
# What a program imports, and what it imports later, when it is first needed.
MODULES = {
    SERVER: ("app", "flask.cli", "alembic.command", "gunicorn.workers.gthread"),
    CLI: ("cli", "pyzipper"),
}


class Process(Protocol):
    """What a started process is asked for; ``subprocess.Popen`` has it, too."""

    pid: int
    returncode: Any  # int | None

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, sig: int) -> None: ...
    def kill(self) -> None: ...
    def terminate(self) -> None: ...


class _Forked:
    """A process that the server of forks has made; its status comes over ``link``, and then the number is free."""

    def __init__(self, link: socket.socket, words: Sequence[str]) -> None:
        self.args = words
        self.returncode: int | None = None
        self._link = link
        self._lock = threading.Lock()
        self.pid = int(link.recv(32))

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        with self._lock:
            if self.returncode is None:
                self._link.settimeout(timeout)
                try:
                    self.returncode = int(self._link.recv(32))
                except (BlockingIOError, TimeoutError):
                    raise subprocess.TimeoutExpired(self.args, timeout or 0) from None
                self._link.close()
        return self.returncode

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, sig)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


def start(
    program: Sequence[str],
    arguments: Sequence[str],
    *,
    env: Mapping[str, str],
    cwd: Path = ROOT,
    stdin: IO[Any] | int = subprocess.DEVNULL,
    stdout: IO[Any],
    stderr: IO[Any],
    under: Sequence[str] = (),
    start_new_session: bool = False,
) -> Process:
    """Start ``SERVER`` or ``CLI``, ``under`` a program that runs it, if one is given."""
    if under or any(name in env for name in NEEDS_EXEC):
        words = [*under, sys.executable, *program, *arguments]
        return subprocess.Popen(
            words, cwd=cwd, env=env, stdin=stdin, stdout=stdout, stderr=stderr, start_new_session=start_new_session
        )
    with contextlib.ExitStack() as stack:
        given = stack.enter_context(open(os.devnull, "rb")) if isinstance(stdin, int) else stdin
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        stack.callback(theirs.close)
        request = {
            "arguments": list(arguments), "environment": dict(env), "folder": str(cwd), "session": start_new_session
        }  # fmt: skip
        files = [given.fileno(), stdout.fileno(), stderr.fileno(), theirs.fileno()]
        socket.send_fds(_forks_of(tuple(program)), [json.dumps(request).encode()], files)
    return _Forked(ours, [sys.executable, *program, *arguments])


def run(
    program: Sequence[str],
    arguments: Sequence[str],
    *,
    env: Mapping[str, str],
    cwd: Path = ROOT,
    input: str | None = None,  # noqa: A002 - as subprocess.run has it
    timeout: float,
    check: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run ``SERVER`` or ``CLI`` to its end, as ``subprocess.run`` does with captured output."""
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        stdin.write((input or "").encode())
        stdin.seek(0)
        process = start(program, arguments, env=env, cwd=cwd, stdin=stdin, stdout=stdout, stderr=stderr)
        try:
            status = process.wait(timeout)
        except BaseException:
            process.kill()
            process.wait()
            raise
        out, err = (io.TextIOWrapper(_rewound(file)).read() for file in (stdout, stderr))
    done = subprocess.CompletedProcess([sys.executable, *program, *arguments], status, out, err)
    if check:
        done.check_returncode()
    return done


def _rewound(file: Any) -> Any:
    file.seek(0)
    return io.BytesIO(file.read())


# --- The server of forks ------------------------------------------------------------------------------------------


@functools.cache
def _forks_of(program: tuple[str, ...]) -> socket.socket:
    """The socket of the process that has imported a program; it ends with this one."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-m", "tests.support.programs", *MODULES[program], str(theirs.fileno())]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PORTAL_")}
    process = subprocess.Popen(command, cwd=ROOT, env=kept, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
    theirs.close()
    atexit.register(_end, ours, process)
    return ours


def _end(forks: socket.socket, process: subprocess.Popen[bytes]) -> None:
    forks.close()
    process.wait()


def _serve(modules: Sequence[str], requests: socket.socket) -> None:
    """Fork at each request until the other side has gone; each child tells its number, this process its status."""
    with contextlib.ExitStack() as made:
        for module in modules:
            __import__(module)
        if "app" in modules:
            _make_what_is_alike(made)
        gc.collect()
        gc.freeze()  # a child that looked through it for garbage would get a copy of each page
        _fork_at_each(modules[0], requests)


def _make_what_is_alike(made: contextlib.ExitStack) -> None:
    """Start a portal, so that those of the children find made what all make alike; ``made`` forgets it."""
    from app import create_app
    from tests.support.harness import first_start, settings_for
    from tests.support.made_once import made_once
    from tests.support.mosquitto import short_folder

    made.enter_context(made_once())
    folder = short_folder(in_memory=True)
    settings = settings_for(folder)
    first_start(settings)
    create_app(settings, background=False)
    shutil.rmtree(folder)


def _fork_at_each(module: str, requests: socket.socket) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # a test run that is broken off ends this by closing the socket
        signal.signal(number, signal.SIG_IGN)
    links: dict[int, socket.socket] = {}
    woken, wake = socket.socketpair()
    for each in (woken, wake):
        each.setblocking(False)
    signal.signal(signal.SIGCHLD, _nothing)
    signal.set_wakeup_fd(wake.fileno())
    selector = selectors.DefaultSelector()
    selector.register(requests, selectors.EVENT_READ)
    selector.register(woken, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is woken:
                woken.recv(4096)
                _tell_statuses(links, selector)
                continue
            if key.data is not None:
                selector.unregister(key.fileobj)
                links.pop(key.data).close()
                os.waitpid(key.data, 0)
                continue
            message, files, _, _ = socket.recv_fds(requests, LONGEST, 4)
            if not message:
                return
            child = os.fork()
            if not child:
                selector.close()
                signal.set_wakeup_fd(-1)
                for other in (requests, woken, wake, *links.values()):
                    other.close()
                _become(module, json.loads(message), files)
            link = socket.socket(fileno=files.pop())
            for file in files:
                os.close(file)
            links[child] = link


def _nothing(_number: int, _frame: FrameType | None) -> None:
    """Be told of a child's end by the wakeup descriptor."""


def _tell_statuses(links: dict[int, socket.socket], selector: selectors.BaseSelector) -> None:
    """Tell of each child that has ended; its number stays taken until whoever asked has heard it."""
    for child, link in links.items():
        if link in selector.get_map():
            continue  # it was told
        ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is not None:
            status = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
            with contextlib.suppress(OSError):  # whoever asked may be gone
                link.send(b"%d" % status)
            selector.register(link, selectors.EVENT_READ, child)


def _become(module: str, request: Mapping[str, Any], files: Sequence[int]) -> NoReturn:
    """In the child: run the program, and end it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    *given, link = files
    for to, file in enumerate(given):
        os.dup2(file, to)
        os.close(file)
    if request["session"]:
        os.setsid()
    with socket.socket(fileno=link) as told:
        told.send(b"%d" % os.getpid())
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)))
    sys.stdout = _written(1, line_buffering=os.isatty(1))
    sys.stderr = _written(2, errors="backslashreplace", line_buffering=True)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    try:
        _run(module, request["arguments"])
    except SystemExit as ended:
        if isinstance(ended.code, str):
            raise
        _end_quickly(ended.code or 0)
    _end_quickly(0)


def _written(number: int, **options: Any) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BufferedWriter(io.FileIO(number, "w", closefd=False)), **options)


def _end_quickly(status: int) -> NoReturn:
    """End as the interpreter does, but for taking its memory apart, which would copy each page of it first."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        raise SystemExit(status) from None  # the interpreter says what it says then
    os._exit(status)


def _run(module: str, arguments: Sequence[str]) -> None:
    if module == "cli":
        sys.argv = [*CLI, *arguments]
        runpy.run_path(CLI[0], run_name="__main__")
    else:
        if plan := os.environ.get(failpoints.VARIABLE):  # which the import would have read
            sys.addaudithook(failpoints.Plan(plan))
        sys.argv = [*SERVER[1:], *arguments]
        runpy.run_module("flask", run_name="__main__")


if __name__ == "__main__":
    _serve(sys.argv[1:-1], socket.socket(fileno=int(sys.argv[-1])))
