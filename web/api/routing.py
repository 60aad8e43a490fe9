"""What a route declares of itself: who may call it, what it reads, what it answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel
from werkzeug.datastructures import Headers

from core.roles import Permission
from workflows.audit import Actor

if TYPE_CHECKING:
    from operations.wiring import Portal


@dataclass(frozen=True, slots=True)
class Call:
    """A request that was let in and whose parameters were checked."""

    portal: Portal
    actor: Actor
    method: str
    path: Mapping[str, str]
    headers: Headers
    body: Any = None
    query: Any = None
    idempotency_key: str | None = None
    environ: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer: a model is sent as JSON; ``content`` are bytes, or an iterator of them, of ``media_type``."""

    model: BaseModel | None = None
    content: bytes | Iterator[bytes] | None = None
    media_type: str = "application/json"
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    omit_none: bool = False


@dataclass(frozen=True, slots=True)
class Answers:
    """What a route may answer with success, for the OpenAPI text: a model, or bytes of ``media_type``.

    ``headers`` says in a few words what is in each header worth knowing.
    """

    model: type[BaseModel] | None = None
    media_type: str = "application/json"
    status: int = 200
    description: str = "Done"
    other_media_types: tuple[str, ...] = ()
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Octets:
    """A body that is handed on as the bytes it is: of ``media_type``, ``most`` bytes long at most."""

    media_type: str
    most: int


@dataclass(frozen=True, slots=True)
class Route:
    """One method of one path. ``permission`` ``None`` means: open to anyone, a decision to be made each time.

    ``token_optional``: anyone may call it, and who shows a valid token is known.
    ``rows`` is the model of each row of a body that is read while it arrives, in one of the media types ``row_types``.

    ``direct``: plain requests for it are answered by ``web/api/direct.py``.

    Every GET answers HEAD, too; with a ``head_summary`` the OpenAPI text says so.
    ``also`` are other answers than errors.
    """

    method: str
    path: str
    handler: Callable[[Call], Reply]
    permission: Permission | None
    summary: str
    answers: Answers
    tag: str
    body: type[BaseModel] | None = None
    octets: Octets | None = None
    query: type[BaseModel] | None = None
    also: tuple[Answers, ...] = ()
    errors: tuple[int, ...] = ()
    on_pki_listener: bool = False
    direct: bool = False
    idempotency_key: bool = False
    body_optional: bool = False
    token_optional: bool = False
    rows: type[BaseModel] | None = None
    row_types: tuple[str, ...] = ()
    head_summary: str = ""

    @property
    def name(self) -> str:
        """The handler's name: unique, and the operationId."""
        return self.handler.__name__


class Routes:
    """The routes of one resource."""

    def __init__(self, tag: str) -> None:
        self.tag = tag
        self.routes: list[Route] = []

    def route(
        self, method: str, path: str, *, permission: Permission | None, answers: Answers, **options: Any
    ) -> Callable[[Callable[[Call], Reply]], Callable[[Call], Reply]]:
        """Declare the decorated function as the handler of a route; its docstring's first line is the summary."""

        def declare(handler: Callable[[Call], Reply]) -> Callable[[Call], Reply]:
            summary = (handler.__doc__ or "").partition("\n")[0]
            self.routes.append(Route(method, path, handler, permission, summary, answers, self.tag, **options))
            return handler

        return declare
