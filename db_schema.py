"""All tables of the database, whichever module has them."""

from __future__ import annotations

import db_tables_enrolment
import db_tables_events
import db_tables_reenrolment
from db_tables import Base

# The modules with tables beside db_tables; importing them is what makes them known.
TOPICS = (db_tables_enrolment, db_tables_events, db_tables_reenrolment)
METADATA = Base.metadata
