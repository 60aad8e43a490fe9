"""What may be asked next about a thing just made, for the OpenAPI text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from web.api.routing import Route


def links(route: Route, routes: Sequence[Route]) -> dict[str, Any]:
    """OpenAPI links from an answer 201 to every operation whose path speaks of what the answer names."""
    model = route.answers.model
    if route.answers.status != 201 or model is None:
        return {}
    found = {}
    for other in routes:
        names = re.findall(r"\{(\w+)\}", other.path)
        if names and other is not route and set(names) <= set(model.model_fields):
            parameters = {name: f"$response.body#/{name}" for name in names}
            found[other.name] = {"operationId": other.name, "parameters": parameters}
    return {"links": found} if found else {}
