"""What RabbitMQ is answered about a client."""

from __future__ import annotations

from pathlib import Path

import pytest

from broker.guard import journal
from broker.guard.journal import JournalAppend, NewJournal, Position, read_position
from broker.rabbitmq.answers import IN_FLIGHT_SECONDS, Answers, check_filter, covers, read_form, seconds_late, words_of
from core.errors import TopicRefused
from core.topics import Access

OWN, OTHER = "0189c0de-0000-7000-8000-000000000001", "0189c0de-0000-7000-8000-000000000002"


def begin(path: Path, *lines: str, epoch: int = 1) -> Position:
    with NewJournal(path, epoch, mode=0o640, group=None) as writer:
        for line in lines:
            writer.add(line)
        return writer.commit(1)


def append(path: Path, *lines: str) -> None:
    position = read_position(path)
    writer = JournalAppend(path, position)
    for line in lines:
        writer.add(line)
    writer.commit(position.generation + 1)


def topic(key: str, permission: str, identity: str = OWN, client_id: str | None = None) -> dict[str, str]:
    return {
        "username": identity,
        "vhost": "/",
        "resource": "topic",
        "name": "amq.topic",
        "permission": permission,
        "routing_key": key,
        "variable_map.client_id": client_id or identity,
    }


def of_queue(name: str, client_id: str = OWN) -> dict[str, str]:
    about = {"vhost": "/", "resource": "queue", "name": name, "permission": "configure"}
    return {"username": OWN, "client_id": client_id, **about}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    begin(tmp_path / "journal", journal.allow_line(OWN), journal.allow_line(OTHER))
    return tmp_path / "journal"


@pytest.fixture
def answers(path: Path) -> Answers:
    return Answers(path, "devices")


def test_a_device_logs_in_by_its_certificate_alone(answers: Answers) -> None:
    assert answers.allows("user", {"username": OWN})
    assert answers.allows("user", {"username": OWN, "vhost": "/", "client_id": OWN})  # as RabbitMQ 4.3 asks
    assert not answers.allows("user", {"username": "nobody"})


@pytest.mark.parametrize("password", ["", "x", "none"])
def test_whoever_gives_a_password_is_refused(answers: Answers, password: str) -> None:
    """The certificate of one device and the name of another in CONNECT: the node asks about the name."""
    given = {"username": OTHER, "password": password, "vhost": "/", "client_id": OWN}
    assert not answers.allows("user", given)


def test_a_client_id_must_be_the_devices_own_so_that_it_ends_no_other_session(answers: Answers) -> None:
    assert answers.allows("vhost", {"username": OWN, "vhost": "/", "client_id": OWN})
    assert not answers.allows("vhost", {"username": OWN, "vhost": "/", "client_id": OTHER})
    assert not answers.allows("vhost", {"username": OWN, "vhost": "other", "client_id": OWN})


@pytest.mark.parametrize("quality", [0, 1])
def test_a_device_has_its_own_queues_and_no_others(answers: Answers, quality: int) -> None:
    assert answers.allows("resource", of_queue(f"mqtt-subscription-{OWN}qos{quality}"))
    assert not answers.allows("resource", of_queue(f"mqtt-subscription-{OTHER}qos{quality}"))
    assert not answers.allows("resource", of_queue(f"mqtt-subscription-{OWN}qos{quality}", client_id=OTHER))


def test_the_exchange_of_all_topics_is_used_and_not_changed(answers: Answers) -> None:
    about = {"username": OWN, "client_id": OWN, "vhost": "/", "resource": "exchange", "name": "amq.topic"}
    assert answers.allows("resource", {**about, "permission": "write"})
    assert not answers.allows("resource", {**about, "permission": "configure"})
    assert not answers.allows("resource", {**about, "permission": "write", "name": "amq.fanout"})


@pytest.mark.parametrize("permission", ["read", "write"])
def test_a_device_has_what_is_below_its_id(answers: Answers, permission: str) -> None:
    assert answers.allows("topic", topic(f"devices.{OWN}.state", permission))
    assert not answers.allows("topic", topic(f"devices.{OTHER}.state", permission))
    assert not answers.allows("topic", topic(f"devices.{OWN}.state", permission, client_id=OTHER))
    assert not answers.allows("topic", topic("", permission))


@pytest.mark.parametrize("key", ["#", "devices.#", "devices.*.state", "#.state", "devices.#.state", "*.*.state"])
def test_a_wildcard_reaches_no_other_device(answers: Answers, key: str) -> None:
    assert not answers.allows("topic", topic(key, "read"))


@pytest.mark.parametrize("key", ["*", "#", "a*"])
def test_nothing_is_published_to_a_wildcard(answers: Answers, key: str) -> None:
    assert answers.allows("topic", topic(f"devices.{OWN}.a", "write"))
    assert not answers.allows("topic", topic(f"devices.{OWN}.{key}", "write"))


def test_own_topics_go_by_direction(path: Path, answers: Answers) -> None:
    filters = [(f"devices/{OWN}/up/+", Access.WRITE), (f"devices/{OWN}/down/#", Access.READ)]
    append(path, journal.allow_line(OWN, filters))
    assert answers.allows("topic", topic(f"devices.{OWN}.up.a", "write"))
    assert not answers.allows("topic", topic(f"devices.{OWN}.up.a", "read"))
    assert not answers.allows("topic", topic(f"devices.{OWN}.up.a.b", "write"))
    assert answers.allows("topic", topic(f"devices.{OWN}.down.#", "read"))
    assert not answers.allows("topic", topic(f"devices.{OWN}.down.a", "write"))


@pytest.mark.parametrize("filter_", ["devices/*/state", f"devices/x.{OTHER}/state", "devices.#"])
def test_a_filter_that_means_more_to_rabbitmq_grants_nothing(path: Path, answers: Answers, filter_: str) -> None:
    """An asterisk is a letter in MQTT and a wildcard in a routing key, and a dot ends a word there."""
    append(path, journal.allow_line(OWN, [(filter_, Access.READ)]))
    assert answers.allows("user", {"username": OWN})
    assert not answers.allows("topic", topic(filter_.replace("/", "."), "read"))


def test_a_revocation_counts_at_the_next_question(path: Path, answers: Answers) -> None:
    assert answers.allows("user", {"username": OWN})
    append(path, journal.deny_line(OWN))
    assert not answers.allows("user", {"username": OWN})
    assert not answers.allows("topic", topic(f"devices.{OWN}.state", "write"))
    assert answers.allows("user", {"username": OTHER})
    append(path, journal.allow_line(OWN))
    assert answers.allows("user", {"username": OWN})
    append(path, journal.forget_line(OWN))
    assert not answers.allows("user", {"username": OWN})


def test_a_new_journal_takes_the_place_of_the_old_one(path: Path, answers: Answers) -> None:
    assert answers.allows("user", {"username": OWN})
    begin(path, journal.allow_line(OTHER), epoch=2)
    assert not answers.allows("user", {"username": OWN})
    assert answers.allows("user", {"username": OTHER})


# --- Tenants ---------------------------------------------------------------------------------------------------------


def of_tenant(answers: Answers, key: str, permission: str = "write", vhost: str = "acme") -> bool:
    return answers.allows("topic", {**topic(key, permission), "vhost": vhost})


@pytest.fixture
def acme(path: Path) -> None:
    """A tenant, which has one device of its own, and one that belonged to nobody before."""
    append(path, journal.tenant_line("acme", "acme/devices"), journal.allow_line(OWN, tenant="acme"))


@pytest.mark.usefixtures("acme")
def test_a_client_of_a_tenant_is_let_into_the_vhost_of_that_alone(answers: Answers) -> None:
    assert answers.allows("user", {"username": OWN})
    for vhost, allowed in (("acme", True), ("/", False), ("other", False), ("", False)):
        assert answers.allows("vhost", {"username": OWN, "vhost": vhost, "client_id": OWN}) is allowed
        assert answers.allows("resource", {**of_queue(f"mqtt-subscription-{OWN}qos1"), "vhost": vhost}) is allowed
        assert of_tenant(answers, f"acme.devices.{OWN}.a", vhost=vhost) is allowed
    assert not answers.allows("vhost", {"username": OTHER, "vhost": "acme", "client_id": OTHER})  # the first tenant's


@pytest.mark.usefixtures("acme")
def test_a_client_of_a_tenant_has_its_topics_below_the_prefix_of_that(path: Path, answers: Answers) -> None:
    assert of_tenant(answers, f"acme.devices.{OWN}.a")
    assert not of_tenant(answers, f"devices.{OWN}.a")
    append(path, journal.allow_line(OWN, [("acme/devices/+/a", Access.READ), ("#", Access.WRITE)], tenant="acme"))
    assert of_tenant(answers, "acme.devices.*.a", "read")
    assert of_tenant(answers, "acme.devices.x")
    assert not of_tenant(answers, f"devices.{OTHER}.a")
    assert not of_tenant(answers, "acme.other.a")


@pytest.mark.usefixtures("acme")
def test_of_a_suspended_tenant_nobody_is_allowed_anything(path: Path, answers: Answers) -> None:
    append(
        path, journal.suspend_line("acme"), journal.allow_line(OWN, [("acme/devices/x", Access.WRITE)], tenant="acme")
    )
    assert not answers.allows("user", {"username": OWN})
    assert not answers.allows("vhost", {"username": OWN, "vhost": "acme", "client_id": OWN})
    assert not of_tenant(answers, "acme.devices.x")
    assert answers.allows("user", {"username": OTHER})
    append(path, journal.tenant_line("acme", "acme/devices"))
    assert of_tenant(answers, "acme.devices.x")


def test_a_client_of_a_tenant_that_is_not_known_is_allowed_nothing(path: Path, answers: Answers) -> None:
    append(path, journal.allow_line(OWN, tenant="acme"))
    assert not answers.allows("user", {"username": OWN})


@pytest.mark.usefixtures("acme")
def test_who_left_a_tenant_is_denied(path: Path, answers: Answers) -> None:
    assert answers.allows("user", {"username": OWN})
    append(path, journal.deny_line(OWN, tenant="acme"))
    assert not answers.allows("user", {"username": OWN})


def test_a_journal_that_is_missing_or_damaged_admits_nobody(path: Path, answers: Answers) -> None:
    content = path.read_bytes()
    flipped = content.replace(OWN.encode(), OTHER.encode(), 1)
    for damaged in (flipped, content[content.index(b"\n") + 1 :], content[: content.index(b"\n") + 1], b"", b"x\n"):
        path.unlink()
        path.write_bytes(damaged)
        assert not answers.allows("user", {"username": OTHER}), damaged
    path.unlink()
    assert not answers.allows("user", {"username": OTHER})
    path.write_bytes(content)
    assert answers.allows("user", {"username": OTHER})


def test_a_torn_last_line_is_waited_for(path: Path, answers: Answers) -> None:
    whole = path.read_bytes()
    append(path, journal.deny_line(OWN))
    changed = path.read_bytes()
    path.write_bytes(changed[: len(whole) + 5])
    assert answers.allows("user", {"username": OWN})
    path.write_bytes(changed)
    assert not answers.allows("user", {"username": OWN})


@pytest.mark.parametrize(
    "body", [b"a=1&a=2", b"a", b"a=%ff", b"\xff=1", b"a=" + b"x" * 4096, b"&".join(b"a%d=1" % n for n in range(17))]
)
def test_a_form_that_is_not_understood_is_none(body: bytes) -> None:
    assert read_form(body) is None


def test_a_form_keeps_what_is_empty() -> None:
    assert read_form(b"username=a%2Fb&password=") == {"username": "a/b", "password": ""}


def test_words_are_those_of_rabbitmq() -> None:
    assert words_of("a/+/b.c/#", is_filter=True) == ["a", "*", "b", "c", "#"]
    assert words_of("a//b", is_filter=True) is None
    assert words_of("a/b+", is_filter=True) is None
    assert covers(["a", "#"], ["a"])
    assert not covers(["a", "*"], ["a", "#"])
    assert not covers(["a"], ["a", "b"])


# --- The portal's own probe -------------------------------------------------------------------------------------------

PROBE = "0189c0de-0000-7000-8000-00000000000f"
SESSION = f"{PROBE}-0123456789abcdef"


def allows_probe(answers: Answers, question: str, form: dict[str, str], *, is_probe: bool = True) -> bool:
    answers.follow()
    return answers.allows_as_read(question, form, is_probe=is_probe)


def of_probe(key: str, permission: str = "write", client_id: str = SESSION) -> dict[str, str]:
    return topic(key, permission, PROBE, client_id)


def test_a_probe_logs_in_by_its_certificate_in_many_sessions_at_once(answers: Answers) -> None:
    assert allows_probe(answers, "user", {"username": PROBE})
    assert allows_probe(answers, "vhost", {"username": PROBE, "vhost": "/", "client_id": SESSION})
    for client_id in (PROBE, OWN, f"{PROBE}-", f"{SESSION}0", f"{SESSION}\n", ""):
        assert not allows_probe(answers, "vhost", {"username": PROBE, "vhost": "/", "client_id": client_id})
    assert not allows_probe(answers, "vhost", {"username": PROBE, "vhost": "other", "client_id": SESSION})
    assert not allows_probe(answers, "user", {"username": PROBE, "password": ""})
    assert not allows_probe(answers, "user", {"username": PROBE}, is_probe=False)


def test_a_probe_proves_generations_that_the_journal_has(answers: Answers, path: Path) -> None:
    assert allows_probe(answers, "topic", of_probe("portal.prove.1"))
    assert not allows_probe(answers, "topic", of_probe("portal.prove.2"))
    append(path)
    assert allows_probe(answers, "topic", of_probe("portal.prove.2"))
    for key in ("portal.prove.", "portal.prove.-1", "portal.prove.x", "portal.prove.1.1", "portal.prove.#"):
        assert not allows_probe(answers, "topic", of_probe(key))


def test_what_is_true_until_a_time_is_refused_from_then_on(path: Path) -> None:
    now = [1000.0]
    answers = Answers(path, "devices", lambda: now[0])
    assert allows_probe(answers, "topic", of_probe("portal.until.1000500"))
    assert not allows_probe(answers, "topic", of_probe("portal.until.1010001"))  # too far ahead
    now[0] = 1000.5
    assert not allows_probe(answers, "topic", of_probe("portal.until.1000500"))


def test_a_probe_asks_for_an_answer_that_comes_too_late_and_nobody_else_waits_for_one(answers: Answers) -> None:
    late = of_probe("portal.late.17")
    assert allows_probe(answers, "topic", late)
    assert not allows_probe(answers, "topic", late, is_probe=False)
    assert seconds_late("topic", late) > IN_FLIGHT_SECONDS
    for question, form in (("resource", late), ("topic", of_probe("portal.until.17")), ("user", {"username": PROBE})):
        assert seconds_late(question, form) == 0


def test_a_probe_may_do_nothing_else(answers: Answers, path: Path) -> None:
    exchange = {"username": PROBE, "client_id": SESSION, "vhost": "/", "resource": "exchange", "name": "amq.topic"}
    assert allows_probe(answers, "resource", exchange | {"permission": "write"})
    assert not allows_probe(answers, "resource", exchange | {"permission": "read"})
    queue = exchange | {"resource": "queue", "name": f"mqtt-subscription-{SESSION}qos1", "permission": "configure"}
    assert not allows_probe(answers, "resource", queue)
    for asked in (of_probe("portal.prove.1", "read"), of_probe(f"devices.{PROBE}.a"), of_probe("portal.other.1")):
        assert not allows_probe(answers, "topic", asked)
    append(path, journal.allow_line(PROBE))  # as of a device: then it is one
    assert not allows_probe(answers, "topic", of_probe("portal.prove.1"))


def test_nobody_else_says_what_a_probe_may(path: Path) -> None:
    append(path, journal.allow_line(OWN, [("portal/#", Access.READWRITE), ("#", Access.READWRITE)]))
    answers = Answers(path, "portal")
    for key in ("portal.prove.1", f"portal.{OTHER}.a"):
        assert not answers.allows("topic", topic(key, "write"))
        assert not answers.allows("topic", topic(key, "read"))


def test_a_damaged_journal_proves_nothing(answers: Answers, path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3] + b"00\n")
    assert not allows_probe(answers, "user", {"username": PROBE})
    assert not allows_probe(answers, "topic", of_probe("portal.prove.1"))


@pytest.mark.parametrize("text", ["devices/a.b/#", "devices/*/a", "devices//a"])
def test_a_filter_that_means_more_to_rabbitmq_is_refused(text: str) -> None:
    with pytest.raises(TopicRefused, match="cannot be granted by RabbitMQ"):
        check_filter(text)
    check_filter("devices/+/a/#")
