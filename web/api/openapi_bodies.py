"""The part of the OpenAPI text that says what a request's body is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from web.api.routing import Route


def request_body(route: Route, schemas: Mapping[type[BaseModel], Any]) -> dict[str, Any] | None:
    """Describe the body that a route takes, ``None`` for one that takes none; ``schemas`` holds those of the models."""
    if route.body is not None:
        content: dict[str, Any] = {"application/json": {"schema": schemas[route.body]}}
        return {"required": not route.body_optional, "content": content}
    if route.octets is not None:
        content = {route.octets.media_type: {"schema": {"type": "string", "format": "binary"}}}
        return {"required": True, "content": content}
    if route.rows is not None:
        row = schemas[route.rows]
        return {
            "required": True,
            "description": "A row for each device, as the schema has one; of CSV, the first row names the columns",
            "content": {kind: {"schema": {"type": "string"}, "x-row-schema": row} for kind in route.row_types},
        }
    return None
