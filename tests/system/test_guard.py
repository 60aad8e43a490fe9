"""The guard in a real Mosquitto: whom it decides for, what it grants, when it believes the journal, what it tells."""

from __future__ import annotations

import hashlib
import ssl
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.guard import (
    PASSWORD,
    GuardedBroker,
    Journal,
    guarded_broker,
    key_hashes_of,
    may_publish,
    may_subscribe,
)
from tests.support.mosquitto import GUARD, StartFailed, guard_library
from tests.support.mqtt import NOT_AUTHORISED, Message, MqttClient, connect_socket, connect_tls, tls_context
from tests.support.pki import PEM, Authority, Pki

pytest_plugins = ("tests.support.guard_fixtures",)
pytestmark = pytest.mark.system
SECOND_USER = "their-telegraf"
THEIRS = "a password of the operator's users"


# --- The plugin by itself -----------------------------------------------------------------------------------------


def test_the_matcher_agrees_with_mosquitto_and_mutated_journals_are_survived(tmp_path: Path) -> None:
    subprocess.run(["make", "-s", "-C", GUARD, f"BUILD={tmp_path}", "test"], check=True)


@pytest.mark.long
def test_ten_minutes_of_mutated_journals_and_filters_are_survived(tmp_path: Path) -> None:
    subprocess.run(["make", "-s", "-C", GUARD, f"BUILD={tmp_path}", "fuzz", "SECONDS=600"], check=True)


def test_the_plugin_is_installed_below_the_prefix(tmp_path: Path) -> None:
    subprocess.run(
        ["make", "-s", "-C", GUARD, f"BUILD={tmp_path}", f"DESTDIR={tmp_path}/root", "PREFIX=/usr", "install"],
        check=True,
    )
    installed = tmp_path / "root/usr/lib/onboarding-portal/portal_guard.so"
    assert installed.stat().st_mode & 0o777 == 0o644
    needed = subprocess.run(["readelf", "-d", installed], check=True, capture_output=True, text=True).stdout
    assert [line.split("[")[1].rstrip("]") for line in needed.splitlines() if "(NEEDED)" in line] == ["libc.so.6"]


def test_a_broker_without_the_journals_path_does_not_start() -> None:
    with guarded_broker(start=False) as broker:
        text = broker.configuration_text()
        broker.configuration_text = lambda: text.replace("plugin_opt_journal", "plugin_opt_other")  # type: ignore[method-assign]
        with pytest.raises(StartFailed, match="Give plugin_opt_journal"):
            broker.start()


# --- Topics ---------------------------------------------------------------------------------------------------------


def test_a_device_reaches_its_default_topics_and_no_other(broker: GuardedBroker) -> None:
    one, credentials = broker.admit()
    two, neighbour_credentials = broker.admit()
    with broker.device(credentials) as device, broker.device(neighbour_credentials) as neighbour:
        assert may_subscribe(device, f"devices/{one}/#")
        for topic in (f"devices/{one}", f"devices/{one}/a", f"devices/{one}/a/b"):
            assert may_publish(device, topic)
            assert device.receive() == Message(topic, b"hello")
        for topic in (f"devices/{two}/a", f"devices/{one}x/a", "devices", "a", "portal/guard/refused", "$SYS/broker/x"):
            assert not may_publish(device, topic)
        assert not may_publish(neighbour, f"devices/{one}/a")
        assert not may_subscribe(neighbour, f"devices/{one}/#")
        neighbour.ping()
        assert neighbour.messages == []


def test_own_filters_replace_the_default_topics_and_have_their_own_access(broker: GuardedBroker) -> None:
    identity = str(uuid.uuid4())
    broker.tell(f"allow {identity} r:plant/+/state w:plant/7/command rw:mine/{identity}/# r:caf%C3%A9/a%20b/%25")
    with broker.device(broker.issue(identity)) as device:
        assert may_subscribe(device, "plant/+/state")
        assert not may_publish(device, "plant/7/state")
        assert may_publish(device, "plant/7/command")
        assert not may_subscribe(device, "plant/7/command")
        assert may_subscribe(device, "café/a b/%")
        assert may_publish(device, f"mine/{identity}/x")
        assert not may_publish(device, f"devices/{identity}/x")


def test_another_prefix_stands_in_the_journal(own_broker: GuardedBroker) -> None:
    identity = str(uuid.uuid4())
    journal = own_broker.new_journal(2)
    journal.line("prefix factory/devices")
    journal.line(f"allow {identity}")
    own_broker.journal = journal.write()
    assert own_broker.ask("epoch/2")
    with own_broker.device(own_broker.issue(identity)) as device:
        assert may_publish(device, f"factory/devices/{identity}/x")
        assert not may_publish(device, f"devices/{identity}/x")


def test_a_subscription_is_granted_if_it_can_match_something_readable_and_delivery_filters_it(
    broker: GuardedBroker,
) -> None:
    one, credentials = broker.admit()
    _, sender_credentials = broker.admit("rw:devices/#")
    with broker.device(credentials) as device, broker.device(sender_credentials) as sender:
        for filter_ in ("#", "+/+/#", "devices/+/x", "+/+/x/#"):
            assert may_subscribe(device, filter_)
        assert not may_subscribe(device, "other/#")
        assert not may_subscribe(device, "+")
        sender.publish("devices/other/x")
        sender.publish(f"devices/{one}/x")
        assert device.receive().topic == f"devices/{one}/x"
        device.ping()
        assert {message.topic for message in device.messages} <= {f"devices/{one}/x"}


@pytest.mark.parametrize(
    "filter_", ["$SYS/#", "$CONTROL/#", "$other", "$share/g", "$share//a", "$share/g/#", "$share/g/+/x"]
)
def test_a_subscription_outside_of_the_devices_topics_is_refused(broker: GuardedBroker, filter_: str) -> None:
    _, credentials = broker.admit()
    with broker.tls(credentials) as device:
        device.connect("any")
        try:
            assert not may_subscribe(device, filter_)
        except ConnectionError:  # the broker itself takes it for malformed
            assert filter_ in ("$share/g", "$share//a")


def test_a_shared_subscription_is_granted_only_if_all_of_it_is_readable(broker: GuardedBroker) -> None:
    one, credentials = broker.admit()
    two, other_credentials = broker.admit("r:fleet/+/up", "r:fleet/7/#", "w:fleet/8/#")
    with broker.device(credentials) as device, broker.device(other_credentials) as other:
        assert may_subscribe(device, f"$share/g/devices/{one}/#")
        assert may_subscribe(device, f"$share/g/devices/{one}/+/x")
        for filter_ in (f"devices/{two}/#", "devices/+/x", "devices/#", "#", f"devices/{one}x/#"):
            assert not may_subscribe(device, f"$share/g/{filter_}")
        assert may_subscribe(other, "$share/g/fleet/+/up")
        assert may_subscribe(other, "$share/g/fleet/7/#")
        assert not may_subscribe(other, "$share/g/fleet/#")
        assert not may_subscribe(other, "$share/g/fleet/8/#")


def test_a_device_that_tries_to_join_a_group_takes_nothing_from_it(broker: GuardedBroker) -> None:
    group = uuid.uuid4().hex
    _, application_credentials = broker.admit("r:telemetry/#")
    _, second_credentials = broker.admit("r:telemetry/#")
    _, sender_credentials = broker.admit("w:telemetry/#")
    _, intruder_credentials = broker.admit()
    with (
        broker.device(application_credentials) as first,
        broker.device(second_credentials) as other,
        broker.device(sender_credentials) as publisher,
        broker.device(intruder_credentials) as intruder,
    ):
        assert may_subscribe(first, f"$share/{group}/telemetry/#")
        assert may_subscribe(other, f"$share/{group}/telemetry/#")
        assert not may_subscribe(intruder, f"$share/{group}/telemetry/#")
        for number in range(30):
            publisher.publish("telemetry/x", b"%d" % number)
        first.ping()
        other.ping()
        got = sorted(int(message.payload) for client in (first, other) for message in client.messages)
    assert got == list(range(30))


def test_unsubscribing_is_always_granted(broker: GuardedBroker) -> None:
    _, credentials = broker.admit()
    with broker.device(credentials) as device:
        assert device.unsubscribe("other/#") in (0x00, 0x11)


# --- Whom it decides for ------------------------------------------------------------------------------------------


def test_a_certificate_of_a_portal_ca_is_not_enough_whatever_its_name(broker: GuardedBroker) -> None:
    for name in (str(uuid.uuid4()), "telegraf", "portal", "x" * 64, "odd name, with spaces", f"{uuid.uuid4()}x"):
        with broker.device(broker.issue(name)) as device:
            assert not may_publish(device, f"devices/{name}/x")
            device.wait_until_cut()


@contextmanager
def forged(
    broker: GuardedBroker, sibling: Authority, identity: str, *, names_issuer: bool = False
) -> Iterator[MqttClient]:
    """A client with the name of a device and a certificate of another CA, which it sends with it; not connected yet."""
    certificate, key = sibling.issue(identity, names_issuer=names_issuer).write(broker.root, uuid.uuid4().hex)
    certificate.write_bytes(certificate.read_bytes() + sibling.certificate.public_bytes(PEM))
    with MqttClient(connect_tls(broker.port, tls_context(broker.ca, certificate, key))) as client:
        yield client


def sibling_of(pki: Pki, **options: bytes | None) -> Authority:
    """A CA of the same name as the portal's, below the same root, with another key."""
    return Authority(pki.issuing.common_name, issuer=pki.root, **options)  # type: ignore[arg-type]


def tls_refuses(broker: GuardedBroker, sibling: Authority, identity: str, *, names_issuer: bool = False) -> bool:
    try:
        with forged(broker, sibling, identity, names_issuer=names_issuer) as client:
            client.connect("any")
    except (ssl.SSLError, ConnectionError):
        return True
    return False


def test_another_ca_of_the_same_name_and_root_makes_nobody_a_device(own_broker: GuardedBroker) -> None:
    broker = own_broker
    sibling, (identity, right) = sibling_of(broker.pki), broker.admit()
    copied = sibling_of(broker.pki, key_identifier=broker.pki.issuing.key_identifier)
    for ca, names_issuer in ((sibling, False), (sibling, True), (copied, True)):
        with forged(broker, ca, identity, names_issuer=names_issuer) as client:
            assert client.connect("another") == 0
            assert not may_publish(client, f"devices/{identity}/x"), names_issuer
            assert not may_subscribe(client, f"devices/{identity}/#")
    assert "is that of another CA with the name of a portal CA" in broker.log
    # Of two CAs of one name and one key identifier, TLS takes the one that it trusts, whose key has not signed.
    assert tls_refuses(broker, copied, identity)
    with broker.device(right, identity) as device:
        assert may_publish(device, f"devices/{identity}/x")


def test_with_a_crl_tls_refuses_another_ca_of_the_same_name_whatever_its_key_identifier() -> None:
    with guarded_broker(start=False) as broker:
        (broker.root / "crl.pem").write_bytes(broker.pki.issuing.crl())
        broker.extra = f"crlfile {broker.root}/crl.pem"
        broker.start()
        sibling, (identity, right) = sibling_of(broker.pki), broker.admit()
        copied = sibling_of(broker.pki, key_identifier=broker.pki.issuing.key_identifier)
        for ca in (sibling, copied):
            assert tls_refuses(broker, ca, identity)
            assert tls_refuses(broker, ca, identity, names_issuer=True)
        with broker.device(right, identity) as device:
            assert may_publish(device, f"devices/{identity}/x")


def test_a_journal_of_before_names_no_keys_and_is_believed(own_broker: GuardedBroker) -> None:
    journal = Journal(own_broker.journal.path, 2)
    for text in (f"portal {hashlib.sha256(PASSWORD.encode()).hexdigest()}", f"issuer {own_broker.issuer}"):
        journal.line(text)
    identity = str(uuid.uuid4())
    journal.line(f"allow {identity}")
    own_broker.journal = journal.write()
    assert own_broker.ask("epoch/2")
    right = own_broker.issue(identity)
    with own_broker.device(right, identity) as device:
        assert may_publish(device, f"devices/{identity}/x")
    with forged(own_broker, sibling_of(own_broker.pki), identity) as client:
        assert client.connect("another") == 0
        assert may_publish(client, f"devices/{identity}/x")  # until the portal adds the keys
        own_broker.tell(*(f"issuer {each}" for each in key_hashes_of(own_broker.pki.issuing)))
        assert not may_publish(client, f"devices/{identity}/x")
    with own_broker.device(right, identity) as device:
        assert may_publish(device, f"devices/{identity}/x")


def test_the_name_in_upper_case_is_another_name(broker: GuardedBroker) -> None:
    identity, _ = broker.admit()
    with broker.device(broker.issue(identity.upper())) as device:
        assert not may_publish(device, f"devices/{identity}/x")
    with broker.device(broker.issue(identity.upper())) as device:
        assert not may_publish(device, f"devices/{identity.upper()}/x")


def test_an_identity_need_not_be_a_uuid(broker: GuardedBroker) -> None:
    name = f"telegraf-{uuid.uuid4().hex}"
    broker.tell(f"allow {name} r:devices/#")
    with broker.device(broker.issue(name)) as application:
        assert may_subscribe(application, "devices/#")
        assert not may_publish(application, "devices/x")


@dataclass
class Operator:
    """What an operator has beside the portal: a CA, users, an ACL."""

    broker: GuardedBroker
    ca: Authority
    user_with_uuid: str

    @contextmanager
    def client(self, client_id: str, username: str | None = None, password: str = THEIRS) -> Iterator[MqttClient]:
        with MqttClient(connect_socket(self.broker.socket)) as client:
            given = None if username is None else password
            assert client.connect(client_id, username=username, password=given) == 0
            yield client

    def refuses(self, client_id: str, username: str | None = None, password: str | None = None) -> bool:
        with MqttClient(connect_socket(self.broker.socket)) as client:
            return client.connect(client_id, username=username, password=password) == NOT_AUTHORISED


@pytest.fixture(scope="module")
def operator() -> Iterator[Operator]:
    with guarded_broker(start=False) as broker:
        passwords, acl = broker.root / "passwords", broker.root / "acl"
        passwords.touch()
        identity = str(uuid.uuid4())
        for user in ("operator", "portal", SECOND_USER, identity):
            subprocess.run(["mosquitto_passwd", "-b", passwords, user, THEIRS], check=True, stderr=subprocess.DEVNULL)
        passwords.chmod(0o644)
        acl.write_text("topic readwrite open/#\nuser operator\ntopic readwrite plant/#\npattern readwrite own/%u/#\n")
        acl.chmod(0o644)
        foreign = Authority("Their own CA")
        broker.ca.write_bytes(broker.ca.read_bytes() + foreign.certificate.public_bytes(PEM))
        broker.extra = f"password_file {passwords}\nacl_file {acl}\nallow_anonymous true\n"
        broker.start()
        yield Operator(broker, foreign, identity)


def test_password_users_of_the_operator_are_left_to_the_acl_file(operator: Operator) -> None:
    with operator.client("any", "operator") as client:
        assert may_publish(client, "plant/x")
        assert may_publish(client, "own/operator/x")
        assert not may_publish(client, "devices/x")
        assert may_subscribe(client, "#")  # acl_file grants every subscription
    assert operator.refuses("any", "operator", "wrong")


def test_a_user_whose_name_is_a_uuid_that_the_journal_does_not_know_is_the_operators(operator: Operator) -> None:
    user = operator.user_with_uuid
    with operator.client("any", user) as client:
        assert may_publish(client, f"own/{user}/x")
        assert not may_publish(client, f"devices/{user}/x")


def test_anonymous_clients_are_left_to_the_acl_file(operator: Operator) -> None:
    with operator.client(str(uuid.uuid4())) as client:
        assert may_publish(client, "open/x")
        assert not may_publish(client, "plant/x")


def test_a_certificate_of_a_foreign_ca_is_left_to_the_acl_file(operator: Operator) -> None:
    for name in ("pump", "portal", str(uuid.uuid4())):
        with operator.broker.device(operator.broker.issue(name, operator.ca)) as device:
            assert may_publish(device, f"own/{name}/x")
            assert not may_publish(device, f"devices/{name}/x")


def test_a_foreign_certificate_with_the_name_of_a_device_has_none_of_its_rights(operator: Operator) -> None:
    identity, _ = operator.broker.admit()
    with operator.broker.device(operator.broker.issue(identity, operator.ca)) as device:
        assert not may_publish(device, f"devices/{identity}/x")


def test_devices_of_the_portal_have_nothing_of_the_acl_file(operator: Operator) -> None:
    identity, credentials = operator.broker.admit()
    with operator.broker.device(credentials) as device:
        assert may_publish(device, f"devices/{identity}/x")
        assert not may_publish(device, "open/x")
        assert not may_publish(device, f"own/{identity}/x")


def test_nobody_becomes_a_device_by_a_password_or_by_its_client_id(operator: Operator) -> None:
    identity, _ = operator.broker.admit()
    assert operator.refuses(identity)
    assert operator.refuses("any", identity, THEIRS)
    assert operator.refuses(identity, "operator", THEIRS)


def test_a_user_whose_name_becomes_a_device_loses_everything(operator: Operator) -> None:
    with operator.client("any", SECOND_USER) as client:
        assert may_publish(client, f"own/{SECOND_USER}/x")
        operator.broker.tell(f"allow {SECOND_USER}")
        assert not may_publish(client, f"own/{SECOND_USER}/x")
        assert not may_publish(client, f"devices/{SECOND_USER}/x")


def test_the_portals_password_alone_makes_the_portal(operator: Operator) -> None:
    assert operator.refuses("any", "portal", THEIRS)  # though the operator's password_file has that user
    assert operator.refuses("any", "portal", "guessed")
    assert operator.refuses("any", "portal")
    with operator.broker.device(operator.broker.issue("portal", operator.ca)) as device:
        assert not may_publish(device, "portal/guard/version/2")


def test_without_files_of_the_operators_only_devices_and_the_portal_connect(broker: GuardedBroker) -> None:
    for client_id, username, password in (
        ("any", None, None),
        ("any", "operator", "x"),
        (str(uuid.uuid4()), None, None),
    ):
        with MqttClient(connect_socket(broker.socket)) as client:
            assert client.connect(client_id, username=username, password=password) == NOT_AUTHORISED


def test_the_portal_may_do_nothing_but_ask(broker: GuardedBroker) -> None:
    with broker.portal() as portal:
        for topic in ("devices/x", "portal/other", "portal/guard", "$CONTROL/x"):
            assert not may_publish(portal, topic)
        for filter_ in ("#", "devices/#", "portal/#", "$share/g/portal/guard/#"):
            assert not may_subscribe(portal, filter_)
        assert may_subscribe(portal, "portal/guard/presence")


def test_a_device_with_a_wide_filter_does_not_reach_the_portals_topics(broker: GuardedBroker) -> None:
    _, credentials = broker.admit("rw:portal/#")
    with broker.device(credentials) as device:
        assert not may_publish(device, "portal/guard/version/2")
        assert not may_subscribe(device, "$share/g/portal/#")
        assert may_subscribe(device, "portal/#")
        assert broker.ask("version/2")
        device.ping()
        assert device.messages == []


def test_a_listener_on_which_the_username_is_not_the_certificates_gives_no_devices_rights() -> None:
    with guarded_broker(start=False) as broker:
        text = broker.configuration_text().replace("use_identity_as_username true", "")
        passwords = broker.root / "passwords"
        passwords.touch()
        victim, _ = str(uuid.uuid4()), None
        subprocess.run(["mosquitto_passwd", "-b", passwords, victim, "x"], check=True, stderr=subprocess.DEVNULL)
        passwords.chmod(0o644)
        broker.configuration_text = lambda: f"{text}\npassword_file {passwords}\n"  # type: ignore[method-assign]
        broker.start()
        broker.tell(f"allow {victim}")
        with broker.tls(broker.issue(str(uuid.uuid4()))) as thief:
            assert thief.connect("any", username=victim, password="x") == 0
            assert not may_publish(thief, f"devices/{victim}/x")


def test_a_foreign_client_with_a_uuid_gets_its_messages_while_asleep(operator: Operator) -> None:
    user = operator.user_with_uuid
    with MqttClient(connect_socket(operator.broker.socket)) as client:
        assert client.connect("sleeper", clean=False, expiry=3600, username=user, password=THEIRS) == 0
        assert may_subscribe(client, f"own/{user}/#")
        assert may_publish(client, f"own/{user}/x")
    with operator.client("any", user) as client:
        assert may_publish(client, f"own/{user}/y")
    with MqttClient(connect_socket(operator.broker.socket)) as client:
        client.connect("sleeper", clean=False, expiry=3600, username=user, password=THEIRS)
        client.ping()
        assert [message.topic for message in client.messages if message.topic.endswith("/y")]


def test_nobody_takes_the_client_id_to_which_presence_is_sent(operator: Operator) -> None:
    with operator.broker.portal("portal-presence") as portal:
        assert not operator.refuses("portal-other", "operator", THEIRS)
        assert may_publish(portal, "portal/guard/report")
        assert operator.refuses("portal-presence", "operator", THEIRS)
        portal.ping()


# --- Plugins that cannot be loaded ----------------------------------------------------------------------------------


def of_another_machine(plugin: bytes) -> bytes:
    """The same file for an architecture that is not this one: the field e_machine of the ELF header."""
    return plugin[:18] + (b"\xb7\x00" if plugin[18:20] != b"\xb7\x00" else b"\x3e\x00") + plugin[20:]


@pytest.mark.parametrize("kind", ["missing", "of another architecture", "cut short"])
def test_a_broker_whose_plugin_cannot_be_loaded_does_not_start_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    plugin, content = tmp_path / "portal_guard.so", guard_library().read_bytes()
    if kind != "missing":
        plugin.write_bytes(of_another_machine(content) if "architecture" in kind else content[:5000])
    monkeypatch.setattr("tests.support.guard.guard_library", lambda: plugin)
    with guarded_broker(start=False) as broker:
        with pytest.raises(StartFailed) as failed:
            broker.start()
        assert not broker.running
    assert "Unable to load" in str(failed.value)
