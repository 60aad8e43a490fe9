"""The check of the SMTP server for mail to people."""

from __future__ import annotations

from core.errors import Unavailable
from core.server_command import server_command
from operations.doctor.base import Finding, Installation, problem, well
from workflows.mail.smtp import SmtpServer


def mail(installation: Installation) -> Finding:
    """Check that the SMTP server lets the portal in; nothing is sent."""
    settings = installation.settings
    if settings.mail_server is None:
        return well("No mail is sent: PORTAL_MAIL_SERVER is not set.")
    try:
        SmtpServer(settings).check()
    except Unavailable as error:
        return problem(error.detail, f"Nobody is told by mail until this works; try: {server_command('mail test')}")
    return well(f"{settings.mail_server} lets the portal in.")
