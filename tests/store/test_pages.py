"""Counts of all nodes are in one table, and go by the clock of the database, whatever that of a node says."""

from __future__ import annotations

import sqlalchemy as sa

from core import rates, throttle
from core.rates import Rates
from core.throttle import Throttle
from operations.wiring import Portal
from store.pages import PageTable
from tests.support.harness import ON_POSTGRESQL

pytestmark = ON_POSTGRESQL
HERE, A_MINUTE_OFF = "192.0.2.7", (0.0, 60.0, 4_000_000_000.0, -60.0)


def test_failed_logins_at_several_nodes_count_together_though_their_clocks_differ(portal: Portal) -> None:
    nodes = [Throttle(PageTable(portal.database, throttle.LAYOUT), limit=3) for _ in A_MINUTE_OFF]
    waits = [node.failed(HERE, now).wait for node, now in zip(nodes, A_MINUTE_OFF, strict=True)]
    assert waits[:3] == [0, 0, 0]
    assert 55 <= waits[3] <= 60
    for number in range(throttle.RECORDED_OF_AN_ADDRESS):
        nodes[number % 3].failed(HERE, 0.0)
    assert nodes[1].take_unrecorded().networks == ((HERE, 4),)
    assert nodes[2].take_unrecorded().count == 0


def test_what_tenants_take_at_several_nodes_counts_together(portal: Portal) -> None:
    first, second = (Rates(PageTable(portal.database, rates.LAYOUT)) for _ in range(2))
    assert first.take("acme", 2, 3, 0.0).number == 2
    taken = second.take("acme", 2, 3, 60.0)
    assert taken.number == 1
    assert 55 <= taken.wait <= 60
    assert second.take("another", 2, 3, 60.0).number == 2
    with portal.database.snapshot() as tx:
        assert tx.execute(sa.text("SELECT count(*) FROM pages")).scalar_one() <= 2
