"""The one-time download of a bundle, where the signed link is the permission."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from core.errors import Gone, LinkUnknown, PortalError
from delivery.formats import BundleFormat
from web.api.routing import ANYONE, Answers, Call, Reply, Route, tagged
from web.transport import HasDescriptor, client_is_gone

HELD_BACK = 256  # bytes: the end of the archive's directory is among them, or of the MAC


def download(call: Call, token: str) -> Reply:
    """Fetch a bundle, once. HEAD spends nothing."""
    try:
        if call.method == "HEAD":
            record = call.portal.deliveries.check_download(token)
            bundle_format = BundleFormat(record.format)
            headers = _headers(record.device_id, bundle_format, record.length)
            return Reply(content=b"", media_type=bundle_format.media_type, headers=headers)
        bundle = call.portal.deliveries.claim_download(call.actor, token)
    except LinkUnknown as error:
        call.portal.operators.login_failed(call.actor, "bundle:fetch", "link", error.code)
        raise
    except Gone as error:
        # Somebody was not the first to use the link: worth knowing.
        call.portal.operators.came_too_late(call.actor, "bundle:fetch", "link", error.code)
        raise
    headers = _headers(bundle.device_id, bundle.format, len(bundle.content))
    portal, actor = call.portal, call.actor

    def when_done(received: bool) -> None:
        if received:
            portal.deliveries.finish_download(actor, bundle)
        else:
            portal.deliveries.release_download(bundle)

    # The portal's server ends the connection after the bundle, and tells by how it ended whether that has arrived.
    call.environ["portal.when_done"] = when_done
    content: Iterator[bytes]
    if "portal.listener" in call.environ:
        content = _in_two_parts(
            bundle.content, call.environ["gunicorn.socket"], lambda: portal.deliveries.end_download(bundle)
        )
    else:
        portal.deliveries.end_download(bundle)
        content = _Sending(bundle.content, when_done)
    return Reply(content=content, media_type=bundle.format.media_type, headers=headers)


def _headers(device_id: str, bundle_format: BundleFormat, length: int) -> dict[str, str]:
    return {
        "Content-Disposition": f'attachment; filename="{device_id}.{bundle_format.extension}"',
        "Content-Length": str(length),
    }


def _in_two_parts(content: bytes, connection: HasDescriptor, before_end: Callable[[], None]) -> Iterator[bytes]:
    """The bundle, its end only for a client that has stayed for it: without it nobody can open the archive.

    TLS hands a small answer to the client's program in one piece, of which it may have read a little only; how the
    connection ends would not show that.
    """
    yield content[:-HELD_BACK]
    yield b""  # the server has sent the part above when it asks for the next
    if client_is_gone(connection):
        raise ConnectionResetError("the client broke off a download")
    try:
        before_end()
    except PortalError as error:  # the status has gone out already: all there is left is not to finish
        raise ConnectionResetError(error.detail) from error
    yield content[-HELD_BACK:]


class _Sending(Iterator[bytes]):
    """The bundle sent by another server than the portal's: what that took counts as received."""

    def __init__(self, content: bytes, when_done: Callable[[bool], None]) -> None:
        self._chunks = iter((content,))
        self._when_done: Callable[[bool], None] | None = when_done
        self._sent = False

    def __next__(self) -> bytes:
        chunk = next(self._chunks, None)
        if chunk is None:
            self._sent = True  # a server asks for more only when it has sent what it had
            raise StopIteration
        return chunk

    def close(self) -> None:
        """Called by the server when it is through with the answer, however that ended."""
        when_done, self._when_done = self._when_done, None
        if when_done is not None:
            when_done(self._sent)


ROUTES = tagged(
    "Download",
    Route(
        "GET",
        "/download/{token}",
        download,
        ANYONE,
        Answers(
            media_type=BundleFormat.ZIP.media_type,
            other_media_types=(BundleFormat.P12.media_type,),
            description="The bundle; the link is used up",
        ),
        errors=(404, 409, 410, 429, 503),
        head_summary="Look at a link and spend nothing",
    ),
)
