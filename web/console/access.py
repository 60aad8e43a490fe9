"""Who and what may use the portal: the parts of the screen, and operator tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, Any, Literal

from pydantic import Field

from core.errors import Conflict, Forbidden, IdempotencyConflict, InputInvalid, PortalError
from core.roles import Permission, Role
from web.api.fields import IntegerText, RoleName, ShortText
from web.api.problems import status_of
from web.api.routing import RequestModel
from web.console.pages import LOGIN, Moved, Pages, Shown, Visit
from web.console.registration import Once, new_once

PAGES = Pages()
ACCESS = "/ui/access"
TOKENS = f"{ACCESS}/tokens"
SHOWN = 200  # tokens that a list shows at most
SENT_BEFORE = "This form was sent before with other values. Look at the list first; then send it again."


@dataclass(frozen=True, slots=True)
class Tab:
    """A part of a screen with its own page, for those who have the permission.

    Pages below its path belong to it, unless it is ``alone``.
    """

    title: str
    path: str
    permission: Permission
    alone: bool = False


TABS = (
    Tab("Operator tokens", TOKENS, Permission.TOKENS),
    Tab("Enrolment tokens", f"{ACCESS}/enrolment", Permission.READ),
    Tab("Manufacturers", f"{ACCESS}/manufacturers", Permission.READ),
    Tab("Applications", f"{ACCESS}/applications", Permission.READ),
    Tab("Tenants", f"{ACCESS}/tenants", Permission.TENANTS),
    Tab("Brokers", f"{ACCESS}/brokers", Permission.BROKERS),
)


class AllQuery(RequestModel):
    """With ``all`` those that have ended are listed, too."""

    all: Literal["yes"] | None = None


class TokenForm(RequestModel):
    """A token to create; a form that is sent twice creates one, by ``once``."""

    once: Once
    name: ShortText
    role: RoleName
    expires_in_days: Annotated[int, Field(ge=1, le=3650), IntegerText] | None = None


class RevokeTokenForm(RequestModel):
    """With ``force`` the last valid admin token is revoked, too; ``enrolment_tokens``: with those it has made."""

    force: Literal["yes"] | None = None
    enrolment_tokens: Literal["revoke"] | None = None


def access_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a page of this screen shows, with its parts."""
    return {"tabs": TABS, **values}


def tokens_shown(template: str, query: AllQuery, records: Sequence[Any], usable: Sequence[Any]) -> Shown:
    """Return a list of tokens: those that are usable, or all ``records`` if the query asks for them."""
    found = records if query.all else usable
    values = {
        "tokens": found[:SHOWN],
        "left": max(0, len(found) - SHOWN),
        "all": query.all,
        "ended": len(records) - len(found),
    }
    return Shown(template, access_values(values))


def secret_shown(secret: str, **values: Any) -> Shown:
    """Return the page that shows a new secret, which no browser keeps and no other page shows."""
    return Shown("secret.html", {"secret": secret, **values}, status=201)


def form_again(visit: Visit, template: str, model: type[RequestModel], error: PortalError, **values: Any) -> Shown:
    """Return a form once more, with what was entered and what is wrong with it."""
    found = error.errors if isinstance(error, InputInvalid) else ()
    sent = visit.request.form
    given: dict[str, Any] = {name: sent.get(name, "") for name in model.model_fields}
    given |= {name: sent.getlist(name) for name in ("key_types",) if name in given}
    problems = {one.field.partition(".")[0]: one.message for one in found}
    if not problems.keys() & given.keys() - {"once"}:
        problems = {"": SENT_BEFORE if isinstance(error, IdempotencyConflict) else error.detail}
    shown = {"once": new_once(), "given": given, "problems": problems, **values}
    return Shown(template, shown, status=status_of(error))


@PAGES.add("GET", ACCESS, Permission.READ)
def access(visit: Visit) -> Moved:
    """Lead to the first part that the role may see."""
    return Moved(next(tab.path for tab in TABS if visit.may(tab.permission)))


# --- Operator tokens ----------------------------------------------------------------------------------------------


@PAGES.add("GET", TOKENS, Permission.TOKENS)
def tokens(visit: Visit) -> Shown:
    """List the valid operator tokens, newest first, and with ``all`` those that have ended."""
    query = visit.query(AllQuery)
    records = visit.portal.operators.tokens(visit.actor.tenant_id)
    return tokens_shown("tokens.html", query, records, [one for one in records if one.is_valid(visit.now)])


@PAGES.add("GET", f"{TOKENS}/new", Permission.TOKENS)
def new_token(visit: Visit) -> Shown:
    """Show the form for a token."""
    return Shown("token_new.html", {"once": new_once(), "given": {}, "problems": {}, "roles": _roles(visit)})


@PAGES.add("POST", f"{TOKENS}/new", Permission.TOKENS)
def create_token(visit: Visit) -> Shown:
    """Create a token, and show its secret this once."""
    try:
        form = visit.form(TokenForm)
        life = None if form.expires_in_days is None else timedelta(days=form.expires_in_days)
        operators, role = visit.portal.operators, Role(form.role)
        secret, record = operators.create(visit.actor, form.name, role, life, form.once)
    except (InputInvalid, Conflict, Forbidden) as error:
        return form_again(visit, "token_new.html", TokenForm, error, roles=_roles(visit))
    return secret_shown(
        secret,
        title="Operator token",
        name=record.name,
        back=TOKENS,
        ends=record.expires_at,
        use="It is pasted at this console's login page, or given to the command line:",
        command="portal login",
    )


@PAGES.add("POST", f"{TOKENS}/{{token_id}}/revoke", Permission.TOKENS)
def revoke_token(visit: Visit, token_id: str) -> Moved:
    """Revoke a token at once; whoever revokes their own is logged out by that."""
    form, operators = visit.form(RevokeTokenForm), visit.portal.operators
    operators.revoke(visit.actor, token_id, force=form.force is not None)
    if form.enrolment_tokens is not None:
        operators.revoke_enrolment_tokens_of(visit.actor, token_id)
    return Moved(LOGIN, session_secret="") if token_id == visit.actor.token_id else Moved(TOKENS)


def _roles(visit: Visit) -> Sequence[tuple[str, str]]:
    """Return the roles that the operator may give, each with what it may do."""
    found = [
        (Role.OPERATOR.value, "operator: registers, renews and revokes devices"),
        (Role.AUDITOR.value, "auditor: reads everything, and the audit record"),
        (Role.ADMIN.value, "admin: everything in this tenant"),
    ]
    return [*found, (Role.SYSTEM.value, "system: all tenants")] if visit.may(Permission.TENANTS) else found
