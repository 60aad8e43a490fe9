"""The broker's access control list, built block by block."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from broker.session import PORTAL_USER
from core.broker_control import STYLE_LINE, AclStyle
from core.errors import FieldProblem, ProjectionInvalid, TopicRefused
from core.tenants import TenantOnBroker
from core.topics import Access, Topic, check_device_id, check_topics, default_topics, expand

# Below it, the only topic that the portal may write: the number of the ACL. A portal before this one used another name,
# so that its ACL, of whatever number, is never taken for one of these.
NUMBER_TOPIC = "portal/acl"
# Never granted by a valid ACL: any answer but "not authorised" shows that the broker runs without its ACL.
REFUSED_TOPIC = "portal/refused"
VERSION_TOPIC = "$SYS/broker/version"  # retained; the portal may read it

_WRITER = b"# Written by the device onboarding portal. A change by hand is damage to it and is overwritten.\n"
_NUMBER = re.compile(rb"# generation ([0-9]{1,18})\n")
DENY_ALL = "topic deny #\n"


class Acl:
    """The ACL of one broker in one style; filled device by device, then rendered under a number.

    It grants topics, and is no list of those who are out: certificates that are revoked or on hold are refused by the
    CRL, so that the broker need not load another ACL for them. The number is that of the generation from which on the
    broker has to have this ACL, and is what it is asked for.

    ``per-device``: an allow-list, a device without a block may do nothing. ``pattern``: one line grants each device
    everything below its id, and only devices with topics of their own and denied devices have blocks.
    In Mosquitto a deny entry overrides all others of its user, patterns too, and the pattern is added to a user's own
    topics. So this style cannot express topics narrower than the default, and such a device is denied everything.
    """

    keeps_suspended = True

    def __init__(self, style: AclStyle, prefix: str) -> None:
        self.style = style
        self.prefix = prefix
        self._blocks: dict[str, bytes] = {}
        self._closed: dict[str, str] = {}
        self._out: set[str] = set()  # devices without a certificate that counts, since the last ``settle``
        self._default_lines = _topic_lines("{id}", default_topics(prefix))

    @property
    def closed(self) -> Mapping[str, str]:
        """Devices that are denied everything because their topics cannot be granted, each with the reason."""
        return MappingProxyType(self._closed)

    def __len__(self) -> int:
        """Return the number of devices with a block."""
        return len(self._blocks)

    def must_be_loaded(self, installed: bytes) -> bool:
        """Return whether a broker that has the ACL ``installed`` has to load this one in its place.

        A block more there does no harm if its device is out: no certificate of it is accepted.
        """
        if not installed.startswith(self._head(number_of(installed))):
            return True
        blocks = _blocks_of(installed)
        more = blocks.keys() - self._blocks.keys()
        return not more <= self._out or any(blocks.get(device_id) != own for device_id, own in self._blocks.items())

    def settle(self) -> None:
        """Forget which devices are out, once the ACL is installed."""
        self._out.clear()

    def grant(self, device_id: str, topics: Sequence[Topic] | None, tenant: TenantOnBroker | None = None) -> None:
        """Grant ``topics``; see ``broker_provisioning.add_device_acl``. Only the first tenant's devices are granted."""
        check_device_id(device_id)
        self._closed.pop(device_id, None)
        self._out.discard(device_id)
        if tenant is not None:
            self._close(device_id, "A second tenant needs PORTAL_BROKER_CONTROL=guard.")
            return
        if topics is None:
            if self.style is AclStyle.PATTERN:
                self._blocks.pop(device_id, None)
            else:
                self._blocks[device_id] = f"user {device_id}\n{self._default_lines.replace('{id}', device_id)}".encode()
            return
        try:
            checked = check_topics(topics, device_id=device_id, prefix=self.prefix)
            check_style(checked, self.style, self.prefix)
        except TopicRefused as error:
            self._close(device_id, error.detail)
            return
        self._blocks[device_id] = f"user {device_id}\n{_topic_lines(device_id, checked)}".encode()

    def grant_application(
        self, application_id: str, topics: Sequence[Topic], tenant: TenantOnBroker | None = None
    ) -> None:
        """Deny an application everything: with an ACL Mosquitto grants every SUBSCRIBE."""
        check_device_id(application_id)
        self._out.discard(application_id)
        self._close(application_id, "Applications need PORTAL_BROKER_CONTROL=guard.")

    def _close(self, device_id: str, reason: str) -> None:
        self._blocks.pop(device_id, None)
        if self.style is AclStyle.PATTERN:
            self._blocks[device_id] = f"user {device_id}\n{DENY_ALL}".encode()
        self._closed[device_id] = reason

    def deny(self, device_id: str, tenant: TenantOnBroker | None = None) -> None:
        """Remove the block of a device whose certificates are all revoked."""
        check_device_id(device_id)
        self.forget(device_id)

    def forget(self, device_id: str) -> None:
        """Remove the block of a device that has no certificate, or only expired ones, so it cannot connect."""
        self._closed.pop(device_id, None)
        self._blocks.pop(device_id, None)
        self._out.add(device_id)

    def render(self, number: int) -> bytes:
        """Return the file under a number in Mosquitto's format (mosquitto.conf(5), acl_file)."""
        tail = f"# end {number} {len(self._blocks)}\n"
        return b"".join([self._head(number), *self._blocks.values(), tail.encode()])

    def _head(self, number: int) -> bytes:
        pattern, portal_deny = "", ""
        if self.style is AclStyle.PATTERN:
            pattern = f"pattern readwrite {self.prefix}/%u/#\n"
            portal_deny = f"topic deny {self.prefix}/{PORTAL_USER}/#\n"  # what the pattern grants this user
        head = (
            f"# generation {number}\n# style {self.style}\n{pattern}"
            f"user {PORTAL_USER}\ntopic write {NUMBER_TOPIC}/{number}\ntopic read {VERSION_TOPIC}\n{portal_deny}"
        )
        return _WRITER + head.encode()


def check_style(topics: Sequence[Topic] | None, style: AclStyle, prefix: str) -> None:
    """Raise ``TopicRefused`` if ``topics``, in normal form, cannot be enforced in ``style``."""
    if style is AclStyle.PATTERN and topics is not None and default_topics(prefix)[0] not in topics:
        message = f"topics narrower than the default need PORTAL_ACL_STYLE={AclStyle.PER_DEVICE}"
        raise TopicRefused(f"{message}.", [FieldProblem("topics", message)])


def _topic_lines(device_id: str, topics: Sequence[Topic]) -> str:
    return "".join(f"topic {topic.access} {expand(topic, device_id)}\n" for topic in topics)


def validate_acl(content: bytes, generation: int, *, style: AclStyle | None = None, prefix: str | None = None) -> int:
    """Parse an ACL as untrusted input; return its number.

    Raise ``ProjectionInvalid`` if it is not valid, or if its number is newer than ``generation``.

    Checked: header, every line, one block for each user, and the last line, which shows a truncated file. With
    ``prefix`` also that each filter is below it and names no other device.
    """
    if not content.startswith(_WRITER):
        raise ProjectionInvalid("The ACL does not begin with the portal's header.")
    head = _NUMBER.match(content, len(_WRITER))
    if head is None or int(head[1]) > generation:
        raise ProjectionInvalid(f"The ACL is not of generation {generation} or an older one.")
    number = int(head[1])
    stated = STYLE_LINE.match(content, head.end())
    if stated is None or stated[1].decode() not in set(AclStyle) or (style is not None and stated[1].decode() != style):
        raise ProjectionInvalid("The ACL is not of the style that is set.")
    tail = re.compile(rb"# end ([0-9]{1,18}) ([0-9]{1,9})\n\Z").search(content, max(0, len(content) - 64))
    if tail is None or int(tail[1]) != number:
        raise ProjectionInvalid("The ACL is truncated: its last line is missing.")
    fixed = _fixed_lines(AclStyle(stated[1].decode()), number, prefix).match(content, stated.end() + 1)
    if fixed is None:
        raise ProjectionInvalid("The ACL's lines for the portal itself are wrong.")
    body = _blocks(prefix).match(content, fixed.end(), tail.start())
    if body is None or body.end() != tail.start():
        line = content.count(b"\n", 0, body.end() if body else fixed.end()) + 1
        raise ProjectionInvalid(f"The ACL is malformed, or grants too much, in the block that begins at line {line}.")
    users = re.findall(rb"^user (.+)$", content[fixed.end() : tail.start()], re.MULTILINE)
    if len(users) != int(tail[2]) or len(set(users)) != len(users):
        raise ProjectionInvalid("The ACL does not contain as many devices as its last line says, each once.")
    return number


def number_of(content: bytes) -> int:
    """Return the number of an ACL, 0 if it has none."""
    head = _NUMBER.match(content, len(_WRITER))
    return 0 if head is None else int(head[1])


def _blocks_of(content: bytes) -> dict[str, bytes]:
    """Return the block of each device in a valid ACL."""
    _head, _portal, *devices = content.rpartition(b"# end ")[0].split(b"\nuser ")
    return {one[:36].decode(): b"user " + one.rstrip(b"\n") + b"\n" for one in devices}


def _fixed_lines(style: AclStyle, number: int, prefix: str | None) -> re.Pattern[bytes]:
    below = re.escape(prefix) if prefix is not None else r"[A-Za-z0-9/_-]+"
    read = re.escape(VERSION_TOPIC)
    portal = f"user {PORTAL_USER}\ntopic write {NUMBER_TOPIC}/{number}\ntopic read {read}\n"
    if style is AclStyle.PATTERN:
        return re.compile(
            f"pattern readwrite (?P<p>{below})/%u/#\n{portal}topic deny (?P=p)/{PORTAL_USER}/#\n".encode()
        )
    return re.compile(portal.encode())


def _blocks(prefix: str | None) -> re.Pattern[bytes]:
    """Match all device blocks; each ends at a line's end, so a match that stops early shows the wrong block."""
    uuid = r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
    below = re.escape(prefix) if prefix is not None else r"[A-Za-z0-9_-]+(?:/[A-Za-z0-9_-]+)*?"
    other = r"(?:[0-9A-Fa-f]-?){32}(?:/|\n)"
    # The level after the prefix is the block's own id, or a name without a wildcard that is not another id.
    place = rf"(?:(?P=id)|(?!{other})[^\x00-\x1f\x7f-\xff/+#%{{}}]+)"
    rest = r"(?:/[^\x00-\x1f\x7f-\xff/+#%{}]+|/\+)*(?:/#)?"
    grant = rf"topic (?:{'|'.join(Access)}) {below}/{place}{rest}\n"
    usual = rf"topic readwrite {below}/(?P=id)/#\n(?=user |# end )"  # first, because it is the fastest to match
    return re.compile(rf"(?:user (?P<id>{uuid})\n(?:{usual}|topic deny #\n|(?:{grant})+))*+".encode())
