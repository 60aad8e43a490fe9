"""What the tables are made of: their base, the types of their columns, conditions and partial indexes."""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, ClassVar, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import DeclarativeBase

from core.states import (
    Approval,
    CertificateStatus,
    DeliveryStatus,
    DeviceStatus,
    EnrolmentStatus,
    EventDeliveryStatus,
    IssuerKind,
    IssuerStatus,
    ManufacturerStatus,
)

StateName = TypeVar("StateName", bound=StrEnum)
BigId = sa.BigInteger().with_variant(sa.Integer(), "sqlite")  # SQLite numbers rows only in INTEGER columns


class NaiveTimeError(ValueError, sa.exc.DontWrapMixin):
    """A time without a zone; SQLAlchemy passes this error on unwrapped."""


class UtcDateTime(sa.TypeDecorator[datetime]):
    """An aware time in UTC, to the microsecond; SQLite, which has no zones, stores it without one."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Convert a time to UTC; raises ``NaiveTimeError`` for one without a zone, which is always a mistake."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise NaiveTimeError("a time without a zone must not reach the database")
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        """Return the time with its zone, UTC."""
        if value is None:
            return None
        time: datetime = value
        return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)


class StateText(sa.TypeDecorator[StateName]):
    """A text column that holds the values of an enum; a row that is read holds the member."""

    impl = sa.String
    cache_ok = True

    def __init__(self, states: type[StateName], length: int = 16) -> None:
        """Take the enum, and the length of the column in the database."""
        super().__init__(length)
        self.states = states

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        """Return the member's text for the driver; a constraint of the table refuses any other text."""
        return None if value is None else str(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> StateName | None:
        """Return the member."""
        return None if value is None else self.states(value)


STATES: tuple[type[StrEnum], ...] = (
    Approval, CertificateStatus, DeliveryStatus, DeviceStatus, EnrolmentStatus, EventDeliveryStatus, IssuerKind,
    IssuerStatus, ManufacturerStatus,
)  # fmt: skip


class Base(DeclarativeBase):
    """The base of all tables; names every constraint, so that migrations and errors can refer to it."""

    type_annotation_map: ClassVar[dict[Any, Any]] = {
        datetime: UtcDateTime,
        **{states: StateText(states) for states in STATES},
    }
    metadata = sa.MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


def one_of(column: str, *values: str) -> str:
    """Return the condition that a column has one of these values."""
    allowed = ", ".join(f"'{value}'" for value in values)
    return f"{column} IN ({allowed})"


def partial_index(name: str, *columns: str, where: str, unique: bool = False) -> sa.Index:
    """Return an index of the rows that fulfil a condition, on either database."""
    return sa.Index(name, *columns, unique=unique, sqlite_where=sa.text(where), postgresql_where=sa.text(where))
