"""The login page, logging out, and the sessions of an operator."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from core.errors import InputInvalid, TooManyAttempts, Unauthenticated
from web.api.routing import RequestModel
from web.console.pages import HOME, LOGIN, Moved, Pages, Shown, Visit, local_path
from web.console.sign_on import BEGIN, provider_of
from workflows.sessions import LiveSession

PAGES = Pages()
SESSIONS = "/ui/sessions"


class LoginForm(RequestModel):
    """What the login page sends: an operator token, and where to go then."""

    token: Annotated[str, Field(min_length=1, max_length=256)]
    next: str = HOME


@PAGES.add("GET", LOGIN, None, without_session=True)
def login(visit: Visit) -> Shown | Moved:
    """Show the login page; whoever is logged in goes where they wanted."""
    wanted = local_path(visit.request.args.get("next")) or HOME
    if visit.session is not None:
        return Moved(wanted)
    return _login_page(visit, wanted)


@PAGES.add("POST", LOGIN, None, without_session=True)
def log_in(visit: Visit) -> Shown | Moved:
    """Begin a session by an operator token."""
    wanted = local_path(visit.request.form.get("next")) or HOME
    try:
        form = visit.form(LoginForm)
        agent = visit.request.headers.get("User-Agent", "")
        secret, session = visit.portal.sessions.log_in(visit.actor, form.token.strip(), agent)
    except InputInvalid:
        return _login_page(visit, wanted, "Enter an operator token.", status=422)
    except (Unauthenticated, TooManyAttempts) as error:
        status = 401 if isinstance(error, Unauthenticated) else 429
        return _login_page(visit, wanted, error.detail, status=status)
    return Moved(wanted, session_secret=secret, until=session.record.expires_at)


def _login_page(visit: Visit, wanted: str, problem: str = "", *, status: int = 200) -> Shown:
    values = {"next": wanted, "problem": problem, "provider": provider_of(visit), "begin": BEGIN}
    return Shown("login.html", values, status=status)


@PAGES.add("POST", "/ui/logout", None)
def log_out(visit: Visit) -> Moved:
    """End the session that makes the request."""
    visit.portal.sessions.end(visit.actor, _own(visit).record.id)
    return Moved(LOGIN, session_secret="")


@PAGES.add("GET", SESSIONS, None)
def sessions(visit: Visit) -> Shown:
    """List the sessions that the operator may end."""
    found = visit.portal.sessions.sessions(visit.actor)
    own = [one for one in found if one.token.id == visit.actor.token_id]
    others = [one for one in found if one.token.id != visit.actor.token_id]
    return Shown("sessions.html", {"own": own, "others": others, "this": _own(visit).record.id})


@PAGES.add("POST", "/ui/sessions/{session_id}/end", None)
def end_session(visit: Visit, session_id: str) -> Moved:
    """End a session."""
    visit.portal.sessions.end(visit.actor, session_id)
    if session_id == _own(visit).record.id:
        return Moved(LOGIN, session_secret="")
    return Moved(SESSIONS)


@PAGES.add("POST", "/ui/sessions/end-all", None)
def end_all_sessions(visit: Visit) -> Moved:
    """End all sessions of the operator's token, this one too."""
    visit.portal.sessions.end_all(visit.actor)
    return Moved(LOGIN, session_secret="")


def _own(visit: Visit) -> LiveSession:
    if visit.session is None:
        raise Unauthenticated("Log in first.")
    return visit.session
