"""Whatever is wrong with a field, the portal says it in words of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, get_args

import pytest
from pydantic import BaseModel
from pydantic_core import ErrorDetails
from pydantic_core.core_schema import ErrorType

from app import ROUTES
from tests.support.harness import Api, problem_of
from web.api.fields import PATTERN_IN_WORDS
from web.api.sentences import OTHER, SENTENCES, in_words

# What a checked value of each kind can be refused for (pydantic-core); without an entry: nothing.
ALWAYS: Mapping[str, tuple[str, ...]] = {
    "str": ("string_type", "string_unicode"),
    "int": ("int_type", "int_from_float", "int_parsing", "int_parsing_size"),
    "float": ("float_type", "float_parsing", "finite_number"),
    "bool": ("bool_type", "bool_parsing"),
    "list": ("list_type",),
    "dict": ("dict_type",),
    "model": ("model_type", "model_attributes_type"),
    "model-fields": ("missing", "extra_forbidden", "invalid_key"),
    "literal": ("literal_error",),
    "enum": ("enum",),
    "datetime": ("datetime_type", "datetime_parsing", "datetime_from_date_parsing"),
    "none": ("none_required",),
}
# By a limit in the schema of a value.
LIMITS: Mapping[tuple[str, str], str] = {
    ("str", "min_length"): "string_too_short",
    ("str", "max_length"): "string_too_long",
    ("str", "pattern"): "string_pattern_mismatch",
    **{("list", limit): f"too_{word}" for limit, word in (("min_length", "short"), ("max_length", "long"))},
    **{("dict", limit): f"too_{word}" for limit, word in (("min_length", "short"), ("max_length", "long"))},
    **{(kind, "ge"): "greater_than_equal" for kind in ("int", "float")},
    **{(kind, "le"): "less_than_equal" for kind in ("int", "float")},
}
WITHOUT_ERRORS = {
    "no-info",  # of a function, not of a value
    *("any", "nullable", "default", "union", "tagged-union", "definitions", "definition-ref", "model-field", "tuple"),
    *("function-after", "function-before", "function-wrap", "function-plain", "lax-or-strict", "json-or-python"),
}


def within(schema: Any) -> Iterator[Mapping[str, Any]]:
    """Each schema of a value in the schema of a model."""
    if isinstance(schema, list | tuple):
        for part in schema:
            yield from within(part)
    elif isinstance(schema, dict):
        if isinstance(schema.get("type"), str):
            yield schema
        for name, part in schema.items():
            if name not in ("metadata", "serialization", "ref"):
                yield from within(part)


def models() -> set[type[BaseModel]]:
    taken = (model for route in ROUTES for model in (route.body, route.query, route.rows and route.rows.model))
    return {model for model in taken if model is not None}


def schemas() -> list[Mapping[str, Any]]:
    return [one for model in models() for one in within(model.__pydantic_core_schema__)]


def test_there_are_words_for_each_error_that_the_models_of_the_routes_can_raise() -> None:
    raised = {error for one in schemas() for error in ALWAYS.get(one["type"], ())}
    limits = [(one, *limit, error) for one in schemas() for limit, error in LIMITS.items()]
    raised |= {error for one, kind, limit, error in limits if one["type"] == kind and limit in one}
    assert {"string_too_short", "less_than_equal", "too_long", "literal_error"} <= raised  # it looks where they are
    assert raised <= set(SENTENCES), raised - set(SENTENCES)
    assert set(SENTENCES) <= set(get_args(ErrorType))


def test_every_kind_of_value_in_the_models_is_one_that_this_knows() -> None:
    kinds = {one["type"] for one in schemas()}
    assert kinds <= set(ALWAYS) | WITHOUT_ERRORS, kinds - set(ALWAYS) - WITHOUT_ERRORS


def test_every_pattern_is_said_in_words() -> None:
    patterns = {one["pattern"] for one in schemas() if one["type"] == "str" and "pattern" in one}
    assert patterns <= set(PATTERN_IN_WORDS), patterns - set(PATTERN_IN_WORDS)


@pytest.mark.parametrize(
    ("body", "field", "said"),
    [
        ({"name": ""}, "name", "must have at least 1 character"),
        ({"name": "x" * 129}, "name", "must have at most 128 characters"),
        ({"name": 5}, "name", "must be text"),
        ({"validity_days": 0}, "validity_days", "must be 1 or more"),
        ({"validity_days": "9"}, "validity_days", "must be a whole number"),
        ({"key_type": "dsa"}, "key_type", "must be ec-p256, ec-p384, ed25519, rsa-2048, rsa-3072 or rsa-4096"),
        ({"topics": []}, "topics", "must have at least 1 item"),
        ({"topics": {}}, "topics", "must be a list"),
        ({"topics": [{"filter": "a", "access": "read", "qos": 1}]}, "topics.0.qos", "is not a field of this request"),
        ({"metadata": []}, "metadata", "must be an object"),
        ({"topics": [7]}, "topics.0", "must be an object"),
    ],
)
def test_what_is_wrong_is_said_in_plain_words(api: Api, body: dict[str, Any], field: str, said: str) -> None:
    pump = {"name": "pump-1", "type": "pump", "location": "hall 1", "firmware": "1.0"}
    found = problem_of(api.post("/register", pump | body), 422, "invalid_input")
    assert {"field": field, "message": said} in found["errors"]
    assert f"{field} ({said})" in found["detail"]


def test_an_error_that_is_new_says_nothing_of_the_library() -> None:
    new: ErrorDetails = {"type": "of_a_later_version", "loc": ("name",), "msg": "Input should be secret", "input": "s"}
    assert in_words(new) == OTHER
