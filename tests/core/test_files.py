"""Files replaced whole or not at all, and locks that one holds."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from core import files
from core.errors import LockUnavailable, StartupError
from core.files import (
    FileLock,
    is_owned,
    own_until_exit,
    private_folder,
    remove_leftovers,
    replace_file,
    secret_file,
    temporary_beside,
)


def test_a_file_is_replaced_with_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "key"
    replace_file(path, b"one")
    replace_file(path, b"two", mode=0o640)
    assert path.read_bytes() == b"two"
    assert path.stat().st_mode & 0o777 == 0o640
    assert [entry.name for entry in tmp_path.iterdir()] == ["key"]


def test_a_write_that_fails_leaves_the_old_file_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "crl.pem"
    replace_file(path, b"old")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["crl.pem"]


def test_what_a_killed_writer_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from core import files; from pathlib import Path; "
        "path = files.temporary_beside(Path(sys.argv[1]))"
    )
    path = tmp_path / "server.key"
    killed = f"{program}; path.write_bytes(b'key'); os.kill(os.getpid(), signal.SIGKILL)"
    subprocess.run([sys.executable, "-c", killed, str(path)], cwd=Path(__file__).parents[2], check=False)
    ours = temporary_beside(path)
    ours.write_bytes(b"key")
    (tmp_path / ".setup.lock").touch()
    assert len(remove_leftovers(tmp_path)) == 1
    assert {entry.name for entry in tmp_path.iterdir()} == {ours.name, ".setup.lock"}


def test_a_folder_gets_its_mode_even_where_it_was_there(tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    folder.mkdir(mode=0o755)
    assert private_folder(folder).stat().st_mode & 0o777 == 0o700


def test_a_secret_is_made_once(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    assert secret_file(path, lambda: "first") == "first"
    assert secret_file(path, lambda: "second") == "first"
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("content", "mode", "said"), [(b"x", 0o644, "chmod 600"), (b"", 0o600, "empty"), (b"\xff", 0o600, "read")]
)
def test_a_secret_that_is_exposed_or_damaged_stops_the_start(
    tmp_path: Path, content: bytes, mode: int, said: str
) -> None:
    path = tmp_path / "secret"
    path.write_bytes(content)
    path.chmod(mode)
    with pytest.raises(StartupError, match=said):
        secret_file(path, lambda: "new")


def test_one_thread_at_a_time_holds_a_lock(tmp_path: Path) -> None:
    lock = FileLock(tmp_path / "lock")
    inside = threading.Semaphore(1)
    clashes: list[int] = []

    def work() -> None:
        for _ in range(50):
            with lock.hold():
                if not inside.acquire(blocking=False):
                    clashes.append(1)
                inside.release()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert clashes == []


def test_another_process_holds_a_lock_until_it_dies(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    program = (
        f"import fcntl,sys; f=open({str(path)!r}, 'w'); fcntl.flock(f, 2); print('held', flush=True); sys.stdin.read()"
    )
    lock = FileLock(path)
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with lock.try_hold() as held:
            assert not held
        with pytest.raises(LockUnavailable, match="another process of the portal holds it"), lock.hold(0.05):
            pass
        holder.kill()
        holder.wait()
        with lock.try_hold() as held:
            assert held


def test_a_lock_that_another_thread_holds_is_waited_for_no_longer_than_wanted(tmp_path: Path) -> None:
    lock = FileLock(tmp_path / "lock")
    with lock.hold(), pytest.raises(LockUnavailable, match="busy"), lock.hold(0.05):
        pass


def test_who_finds_it_done_when_its_turn_has_come_waits_for_no_other_process(tmp_path: Path) -> None:
    lock, of_another = FileLock(tmp_path / "lock"), FileLock(tmp_path / "lock")
    with of_another.hold():
        with lock.hold_unless(lambda: True, timeout=0) as held:
            assert not held
        with pytest.raises(LockUnavailable), lock.hold_unless(lambda: False, timeout=0):
            pass
    with lock.hold_unless(lambda: False, timeout=0) as held:
        assert held
        with of_another.try_hold() as free:
            assert not free


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> threading.Semaphore:
    """Is released each time that a thread is about to wait for a file in the kernel; to poll is an error."""
    waits, flock = threading.Semaphore(0), fcntl.flock

    def announced(descriptor: int, operation: int) -> None:
        if operation == fcntl.LOCK_EX:
            waits.release()
        flock(descriptor, operation)

    def poll(_pause: float) -> None:
        if not threading.current_thread().name.startswith("paho-"):  # a client that an earlier test has left
            raise AssertionError("it polls")

    monkeypatch.setattr(fcntl, "flock", announced)
    monkeypatch.setattr(time, "sleep", poll)
    return waits


def test_who_waits_for_another_process_is_woken_by_the_kernel(tmp_path: Path, waits: threading.Semaphore) -> None:
    lock, of_another = FileLock(tmp_path / "lock"), FileLock(tmp_path / "lock")

    def hold() -> bool:
        with lock.hold(60.0), of_another.try_hold() as free:
            return free

    with ThreadPoolExecutor(1) as pool:
        for _ in range(2):
            with of_another.hold():
                future = pool.submit(hold)
                assert waits.acquire(timeout=60)
            assert future.result() is False
    opened = {os.path.realpath(f"/proc/self/fd/{each}") for each in os.listdir("/proc/self/fd")}
    assert os.path.realpath(tmp_path / "lock") not in opened


def test_a_lock_that_comes_too_late_is_released_and_can_be_waited_for_again(
    tmp_path: Path, waits: threading.Semaphore, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, of_another = FileLock(tmp_path / "lock"), FileLock(tmp_path / "lock")
    monkeypatch.setattr(files, "PATIENT_SECONDS", 0.01)
    with of_another.hold():
        with pytest.raises(LockUnavailable, match="another process of the portal holds it"), lock.hold(0.05):
            pass
        assert waits.acquire(timeout=60)
        monkeypatch.undo()
        with pytest.raises(LockUnavailable), lock.hold(0.05):  # it polls meanwhile
            pass
        assert not waits.acquire(blocking=False)
    with of_another.hold(60.0):  # which the thread that came too late does not keep
        pass
    with lock.hold(60.0), of_another.try_hold() as free:
        assert not free


def test_a_forked_process_waits_by_itself(tmp_path: Path) -> None:
    program = """
import os, sys, threading
from pathlib import Path
from core.files import FileLock
lock, other = FileLock(Path(sys.argv[1])), FileLock(Path(sys.argv[1]))
def wait():
    with lock.hold(60.0):
        pass
def both():
    with other.hold():
        thread = threading.Thread(target=wait)
        thread.start()
        while lock._waiter is None or lock._waiter.process != os.getpid():
            pass
    thread.join()
both()
child = os.fork()
both()
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
os._exit(0)
"""
    command = [sys.executable, "-c", program, str(tmp_path / "lock")]
    assert subprocess.run(command, timeout=60, check=False, cwd=Path(files.__file__).parent.parent).returncode == 0


def test_a_lock_whose_file_cannot_be_opened_is_said_to_be_unavailable(tmp_path: Path) -> None:
    lock = FileLock(tmp_path / "missing" / "lock")
    with pytest.raises(LockUnavailable, match="No such file"), lock.hold():
        pass
    with pytest.raises(LockUnavailable, match="No such file"), lock.try_hold():
        pass


def test_a_lock_leaves_no_descriptor_open(tmp_path: Path) -> None:
    lock = FileLock(tmp_path / "lock")
    before = len(os.listdir("/proc/self/fd"))
    with lock.hold():
        pass
    with lock.try_hold():
        pass
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_a_process_owns_is_free_when_it_has_ended_though_its_child_lives(tmp_path: Path) -> None:
    path = tmp_path / ".serving.lock"
    owner = """
import os, sys
from pathlib import Path
from core.files import own_until_exit
assert own_until_exit(Path(sys.argv[1]))
if os.fork() == 0:
    sys.stdin.read()
    os._exit(0)
print("owned", flush=True)
sys.stdin.readline()
os._exit(0)
"""
    command = [sys.executable, "-c", owner, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "owned\n"
        assert not own_until_exit(path)
        assert is_owned(path)
        process.kill()
        process.wait()
        assert not is_owned(path)
        assert own_until_exit(path)
        process.stdin.close()  # which ends the child
    assert path.stat().st_mode & 0o777 == 0o600
