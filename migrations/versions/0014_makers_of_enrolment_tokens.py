"""By which operator token each enrolment token was made."""

from __future__ import annotations

from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Written out: alembic would make the table anew on SQLite for the sake of the constraint.
    op.execute(
        "ALTER TABLE enrolment_tokens ADD COLUMN operator_token_id VARCHAR(32)"
        " CONSTRAINT fk_enrolment_tokens_operator_token_id REFERENCES tokens (id)"
    )
    op.execute(
        "UPDATE enrolment_tokens SET operator_token_id = (SELECT t.id FROM audit_entries a JOIN tokens t"
        " ON t.tenant_id = a.tenant_id AND a.actor = t.name || ' (' || t.id || ')'"
        " WHERE a.tenant_id = enrolment_tokens.tenant_id AND a.action = 'enrolment_token:create'"
        " AND a.object = 'enrolment_token:' || enrolment_tokens.id LIMIT 1)"
    )
    op.create_index(
        "ix_enrolment_tokens_operator_token", "enrolment_tokens", ["tenant_id", "operator_token_id"], unique=False
    )


def downgrade() -> None:
    op.drop_index("ix_enrolment_tokens_operator_token", "enrolment_tokens")
    op.drop_column("enrolment_tokens", "operator_token_id")
