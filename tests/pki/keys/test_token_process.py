"""The process of a token's module, without the process: how it treats the PIN, and tokens that are about to lock."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from pkcs11 import TokenFlag
from pkcs11 import exceptions as failures

from pki.keys.token_process import Pin, TokenRefused, TokenSession

PIN = "4711-0815"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    path = tmp_path / "pin"
    path.touch(mode=0o600)
    path.write_text(f"{PIN}\n")
    return path


@pytest.fixture
def pin(file: Path, tmp_path: Path) -> Pin:
    return Pin(file, tmp_path / "marker")


def attempt(pin: Pin, right: str) -> bool:
    """Try the PIN with a token; returns whether it was tried at all."""
    with contextlib.suppress(TokenRefused), pin.to_try() as tried:
        if tried != right:
            raise failures.PinIncorrect
        return True
    return False


def test_a_right_pin_is_tried_each_time(pin: Pin) -> None:
    assert attempt(pin, PIN)
    assert attempt(pin, PIN)


@pytest.mark.parametrize("failure", [failures.PinIncorrect, failures.PinInvalid, failures.PinLenRange])
def test_a_refused_pin_is_not_tried_again_until_it_is_another(
    pin: Pin, file: Path, tmp_path: Path, failure: type[Exception]
) -> None:
    with pytest.raises(TokenRefused, match="refuses the PIN in"), pin.to_try():
        raise failure
    file.write_text(PIN)  # again, as a service's credential is at each start
    with pytest.raises(TokenRefused, match="which is not tried again"), Pin(file, tmp_path / "marker").to_try():
        pytest.fail("it was tried again")
    file.write_text("another")
    assert attempt(pin, "another")
    file.write_text(PIN)
    assert attempt(pin, PIN)  # the token accepted another since


@pytest.mark.parametrize("failure", [failures.DeviceError, failures.PinLocked, failures.TokenNotPresent])
def test_a_token_that_fails_says_nothing_about_the_pin(pin: Pin, failure: type[Exception]) -> None:
    with pytest.raises(failure), pin.to_try():
        raise failure
    assert attempt(pin, PIN)


def test_the_marker_of_a_refused_pin_holds_no_pin_and_is_private(pin: Pin, tmp_path: Path) -> None:
    with pytest.raises(TokenRefused), pin.to_try():
        raise failures.PinIncorrect
    marker = tmp_path / "marker"
    assert marker.stat().st_mode & 0o077 == 0
    assert PIN not in marker.read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["marker", "marker.lock", "pin"]


def test_of_many_that_have_a_wrong_pin_one_tries_it(pin: Pin) -> None:
    tries: list[str] = []
    start = threading.Barrier(4)

    def ask() -> None:
        start.wait()
        with contextlib.suppress(TokenRefused), pin.to_try() as tried:
            tries.append(tried)
            raise failures.PinIncorrect

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tries == [PIN]


def test_a_pin_whose_try_cannot_be_noted_is_not_tried(
    pin: Pin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(TokenRefused, match=r"is given no PIN, because .* \(No space left"), pin.to_try():
            pytest.fail("it was tried")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["marker.lock", "pin"]
    with pytest.raises(TokenRefused, match="is given no PIN"), Pin(tmp_path / "pin", tmp_path / "no" / "m").to_try():
        pytest.fail("it was tried")
    assert attempt(pin, PIN)


def test_a_refusal_that_cannot_be_noted_counts_as_a_try(pin: Pin, monkeypatch: pytest.MonkeyPatch) -> None:
    mark, marked = Pin._mark, []

    def once(self: Pin, tried: str, what: str) -> None:
        marked.append(what)
        if len(marked) % 2 == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        mark(self, tried, what)

    monkeypatch.setattr(Pin, "_mark", once)
    tries = 0
    for _ in range(9):
        with contextlib.suppress(TokenRefused), pin.to_try(patient=True):
            tries += 1
            raise failures.PinIncorrect
    assert tries == 2


TRIED_AND_KILLED = """
import os, sys
from pathlib import Path
from pki.keys.token_process import Pin
with Pin(Path(sys.argv[1]), Path(sys.argv[2])).to_try(patient=True):
    os._exit(7)
"""


def test_a_pin_whose_try_was_cut_off_is_tried_once_more_by_who_has_time(pin: Pin, file: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", TRIED_AND_KILLED, str(file), str(tmp_path / "marker")]
    assert subprocess.run(command, check=False).returncode == 7
    with pytest.raises(TokenRefused, match="did not answer a try of the PIN"), pin.to_try():
        pytest.fail("it was tried in no time")
    with pytest.raises(failures.DeviceError), pin.to_try(patient=True):
        raise failures.DeviceError  # which is an answer, and no refusal
    assert subprocess.run(command, check=False).returncode == 7
    with pytest.raises(TokenRefused, match="did not answer 2 tries of the PIN"), pin.to_try(patient=True):
        pytest.fail("it was tried a third time")
    file.write_text("another")
    assert attempt(pin, "another")


def test_a_damaged_marker_blocks_nothing(pin: Pin, tmp_path: Path) -> None:
    (tmp_path / "marker").write_text("00 zz\n")
    assert attempt(pin, PIN)


def _a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


def _below_a_link(path: Path) -> None:
    """As if the link's own folder were private, and that of the file were not."""
    (path.parent / "open").mkdir()
    file = path.rename(path.parent / "open" / "pin")
    path.symlink_to(file)
    file.parent.chmod(0o702)


SPOILED: dict[str, Callable[[Path], object]] = {
    "is open to others: chmod 600": lambda path: path.chmod(0o604),
    "is open to others: chmod 600 .*pin$": lambda path: path.chmod(0o660),
    "is open to others:": lambda path: path.chmod(0o602),
    "which others can change: put it into a folder": lambda path: path.parent.chmod(0o770),
    "which others can change": lambda path: path.parent.chmod(0o703),
    "is in .*/open, which others can change": _below_a_link,
    "is in .*, which others can change": lambda path: os.chown(path.parent, 4711, -1),
    "cannot be read": Path.unlink,
    "is not a file": _a_pipe,
    "must have one line": lambda path: path.write_bytes(b"\n"),
    "must have one line of 1 to 256 bytes": lambda path: path.write_bytes(b"1" * 300),
    "other bytes than UTF-8": lambda path: path.write_bytes(b"\xff\xfe"),
}


@pytest.mark.parametrize(("said", "spoil"), SPOILED.items(), ids=SPOILED)
def test_a_file_that_is_no_pins_is_refused(pin: Pin, file: Path, said: str, spoil: Callable[[Path], object]) -> None:
    spoil(file)
    with pytest.raises(TokenRefused, match=rf"needs a PIN; .*{said}"), pin.to_try():
        pytest.fail("a PIN was read")


def test_a_credential_of_the_service_that_its_group_may_read_is_taken(pin: Pin, file: Path) -> None:
    file.chmod(0o440)
    file.parent.chmod(0o750)
    assert attempt(pin, PIN)


def test_a_file_in_a_folder_where_others_can_replace_none_is_taken(pin: Pin, file: Path) -> None:
    file.parent.chmod(0o1777)
    assert attempt(pin, PIN)


# --- A module that is played ---------------------------------------------------------------------------------------


@dataclass
class PlayedToken:
    """A token, with its slot and module, as far as they are asked before there is a session."""

    flags: TokenFlag
    label: str = "portal"
    serial: bytes = b"4711\0\0"
    manufacturer_id: str = "somebody"
    model: str = "one"
    slot_id: int = 7
    logins: list[str | None] = field(default_factory=list)
    already_in: bool = False
    refuses: bool = False

    @property
    def slot(self) -> PlayedToken:
        return self

    def get_token(self) -> PlayedToken:
        return self

    def get_slots(self, **_: Any) -> list[PlayedToken]:
        return [self]

    def finalize(self) -> None:
        raise failures.GeneralError

    def initialize(self) -> None:
        pass

    def open(self, *, user_pin: str | None = None) -> PlayedToken:
        self.logins.append(user_pin)
        if self.refuses:
            raise failures.PinIncorrect
        if self.already_in and user_pin is not None:
            raise failures.UserAlreadyLoggedIn
        return self

    @property
    def token(self) -> PlayedToken:
        return self


def session_with(played: PlayedToken, file: Path, /, **wanted: object) -> TokenSession:
    setup = {"module": "/m.so", "token": wanted, "known": [], "pin_file": str(file), "markers": str(file.parent)}
    session = TokenSession(setup)
    session._library = played  # type: ignore[assignment]
    return session


@pytest.mark.parametrize(
    ("flag", "said"),
    [(TokenFlag.USER_PIN_LOCKED, "has locked its PIN"), (TokenFlag.USER_PIN_FINAL_TRY, "allows one more try")],
)
def test_a_token_that_is_locked_or_about_to_lock_is_given_no_pin(file: Path, flag: TokenFlag, said: str) -> None:
    token = PlayedToken(TokenFlag.TOKEN_INITIALIZED | flag)
    with pytest.raises(TokenRefused, match=said):
        session_with(token, file).answer({"do": "open"})
    assert token.logins == []


def test_a_token_that_knows_this_process_already_is_opened_without_a_pin(file: Path) -> None:
    token = PlayedToken(TokenFlag.TOKEN_INITIALIZED, already_in=True)
    assert session_with(token, file).answer({"do": "open"})["serial"] == "4711"
    assert token.logins == [PIN, None]


@pytest.mark.parametrize(
    ("wanted", "fits"),
    [
        ({"token": "portal", "serial": "4711", "manufacturer": "somebody", "model": "one", "slot_id": 7}, True),
        ({"token": None, "slot_id": 7}, True),
        ({"token": "another"}, False),
        ({"serial": "4712"}, False),
        ({"manufacturer": "nobody"}, False),
        ({"model": "two"}, False),
        ({"slot_id": 8}, False),
    ],
)
def test_a_token_is_chosen_by_all_that_the_uri_says(file: Path, wanted: dict[str, object], *, fits: bool) -> None:
    session = session_with(PlayedToken(TokenFlag.TOKEN_INITIALIZED), file, **wanted)
    if fits:
        session.answer({"do": "open"})
    else:
        with pytest.raises(TokenRefused, match="is not there"):
            session.answer({"do": "open"})


def test_a_refused_pin_is_not_tried_again_however_the_token_is_named(file: Path) -> None:
    token = PlayedToken(TokenFlag.TOKEN_INITIALIZED, refuses=True)
    with pytest.raises(TokenRefused, match="refuses the PIN"):
        session_with(token, file, token="portal").answer({"do": "open"})
    for wanted in ({"serial": "4711"}, {"slot_id": 7}, {"token": "portal", "model": "one"}):
        with pytest.raises(TokenRefused, match="which is not tried again"):
            session_with(token, file, **wanted).answer({"do": "open"})
    assert token.logins == [PIN]
    other = PlayedToken(TokenFlag.TOKEN_INITIALIZED, serial=b"4712")
    session_with(other, file, token="portal").answer({"do": "open"})
    assert other.logins == [PIN], "another token may have that PIN"


def test_a_slot_whose_token_was_not_set_up_is_passed_over(file: Path) -> None:
    with pytest.raises(TokenRefused, match="is not there"):
        session_with(PlayedToken(TokenFlag.RNG), file).answer({"do": "open"})
