"""Logging in by the identity provider: to it and, with a code, back."""

from __future__ import annotations

from pydantic import Field

from core.errors import NotFound, PortalError, TooManyAttempts
from web.api.fields import TenantName
from web.api.problems import status_of
from web.api.routing import RequestModel
from web.console.pages import HOME, Arrived, Moved, Pages, Shown, ToProvider, Visit, local_path
from workflows.oidc.login import CALLBACK, SingleSignOn
from workflows.oidc.refusals import IdTokenRefused, LoginRefused, NoRole, ProviderUnavailable, TenantNeeded
from workflows.operators import actor_with

PAGES = Pages()
BEGIN = "/ui/login/oidc"


class BeginQuery(RequestModel):
    """Where to go after the login, and for which tenant it is."""

    next: str = Field(default=HOME, max_length=4096)
    tenant: TenantName | None = None


def provider_of(visit: Visit) -> str | None:
    """Return the name of the identity provider, if there is one."""
    return None if visit.portal.sign_on is None else visit.portal.sign_on.provider_name


@PAGES.add("GET", BEGIN, None, without_session=True)
def begin(visit: Visit) -> ToProvider | Moved | Shown:
    """Send the browser to the identity provider; whoever is logged in goes where they wanted."""
    query = visit.query(BeginQuery)
    wanted = local_path(query.next) or HOME
    if visit.session is not None:
        return Moved(wanted)
    try:
        begun = _sign_on(visit).begin(wanted, query.tenant)
    except ProviderUnavailable as error:
        return _refused(visit, error, wanted)
    return ToProvider(begun.url, begun.cookie)


@PAGES.add("GET", CALLBACK, None, without_session=True)
def finish(visit: Visit) -> Arrived | Moved | Shown:
    """Begin a session for the browser that comes back from the identity provider."""
    if visit.session is not None:  # it brings no session's cookie from there, so the page was opened again
        return Moved(HOME)
    sign_on, cookie = _sign_on(visit), visit.login_cookie
    wanted = local_path(sign_on.next_path(cookie)) or HOME
    once = {name: values[0] for name, values in visit.request.args.lists() if len(values) == 1}
    try:
        made = sign_on.finish(visit.actor, cookie, once)
    except TenantNeeded as error:
        choices = {"tenants": error.tenants, "next": wanted, "begin": BEGIN}
        return Shown("tenants.html", choices, status=status_of(error))
    except (LoginRefused, IdTokenRefused, NoRole, ProviderUnavailable, TooManyAttempts) as error:
        return _refused(visit, error, wanted)
    actor = actor_with(made.record, request_id=visit.request_id, address=visit.actor.address)
    agent = visit.request.headers.get("User-Agent", "")
    secret, session = visit.portal.sessions.begin(actor, made.record, agent)
    return Arrived(wanted, session_secret=secret, until=session.record.expires_at)


def _refused(visit: Visit, error: PortalError, wanted: str) -> Shown:
    values = {"next": wanted, "problem": error.detail, "provider": provider_of(visit), "begin": BEGIN}
    return Shown("login.html", values, status=status_of(error))


def _sign_on(visit: Visit) -> SingleSignOn:
    if visit.portal.sign_on is None:
        raise NotFound("This portal has no identity provider; log in with an operator token.")
    return visit.portal.sign_on
