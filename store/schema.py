"""All tables of the database, whichever module has them."""

from __future__ import annotations

from store import tables_enrolment, tables_events, tables_reenrolment
from store.tables import Base

# The modules with tables beside db_tables; importing them is what makes them known.
TOPICS = (tables_enrolment, tables_events, tables_reenrolment)
METADATA = Base.metadata
