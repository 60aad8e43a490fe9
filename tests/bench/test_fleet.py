"""The fleet that benchmarks write is one that the portal could have registered."""

from __future__ import annotations

import sqlalchemy as sa

from bench.fleet import add_fleet
from operations.wiring import Portal
from store.tables import AuditHead
from tests.support.harness import ON_SQLITE


@ON_SQLITE  # on PostgreSQL it takes the role that owns the tables
def test_its_devices_count_for_their_tenant_but_for_revoked_ones(portal: Portal) -> None:
    add_fleet(portal.settings.data_dir, 5, revoked=2, url=portal.settings.database_url)
    with portal.database.snapshot() as tx:
        assert tx.execute(sa.select(AuditHead.clients)).scalar_one() == 3
