"""Answers what a RabbitMQ node asks about a client: may it log in, use a queue, publish or subscribe.

A node asks by its HTTP backend (``rabbitmq_auth_backend_http``) with a form, and is answered ``allow`` or ``deny``.
What clients may do is read from the journal that the guard of a Mosquitto follows, too. Whatever is not understood,
not known or of a damaged journal is denied.
"""

from __future__ import annotations

import os
import re
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO
from urllib.parse import parse_qsl

from broker.guard.journal import MAX_LINE_BYTES, decode
from core.errors import FieldProblem, TopicRefused

EXCHANGE = "amq.topic"
# The portal itself publishes below these, by its probe certificates; see probe.py.
PROVE, UNTIL, LATE = "portal/prove", "portal/until", "portal/late"
_OF_PORTAL = PROVE.partition("/")[0]
MAX_UNTIL_SECONDS = 10.0  # how far ahead the end of what is true may be
# The nodes' auth_http.request_timeout: an answer that comes later is not taken. So for that long, and then for as long
# as it is believed, a node may go by an answer that was given before a change.
IN_FLIGHT_SECONDS = 1.0
LATE_SECONDS = IN_FLIGHT_SECONDS + 0.3  # after which a question about what is LATE is answered
MAX_FORM_BYTES, MAX_FIELDS = 4096, 16
_HEADER = re.compile(rb"portal-guard 1 [0-9]{1,19} 0")
_LINE = re.compile(rb"([0-9]{1,19}) ([!-~][ -~]*)")

# What a node asks by if a client has a certificate and neither name nor password: 3.10, and 4.3. 4.0 names the password
# "none", as a client may that gives the name of another, so that nobody is admitted there.
_OF_CERTIFICATE = ({"username"}, {"username", "vhost", "client_id"})

_FIRST = ""  # the tenant that no line names

_Filter = tuple[Sequence[str], str]  # its words, with "r", "w" or "rw"
_Grant = tuple[
    str, Sequence[_Filter] | None
]  # what an identity may do: its tenant, and filters; None: the default ones
_ANY: _Filter = (("#",), "rw")


def read_form(body: bytes) -> Mapping[str, str] | None:
    """Return the fields of a request, ``None`` if it is too long, malformed or names a field twice."""
    if len(body) > MAX_FORM_BYTES:
        return None
    try:
        pairs = parse_qsl(
            body.decode("ascii"),
            keep_blank_values=True,
            strict_parsing=True,
            errors="strict",
            max_num_fields=MAX_FIELDS,
        )
    except ValueError:
        return None
    fields = dict(pairs)
    return fields if len(fields) == len(pairs) else None


def words_of(text: str, *, is_filter: bool) -> Sequence[str] | None:
    """Return the words of a routing key, or of an MQTT topic or filter; ``None`` if RabbitMQ cannot tell them apart.

    It takes ``/`` and ``.`` for the same, and in a filter ``+`` and ``*``; ``#`` is any number of words, anywhere.
    """
    words = ["*" if word == "+" else word for word in text.replace("/", ".").split(".")]
    for word in words:
        if not word or (("*" in word or "#" in word or "+" in word) and not (is_filter and word in ("*", "#"))):
            return None
    return words


def check_filter(text: str) -> None:
    """Raise ``TopicRefused`` for a filter that means more to RabbitMQ than to MQTT."""
    if "." in text or "*" in text or words_of(text, is_filter=True) is None:
        said = f"{text} cannot be granted by RabbitMQ, to which a dot is a slash and an asterisk a plus sign"
        raise TopicRefused(f"The topic filter {said}.", [FieldProblem("topics", said)])


def covers(granted: Sequence[str], asked: Sequence[str]) -> bool:
    """Tell whether a granted filter has every routing key that is asked for, which may have wildcards."""
    for index, word in enumerate(granted):
        if word == "#":
            return True
        if index == len(asked) or asked[index] == "#" or word not in ("*", asked[index]):
            return False
    return len(granted) == len(asked)


def vhost_of(tenant: str | None) -> str:
    """Return the vhost of a tenant's clients, ``None`` being the first one."""
    return tenant or "/"


def seconds_late(question: str, form: Mapping[str, str]) -> float:
    """Return for how long an ``allow`` is to be held back, by which it is seen how long a node waits for answers."""
    is_late = question == "topic" and form.get("routing_key", "").startswith(LATE.replace("/", ".") + ".")
    return LATE_SECONDS if is_late else 0.0


class Answers:
    """The answers of one process, from the journal at ``path``, which is looked at for each.

    ``prefix`` is the topic below which devices have their default topics. So an answer is of all that was appended
    before the question came. Not for several threads at once: the caller holds a lock.
    """

    def __init__(self, path: Path, prefix: str, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._prefix = prefix
        self._clock = clock
        self._begin(0)

    def _begin(self, inode: int) -> None:
        self._inode, self._end, self._seq, self._checksum = inode, 0, -1, 0
        self._header = b""  # names the epoch, for an inode that a new journal has again
        self._is_damaged = False
        self._generation = 0  # the newest that it states
        self._prefixes: dict[str, str | None] = {_FIRST: self._prefix}  # of tenants, None of those suspended
        self._defaults: dict[str, _Grant] = {}  # one for each tenant, which its devices share
        self._granted: dict[str, _Grant] = {}

    def allows(self, question: str, form: Mapping[str, str]) -> bool:
        """Answer ``user``, ``vhost``, ``resource`` or ``topic``, each with its fields, by the journal as it is now."""
        self.follow()
        return self.allows_as_read(question, form)

    def allows_as_read(self, question: str, form: Mapping[str, str], *, is_probe: bool = False, since: int = 0) -> bool:
        """Answer as ``allows`` does, by what was read of the journal; ``follow`` reads it.

        ``is_probe`` if the identity is that of a probe certificate of a portal. With a journal that is older than the
        generation ``since`` everything is denied.
        """
        identity = form.get("username", "")
        if self._is_damaged or self._seq <= 0 or self._generation < since:
            return False
        if identity not in self._granted:
            return is_probe and self._allows_probe(question, form)
        tenant, filters = self._granted[identity]
        prefix = self._prefixes.get(tenant)
        if prefix is None:
            return False
        if question == "user":  # of a certificate: who gives a password, be it empty, may have that of another
            return form.keys() in _OF_CERTIFICATE
        of_client = form.get("variable_map.client_id" if question == "topic" else "client_id")
        if of_client != identity or form.get("vhost") != vhost_of(tenant):
            return False
        match question:
            case "vhost":  # before a client takes over the session of another with the same client id
                return True
            case "resource":
                return _is_own(identity, form)
            case "topic":
                own = [_below(f"{prefix}/{identity}")] if filters is None else filters
                return _allows_topic(own, _below(prefix) if tenant else _ANY, form)
        return False

    def knows(self, identity: str) -> bool:
        """Return whether the journal, as it was read, allows an identity anything."""
        return identity in self._granted

    def _allows_probe(self, question: str, form: Mapping[str, str]) -> bool:
        """Answer about a probe, which publishes what is true, and nothing else, in many sessions at once."""
        if question == "user":
            return form.keys() in _OF_CERTIFICATE
        of_client = form.get("variable_map.client_id" if question == "topic" else "client_id", "")
        if not re.fullmatch(re.escape(form["username"]) + "-[0-9a-f]{16}", of_client) or form.get("vhost") != vhost_of(
            None
        ):
            return False
        asked = form.get("resource"), form.get("name"), form.get("permission")
        match question:
            case "vhost":
                return True
            case "resource":
                return asked == ("exchange", EXCHANGE, "write")
            case "topic":
                return asked == ("topic", EXCHANGE, "write") and self._is_true(form.get("routing_key", ""))
        return False

    def _is_true(self, key: str) -> bool:
        about, _, number = key.rpartition(".")
        if not re.fullmatch("[0-9]{1,19}", number):
            return False
        if about == PROVE.replace("/", "."):
            return int(number) <= self._generation
        if about == LATE.replace("/", "."):
            return True  # said too late to be taken
        left = int(number) / 1000 - self._clock()
        return about == UNTIL.replace("/", ".") and 0 < left <= MAX_UNTIL_SECONDS

    # --- The journal

    def follow(self, most: int | None = None) -> bool:
        """Take in what was appended, or a new journal; return false, and read nothing, for more than ``most`` bytes."""
        try:
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                header = file.readline(MAX_LINE_BYTES)
                is_new = status.st_ino != self._inode or status.st_size < self._end or header != self._header
                if most is not None and status.st_size - (0 if is_new else self._end) > most:
                    return False
                if is_new:
                    self._begin(status.st_ino)
                    self._header = header
                if status.st_size > self._end and not self._is_damaged:
                    file.seek(self._end)
                    self._read(file)
        except OSError:
            self._begin(0)
        return True

    def _read(self, file: BinaryIO) -> None:
        while (line := file.readline(MAX_LINE_BYTES + 1)).endswith(b"\n"):
            self._take(line)
            self._end += len(line)
        self._is_damaged = self._is_damaged or len(line) > MAX_LINE_BYTES

    def _take(self, line: bytes) -> None:
        text, _, stated = line[:-1].rpartition(b" ")
        checksum = zlib.crc32(text, self._checksum)
        numbered = _LINE.fullmatch(text)
        if stated != b"%08x" % checksum:
            self._is_damaged = True
        elif self._seq < 0:
            self._is_damaged = _HEADER.fullmatch(text) is None
        elif numbered is None or int(numbered[1]) != self._seq + 1:
            self._is_damaged = True
        else:
            self._apply(numbered[2].decode("ascii").split(" "))
        self._seq, self._checksum = self._seq + 1, checksum

    def _apply(self, words: Sequence[str]) -> None:
        match words:
            case ["generation", number]:
                self._generation = max(self._generation, int(number))
            case ["tenant", name, prefix]:
                self._prefixes[name] = decode(prefix)
            case ["suspend", name]:
                self._prefixes[name] = None
            case ["allow", identity, *rest]:
                self._granted[identity] = self._grant(rest)
            case ["deny" | "forget", identity, *_]:
                self._granted.pop(identity, None)

    def _grant(self, words: Sequence[str]) -> _Grant:
        tenant, filters = _FIRST, words
        if words and words[0].startswith("in:"):
            tenant, filters = words[0].removeprefix("in:"), words[1:]
        if filters:
            return tenant, [*filter(None, map(_filter, filters))]
        return self._defaults.setdefault(tenant, (tenant, None))


def _below(topic: str) -> _Filter:
    """Return what is below a topic, to be published and subscribed to."""
    return words_of(f"{topic}/#", is_filter=True) or (), "rw"  # () covers nothing but what has no words


def _allows_topic(granted: Sequence[_Filter], bounds: _Filter, form: Mapping[str, str]) -> bool:
    """Tell whether what a client publishes or subscribes to is granted, and within the bounds of its tenant."""
    permission = form.get("permission", "")
    if (form.get("resource"), form.get("name")) != ("topic", EXCHANGE) or permission not in ("read", "write"):
        return False
    asked = words_of(form.get("routing_key", ""), is_filter=permission == "read")
    if asked is None or asked[0] == _OF_PORTAL or not covers(bounds[0], asked):
        return False
    return any(permission[0] in access and covers(words, asked) for words, access in granted)


def _is_own(identity: str, form: Mapping[str, str]) -> bool:
    """Tell whether a queue is the client's own, or an exchange the one of all topics."""
    asked = form.get("resource"), form.get("name"), form.get("permission")
    queues = (f"mqtt-subscription-{identity}qos0", f"mqtt-subscription-{identity}qos1")
    match asked:
        case ("queue", name, "configure" | "write" | "read"):
            return name in queues
        case ("exchange", name, "write" | "read"):
            return name == EXCHANGE
    return False


def _filter(text: str) -> _Filter | None:
    """Return a filter of a line; ``None`` if it means more to RabbitMQ than to MQTT: a literal dot or asterisk."""
    access, _, encoded = text.partition(":")
    granted = decode(encoded)
    if access not in ("r", "w", "rw") or "." in granted or "*" in granted:
        return None
    words = words_of(granted, is_filter=True)
    return None if words is None else (words, access)
