"""The guard believes the journal while it is good, and denies everybody while it is not; epochs."""

from __future__ import annotations

import os
import uuid
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.guard import (
    PASSWORD,
    GuardedBroker,
    guarded_broker,
    is_admitted,
    may_publish,
    may_subscribe,
    serial_line,
)
from tests.support.mqtt import NOT_AUTHORISED, MqttClient, connect_socket
from tests.support.pki import Credentials

pytest_plugins = ("tests.support.guard_fixtures",)
pytestmark = pytest.mark.system


# --- The journal ------------------------------------------------------------------------------------------------------


@dataclass
class Fleet:
    """A connected device and a broker whose journal is damaged."""

    broker: GuardedBroker
    device: MqttClient
    identity: str
    credentials: Credentials

    @property
    def works(self) -> bool:
        return may_publish(self.device, f"devices/{self.identity}/x")

    @property
    def path(self) -> Path:
        return self.broker.journal.path

    def is_repaired_by(self, content: bytes) -> bool:
        """Write a good journal in place; say whether the same connection works again."""
        with self.path.open("r+b") as file:
            file.truncate()
            file.write(content)
        assert self.broker.proven()
        return self.works


@pytest.fixture
def fleet(own_broker: GuardedBroker) -> Iterator[Fleet]:
    identity, credentials = own_broker.admit()
    with own_broker.device(credentials) as device:
        fleet = Fleet(own_broker, device, identity, credentials)
        assert fleet.works
        yield fleet


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "flipped": lambda content: content[:60] + bytes([content[60] ^ 1]) + content[61:],
    "shorter": lambda content: content[: content.rfind(b"\n", 0, -1) + 1],
    "empty": lambda _: b"",
    "without a line": lambda content: b"".join([*content.splitlines(True)[:1], *content.splitlines(True)[2:]]),
    "another header": lambda content: content.replace(b"portal-guard 1 1 0", b"portal-guard 2 1 0"),
    "an unknown word": lambda content: content + b"5 allowed x 00000000\n",
    "a long line": lambda content: content + b"x" * 40000 + b"\n",
    "zeros": lambda content: content + bytes(100) + b"\n",
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_journal_denies_everybody_keeps_sessions_and_is_good_again_once_repaired(
    fleet: Fleet, name: str
) -> None:
    content = fleet.broker.journal.content
    with fleet.path.open("r+b") as file:
        file.truncate()
        file.write(DAMAGES[name](content))
    assert not fleet.broker.proven()
    assert not fleet.works
    assert not may_subscribe(fleet.device, f"devices/{fleet.identity}/#")
    assert not fleet.broker.ask(f"identify/{fleet.identity}")
    fleet.broker.wait_for_log("Every device is denied until the portal has written a good one.")
    assert fleet.is_repaired_by(content)
    assert may_subscribe(fleet.device, f"devices/{fleet.identity}/#")


OUTSIDE = (
    "%23",
    "+",
    "+/telemetry",
    "$SYS/#",
    "$CONTROL/#",
    "$share/g/#",
    "devices/#/x",
    "devices/a+",
    "devices/%01",
    "devices/%FF",
)


def test_a_line_whose_filter_reaches_outside_is_damage_and_so_is_one_with_65(fleet: Fleet) -> None:
    content, stranger = fleet.broker.journal.content, uuid.uuid4()
    sequence, checksum = fleet.broker.journal.sequence, fleet.broker.journal.checksum
    for filters in (*(f"r:{text}" for text in OUTSIDE), " ".join(f"r:devices/{number}" for number in range(65))):
        text = f"{sequence + 1} allow {stranger} {filters}"
        with fleet.path.open("ab") as file:
            file.write(f"{text} {zlib.crc32(text.encode(), checksum):08x}\n".encode())
        assert not fleet.broker.proven(), filters
        assert not fleet.works
        assert fleet.is_repaired_by(content), filters
    fleet.broker.tell(f"allow {stranger} r:devices/%23 r:devices/+/telemetry")  # as an application has


def test_damage_is_noticed_on_the_tick(fleet: Fleet) -> None:
    fleet.path.write_bytes(DAMAGES["flipped"](fleet.broker.journal.content))
    fleet.broker.wait_for_log("a line with a wrong checksum")
    assert not fleet.works
    fleet.path.write_bytes(fleet.broker.journal.content)
    fleet.broker.wait_for_log("is in force", times=2)
    assert fleet.works


def test_a_missing_journal_denies_everybody_until_it_is_back(fleet: Fleet) -> None:
    away = fleet.path.with_suffix(".away")
    fleet.path.rename(away)
    assert not fleet.broker.proven()
    assert not fleet.works
    away.rename(fleet.path)
    assert fleet.broker.proven()
    assert fleet.works


@pytest.mark.parametrize("kind", ["folder", "loop", "fifo"])
def test_something_else_in_the_journals_place_denies_everybody(fleet: Fleet, kind: str) -> None:
    away = fleet.path.with_suffix(".away")
    fleet.path.rename(away)
    if kind == "folder":
        fleet.path.mkdir()
    elif kind == "loop":
        fleet.path.symlink_to(fleet.path)
    else:
        os.mkfifo(fleet.path)
    assert not fleet.broker.proven()
    assert not fleet.works
    fleet.path.rmdir() if kind == "folder" else fleet.path.unlink()
    away.rename(fleet.path)
    assert fleet.broker.proven()
    assert fleet.works


def test_a_journal_that_may_not_be_read_denies_everybody_though_it_is_open(fleet: Fleet) -> None:
    fleet.path.chmod(0)
    assert not fleet.broker.proven()
    assert not fleet.works
    fleet.path.chmod(0o644)
    assert fleet.broker.proven()
    assert fleet.works


def test_a_line_that_is_being_written_is_waited_for(fleet: Fleet) -> None:
    line = fleet.broker.journal.line(f"deny {fleet.identity}")
    before = fleet.broker.journal.sequence - 1
    with fleet.path.open("ab", buffering=0) as file:
        for part in (line[:1], line[1:30], line[30:-1]):
            file.write(part)
            assert not fleet.broker.proven()
            assert fleet.broker.ask(f"prove/1/{before}")
            assert fleet.works
        file.write(line[-1:])
        assert fleet.broker.proven()
    fleet.device.wait_until_cut()


def test_a_torn_line_may_be_cut_off_and_written_again(fleet: Fleet) -> None:
    size = fleet.path.stat().st_size
    with fleet.path.open("ab") as file:
        file.write(b"5 deny " + fleet.identity.encode())
    assert fleet.broker.proven()
    os.truncate(fleet.path, size)
    assert fleet.broker.proven()
    fleet.broker.tell("generation 1")
    assert fleet.works


def test_a_copy_of_the_journal_in_its_place_changes_nothing(fleet: Fleet) -> None:
    fleet.broker.journal.write()
    assert fleet.broker.proven()
    assert fleet.works
    fleet.broker.tell(f"deny {fleet.identity}")
    fleet.device.wait_until_cut()


def test_another_file_of_the_same_epoch_is_refused(fleet: Fleet) -> None:
    other = fleet.broker.new_journal(1)
    other.line(f"allow {uuid.uuid4()}")
    for _ in range(5):
        other.line("generation 1")
    other.write()
    assert not fleet.broker.proven()
    assert not fleet.works
    fleet.broker.wait_for_log("it is of the same epoch and says something else")
    fleet.broker.journal.write()
    assert fleet.broker.proven()
    assert fleet.works


def test_an_older_copy_of_the_journal_is_refused(fleet: Fleet) -> None:
    older = fleet.path.read_bytes()
    fleet.broker.tell("generation 2")
    temporary = fleet.path.with_suffix(".new")
    temporary.write_bytes(older)
    temporary.chmod(0o644)
    temporary.rename(fleet.path)
    assert not fleet.broker.ask(f"prove/1/{fleet.broker.journal.sequence - 1}")
    assert not fleet.works
    fleet.broker.wait_for_log("it ends before what was in force")
    fleet.broker.journal.write()
    assert fleet.broker.proven()
    assert fleet.works


# --- Epochs -----------------------------------------------------------------------------------------------------------


def test_a_new_epoch_is_in_force_once_it_is_confirmed_and_the_old_one_until_then(fleet: Fleet) -> None:
    stranger = str(uuid.uuid4())
    journal = fleet.broker.new_journal(7)
    journal.line(f"allow {stranger}")
    journal.write()
    assert fleet.broker.ask(f"prove/1/{fleet.broker.journal.sequence}")
    assert not fleet.broker.ask(f"prove/7/{journal.sequence}")
    assert fleet.works
    assert not fleet.broker.ask("epoch/6")
    assert fleet.broker.ask("epoch/7")
    fleet.broker.journal = journal
    assert fleet.broker.proven()
    fleet.device.wait_until_cut()
    assert is_admitted(fleet.broker, stranger, fleet.broker.issue(stranger))


def test_devices_that_a_new_epoch_allows_stay_connected(fleet: Fleet) -> None:
    journal = fleet.broker.new_journal(2)
    journal.line(f"allow {fleet.identity} rw:devices/{fleet.identity}/# r:more/#")
    fleet.broker.journal = journal.write()
    assert fleet.broker.ask("epoch/2")
    assert fleet.works
    fleet.broker.tell(f"deny {fleet.identity}")
    fleet.device.wait_until_cut()


def test_a_new_epoch_that_revokes_a_certificate_cuts_its_connection(fleet: Fleet) -> None:
    journal = fleet.broker.new_journal(2)
    journal.line(f"allow {fleet.identity}")
    journal.line(serial_line(fleet.broker, "serial", fleet.identity, fleet.credentials))
    fleet.broker.journal = journal.write()
    assert fleet.broker.ask("epoch/2")
    fleet.device.wait_until_cut()


def test_a_new_epoch_that_is_not_confirmed_denies_everybody_after_ten_seconds(fleet: Fleet) -> None:
    journal = fleet.broker.new_journal(2)
    journal.line(f"allow {fleet.identity}")
    journal.write()
    fleet.broker.wait_for_log("it is of a new epoch that the portal has not confirmed")
    assert not fleet.works
    assert fleet.broker.ask("epoch/2")
    assert fleet.works


def test_a_lower_epoch_is_refused_within_a_run(fleet: Fleet) -> None:
    journal = fleet.broker.new_journal(5)
    journal.line(f"allow {fleet.identity}")
    journal.write()
    assert fleet.broker.ask("epoch/5")
    fleet.broker.journal.write()
    assert not fleet.broker.ask("epoch/1")
    assert not fleet.works
    fleet.broker.wait_for_log("it is of an earlier epoch")
    journal.write()
    assert fleet.broker.ask(f"prove/5/{journal.sequence}")
    assert fleet.works


def test_a_damaged_file_of_a_new_epoch_denies_everybody_until_it_is_repaired_and_confirmed(fleet: Fleet) -> None:
    journal = fleet.broker.new_journal(2)
    journal.line(f"allow {fleet.identity}")
    journal.write()
    fleet.path.write_bytes(DAMAGES["flipped"](journal.content))
    assert not fleet.broker.ask("epoch/2")
    assert not fleet.works
    fleet.path.write_bytes(journal.content)
    assert not fleet.broker.ask(f"prove/2/{journal.sequence}")
    assert not fleet.works
    assert fleet.broker.ask("epoch/2")
    assert fleet.works


def test_an_older_journal_at_the_start_holds_until_the_portals_first_proof(fleet: Fleet) -> None:
    old = fleet.broker.journal
    journal = fleet.broker.new_journal(2)
    journal.line(f"deny {fleet.identity}")
    journal.write()
    assert fleet.broker.ask("epoch/2")
    fleet.broker.terminate()
    old.write()
    fleet.broker.start()
    assert is_admitted(fleet.broker, fleet.identity, fleet.credentials)
    assert not fleet.broker.ask(f"prove/2/{journal.sequence}")
    with fleet.broker.device(fleet.credentials) as device:
        assert not may_publish(device, f"devices/{fleet.identity}/x")
    assert not fleet.broker.ask(f"prove/1/{old.sequence}")
    journal.write()
    assert fleet.broker.ask("epoch/2")
    assert fleet.broker.ask(f"prove/2/{journal.sequence}")


@pytest.mark.parametrize("present", ["missing", "damaged", "empty"])
def test_a_broker_that_starts_without_a_good_journal_denies_everybody_until_there_is_one(present: str) -> None:
    with guarded_broker(start=False) as broker:
        identity = str(uuid.uuid4())
        broker.journal.line(f"allow {identity}")
        content = broker.journal.content
        broker.journal.path.unlink()
        if present != "missing":
            broker.journal.path.write_bytes(b"" if present == "empty" else content.replace(b" portal ", b" parrot "))
        broker.start()
        with broker.device(broker.issue(identity)) as device:
            assert not may_publish(device, f"devices/{identity}/x")
            with MqttClient(connect_socket(broker.socket)) as portal:
                assert portal.connect("any", username="portal", password=PASSWORD) == NOT_AUTHORISED
            broker.journal.write()
            broker.wait_for_log("is in force: epoch 1")
            assert broker.proven()
            assert may_publish(device, f"devices/{identity}/x")
