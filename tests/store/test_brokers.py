"""What is enforced is what every broker enforces that counts."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy.engine import Connection

import db
from broker_provisioning import BrokerProvisioning
from core.errors import NotFound, StateConflict
from core.states import BrokerKind
from operations.wiring import Portal
from store import brokers, generations
from store.brokers import BrokerRecord
from tests.support.brokers import enforce_all
from tests.support.statements import noting

AT = datetime(2026, 1, 1, tzinfo=UTC)
LATER = AT + timedelta(minutes=1)


def add(tx: Connection, name: str, *, joined: bool = True) -> BrokerRecord:
    return brokers.add_broker(tx, name, BrokerKind.AGENT, at=AT, joined=joined)


def applied(tx: Connection) -> int:
    return generations.get_broker_state(tx).applied_generation


@pytest.fixture
def main(portal: Portal) -> Portal:
    """A portal whose first broker, the only one, has everything."""
    with portal.database.transaction() as tx:
        enforce_all(tx)
    return portal


def test_there_is_one_at_first_and_it_counts(portal: Portal) -> None:
    with portal.database.snapshot() as tx:
        (first,) = brokers.list_brokers(tx)
    assert (first.name, first.kind, first.counts) == ("main", BrokerKind.NODE, True)


def test_one_that_has_joined_counts_although_it_has_proven_nothing(main: Portal) -> None:
    with main.database.transaction() as tx:
        newest = applied(tx)
        assert newest > 0
        add(tx, "edge-1")
        assert applied(tx) == 0
        assert brokers.behind(tx, newest) == ["edge-1"]
        enforce_all(tx)
        assert (applied(tx), brokers.behind(tx, newest)) == (newest, [])


def test_one_that_was_only_invited_does_not_count(main: Portal) -> None:
    with main.database.transaction() as tx:
        newest, edge = applied(tx), add(tx, "edge-1", joined=False)
        assert (applied(tx), edge.counts) == (newest, False)
        brokers.join(tx, edge.id, at=AT)
        assert (applied(tx), brokers.get_broker(tx, "edge-1").counts) == (0, True)


def test_the_slowest_says_what_is_enforced(main: Portal) -> None:
    with main.database.transaction() as tx:
        edge = add(tx, "edge-1")
        first, second = db.next_generation(tx, at=AT), db.next_generation(tx, at=AT)
        brokers.set_applied_generation(tx, 1, second, applied_at=AT)
        brokers.set_applied_generation(tx, edge.id, first, applied_at=LATER)
        state = generations.get_broker_state(tx)
        assert (state.applied_generation, state.applied_at, state.pending_since) == (first, LATER, LATER)
        assert brokers.own_state(tx, 1).applied_generation == second
        brokers.set_applied_generation(tx, edge.id, second, applied_at=LATER)
        assert generations.get_broker_state(tx).pending_since is None


def test_one_that_is_declared_away_does_not_count_until_it_is_declared_back(main: Portal) -> None:
    with main.database.transaction() as tx:
        newest = applied(tx)
        add(tx, "edge-1")
        brokers.declare_away(tx, brokers.get_broker(tx, "edge-1"), at=AT)
        assert (applied(tx), brokers.behind(tx, newest)) == (newest, [])
        brokers.declare_back(tx, brokers.get_broker(tx, "edge-1"), at=AT)
        assert (applied(tx), brokers.behind(tx, newest)) == (0, ["edge-1"])


def test_the_greatest_generation_that_was_enforced_is_remembered(main: Portal) -> None:
    with main.database.transaction() as tx:
        newest = applied(tx)
        add(tx, "edge-1")
        assert (applied(tx), brokers.announced_generation(tx)) == (0, newest)


@pytest.mark.parametrize("end", [brokers.remove_broker, brokers.declare_away])
def test_the_last_one_that_counts_stays(main: Portal, end: Callable[..., None]) -> None:
    with main.database.transaction() as tx:
        add(tx, "edge-1", joined=False)
        with pytest.raises(StateConflict, match="add another"):
            end(tx, brokers.get_broker(tx, "main"), at=AT)
        end(tx, brokers.get_broker(tx, "edge-1"), at=AT)  # it does not count


def test_what_a_removed_one_lacked_is_missed_no_more(main: Portal) -> None:
    with main.database.transaction() as tx:
        newest = applied(tx)
        brokers.remove_broker(tx, add(tx, "edge-1"), at=AT)
        assert applied(tx) == newest
        with pytest.raises(NotFound):
            brokers.get_broker(tx, "edge-1")


def test_a_name_is_given_once_and_the_transaction_goes_on(main: Portal) -> None:
    with main.database.transaction() as tx:
        with pytest.raises(StateConflict, match="another name"):
            add(tx, "main")
        add(tx, "edge-1")


def test_a_problem_is_kept_until_something_is_proven(main: Portal) -> None:
    with main.database.transaction() as tx:
        brokers.set_problem(tx, 1, "p" * 2000, at=LATER)
        record = brokers.get_broker(tx, "main")
        assert (record.problem, record.reported_at) == ("p" * 1000, LATER)
        brokers.set_applied_generation(tx, 1, db.next_generation(tx, at=AT), applied_at=LATER)
        assert brokers.get_broker(tx, "main").problem is None


def test_a_broker_that_was_removed_has_no_state(main: Portal) -> None:
    with main.database.snapshot() as tx, pytest.raises(NotFound, match="join"):
        brokers.own_state(tx, 99)


def test_each_act_takes_its_turn_once_and_before_it_writes(main: Portal, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(brokers, "take_turns", lambda _: done.append("turn"))

    def note(statement: str, _rows: object) -> None:
        if not statement.startswith("SELECT"):
            done.append("write")

    with main.database.transaction() as tx:
        edge = add(tx, "edge-1", joined=False)
        acts: tuple[Callable[[], None], ...] = (
            lambda: brokers.join(tx, edge.id, at=AT),
            lambda: brokers.declare_away(tx, edge, at=AT),
            lambda: brokers.declare_back(tx, edge, at=AT),
            lambda: brokers.remove_broker(tx, edge, at=AT),
            lambda: brokers.forget_proofs_of_agents(tx, at=AT),
        )
        for act in acts:
            done.clear()
            with noting(tx, note):
                act()
            assert done == ["turn", "write", "write"]


def test_a_proof_takes_its_turn_once(main: Portal, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[Connection] = []
    monkeypatch.setattr(brokers, "take_turns", turns.append)
    monkeypatch.setattr(BrokerProvisioning, "bring_into_force", lambda *_, **__: None)
    with main.database.transaction() as tx:
        newest = db.next_generation(tx, at=AT)
    assert main.reconciler.apply(newest).enforced == newest
    assert len(turns) == 1
