"""Routes: what each declares, how its request is authorized and read, how its reply is sent."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self, TypeVar
from urllib.parse import parse_qsl

from flask import Request, Response
from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, ValidationError
from werkzeug.datastructures import Headers, MultiDict
from werkzeug.routing import BaseConverter

from core.errors import (
    ApplicationNotFound,
    BodyTooLarge,
    DeviceNotFound,
    FieldProblem,
    Forbidden,
    InputInvalid,
    LinkUnknown,
    MediaTypeUnsupported,
    NotFound,
    PortalError,
    RequestMalformed,
    TenantSuspended,
    Unauthenticated,
    Unavailable,
)
from core.roles import MAY, Permission
from store import scope
from store.audit import Actor
from web.api.fields import PROFILE_NAME, REFERENCE, names_in
from web.api.proxies import client_address
from web.api.sentences import in_words
from workflows.operators import actor_with

if TYPE_CHECKING:
    from operations.wiring import Portal

JSON, NDJSON = "application/json", "application/x-ndjson"
HTML, FORM = "text/html", "application/x-www-form-urlencoded"
ANYONE: Permission | None = None  # in place of a permission: a route that asks for no token
MAX_PROBLEMS = 32
MAX_COUNTED = 1000  # of more problems none is named: pydantic can only list all of them, which takes long
V1 = "/v1"
# What others have fixed, or have been told, has its path alone: EST, PKI, links, probes, the description.
_WITHOUT_VERSION = (
    "/.well-known/", "/ca.pem", "/broker-ca.pem", "/ca/", "/crl/", "/ocsp", "/download/", "/healthz", "/readyz",
    "/metrics", "/openapi.json", "/docs",
)  # fmt: skip
IDEMPOTENCY_KEY = "^[!-~]{16,255}$"


# How answers write a time: RFC 3339, UTC, microseconds.
Timestamp = Annotated[
    datetime,
    PlainSerializer(lambda value: value.strftime("%Y-%m-%dT%H:%M:%S.%fZ"), return_type=str),
    Field(json_schema_extra={"format": "date-time"}),
]


class RequestModel(BaseModel):
    """The body or the query of a request: unknown fields are refused, nothing is converted silently."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True, defer_build=True)


class AnswerModel(BaseModel):
    """The body of an answer, or a part of it."""

    model_config = ConfigDict(frozen=True, defer_build=True)
    omit_none: ClassVar[bool] = False  # whether fields that are null are left out of the answer

    @classmethod
    def of(cls, *sources: object, **values: object) -> Self:
        """Return an answer with ``values``; other fields are attributes of the same name of the first source with one.

        Example::

            TokenModel.of(record, token_id=record.id)
        """
        for source in sources:
            for name in cls.model_fields:
                if name not in values and (value := getattr(source, name, ...)) is not ...:
                    values[name] = value
        return cls.model_validate(values)


@dataclass(slots=True)
class Exchange:
    """A request that is answered, in ``g.exchange``: what is said of it in the log and the metrics.

    ``started`` is by the performance counter; ``route`` is the rule, once one is found, ``actor`` who asks, if known.
    """

    request_id: str
    started: float
    route: str | None = None
    actor: Actor | None = None


@dataclass(frozen=True, slots=True)
class Call:
    """An authorized request. What its path, query and body hold are arguments of the handler beside it.

    ``device_tenant`` is the tenant that a device has named, by its EST label: no other tenant's credentials count.
    """

    portal: Portal
    actor: Actor
    method: str
    headers: Headers
    environ: dict[str, Any]
    idempotency_key: str | None = None
    device_tenant: str | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer: ``model`` is sent as JSON; ``content`` is bytes, or an iterator of them, of ``media_type``.

    Without a ``status`` it has the one that its route declares.
    """

    model: AnswerModel | None = None
    content: bytes | Iterator[bytes] = b""
    media_type: str = JSON
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


Handler = Callable[..., Reply | AnswerModel]
_H = TypeVar("_H", bound=Handler)


@dataclass(frozen=True, slots=True)
class Answers:
    """A successful answer, for the OpenAPI text: a model, or bytes of ``media_type``.

    ``headers`` maps each header worth knowing to a few words about it.
    """

    description: str = "Done"
    model: type[BaseModel] | None = None
    media_type: str = JSON
    status: int = 200
    other_media_types: tuple[str, ...] = ()
    headers: Mapping[str, str] = field(default_factory=dict)


_DONE = Answers()


@dataclass(frozen=True, slots=True)
class Octets:
    """A body that the handler gets as ``bytes``, of ``media_type`` and at most ``max_bytes`` long."""

    media_type: str
    max_bytes: int


@dataclass(frozen=True, slots=True)
class RowBody:
    """A body of rows, each as ``model`` has it, which the handler reads while it arrives.

    A body of type ``text/csv`` has the fields of the model as columns, those in ``json_columns`` as JSON.
    """

    model: type[BaseModel]
    media_types: tuple[str, ...]
    json_columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class Route:
    """One method of one path.

    ``handler`` gets the ``Call``, each ``{part}`` of the path as a string under its own name, and by the annotations
    of its parameters ``body`` and ``query`` a pydantic model (or, with ``octets``, the bytes of the body). Its name is
    the operationId, the first line of its docstring the summary. If its return annotation is a model, that is the
    answer's.

    With ``token_optional`` a route for ``ANYONE`` checks a token that comes along; with ``for_devices``, too, only a
    Bearer token is one, and the handler reads what a device has sent. With ``form`` the body is that of an HTML form.
    Every GET answers HEAD, too; with ``head_summary`` the OpenAPI text says so. With ``for_people`` a browser gets
    answers, those about errors among them, as pages. ``also`` are further answers that are no errors; ``errors`` need
    not name the statuses that follow from the path, the permission and the body.
    """

    method: str
    path: str
    handler: Handler
    permission: Permission | None
    answers: Answers = _DONE
    octets: Octets | None = None
    rows: RowBody | None = None
    also: tuple[Answers, ...] = ()
    errors: tuple[int, ...] = ()
    on_pki_listener: bool = False
    idempotency_key: bool = False
    body_optional: bool = False
    token_optional: bool = False
    for_devices: bool = False
    for_people: bool = False
    form: bool = False
    head_summary: str = ""
    tag: str = ""
    body: type[BaseModel] | None = field(init=False)
    query: type[BaseModel] | None = field(init=False)

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(self.handler)
        object.__setattr__(self, "body", None if self.octets else hints.get("body"))
        object.__setattr__(self, "query", hints.get("query"))
        if issubclass(hints["return"], BaseModel):
            object.__setattr__(self, "answers", dataclasses.replace(self.answers, model=hints["return"]))

    @property
    def name(self) -> str:
        """The handler's name."""
        return self.handler.__name__

    @property
    def paths(self) -> tuple[str, ...]:
        """The path, and the same below ``/v1`` unless it is one that has no version."""
        return (self.path,) if self.path.startswith(_WITHOUT_VERSION) else (self.path, V1 + self.path)

    @property
    def summary(self) -> str:
        """The first line of the handler's docstring."""
        return (self.handler.__doc__ or "").partition("\n")[0]


class Routes(list[Route]):
    """The routes of one resource, under the heading ``tag`` that they have in the OpenAPI text."""

    def __init__(self, tag: str) -> None:
        super().__init__()
        self.tag = tag

    def add(
        self, method: str, path: str, permission: Permission | None, answers: Answers = _DONE, **options: Any
    ) -> Callable[[_H], _H]:
        """Add the decorated handler as a route, whose fields the arguments are."""

        def decorate(handler: _H) -> _H:
            self.append(Route(method, path, handler, permission, answers, tag=self.tag, **options))
            return handler

        return decorate


# --- The path -----------------------------------------------------------------------------------------------------


class SegmentConverter(BaseConverter):
    """One path segment of at most 512 characters."""

    regex = "[^/]{1,512}"


class RestConverter(BaseConverter):
    """The rest of the path, at most 8,192 characters: base64 has slashes."""

    regex = r"[\s\S]{1,8192}"
    part_isolating = False


CONVERTERS: Mapping[str, type[BaseConverter]] = {"segment": SegmentConverter, "rest": RestConverter}
_LONG_PARTS = ("request", "rest")
_HEX = "^[0-9a-f]{16}$"
_OF_CLIENTS = "ids are UUIDs in lower case; a name goes into ?name=, with - in place of the id."
# The variable parts of paths: the pattern, and what is raised for a part that does not match it.
PATH_PARTS: Mapping[str, tuple[str, type[PortalError], str]] = {
    "device_id": (REFERENCE, DeviceNotFound, f"No device has this id: {_OF_CLIENTS}"),
    "application_id": (REFERENCE, ApplicationNotFound, f"No application has this id: {_OF_CLIENTS}"),
    "token_id": (_HEX, NotFound, "No operator token has this id: ids are 16 hexadecimal digits."),
    "session_id": (_HEX, NotFound, "No session has this id; it may have ended."),
    "webhook_id": (_HEX, NotFound, "No webhook has this id: ids are 16 hexadecimal digits."),
    "enrolment_token_id": (_HEX, NotFound, "No enrolment token has this id: ids are 16 hexadecimal digits."),
    "manufacturer_id": (_HEX, NotFound, "No manufacturer has this id: ids are 16 hexadecimal digits."),
    "log": (_HEX, NotFound, "No log has this name: names are 16 hexadecimal digits, the end of a checkpoint's origin."),
    "profile": (PROFILE_NAME, NotFound, "No certificate profile has this name; list them with GET /profiles."),
    "group": (PROFILE_NAME, NotFound, "No group has this name; list them with GET /groups."),
    "tenant": (PROFILE_NAME, NotFound, "No tenant has this name; list them with GET /tenants."),
    "broker": (PROFILE_NAME, NotFound, "No broker has this name; list them with GET /brokers."),
    "label": ("^[A-Za-z0-9._-]{1,64}$", NotFound, "Unknown EST label; leave it out, or use the tenant's name."),
    "issuer": ("^[a-z0-9-]{1,64}$", NotFound, "No issuer has this name; the certificate chain is at /ca.pem."),
    "token": (
        "^[A-Za-z0-9._-]{1,512}$",
        LinkUnknown,
        "This download link is not known here; check that it was copied whole.",
    ),
    "request": (
        r"^[\s\S]{1,8192}$",  # an OCSP client expects an OCSP response, whatever it has sent
        RequestMalformed,
        "The part after /ocsp/ must be an OCSP request in base64.",
    ),
    "rest": (r"^[\s\S]{1,8192}$", NotFound, "Nothing is at this path."),
}


def without_version(path: str) -> str:
    """Return the path of a request as the routes declare it."""
    rest = path.removeprefix(V1)
    return rest if path.startswith(f"{V1}/") and not rest.startswith(_WITHOUT_VERSION) else path


def rule_of(path: str) -> str:
    """Return Flask's rule for a path such as ``/devices/{device_id}``."""
    return re.sub(r"\{(\w+)\}", lambda part: f"<{'rest' if part[1] in _LONG_PARTS else 'segment'}:{part[1]}>", path)


# --- Who asks -----------------------------------------------------------------------------------------------------


def actor_of(portal: Portal, route: Route, request: Request, request_id: str) -> Actor:
    """Return who asks: an operator by token, or anyone, if the route is open to anyone.

    Raises ``Unauthenticated`` and ``TenantSuspended``, recorded as refused, and ``TooManyAttempts``; a valid token is
    never throttled.
    """
    anyone = Actor(
        portal.first_tenant,
        "anyone",
        "none",
        request_id,
        client_address(request.environ, portal.settings.trusted_proxies),
    )
    scheme, _, secret = request.headers.get("Authorization", "").partition(" ")
    comes_along = route.token_optional and (bool(scheme) if not route.for_devices else scheme.lower() == "bearer")
    if route.permission is None and not comes_along:
        return anyone
    try:
        token = portal.operators.authenticate(secret.strip()) if scheme.lower() == "bearer" and secret else None
    except Unavailable:
        if route.token_optional:
            return anyone  # what is open to anyone is answered without a database, too
        raise
    if token is None:
        portal.operators.login_failed(anyone, f"{route.method} {route.path}", "access", "unauthenticated")
        raise Unauthenticated(
            "A valid operator token is required: send it as Authorization: Bearer <token>, or ask an admin for one."
        )
    scope.enter(token.tenant_id)
    actor = actor_with(token, request_id=request_id, address=anyone.address)
    check_tenant(portal, actor, f"{route.method} {route.path}")
    return actor


def check_tenant(portal: Portal, actor: Actor, action: str) -> None:
    """Raise ``TenantSuspended``, recorded as refused, unless the actor's tenant is served."""
    try:
        portal.tenant_terms.of(actor.tenant_id).check_served()
    except TenantSuspended as error:
        portal.operators.refused(actor, action, "access", error.code)
        raise


def check_permission(portal: Portal, permission: Permission | None, actor: Actor, action: str) -> None:
    """Raise ``Forbidden``, recorded as refused, if the actor's role does not have the permission of a route."""
    if permission is None or permission in MAY.get(actor.role, ()):
        return
    portal.operators.refused(actor, action, "access", "forbidden")
    raise Forbidden(f"The role {actor.role} does not allow this; it takes a role with the permission {permission}.")


def share_of(portal: Portal, tenant_id: str) -> AbstractContextManager[None]:
    """Return what to do the work for a tenant in, so that one with many requests leaves room for those of others.

    Raises ``TenantBusy``.
    """
    return portal.fair_share.work_of(tenant_id) if portal.tenant_terms.are_several else contextlib.nullcontext()


def in_parts(portal: Portal, tenant_id: str, parts: Iterator[bytes]) -> Iterator[bytes]:
    """Return the content of a long answer for a tenant, each part of which is made in a turn of that tenant's."""
    return portal.fair_share.in_parts(tenant_id, parts) if portal.tenant_terms.are_several else parts


# --- The request --------------------------------------------------------------------------------------------------


def read_arguments(route: Route, request: Request, path: Mapping[str, str]) -> dict[str, str | bytes | BaseModel]:
    """Return the handler's arguments: the parts of the path, and what it takes of body and query, checked.

    Raises ``NotFound``, ``MediaTypeUnsupported``, ``BodyTooLarge``, ``RequestMalformed``, ``InputInvalid``.
    """
    check_path(path)
    arguments: dict[str, str | bytes | BaseModel] = {**path}
    if route.rows is not None and request.mimetype not in route.rows.media_types:
        kinds = " or ".join(route.rows.media_types)
        raise MediaTypeUnsupported(f"The body must consist of rows; send it with Content-Type: {kinds}.")
    if route.octets is not None:
        arguments["body"] = _read_octets(route.octets, request)
    if route.body is not None:
        read = _read_form if route.form else _read_json
        arguments["body"] = read(route.body, request, optional=route.body_optional)
    if route.query is not None:
        names = names_in(route.path)
        own = [(name, value) for name, value in request.args.items(multi=True) if name not in names]
        arguments["query"] = read_fields(route.query, MultiDict(own))
    return arguments


def check_path(path: Mapping[str, str]) -> None:
    """Raise ``NotFound``, or what else is meant, if a part of a path does not have the form that its name has."""
    for name, value in path.items():
        pattern, error, detail = PATH_PARTS[name]
        if not re.fullmatch(pattern, value):
            raise error(detail)


def read_idempotency_key(route: Route, request: Request) -> str | None:
    """Return the ``Idempotency-Key``, if the route takes one; raise ``InputInvalid``."""
    key = request.headers.get("Idempotency-Key") if route.idempotency_key else None
    if key is not None and not re.fullmatch(IDEMPOTENCY_KEY, key):
        raise _refused([FieldProblem("Idempotency-Key", "must be 16 to 255 printable ASCII characters, no spaces")])
    return key


def _read_octets(octets: Octets, request: Request) -> bytes:
    if request.mimetype != octets.media_type:
        raise MediaTypeUnsupported(f"Send the body with Content-Type: {octets.media_type}.")
    too_long = BodyTooLarge(f"The body must not be longer than {octets.max_bytes} bytes.")
    if request.content_length is not None and request.content_length > octets.max_bytes:
        raise too_long
    content = request.get_data(cache=False)
    if len(content) > octets.max_bytes:
        raise too_long
    return content


def _read_json(model: type[BaseModel], request: Request, *, optional: bool) -> BaseModel:
    content = request.get_data(cache=False)
    if not content and optional:
        return model()
    if request.mimetype != JSON:
        raise MediaTypeUnsupported("The body must be JSON; send it with Content-Type: application/json.")
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        if is_no_json(error):
            raise RequestMalformed("The body is not JSON in UTF-8; check it with a JSON parser.") from None
        raise input_invalid(error) from None


def _read_form(model: type[BaseModel], request: Request, *, optional: bool) -> BaseModel:
    content = request.get_data(cache=False)
    if not content and optional:
        return model()
    if request.mimetype != FORM:
        raise MediaTypeUnsupported(f"The body must be that of a form; send it with Content-Type: {FORM}.")
    try:
        pairs = parse_qsl(
            content.decode("ascii"),
            keep_blank_values=True,
            strict_parsing=True,
            errors="strict",
            max_num_fields=MAX_PROBLEMS,
        )
    except ValueError:
        raise RequestMalformed(f"The body is not {FORM}: NAME=VALUE, percent-encoded UTF-8, joined by &.") from None
    return read_fields(model, MultiDict(pairs))


def read_fields(
    model: type[BaseModel], fields: MultiDict[str, str], lists: Mapping[str, list[str]] | None = None
) -> BaseModel:
    """Return the fields of a query, or of a form with its ``lists``, as a model; raises ``InputInvalid``."""
    repeated = [name for name in fields if len(fields.getlist(name)) > 1]
    if repeated:
        raise _refused([FieldProblem(_shown(repeated[0]), "is given more than once")])
    try:
        return model.model_validate({**fields.to_dict(), **(lists or {})})
    except ValidationError as error:
        raise input_invalid(error) from None


def is_no_json(error: ValidationError) -> bool:
    """Tell whether a body was refused because it is not JSON; pydantic reports nothing else then."""
    return error.error_count() == 1 and error.errors(include_input=False)[0]["type"] == "json_invalid"


def input_invalid(error: ValidationError) -> InputInvalid:
    """Return an error that says what is wrong with each field, never what was in it: it may be a secret."""
    if error.error_count() > MAX_COUNTED:
        return _refused([FieldProblem("body", f"has {error.error_count()} unknown or invalid fields; see /docs")])
    return _refused(
        [
            FieldProblem(_shown(".".join(str(part) for part in problem["loc"])) or "body", in_words(problem))
            for problem in error.errors(include_input=False, include_url=False)[:MAX_PROBLEMS]
        ]
    )


def _refused(problems: list[FieldProblem]) -> InputInvalid:
    named = ", ".join(f"{problem.field} ({problem.message})" for problem in problems[:5])
    return InputInvalid(f"The request has invalid fields: {named}.", problems)


def _shown(name: str) -> str:
    """Return a field's name, which the client chose, so that a terminal shows it and does nothing else with it."""
    return (name if name.isprintable() else ascii(name)[1:-1])[:128]


# --- The reply ----------------------------------------------------------------------------------------------------


def response_of(route: Route, answer: Reply | AnswerModel) -> Response:
    """Return the HTTP response: a model as JSON; bytes, or an iterator of them, as they are."""
    reply = answer if isinstance(answer, Reply) else Reply(answer)
    content: bytes | Iterator[bytes] = reply.content
    if reply.model is not None:
        content = reply.model.model_dump_json(exclude_none=reply.model.omit_none).encode()
    headers = {"Content-Type": reply.media_type, **reply.headers}
    if isinstance(content, bytes):
        # In a list, because Flask sets the length of bytes; that of a reply to HEAD is without the content.
        body: Iterable[bytes] = [content]
        headers.setdefault("Content-Length", str(len(content)))
    else:
        body = scope.Scoped(content)
    response = Response(body, reply.status or route.answers.status, headers)
    if not reply.media_type:
        del response.headers["Content-Type"]
    return response
