"""Indexes for passes that read what has changed, however many devices there are."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_LISTED = "status IN ('held', 'revoked')"
_PARTIAL = {
    "ix_devices_generation": "generation > 0",
    "ix_devices_own_topics": "own_topics",
    "ix_devices_out": "status IN ('revoked', 'suspended')",
}


def upgrade() -> None:
    op.drop_index("ix_certificates_crl", "certificates")
    _create("ix_certificates_crl", "certificates", ["issuer_id", "status", "not_after", "id"], _LISTED)
    op.drop_index("ix_devices_generation", "devices")
    for name, condition in _PARTIAL.items():
        _create(name, "devices", ["tenant_id", "generation"], condition)


def downgrade() -> None:
    for name in _PARTIAL:
        op.drop_index(name, "devices")
    op.create_index("ix_devices_generation", "devices", ["tenant_id", "generation"])
    op.drop_index("ix_certificates_crl", "certificates")
    _create("ix_certificates_crl", "certificates", ["issuer_id", "not_after"], _LISTED)


def _create(name: str, table: str, columns: list[str], condition: str) -> None:
    op.create_index(name, table, columns, sqlite_where=sa.text(condition), postgresql_where=sa.text(condition))
