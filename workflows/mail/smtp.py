"""Sends a message to the SMTP server of the settings, or says in a sentence why that cannot be done."""

from __future__ import annotations

import contextlib
import re
import smtplib
import ssl
from collections.abc import Iterator
from email.message import EmailMessage
from pathlib import Path
from urllib.parse import urlsplit

from config import Settings
from core.connections import cut_off_after
from core.errors import Unavailable

STEP_SECONDS = 10.0  # for the connection, and for each answer of the server
TOTAL_SECONDS = 40.0  # once it is connected


class SmtpServer:
    """The server of ``PORTAL_MAIL_SERVER``, to which each message goes over a connection of its own."""

    def __init__(self, settings: Settings, *, total_seconds: float = TOTAL_SECONDS) -> None:
        if settings.mail_server is None:
            raise Unavailable("No mail is sent: set PORTAL_MAIL_SERVER, PORTAL_MAIL_FROM and PORTAL_MAIL_TO.")
        self._settings, self._address, self._total_seconds = settings, settings.mail_server, total_seconds

    def check(self) -> None:
        """Connect and log in, without sending anything; raises ``Unavailable``."""
        with self._connected() as server:
            server.noop()

    def send(self, message: EmailMessage) -> tuple[str, ...]:
        """Send a message to ``PORTAL_MAIL_TO`` and return the addresses that the server refused, not all of them.

        Raises ``Unavailable`` if it took the message for nobody.
        """
        settings = self._settings
        with self._connected() as server:
            refused = server.send_message(message, from_addr=settings.mail_from[0], to_addrs=list(settings.mail_to))
        return tuple(sorted(refused))

    @contextlib.contextmanager
    def _connected(self) -> Iterator[smtplib.SMTP]:
        where = f"The mail server {self._address}"
        try:
            login, context = self._login(), self._context()
            with contextlib.closing(self._connection(context)) as server:
                with cut_off_after(self._total_seconds, lambda: server.sock):
                    server.ehlo()
                    if self._settings.mail_tls == "starttls":
                        server.starttls(context=context)
                    if login is not None:
                        server.login(*login)
                    yield server
                with contextlib.suppress(OSError, smtplib.SMTPException):
                    server.quit()
        except TimeoutError:
            raise Unavailable(f"{where} did not answer in time; check its name, its port and the firewall.") from None
        except (OSError, smtplib.SMTPException) as error:  # an SMTPException is an OSError, which need not stay so
            raise Unavailable(f"{where} {_explain(error)}") from error

    def _connection(self, context: ssl.SSLContext) -> smtplib.SMTP:
        host, port = self._address
        named = urlsplit(self._settings.public_url).hostname or ""
        own_name = named if re.search("[a-z]", named) and ":" not in named else None  # else that of the machine
        if self._settings.mail_tls == "tls":
            return smtplib.SMTP_SSL(host, port, own_name, timeout=STEP_SECONDS, context=context)
        return smtplib.SMTP(host, port, own_name, timeout=STEP_SECONDS)

    def _context(self) -> ssl.SSLContext:
        context, path = ssl.create_default_context(), self._settings.mail_ca_file
        if path is not None:
            try:
                context.load_verify_locations(path)
            except OSError:
                raise Unavailable(f"PORTAL_MAIL_CA_FILE names {path}, which holds no CA certificates in PEM.") from None
        return context

    def _login(self) -> tuple[str, str] | None:
        path = self._settings.mail_login_file
        return None if path is None else read_login(path)


def read_login(path: Path) -> tuple[str, str]:
    """Return user and password of a file with a line each; raises ``Unavailable`` if others can read it, too."""
    named = f"PORTAL_MAIL_LOGIN_FILE names {path}, which"
    try:
        if path.stat().st_mode & 0o027:  # a group may read it, as it may read systemd's credentials
            raise Unavailable(f"{named} is open to others; chmod 600 {path}.")
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise Unavailable(f"{named} cannot be read ({error.strerror}).") from None
    except ValueError:
        lines = []
    if len(lines) != 2 or not all(line.isprintable() and line for line in lines):
        raise Unavailable(f"{named} must have two lines, the user and the password.")
    return lines[0], lines[1]


def _explain(error: Exception) -> str:
    """Return the rest of a sentence; of what the server said only a code, since that may repeat a password."""
    match error:
        case smtplib.SMTPAuthenticationError():
            return f"refused the login ({error.smtp_code}); correct PORTAL_MAIL_LOGIN_FILE."
        case smtplib.SMTPNotSupportedError():
            return (
                "does not offer STARTTLS or the login that PORTAL_MAIL_TLS and PORTAL_MAIL_LOGIN_FILE ask for; nothing"
                " was sent."
            )
        case smtplib.SMTPRecipientsRefused():
            codes = sorted({str(code) for code, _ in error.recipients.values()})
            return f"refused every address of PORTAL_MAIL_TO ({', '.join(codes)})."
        case smtplib.SMTPSenderRefused():
            return f"refused the sender of PORTAL_MAIL_FROM ({error.smtp_code})."
        case smtplib.SMTPServerDisconnected():
            return "closed the connection, or does not speak SMTP there; check PORTAL_MAIL_TLS and the port."
        case smtplib.SMTPResponseException():
            return f"refused the message ({error.smtp_code})."
        case ssl.SSLCertVerificationError():
            return f"has a certificate that is not trusted ({error.verify_message}); see PORTAL_MAIL_CA_FILE."
        case ssl.SSLError():
            return "does not speak TLS there; check PORTAL_MAIL_TLS and the port."
        case OSError():
            return f"cannot be reached ({error.strerror or type(error).__name__})."
    return "sent an answer that is not SMTP."
