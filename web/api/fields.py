"""Types of the fields of requests and answers."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field, GetJsonSchemaHandler, TypeAdapter, WithJsonSchema
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema
from typing_extensions import TypeAliasType

from config import KEY_TYPES
from core.states import METADATA_BYTES
from pki.issuers import Reason

# Control characters, line separators and bidirectional overrides could deceive somebody who reads a list or a log.
_HIDDEN = r"\u0000-\u001f\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\uffff"
_TEXT = rf"^[^\s{_HIDDEN}]([^{_HIDDEN}]*[^\s{_HIDDEN}])?$"
_TEXT_OR_NONE = rf"^([^\s{_HIDDEN}]([^{_HIDDEN}]*[^\s{_HIDDEN}])?)?$"
UUID = "^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$"
# In a path, in place of an id: its beginning, or - with the name in the query.
REFERENCE = "^([0-9a-f]{4,8}|[0-9a-f]{8}-[0-9a-f-]{0,27}|-)$"
BY_NAME = "-"
_NAMES: Mapping[str, tuple[str, ...]] = {"{device_id}": ("name", "external_id"), "{application_id}": ("name",)}
_PASSWORD = "^[ -~]{12,128}$"  # noqa: S105 - a pattern, not a password
_CURSOR = "^Wy[IJ][A-Za-z0-9_-]{40,900}$"  # Base64 of a JSON list that begins with the name of an order
_FINGERPRINT = "^[0-9a-f]{64}$"
SHORT_ID = "^[0-9a-f]{16}$"
BASE64 = "^[A-Za-z0-9+/]*={0,2}$"
_NUMERIC_CURSOR = "^[1-9][0-9]{0,17}$"
_PAIR = r'^[^="\\\u0000-\u001f\u007f]{1,128}=[^\u0000-\u001f\u007f]*$'
PROFILE_NAME = "^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"
TOPIC_PREFIX = "^[A-Za-z0-9_-]{1,64}(/[A-Za-z0-9_-]{1,64}){0,7}$"
# Messages about values that do not match, in place of the pattern.
PATTERN_IN_WORDS = {
    _TEXT: "must not contain control or invisible characters, nor begin or end with white space",
    _TEXT_OR_NONE: "must not contain control or invisible characters, nor begin or end with white space",
    _PASSWORD: "must be 12 to 128 printable ASCII characters",
    _PAIR: "must be KEY=VALUE, the key without quotation marks and backslashes",
    _NUMERIC_CURSOR: "must be the next_cursor of the previous page",
    PROFILE_NAME: "must be 1 to 63 lower-case letters, digits and inner hyphens",
    TOPIC_PREFIX: "must be one or more topic levels of letters, digits, - and _, without wildcards, such as sites/acme",
    _CURSOR: "must be the next_cursor of the previous page",
    UUID: "must be an id, a UUID in lower case",
    _FINGERPRINT: "must be 64 hexadecimal digits in lower case",
    SHORT_ID: "must be 16 hexadecimal digits in lower case",
    BASE64: "must be Base64",
    "^[!-~]{16,255}$": "must be 16 to 255 printable ASCII characters, no spaces",  # an idempotency key
    # Of evidence (attestation/appraisal.py).
    "^([0-9a-f]{2})+$": "must be bytes in hexadecimal digits in lower case",
    "^([0-9a-f]{2}){0,64}$": "must be at most 64 bytes in hexadecimal digits in lower case",
    "^([0-9a-f]{64}|[0-9a-f]{96}|[0-9a-f]{128})$": "must be a hash of 64, 96 or 128 hexadecimal digits in lower case",
    "^(sha-256:[0-9a-f]{64}|sha-384:[0-9a-f]{96}|sha-512:[0-9a-f]{128})$": (
        "must be sha-256:, sha-384: or sha-512: with a hash in hexadecimal digits in lower case"
    ),
    "^(1?[0-9]|2[0-3])$": "must be the number of a PCR, 0 to 23",
    r"^[0-9]{1,9}(\.[0-9]{1,9}){0,7}$": "must be a version of numbers and dots, such as 1.4.2",
}

METADATA_DEPTH = 5
MAX_WHOLE = 2**53  # up to which a double has every whole number
_RFC_3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:\d\d)", re.ASCII)

Name = Annotated[str, Field(min_length=1, max_length=128, pattern=_TEXT, examples=["pump-17"])]
ShortText = Annotated[str, Field(min_length=1, max_length=64, pattern=_TEXT)]
Place = Annotated[str, Field(min_length=1, max_length=128, pattern=_TEXT)]
Description = Annotated[str, Field(max_length=256, pattern=_TEXT_OR_NONE, examples=["Pumps of hall 2"])]
ExternalId = Annotated[str, Field(min_length=1, max_length=128, pattern=_TEXT, examples=["line-4/000217"])]
ProfileName = Annotated[
    str,
    Field(
        pattern=PROFILE_NAME,
        examples=["tls-server"],
        description="The name of a certificate profile; `default` if it is left out",
    ),
]
GroupName = Annotated[
    str, Field(pattern=PROFILE_NAME, examples=["hall-2"], description="The name of a group of devices")
]
GroupNames = Annotated[list[GroupName], Field(max_length=32, description="Groups that the device is put into")]
BrokerName = Annotated[str, Field(pattern=PROFILE_NAME, examples=["edge-1"])]
BrokerAddress = Annotated[str, Field(min_length=1, max_length=255, pattern=_TEXT, examples=["edge-1.example.com:8883"])]
TenantName = Annotated[str, Field(pattern=PROFILE_NAME, examples=["acme"])]
TopicPrefix = Annotated[str, Field(pattern=TOPIC_PREFIX, max_length=256, examples=["sites/acme"])]
MetadataPair = Annotated[
    str,
    Field(
        max_length=512,
        pattern=_PAIR,
        examples=["owner=ops"],
        description="KEY=VALUE: devices whose metadata has this value, as text, under this key",
    ),
]
BundlePassword = Annotated[str, Field(pattern=_PASSWORD)]
BundleFormatName = Annotated[
    Literal["zip", "p12", "pem"],
    Field(description="zip (the default): an encrypted ZIP; p12: PKCS#12; pem: a plain ZIP with an encrypted key"),
]
DeviceId = Annotated[str, Field(pattern=UUID, examples=["3f2b8c1e-5a4d-4e6f-8a9b-0c1d2e3f4a5b"])]
Hex = Annotated[str, Field(pattern="^[0-9a-f]+$")]
Fingerprint = Annotated[str, Field(pattern=_FINGERPRINT)]
KeyTypeName = Literal["ec-p256", "ec-p384", "ed25519", "rsa-2048", "rsa-3072", "rsa-4096"]
ReasonName = Literal[
    "unspecified",
    "key_compromise",
    "affiliation_changed",
    "superseded",
    "cessation_of_operation",
    "privilege_withdrawn",
]
StatusName = Literal["pending", "active", "suspended", "revoked"]
RoleName = Literal["system", "admin", "operator", "auditor"]

if set(get_args(KeyTypeName)) != set(KEY_TYPES) or not set(get_args(ReasonName)) <= set(Reason):
    raise AssertionError("KeyTypeName and ReasonName must name values of config.KEY_TYPES and pki.issuers.Reason")


_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def _check_metadata(value: dict[str, Any]) -> dict[str, Any]:
    if len(json.dumps(value, ensure_ascii=False).encode()) > METADATA_BYTES:  # first: it bounds what follows
        raise ValueError(f"must be at most {METADATA_BYTES} bytes of JSON")
    _check_value(value, depth=1)
    return value


def _check_value(value: Any, depth: int) -> None:
    if depth > METADATA_DEPTH:
        raise ValueError(f"must be nested at most {METADATA_DEPTH} deep")
    if isinstance(value, dict):
        for key, inner in value.items():
            _check_value(key, depth)
            _check_value(inner, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            _check_value(inner, depth + 1)
    elif isinstance(value, str):
        if _CONTROL.search(value):
            raise ValueError("must not contain control characters")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError("must contain finite numbers only")
    elif isinstance(value, int | float) and abs(value) > MAX_WHOLE and value == int(value):  # 1e20 is whole, too
        raise ValueError("must contain only whole numbers of at most 53 bits")


class _Closed:
    """Says in the JSON schema of an object that it has no other keys than those that match."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return handler(schema) | {"additionalProperties": False}


_MetadataText = Annotated[str, Field(pattern=r"^[^\u0000-\u001f\u007f]*$")]
_Whole = {"type": "integer", "minimum": -MAX_WHOLE, "maximum": MAX_WHOLE}
_MetadataNumber = Annotated[float, WithJsonSchema({"anyOf": [_Whole, {"type": "number", "not": {"type": "integer"}}]})]


@functools.cache
def _level(number: int) -> Any:
    """Return the type of the values at a level of metadata."""
    scalar = _MetadataText | _MetadataNumber | bool | None
    if number == METADATA_DEPTH:  # only what is empty: its values would be a level deeper
        empty = Field(max_length=0)
        return TypeAliasType(
            f"MetadataLevel{number}", scalar | Annotated[list[Any], empty] | Annotated[dict[str, Any], empty]
        )
    deeper = _level(number + 1)
    return TypeAliasType(f"MetadataLevel{number}", scalar | list[deeper] | _object(number + 1))  # type: ignore[valid-type]


def _object(number: int) -> Any:
    values = _level(number)
    return Annotated[dict[_MetadataText, values], _Closed()]  # type: ignore[valid-type]


class _MetadataSchema:
    """Says in the JSON schema what ``_check_value`` checks, but for the size."""

    _described = TypeAdapter(_object(2))

    def __get_pydantic_json_schema__(self, _schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return handler(self._described.core_schema) | {"additionalProperties": False}


Metadata = Annotated[
    dict[str, Any],
    AfterValidator(_check_metadata),
    _MetadataSchema(),
    Field(
        description=f"Any JSON object of at most {METADATA_BYTES} bytes and {METADATA_DEPTH} levels, without control"
        " characters and with whole numbers of at most 53 bits"
    ),
]


def _read_integer(value: Any) -> Any:
    return int(value) if isinstance(value, str) and re.fullmatch("-?[0-9]{1,9}", value) else value


def _read_flag(value: Any) -> Any:
    return {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value


def _read_whole_number(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value  # 1.0 is an integer in JSON Schema


def _read_time(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        if not _RFC_3339.fullmatch(value):
            raise ValueError("not RFC 3339")
        return datetime.fromisoformat(value.upper()).astimezone(UTC)
    except (ValueError, OverflowError):
        raise ValueError("must be an RFC 3339 time with a time zone, such as 2027-01-31T00:00:00Z") from None


Time = Annotated[datetime, Field(json_schema_extra={"format": "date-time"}), BeforeValidator(_read_time)]
# The BeforeValidator comes last: before the Field it would hide the limits from the OpenAPI text.
Limit = Annotated[int, Field(ge=1, le=200), BeforeValidator(_read_integer)]
Flag = Annotated[bool, BeforeValidator(_read_flag)]
IntegerText = BeforeValidator(_read_integer)  # for an integer in a form, where everything is text
WholeNumber = BeforeValidator(_read_whole_number)
Cursor = Annotated[str, Field(max_length=903, pattern=_CURSOR)]
NumericCursor = Annotated[str, Field(pattern=_NUMERIC_CURSOR)]


def given(name: str) -> dict[str, Any]:
    """Return the JSON schema of an object in which a field is there and not null."""
    return {"required": [name], "properties": {name: {"not": {"type": "null"}}}}


def names_in(path: str) -> tuple[str, ...]:
    """Return the parameters of the query by which a path such as ``/devices/{device_id}`` names what it is about."""
    return next((names for part, names in _NAMES.items() if part in path), ())
