"""The one-time download of a bundle; the signed link is the permission."""

from __future__ import annotations

from core.errors import Gone, LinkUnknown
from delivery.formats import BundleFormat
from web.api.routing import ANYONE, Answers, Call, Reply, Route, tagged


def download(call: Call, token: str) -> Reply:
    """Download a bundle, once. HEAD does not use the link."""
    try:
        if call.method == "HEAD":
            record = call.portal.deliveries.check_download(token)
            bundle_format = BundleFormat(record.format)
            headers = _headers(record.device_id, bundle_format, record.length)
            return Reply(content=b"", media_type=bundle_format.media_type, headers=headers)
        bundle = call.portal.deliveries.deliver(call.actor, token)
    except LinkUnknown as error:
        call.portal.operators.login_failed(call.actor, "bundle:fetch", "link", error.code)
        raise
    except Gone as error:
        # Somebody was not the first to use the link: worth knowing.
        call.portal.operators.came_too_late(call.actor, "bundle:fetch", "link", error.code)
        raise
    headers = _headers(bundle.device_id, bundle.format, len(bundle.content))
    return Reply(content=bundle.content, media_type=bundle.format.media_type, headers=headers)


def _headers(device_id: str, bundle_format: BundleFormat, length: int) -> dict[str, str]:
    return {
        "Content-Disposition": f'attachment; filename="{device_id}.{bundle_format.extension}"',
        "Content-Length": str(length),
    }


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
            description="The bundle; the link cannot be used again",
        ),
        errors=(404, 409, 410, 429, 503),
        head_summary="Check a link without using it.",
    ),
)
