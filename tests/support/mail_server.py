"""An SMTP server for tests, by aiosmtpd: a real one that takes mail, or refuses it, on a port of its own."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from email import message_from_bytes, policy
from email.message import EmailMessage
from pathlib import Path
from typing import Any

from aiosmtpd.smtp import SMTP, AuthResult, Envelope, Session

from tests.support.pki import PEM, Authority

USER, PASSWORD = "portal", "a very secret password"
ACCEPTED = "250 OK"


@dataclass
class MailServer:
    """``refuses`` maps an address to the answer that it gets; ``answer`` is that to a message."""

    folder: Path
    port: int = 0
    answer: str = ACCEPTED
    refuses: dict[str, str] = field(default_factory=dict)
    messages: list[EmailMessage] = field(default_factory=list)
    recipients: list[list[str]] = field(default_factory=list)
    logins: list[tuple[bytes, bytes]] = field(default_factory=list)
    encrypted: list[bool] = field(default_factory=list)
    connections: int = 0
    arrived: threading.Event = field(default_factory=threading.Event)

    def environment(self, **more: str) -> dict[str, str]:
        """The settings of a portal that sends its mail here."""
        login = self.folder / "login"
        login.write_text(f"{USER}\n{PASSWORD}\n", encoding="utf-8")
        login.chmod(0o600)
        return {
            "PORTAL_MAIL_SERVER": f"localhost:{self.port}",
            "PORTAL_MAIL_CA_FILE": str(self.folder / "root.pem"),
            "PORTAL_MAIL_LOGIN_FILE": str(login),
            "PORTAL_MAIL_FROM": "portal@example.com",
            "PORTAL_MAIL_TO": "ada@example.com, grace@example.com",
            **more,
        }

    async def handle_RCPT(  # noqa: N802 - the name that aiosmtpd calls
        self, server: SMTP, session: Session, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        if address not in self.refuses:
            envelope.rcpt_tos.append(address)
        return self.refuses.get(address, ACCEPTED)

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:  # noqa: N802 - as above
        if self.answer == ACCEPTED:
            assert isinstance(envelope.content, bytes)
            self.messages.append(message_from_bytes(envelope.content, policy=policy.default))
            self.recipients.append(list(envelope.rcpt_tos))
            self.encrypted.append(session.ssl is not None)
        self.arrived.set()
        return self.answer

    def authenticate(self, server: Any, session: Any, envelope: Any, mechanism: str, data: Any) -> AuthResult:
        self.logins.append((data.login, data.password))
        known = (data.login, data.password) == (USER.encode(), PASSWORD.encode())
        return AuthResult(success=known, handled=False)


@contextlib.contextmanager
def mail_server(folder: Path, *, starttls: bool = True) -> Iterator[MailServer]:
    """Serve on localhost until the end of the ``with``; with ``starttls`` only after it, and only with a login."""
    root = Authority("mail root")
    (folder / "root.pem").write_bytes(root.certificate.public_bytes(PEM))
    certificate, key = root.issue("localhost", server_names=["localhost"]).write(folder, "mail")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = MailServer(folder)

    def protocol() -> SMTP:
        server.connections += 1
        tls: dict[str, Any] = {"tls_context": context, "require_starttls": True, "auth_required": True}
        options = tls if starttls else {}
        return SMTP(server, loop=loop, hostname="localhost", authenticator=server.authenticate, **options)

    loop = asyncio.new_event_loop()
    listening = loop.run_until_complete(loop.create_server(protocol, "127.0.0.1", 0))
    server.port = listening.sockets[0].getsockname()[1]
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(_end(listening), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _end(listening: asyncio.Server) -> None:
    listening.close()
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
