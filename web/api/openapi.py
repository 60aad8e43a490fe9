"""The OpenAPI 3.1 description of the interface, made from the routes and the models that check requests."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import models_json_schema

from core.errors import NotFound
from web.api import problems
from web.api.fields import ExternalId, Name, names_in
from web.api.problems import ProblemModel
from web.api.routing import FORM, HTML, IDEMPOTENCY_KEY, JSON, PATH_PARTS, Answers, Route, RowBody

VERSION = "1"
_ERROR_HEADERS = {
    401: {"WWW-Authenticate": "Bearer"},
    405: {"Allow": "The methods that the path allows"},
    429: {"Retry-After": "Seconds"},
    503: {"Retry-After": "Seconds"},
}

_BASIC = {"WWW-Authenticate": "Basic"}


def openapi(routes: Sequence[Route], *, server_url: str) -> dict[str, Any]:
    """Return the OpenAPI 3.1.1 description of the routes."""
    schemas = _schemas(routes)
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        methods = paths.setdefault(route.path, {})
        methods[route.method.lower()] = operation = _operation(route, schemas)
        operation["responses"][str(route.answers.status)] |= links(route, routes)
        if route.head_summary:
            methods["head"] = _head_operation(route, schemas)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Device Onboarding Portal",
            "version": VERSION,
            "description": "Registers IoT devices, issues and revokes their certificates, and controls their access"
            " to the MQTT broker. The paths for operators and programs are served below /v1, too.",
        },
        "servers": [{"url": server_url}],
        "paths": paths,
        "components": {
            "schemas": schemas["components"],
            "securitySchemes": {
                "operatorToken": {"type": "http", "scheme": "bearer", "description": "An operator token"}
            },
        },
    }


def _schemas(routes: Sequence[Route]) -> dict[str, Any]:
    inputs: dict[type[BaseModel], None] = {}
    outputs: dict[type[BaseModel], None] = {ProblemModel: None}
    for route in routes:
        for model in (route.body, route.query, route.rows.model if route.rows else None):
            if model is not None:
                inputs[model] = None
        outputs |= {answer.model: None for answer in (route.answers, *route.also) if answer.model is not None}
    references, definitions = models_json_schema(
        [*((model, "validation") for model in inputs), *((model, "serialization") for model in outputs)],
        ref_template="#/components/schemas/{model}",
    )
    named = {model: schema for (model, _mode), schema in references.items()}
    return {"components": definitions.get("$defs", {}), "by_model": named}


def _operation(route: Route, schemas: dict[str, Any]) -> dict[str, Any]:
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "pattern": pattern}}
        for name, (pattern, _, _) in PATH_PARTS.items()
        if f"{{{name}}}" in route.path
    ]
    if route.query is not None:
        parameters += _query_parameters(route.query, schemas)
    parameters += [
        {
            "name": name,
            "in": "query",
            "required": False,
            "description": f"The {name}, with - in the place of the id; that may be shortened to 4 digits, too",
            "schema": TypeAdapter(ExternalId if name == "external_id" else Name).json_schema(),
        }
        for name in names_in(route.path)
    ]
    if route.idempotency_key:
        parameters.append(
            {
                "name": "Idempotency-Key",
                "in": "header",
                "required": False,
                "description": "A repeat with the same key gets the same answer, for 24 hours or a bundle's grace time",
                "schema": {"type": "string", "pattern": IDEMPOTENCY_KEY},
            }
        )
    operation: dict[str, Any] = {
        "operationId": route.name,
        "summary": route.summary,
        "tags": [route.tag],
        "parameters": parameters,
        "responses": _responses(route, schemas),
        "security": _security(route),
    }
    body = request_body(route, schemas["by_model"])
    if body is not None:
        operation["requestBody"] = body
    return operation


def _security(route: Route) -> list[dict[str, list[str]]]:
    if route.permission is not None:
        return [{"operatorToken": []}]
    return [{}, {"operatorToken": []}] if route.token_optional else []


def _head_operation(route: Route, schemas: dict[str, Any]) -> dict[str, Any]:
    operation = _operation(route, schemas)
    responses = {
        status: {name: value for name, value in response.items() if name != "content"}
        for status, response in operation["responses"].items()
    }
    return {
        **operation,
        "operationId": f"{route.name}_head",
        "summary": route.head_summary,
        "responses": responses,
    }


def _query_parameters(model: type[BaseModel], schemas: dict[str, Any]) -> list[dict[str, Any]]:
    name = schemas["by_model"][model]["$ref"].rpartition("/")[2]
    described = schemas["components"][name]
    needed = described.get("required", ())
    return [
        {"name": field, "in": "query", "required": field in needed, "schema": _without_null(schema)}
        for field, schema in described["properties"].items()
    ]


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a query parameter, which may be missing but is never null."""
    options = [option for option in schema.get("anyOf", []) if option.get("type") != "null"]
    rest = {name: value for name, value in schema.items() if name not in ("anyOf", "default") or value is not None}
    if options:
        rest.pop("anyOf")
        rest |= options[0]
    return rest


def _responses(route: Route, schemas: dict[str, Any]) -> dict[str, Any]:
    answers = route.answers
    responses = {str(answers.status): _success(answers, schemas)}
    if route.on_pki_listener and answers.model is None:
        responses["304"] = {"description": "Not modified", "headers": _headers(answers.headers)}
    plain = route.path.startswith(problems.IN_PLAIN_TEXT)
    said = {problems.MEDIA_TYPE: {"schema": schemas["by_model"][ProblemModel]}}
    if route.for_people:
        said[HTML] = {"schema": {"type": "string"}}
    for status in sorted(_error_statuses(route)):
        responses[str(status)] = {
            "description": HTTPStatus(status).phrase,
            "content": {"text/plain": {"schema": {"type": "string"}}} if plain else said,
            "headers": _headers(_BASIC if plain and status == 401 else _ERROR_HEADERS.get(status)),
        }
        if plain and status == 401:
            del responses["401"]["content"]
    for answer in route.also:
        described = _success(answer, schemas)
        responses.setdefault(str(answer.status), described).setdefault("content", {}).update(described["content"])
    return responses


def _success(answers: Answers, schemas: dict[str, Any]) -> dict[str, Any]:
    schema = {"type": "object"} if answers.media_type == "application/json" else {"type": "string", "format": "binary"}
    if answers.model is not None:
        schema = schemas["by_model"][answers.model]
    return {
        "description": answers.description,
        "content": {kind: {"schema": schema} for kind in (answers.media_type, *answers.other_media_types) if kind},
        "headers": _headers(answers.headers),
    }


def _error_statuses(route: Route) -> set[int]:
    statuses = {400, 405, *route.errors}
    if any(f"{{{name}}}" in route.path and issubclass(error, NotFound) for name, (_, error, _) in PATH_PARTS.items()):
        statuses |= {404}
    if route.permission is not None:
        statuses |= {401, 403, 429, 503}
    if route.body is not None:
        statuses |= {413, 415, 422}
    if route.octets is not None:
        statuses |= {413, 415}
    if route.rows is not None:
        statuses |= {408, 413, 415, 422}
    if route.query is not None or route.idempotency_key or names_in(route.path):
        statuses |= {422}
    if names_in(route.path):
        statuses |= {409}
    return statuses


def _headers(more: Mapping[str, str] | None = None) -> dict[str, Any]:
    described = {"X-Request-Id": "Is in the log and the audit record, too", **(more or {})}
    return {name: {"description": description, "schema": {"type": "string"}} for name, description in described.items()}


def _rows_of(rows: RowBody, media_type: str, row: Any) -> dict[str, Any]:
    """Describe a body of rows in one media type; ``row`` is the schema of each."""
    if media_type != "text/csv":
        return {"schema": {"type": "string"}, "x-row-schema": row}
    fields = rows.model.model_fields
    required = [name for name, field in fields.items() if field.is_required()]
    columns = {
        name: {
            "required": name in required,
            "content": "application/json" if name in rows.json_columns else "text/plain",
            "schema": {"$ref": f"{row['$ref']}/properties/{name}"},
        }
        for name in fields
    }
    description = (
        "RFC 4180 in UTF-8, cells separated by commas. The first row names the columns, in any order and case; those of"
        f" x-columns, of which {', '.join(required)} are needed. {' and '.join(rows.json_columns)} hold JSON, lists of"
        " names are separated by spaces. An empty cell is a field that is not given, a row of empty cells no row."
    )
    # The first row is needed, even if there is no other.
    schema = {"type": "string", "minLength": 1, "description": description}
    return {"schema": schema, "x-row-schema": row, "x-columns": columns}


def request_body(route: Route, schemas: Mapping[type[BaseModel], Any]) -> dict[str, Any] | None:
    """Describe the body of a route, ``None`` if it has none; ``schemas`` has the schema of each model."""
    if route.body is not None:
        content: dict[str, Any] = {FORM if route.form else JSON: {"schema": schemas[route.body]}}
        return {"required": not route.body_optional, "content": content}
    if route.octets is not None:
        content = {route.octets.media_type: {"schema": {"type": "string", "format": "binary"}}}
        return {"required": True, "content": content}
    if route.rows is not None:
        row = schemas[route.rows.model]
        return {
            "required": True,
            "description": "One row for each device, as in x-row-schema; a CSV has the columns of x-columns",
            "content": {kind: _rows_of(route.rows, kind, row) for kind in route.rows.media_types},
        }
    return None


def links(route: Route, routes: Sequence[Route]) -> dict[str, Any]:
    """Return OpenAPI links from an answer 201 to every operation whose path parameters it has."""
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
