"""The table of what people were told by mail."""

from __future__ import annotations

from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.orm import Mapped, mapped_column

from store.database import Base


class MailedMatter(Base):
    """A matter that a message to the people of a tenant has named, so that it is named once.

    ``subject`` tells one matter of a kind from another, and each occurrence of it: see ``workflows.mail.matters``.
    """

    __tablename__ = "mailed_matters"

    tenant_id: Mapped[str] = mapped_column(sa.ForeignKey("tenants.id"), primary_key=True)
    kind: Mapped[str] = mapped_column(sa.String(16), primary_key=True)
    subject: Mapped[str] = mapped_column(sa.String(64), primary_key=True)
    said_at: Mapped[datetime]
