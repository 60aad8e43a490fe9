"""Answers the nodes of a RabbitMQ cluster about its clients: web/mutual_tls.py has what their connections may cost."""

from __future__ import annotations

import logging
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Generic, TypeVar

from broker.rabbitmq.answers import MAX_FORM_BYTES, Answers, read_form, seconds_late
from broker.rabbitmq.followed import FollowedAnswers
from config import Settings
from core.broker_control import JOURNAL_FILE
from core.errors import NotFound, PortalError, Unavailable
from core.setting_values import Address
from web.api.problems import of_error
from web.mutual_tls import Conversation, MutualTlsListener, run_in_one_process
from workflows.questioners import Questioners, Standing

log = logging.getLogger("portal.rabbitmq")

LOCK = ".rabbitmq.lock"
PATH = "/broker/rabbitmq/"
QUESTIONS = frozenset(("user", "vhost", "resource", "topic"))
# From an answer to the end of the next request. A node closes what it has not used for two minutes, and has to be the
# one that does: else a question might be on its way meanwhile, and its client would be refused.
IDLE_SECONDS = 180.0
MAX_QUESTION_BYTES = 1 << 19  # client id and topic have 65,535 bytes at most, of each of which a form may make three
ANSWER_SECONDS = 15.0
MAX_OF_NODE = 400  # connections, of 1000 in all
SURE_SECONDS = 1.0  # for which what the database said is not looked up again,
UNSURE_SECONDS = 300.0  # and if the database does not answer.
# Then a portal beside which others count may have been declared away, and changes be enforced without it. The one that
# is alone cannot be: without it nobody would be let in.
UNSURE_OF_SEVERAL_SECONDS = 60.0

_K = TypeVar("_K")
_V = TypeVar("_V")


def run(settings: Settings, questioners: Questioners, stopping: threading.Event) -> None:
    """Answer until ``stopping`` is set, in one process among all on the data folder; the body of a thread."""
    run_in_one_process(
        settings.data_dir / LOCK, lambda event: RabbitmqListener(settings, questioners).serve(event), stopping
    )


class _Known(Generic[_K, _V]):
    """What the database says of a key, looked up once a second, or while it is away what it said before.

    ``unsure_seconds`` says for how long that counts.
    """

    def __init__(self, look: Callable[[_K], _V], unsure_seconds: Callable[[_V], float]) -> None:
        self._look, self._unsure_seconds = look, unsure_seconds
        self._known: dict[_K, tuple[_V, float]] = {}

    def get(self, key: _K) -> _V:
        """Return it; raise ``Unavailable`` if it is not known, and what looking it up raises."""
        now, known = time.monotonic(), self._known.get(key)
        if known is not None and now - known[1] < SURE_SECONDS:
            return known[0]
        try:
            value = self._look(key)
        except Unavailable:
            if known is not None and now - known[1] < self._unsure_seconds(known[0]):
                return known[0]
            raise
        except PortalError:
            self._known.pop(key, None)
            raise
        self._known[key] = value, now
        return value


class RabbitmqListener(MutualTlsListener):
    """Accepts connections of nodes, by the certificates that the portal has issued to them for that."""

    name, variable = "rabbitmq", "PORTAL_RABBITMQ_BIND"
    trusts_addresses_for = 600.0  # many clients that come at once make many connections of a node

    def __init__(self, settings: Settings, questioners: Questioners) -> None:
        super().__init__(settings)
        self._questioners = questioners
        journal = settings.broker_file(JOURNAL_FILE)
        self.answers = FollowedAnswers(lambda: Answers(journal, settings.topic_prefix), questioners.is_probe)
        self._nodes = _Known[bytes, str](lambda certificate: questioners.node_of(certificate), lambda _: UNSURE_SECONDS)
        self._standing = _Known[None, Standing](
            lambda _: questioners.standing(),
            lambda standing: UNSURE_SECONDS if standing.is_alone else UNSURE_OF_SEVERAL_SECONDS,
        )

    @property
    def address(self) -> Address | None:
        """Where it listens."""
        return self.settings.rabbitmq_bind

    @property
    def client_cas(self) -> str:
        """The CAs that nodes' certificates are verified by, PEM."""
        return self._questioners.client_cas

    def check(self, certificate: bytes) -> None:
        """Raise ``ClientCertificateRefused`` if a certificate is not a node's."""
        self.node_of(certificate)

    def node_of(self, certificate: bytes) -> str:
        """Return the node of a certificate, by the database, or while it is away by what it said minutes ago.

        Raise ``ClientCertificateRefused`` if the certificate does not count, ``Unavailable`` if that is not known.
        """
        return self._nodes.get(certificate)

    def allows(self, question: str, form: Mapping[str, str]) -> bool:
        """Answer a question of a node.

        Raise ``StateConflict`` if changes are enforced without this portal, ``Unavailable`` if that is not known.
        """
        return self.answers.allows(question, form, self._standing.get(None).least_generation)

    def converse(self, client: ssl.SSLSocket) -> None:
        """Answer a node."""
        try:
            node = self.node_of(client.getpeercert(binary_form=True) or b"")
        except PortalError:
            node = ""  # it is refused in a sentence
        with self.counted(node, MAX_OF_NODE) as may_ask:
            if may_ask:
                _Conversation(client, self)


class _Conversation(Conversation):
    """Answers the questions of one connection."""

    max_body = MAX_QUESTION_BYTES

    def __init__(self, client: ssl.SSLSocket, listener: RabbitmqListener) -> None:
        self._listener = listener
        self._der = client.getpeercert(binary_form=True) or b""
        super().__init__(client, listener)

    def answer(self) -> None:
        """Answer a question by ``allow`` or ``deny``; what is none, by whoever, in a sentence."""
        self.extend(ANSWER_SECONDS)
        try:
            form = self._form()
            self._listener.node_of(self._der)
            question = self.path.removeprefix(PATH)
            if self.command != "POST" or self.path == question or question not in QUESTIONS:
                raise NotFound("There is nothing at this path for RabbitMQ.")
            is_allowed = form is not None and self._listener.allows(question, form)
            if is_allowed and (seconds := seconds_late(question, form or {})):
                self._listener.stopping.wait(seconds)
            answer = b"allow" if is_allowed else b"deny"
            self.extend(IDLE_SECONDS)
            self.send(HTTPStatus.OK, answer, "text/plain")
        except PortalError as error:
            self._refuse(error)
        except OSError:
            self.close_connection = True
            raise
        except Exception as error:
            log.exception("a question was not answered")
            self._refuse(error)

    def _form(self) -> Mapping[str, str] | None:
        """Return the form, ``None`` if it is too long or none: a client chooses its id and topics, and is denied.

        To end the connection would harm the questions about others that the node has to ask.
        """
        length = self.length_of_body()
        if length <= MAX_FORM_BYTES:
            return read_form(self.read_body())
        self.skip_body(length)
        return None

    def _refuse(self, error: Exception) -> None:
        self.close_connection = True
        problem = of_error(error, request_id="", path=self.path)
        log.warning("a question was refused", extra={"status": problem.status, "problem": problem.detail})
        self.send(problem.status, problem.detail.encode(), "text/plain")
