"""Certificates of agents have a purpose of their own."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0043"
down_revision = "0042"
branch_labels = None
depends_on = None

_OLD, _NEW = "'device', 'server', 'canary', 'lost'", "'device', 'server', 'agent', 'canary', 'lost'"
_THEIRS = (
    "UPDATE certificates SET purpose = 'agent' WHERE purpose = 'server' AND fingerprint IN"
    " (SELECT certificate FROM broker_agents UNION SELECT next_certificate FROM broker_agents)"
)


def upgrade() -> None:
    bind = op.get_bind()
    if bind.dialect.name == "sqlite":
        # A table of a million certificates is not copied for a constraint: https://sqlite.org/lang_altertable.html
        # section 7 has this way for changes that do not affect what is on the disk.
        version = bind.exec_driver_sql("PRAGMA schema_version").scalar_one()
        bind.exec_driver_sql("PRAGMA writable_schema = ON")
        replaced = bind.execute(
            sa.text(
                "UPDATE sqlite_master SET sql = replace(sql, :old, :new)"
                " WHERE type = 'table' AND name = 'certificates' AND instr(sql, :old) > 0"
            ),
            {"old": f"purpose IN ({_OLD})", "new": f"purpose IN ({_NEW})"},
        )
        bind.exec_driver_sql(f"PRAGMA schema_version = {version + 1}")
        bind.exec_driver_sql("PRAGMA writable_schema = OFF")
        if replaced.rowcount != 1:
            raise RuntimeError("the constraint on the purpose of certificates is not as it was written")
    else:
        name = op.f("ck_certificates_purpose")
        op.drop_constraint(name, "certificates", type_="check")
        op.create_check_constraint(name, "certificates", f"purpose IN ({_NEW})")
    op.execute(_THEIRS)


def downgrade() -> None:
    raise RuntimeError("an older portal would not know the certificates of agents: restore a backup")
