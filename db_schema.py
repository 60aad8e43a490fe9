"""All tables of the database, whichever module has them."""

from __future__ import annotations

import db_tables_events
from db_tables import Base

TOPICS = (db_tables_events,)  # the modules with tables beside db_tables; importing them is what makes them known
METADATA = Base.metadata
