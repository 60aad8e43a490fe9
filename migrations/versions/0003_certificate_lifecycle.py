"""Certificates that go on beside their successor, when each came onto a CRL, since when a CA issues."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_ONE_CURRENT = "status IN ('active', 'held') AND replaced_until IS NULL"
_ON_A_CRL = "generation > 0"


def upgrade() -> None:
    # A constraint of a column may name others, and so comes without writing the table anew, which a million rows feel.
    time = "DATETIME" if op.get_bind().dialect.name == "sqlite" else "TIMESTAMP WITH TIME ZONE"
    op.execute(
        f"ALTER TABLE certificates ADD COLUMN replaced_until {time} CONSTRAINT ck_certificates_replaced_until CHECK"
        " (status IN ('held', 'revoked') OR (status = 'replaced') = (replaced_until IS NOT NULL))"
    )
    op.add_column("certificates", sa.Column("ends_when_used", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("certificates", sa.Column("generation", sa.BigInteger(), nullable=False, server_default="0"))
    op.drop_index("uq_certificates_one_active_a_device", "certificates")
    op.create_index(
        "uq_certificates_one_active_a_device",
        "certificates",
        ["device_id"],
        unique=True,
        sqlite_where=sa.text(_ONE_CURRENT),
        postgresql_where=sa.text(_ONE_CURRENT),
    )
    op.create_index(
        "ix_certificates_generation",
        "certificates",
        ["generation"],
        sqlite_where=sa.text(_ON_A_CRL),
        postgresql_where=sa.text(_ON_A_CRL),
    )
    op.create_index(
        "ix_certificates_replaced",
        "certificates",
        ["replaced_until"],
        sqlite_where=sa.text("status = 'replaced'"),
        postgresql_where=sa.text("status = 'replaced'"),
    )
    op.add_column("issuers", sa.Column("issuing_since", sa.DateTime(timezone=True), nullable=True))
    op.execute("UPDATE issuers SET issuing_since = created_at WHERE kind = 'issuing'")


def downgrade() -> None:
    raise RuntimeError("an older portal would let replaced certificates go on for ever: restore a backup instead")
