"""The server's own command for mail: a message that shows whether the settings work."""

from __future__ import annotations

import click

from operations.command_base import settings_of_app, without_traceback
from operations.wiring import utc_now
from workflows.mail.messages import trial_message
from workflows.mail.smtp import SmtpServer


@click.group("mail")
def mail_group() -> None:
    """Look after the mail to people."""


@mail_group.command("test")
@without_traceback
def send_test() -> None:
    """Send a test message to PORTAL_MAIL_TO.

    Whether it arrives is for the mail server to say: look into the mailbox.
    """
    settings = settings_of_app()
    refused = SmtpServer(settings).send(trial_message(settings, now=utc_now()))
    if refused:
        raise click.ClickException(f"{settings.mail_server} took the message, but not for {', '.join(refused)}.")
    click.echo(f"{settings.mail_server} took a message to {', '.join(settings.mail_to)}.")
