"""What is wrong with a field, in words: ours, whatever the library that checks the models would say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic_core import ErrorDetails

from web.api.fields import PATTERN_IN_WORDS

_Context = Mapping[str, Any]


OTHER = "has a value that does not fit; see /docs"


def _counted(number: object, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _one_of(context: _Context) -> str:
    return f"must be {str(context['expected']).replace(chr(39), '')}"


# By the types of errors (pydantic-core), each the end of a sentence that begins with the field. A test collects those
# that the models of all routes can raise.
SENTENCES: Mapping[str, str | Callable[[_Context], str]] = {
    "missing": "is missing",
    "extra_forbidden": "is not a field of this request",
    "string_type": "must be text",
    "string_unicode": "must be valid Unicode",
    "string_too_short": lambda context: f"must have at least {_counted(context['min_length'], 'character')}",
    "string_too_long": lambda context: f"must have at most {_counted(context['max_length'], 'character')}",
    "string_pattern_mismatch": lambda context: PATTERN_IN_WORDS.get(context["pattern"], OTHER),
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_parsing_size": "must be a whole number that is not as large",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "greater_than_equal": lambda context: f"must be {context['ge']} or more",
    "less_than_equal": lambda context: f"must be {context['le']} or less",
    "greater_than": lambda context: f"must be more than {context['gt']}",
    "less_than": lambda context: f"must be less than {context['lt']}",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "literal_error": _one_of,
    "enum": _one_of,
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "too_short": lambda context: f"must have at least {_counted(context['min_length'], 'item')}",
    "too_long": lambda context: f"must have at most {_counted(context['max_length'], 'item')}",
    "datetime_type": "must be a time, such as 2027-01-31T00:00:00Z",
    "datetime_parsing": "must be a time, such as 2027-01-31T00:00:00Z",
    "datetime_from_date_parsing": "must be a time, such as 2027-01-31T00:00:00Z",
    "invalid_key": "must have text as keys",
    "none_required": "must be null",
    "json_invalid": "must be JSON",
}


def in_words(problem: ErrorDetails) -> str:
    """Return the end of a sentence about a field, without the value, which may be a secret."""
    if problem["type"] == "value_error":  # a check of our own, in our own words
        return problem["msg"].removeprefix("Value error, ")
    sentence = SENTENCES.get(problem["type"], OTHER)
    return sentence if isinstance(sentence, str) else sentence(problem.get("ctx", {}))
