"""The download of a bundle: once, by a program at once, by a person from a page whose button fetches it."""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import secrets
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Annotated

from flask import Request, Response, render_template
from markupsafe import Markup
from pydantic import ConfigDict, Field
from werkzeug.datastructures import Headers, MIMEAccept
from werkzeug.http import parse_accept_header

from core.errors import ForeignOrigin, Gone, LinkUnknown, LinkUsed, TenantSuspended
from delivery.formats import BundleFormat
from store.deliveries import DeliveryRecord
from web.api.fields import BundleFormatName
from web.api.origins import parts_of
from web.api.problems import ProblemModel
from web.api.routing import ANYONE, HTML, IDEMPOTENCY_KEY, Answers, Call, Reply, RequestModel, Routes, share_of

ROUTES = Routes("Download")
PATH = "/download/"
_PAGES = frozenset((HTML, "application/xhtml+xml"))
_BUNDLES = frozenset((*(each.media_type for each in BundleFormat), "application/octet-stream"))
_ERRORS = (403, 409, 410, 429, 503)
_BUNDLE = Answers(
    "The bundle; the link cannot be used again",
    media_type=BundleFormat.ZIP.media_type,
    other_media_types=(BundleFormat.P12.media_type,),
)
# Referrer-Policy: the address of the page is what opens the bundle.
_HEADERS = {"Referrer-Policy": "no-referrer", "Vary": "Accept", "X-Robots-Tag": "noindex, nofollow"}
# What pages say of an error, by its code: a title, what happened, and what to do next.
_TOLD: Mapping[str, tuple[str, str, str]] = {
    "link_used": (
        "This link has been used",
        "It works once, and the credentials behind it have been fetched.",
        (
            "If that was you, the file is in the downloads of the browser or program that fetched it. If not, or if it"
            " did not arrive, tell whoever sent you the link at once: somebody else may have the file. They can make"
            " new credentials, which stops the old ones from working."
        ),
    ),
    "link_expired": (
        "This link has expired",
        "Links work for a limited time. The credentials behind this one have been destroyed.",
        "Ask whoever sent you the link for a new one.",
    ),
    "link_revoked": (
        "This link has been withdrawn",
        "The device, or the certificate that was behind this link, has been revoked.",
        "Ask whoever sent you the link whether there is a newer one.",
    ),
    "link_unknown": (
        "This link is not known here",
        "Most often a part of it is missing: mail programs break long links.",
        "Copy the whole link from the message into the address bar. If that does not help, ask whoever sent it.",
    ),
    "state_conflict": (
        "The device is suspended",
        "Its credentials cannot be fetched while it is. The link has not been used.",
        "Ask whoever sent you the link to resume the device, then load this page again.",
    ),
    "tenant_suspended": (
        "This link does not work at the moment",
        "The organization that it belongs to is suspended. The link has not been used.",
        "Ask whoever sent you the link.",
    ),
    "foreign_origin": (
        "This was not sent from this page",
        "Another page made your browser ask for the credentials. The link has not been used.",
        "Open the link itself from the message, and press the button there.",
    ),
    "too_many_attempts": (
        "Too many links were tried",
        "From your address several links were opened that do not exist, so it has to wait for a minute.",
        "Wait a minute, then open the link again, copied whole.",
    ),
}
_NOT_NOW = (
    "The portal cannot answer now",
    "A part of it does not respond. The link has not been used.",
    "Load this page again in a minute. If that does not help, tell whoever sent you the link.",
)
_OTHERWISE = (
    "This does not work",
    "The portal cannot do what was asked.",
    "Open the link again from the message. If that does not help, tell whoever sent it.",
)


class DownloadQuery(RequestModel):
    """How a bundle is to be packed."""

    format: Annotated[
        BundleFormatName | None,
        Field(
            description="The format of the bundle, if it is not the one that was registered; not for a bundle whose"
            " password was chosen, nor for one that is fetched again"
        ),
    ] = None

    @property
    def wanted(self) -> BundleFormat | None:
        """Return the format that is asked for, if any."""
        return None if self.format is None else BundleFormat(self.format)


class FetchForm(RequestModel):
    """What the page's button sends: the idempotency key, by which a download that broke off is repeated."""

    # A form has no null, and the default is not a key.
    model_config = ConfigDict(json_schema_extra=lambda schema: schema["properties"]["idempotency_key"].pop("default"))

    idempotency_key: Annotated[str, Field(pattern=IDEMPOTENCY_KEY)] = ""


@ROUTES.add(
    "GET",
    "/download/{token}",
    ANYONE,
    Answers(
        "The bundle; the link cannot be used again. With Accept: text/html a page about it; the link is not used",
        media_type=BundleFormat.ZIP.media_type,
        other_media_types=(BundleFormat.P12.media_type, HTML),
    ),
    errors=_ERRORS,
    idempotency_key=True,
    for_people=True,
    head_summary="Check a link without using it.",
)
def download(call: Call, token: str, query: DownloadQuery) -> Reply:
    """Download a bundle, once; with an `Idempotency-Key` again by the same key for a while.

    HEAD uses no link, nor does a browser's request, which gets a page.
    """
    is_page = wants_page(call.headers)
    with _refusals_recorded(call):
        if not is_page and call.method != "HEAD":
            return _fetched(call, token, call.idempotency_key, query.wanted)
        record = call.portal.deliveries.check_download(token, call.idempotency_key, query.wanted)
    if is_page:
        return _page(call, record)
    bundle_format = BundleFormat(record.format)
    headers = _bundle_headers(record.device_id, bundle_format, record.length)
    # Of the bytes the length would be 0.
    nothing: bytes | Iterator[bytes] = iter(()) if record.length is None else b""
    return Reply(content=nothing, media_type=bundle_format.media_type, headers=headers)


@ROUTES.add(
    "POST",
    "/download/{token}",
    ANYONE,
    _BUNDLE,
    errors=_ERRORS,
    idempotency_key=True,
    body_optional=True,
    form=True,
    for_people=True,
)
def fetch(call: Call, token: str, query: DownloadQuery, body: FetchForm) -> Reply:
    """Download a bundle, once, as GET does for programs; the button of the page sends this."""
    _check_own_page(call.headers)
    with _refusals_recorded(call):
        return _fetched(call, token, call.idempotency_key or body.idempotency_key, query.wanted)


@contextmanager
def _refusals_recorded(call: Call) -> Iterator[None]:
    """Record who comes with a link that does not work."""
    try:
        yield
    except LinkUnknown as error:
        call.portal.operators.login_failed(call.actor, "bundle:fetch", "link", error.code)
        raise
    except LinkUsed as error:
        # Somebody was not the first to use the link: worth knowing, from a browser, too, which shows a page of it.
        call.portal.operators.record_used_link(call.actor, error, fetched=call.method != "HEAD")
        raise
    except (Gone, TenantSuspended) as error:
        call.portal.operators.record_late_use(call.actor, "bundle:fetch", "link", error.code)
        raise


def _fetched(call: Call, token: str, key: str | None, wanted: BundleFormat | None) -> Reply:
    """Return the bundle, which spends the link."""
    with _share_of_link(call, token, key):
        bundle = call.portal.deliveries.deliver(call.actor, token, key, wanted)
    headers = _bundle_headers(bundle.device_id, bundle.format, len(bundle.content))
    return Reply(content=bundle.content, media_type=bundle.format.media_type, headers=headers)


def _share_of_link(call: Call, token: str, key: str | None) -> AbstractContextManager[None]:
    if not call.portal.tenant_terms.are_several:  # whose the link is need not be looked up
        return contextlib.nullcontext()
    return share_of(call.portal, call.portal.deliveries.check_download(token, key).tenant_id)


def _bundle_headers(device_id: str, bundle_format: BundleFormat, length: int | None) -> dict[str, str]:
    name = f'attachment; filename="{device_id}.{bundle_format.extension}"'
    return {**_HEADERS, "Content-Disposition": name} | ({} if length is None else {"Content-Length": str(length)})


# --- Who asks -----------------------------------------------------------------------------------------------------


def wants_page(headers: Headers) -> bool:
    """Return whether a GET is answered by a page, and spends nothing.

    It is if ``Accept`` names HTML and no bundle that it would rather have; ``*/*`` names neither. Whatever it accepts,
    a browser that loads ahead (``Sec-Purpose``) or a part of a page (``Sec-Fetch-Dest``) spends nothing either.
    """
    if "Sec-Fetch-Dest" in headers or "prefetch" in headers.get("Sec-Purpose", headers.get("Purpose", "")).lower():
        return True
    accepted = parse_accept_header(headers.get("Accept"), MIMEAccept)
    page, bundle = (
        max((quality for kind, quality in accepted if kind.partition(";")[0].strip().lower() in kinds), default=0.0)
        for kinds in (_PAGES, _BUNDLES)
    )
    return page > 0 and page >= bundle


def is_for_person(request: Request) -> bool:
    """Return whether an error at a link is told by a page."""
    return request.path.startswith(PATH) and wants_page(request.headers)


def _check_own_page(headers: Headers) -> None:
    """Raise ``ForeignOrigin`` if a page of another site lets a browser spend the link.

    Whoever made that page knows the link, but may not be able to reach the portal, as the browser is. Browsers say
    where a request comes from in ``Sec-Fetch-Site``; older ones in ``Origin``, which is "null" from this page, too.
    """
    site, origin = headers.get("Sec-Fetch-Site"), headers.get("Origin", "null")
    is_own = site in ("same-origin", "none")
    if site is None:
        parts = parts_of(origin)
        is_named = parts is not None and parts.netloc.lower() == headers.get("Host", "").lower()
        is_own = origin == "null" or is_named
    if not is_own:
        raise ForeignOrigin("Another site's page sent this request; open the link itself, and press the button there.")


# --- The pages ----------------------------------------------------------------------------------------------------


def _page(call: Call, record: DeliveryRecord) -> Reply:
    content = render_template(
        "download/bundle.html",
        style=_style(),
        name=record.device_name,
        kind=record.kind.value,
        file=f"{record.device_id}.{BundleFormat(record.format).extension}",
        device_id=record.device_id,
        format=record.format,
        expires_at=record.expires_at,
        now=call.portal.clock(),
        key=secrets.token_urlsafe(24),
        grace=int(call.portal.settings.link_grace // 60),
    )
    return Reply(content=content.encode(), media_type=f"{HTML}; charset=utf-8", headers=_page_headers())


def page_of_problem(response: Response, problem: ProblemModel, error: Exception) -> Response:
    """Return the same answer about an error as a page that says what to do next."""
    title, happened, following = _TOLD.get(problem.code, _NOT_NOW if problem.status >= 500 else _OTHERWISE)
    response.set_data(
        render_template(
            "download/problem.html",
            style=_style(),
            title=title,
            happened=happened,
            following=following,
            used_at=error.delivered_at if isinstance(error, LinkUsed) else None,
            request_id=problem.request_id,
        )
    )
    response.content_type = f"{HTML}; charset=utf-8"
    response.headers.update(_page_headers())
    return response


def _page_headers() -> dict[str, str]:
    return {**_HEADERS, "Content-Security-Policy": _policy(), "X-Frame-Options": "DENY"}


@functools.cache
def _style() -> Markup:
    return Markup(render_template("download/page.css"))  # noqa: S704 - a file of ours, without a variable


@functools.cache
def _policy() -> str:
    digest = base64.b64encode(hashlib.sha256(_style().encode()).digest()).decode()
    return (
        f"default-src 'none'; style-src 'sha256-{digest}'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    )
