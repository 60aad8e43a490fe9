"""Each trap, made by hand, shows as the line that speaks of it."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
import subprocess
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from urllib.parse import unquote

import click
import pytest
import sqlalchemy as sa

from app import create_app, portal_of
from config import Settings
from core.broker_control import AclStyle, ControlKind
from core.roles import Role
from core.states import ClientKind
from operations.commands import line_of
from operations.doctor import authority, data, doctor, network
from operations.doctor.base import Finding, Installation, State, combine, counted, problem, warning, well
from operations.doctor.doctor import examine, exit_status
from operations.doctor.mosquitto import bridge_warnings, mistakes, read_configuration, size_warnings, version_of
from operations.doctor.network import START_PORTAL
from operations.own_certificates import probe_certificates
from operations.wiring import Portal, prepare
from pki.profiles import CertificateProfile
from store import tenants
from store.tables import Certificate, Delivery
from tests.support.brokers import enforce_all
from tests.support.harness import Clock, as_owner, settings_for
from tests.support.mosquitto import BESIDE, CONFIGURATION, INSTALLED_FOLDER, INSTALLED_PORT, without_guard
from tests.support.tenants import add_tenant
from tests.workflows.test_registration import OPERATOR, PUMP, token_of
from workflows.credentials import DeviceRequest
from workflows.operators import new_token

PROJECT = Path(__file__).parents[3]
# What cannot be well in these tests, where neither the server nor the broker runs.
ABSENT = {"portal", "CRL served", "broker", "broker certificate", "probe certificates", "generation"}
FOLLOWING = {"portal certificate", "OCSP served"}  # from those, so that they are left out
NAMES = [name for name, _ in doctor.CHECKS if name not in FOLLOWING and not name.startswith("RabbitMQ")]


@pytest.fixture
def portal(make_settings: Callable[..., Settings], clock: Clock) -> Iterator[Portal]:
    """A prepared portal with two devices, of which one is revoked; neither server nor broker runs."""
    app = create_app(make_settings(PORTAL_ENFORCE_TIMEOUT="0.1"), background=False, clock=clock)
    built = portal_of(app)
    prepare(built)
    for _ in range(2):
        device = built.registrations.register(OPERATOR, PUMP)
    built.revocations.revoke(OPERATOR, device.device_id, "key_compromise")
    built.reconciler.install()
    (built.settings.broker_dir / "mosquitto.conf").write_text(installed_configuration(built.settings))
    yield built
    built.close()


def installed_configuration(settings: Settings) -> str:
    """What mosquitto/README.md says to install."""
    text = CONFIGURATION.read_text()
    if settings.broker_control is ControlKind.FILES:
        text = without_guard(text)
    text = text.replace(INSTALLED_FOLDER, str(settings.broker_dir))
    return text.replace(INSTALLED_PORT, str(settings.mqtt_port))


def examined(portal: Portal, *names: str) -> dict[str, Finding]:
    checks = tuple((name, check) for name, check in doctor.CHECKS if not names or name in names)
    return {finding.name: finding for finding in doctor.examine(portal.settings, portal.clock, checks=checks)}


def test_a_sound_installation_is_well_but_for_what_does_not_run(
    portal: Portal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("operations.doctor.mosquitto.version_of", lambda _: (2, 1, 2))
    findings = examined(portal)
    assert {name: finding for name, finding in findings.items() if finding.state is not State.OK}.keys() == ABSENT
    assert list(findings) == NAMES
    for finding in findings.values():
        assert finding.detail.endswith(".")
        assert "Traceback" not in finding.detail


def test_nothing_is_changed_by_looking(portal: Portal) -> None:
    def state() -> dict[Path, tuple[int, int, bytes]]:
        return {
            path: (path.lstat().st_mode, path.lstat().st_mtime_ns, path.read_bytes())
            for path in portal.settings.data_dir.rglob("*")
            if path.is_file() and not path.name.startswith("portal.db") and path.suffix != ".lock"
        }

    portal.settings.broker_file("passwords").write_text("damaged")
    portal.settings.secrets_dir.chmod(0o755)
    before = state()
    examined(portal)
    assert state() == before
    assert portal.settings.secrets_dir.stat().st_mode & 0o777 == 0o755


# --- Files --------------------------------------------------------------------------------------------------------


def others_read_a_key(portal: Portal) -> None:
    (portal.settings.ca_dir / "issuing-1.key.pem").chmod(0o644)


def others_read_the_server_key(portal: Portal) -> None:
    portal.settings.broker_file("server.key").chmod(0o644)


def others_read_the_token(portal: Portal) -> None:
    (portal.settings.data_dir / "operator.env").write_text("")


def others_enter_the_secrets(portal: Portal) -> None:
    portal.settings.secrets_dir.chmod(0o755)


def a_folder_is_missing(portal: Portal) -> None:
    for path in (portal.settings.data_dir / "canaries").iterdir():
        path.unlink()
    (portal.settings.data_dir / "canaries").rmdir()


def the_passphrase_is_another(portal: Portal) -> None:
    (portal.settings.secrets_dir / "ca-passphrase").write_text("this is another passphrase")


def the_issuing_key_is_lost(portal: Portal) -> None:
    (portal.settings.ca_dir / "issuing-1.key.pem").unlink()


def the_issuing_key_is_the_roots(portal: Portal) -> None:
    content = (portal.settings.ca_dir / "root.key.pem").read_bytes()
    (portal.settings.ca_dir / "issuing-1.key.pem").write_bytes(content)


def ca_pem_is_cut_off(portal: Portal) -> None:
    path = portal.settings.data_dir / "ca.pem"
    path.write_text(path.read_text().partition("-----END CERTIFICATE-----\n")[0] + "-----END CERTIFICATE-----\n")


def the_crl_is_an_older_one(portal: Portal) -> None:
    path = portal.settings.broker_file("crl.pem")
    older = path.read_bytes()
    revoke_another(portal)
    path.write_bytes(older)


def revoke_another(portal: Portal) -> None:
    device = portal.registrations.register(OPERATOR, PUMP)
    portal.revocations.revoke(OPERATOR, device.device_id, "superseded")
    portal.reconciler.install()


def the_crl_is_gone(portal: Portal) -> None:
    portal.settings.broker_file("crl.pem").unlink()


def the_acl_admits_an_unknown_device(portal: Portal) -> None:
    path = portal.settings.broker_file("acl")
    stranger = "user 00000000-0000-4000-8000-000000000000\ntopic readwrite #\n# end"
    path.write_text(path.read_text().replace("# end", stranger))


def the_acl_lacks_a_device(portal: Portal) -> None:
    topics = (("devices/{id}/#", "readwrite"), ("devices/shared/#", "read"))
    portal.registrations.register(OPERATOR, dataclasses.replace(PUMP, topics=topics))
    portal.reconciler.install()
    path = portal.settings.broker_file("acl")
    lines = path.read_text().splitlines(keepends=True)
    at = next(number for number, line in enumerate(lines) if line.startswith("user ") and "-" in line)
    path.write_text("".join(lines[:at] + lines[at + 3 :]))


def the_acl_gives_more(portal: Portal) -> None:
    path = portal.settings.broker_file("acl")
    path.write_text(path.read_text().replace("readwrite devices/", "readwrite devices/+/"))


def a_revocation_is_undone(portal: Portal) -> None:
    with portal.database.transaction() as tx:
        tx.execute(sa.delete(Delivery))
        tx.execute(sa.delete(Certificate).where(Certificate.purpose == "device", Certificate.status == "revoked"))


def the_passwords_are_others(portal: Portal) -> None:
    portal.settings.broker_file("passwords").write_text("portal:$7$101$x$y\n")


def an_audit_entry_is_altered(portal: Portal) -> None:
    with as_owner(portal) as tx:
        if tx.dialect.name == "sqlite":
            tx.execute(sa.text("DROP TRIGGER audit_entries_unchanged"))
        else:
            tx.execute(sa.text("DROP TRIGGER audit_entries_append_only ON audit_entries"))
        tx.execute(sa.text("UPDATE audit_entries SET actor = 'nobody' WHERE number = 2"))


def the_schema_is_another(portal: Portal) -> None:
    with as_owner(portal) as tx:
        tx.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))


def the_responder_is_gone(portal: Portal) -> None:
    portal.responder.certificates.path("issuing-1").unlink()


def the_responder_is_the_roots(portal: Portal) -> None:
    path = portal.responder.certificates.path
    path("issuing-1").write_bytes(path("root").read_bytes())


def others_read_the_responder(portal: Portal) -> None:
    portal.responder.certificates.path("issuing-1").chmod(0o644)


def the_probe_certificate_is_gone(portal: Portal) -> None:
    (portal.settings.data_dir / "canaries" / "good.pem").unlink()


@pytest.mark.parametrize(
    ("trap", "name", "said"),
    [
        (others_read_a_key, "secret files", "chmod 600"),
        (others_read_a_key, "CA keys", "chmod 600"),
        (others_read_the_server_key, "secret files", "chmod 640"),
        (others_read_the_token, "secret files", "operator.env has mode 644"),
        (others_enter_the_secrets, "data folder", "has mode 755, not 700"),
        (a_folder_is_missing, "data folder", "canaries is missing"),
        (the_passphrase_is_another, "CA keys", "does not open"),
        (the_issuing_key_is_lost, "CA keys", "issuing-1.key.pem"),
        (the_issuing_key_is_the_roots, "CA keys", "does not belong to its certificate"),
        (ca_pem_is_cut_off, "CA chain", "ca.pem does not contain"),
        (the_crl_is_an_older_one, "CRL", "does not contain the newest CRL"),
        (the_crl_is_an_older_one, "CRL entries", "2 revoked certificates are not on the CRL"),
        (the_crl_is_an_older_one, "broker files", "was changed since generation"),
        (the_crl_is_gone, "CRL", "cannot be read"),
        (the_crl_is_gone, "CRL entries", "crl.pem"),
        (
            the_acl_admits_an_unknown_device,
            "ACL entries",
            "1 entry of the ACL should not exist: 00000000-",
        ),
        (the_acl_lacks_a_device, "ACL entries", "1 entry of the ACL is missing"),
        (the_acl_gives_more, "ACL entries", "1 entry of the ACL grants other topics"),
        (a_revocation_is_undone, "CRL entries", "1 certificate is on the CRL but not revoked"),
        (the_passwords_are_others, "broker files", "is not what the portal wrote"),
        (an_audit_entry_is_altered, "audit record", "Entry 2 was altered"),
        (the_schema_is_another, "database", "has schema 9999"),
        (the_probe_certificate_is_gone, "expiry", "The good probe certificate"),
        (the_responder_is_gone, "OCSP responders", "issuing-1.pem cannot be read"),
        (the_responder_is_the_roots, "OCSP responders", "of CA issuing-1 cannot be used"),
        (others_read_the_responder, "secret files", "issuing-1.pem has mode 644"),
    ],
)
def test_a_trap_shows_as_its_line(portal: Portal, trap: Callable[[Portal], None], name: str, said: str) -> None:
    assert examined(portal, name)[name].state is State.OK
    trap(portal)
    finding = examined(portal, name)[name]
    assert finding.state is State.PROBLEM
    assert said in f"{finding.detail} {finding.advice}"


# --- OCSP ---------------------------------------------------------------------------------------------------------


def asked_about_the_two(portal: Portal, monkeypatch: pytest.MonkeyPatch) -> Finding:
    """What is found where the portal answers, without a network between."""

    def served(_installation: object, path: str) -> bytes:
        return portal.responder.answer(base64.b64decode(unquote(path.removeprefix("/ocsp/")))).der

    monkeypatch.setattr(authority, "served", served)
    return examined(portal, "OCSP served")["OCSP served"]


def test_ocsp_tells_the_good_probe_certificate_from_the_revoked_one(
    portal: Portal, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert asked_about_the_two(portal, monkeypatch).state is State.OK
    folder = portal.settings.data_dir / "canaries"
    (folder / "revoked.pem").write_bytes((folder / "good.pem").read_bytes())
    finding = asked_about_the_two(portal, monkeypatch)
    assert finding.state is State.PROBLEM
    assert "Asked about the revoked probe certificate, the portal says good, not revoked." in finding.detail


def test_ocsp_that_has_no_answer_or_none_of_ours_is_a_problem(
    portal: Portal, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    portal.responder.certificates.path("issuing-1").unlink()
    assert "the portal answers try_later" in asked_about_the_two(portal, monkeypatch).detail
    monkeypatch.setattr(authority, "served", lambda *_: b"")
    assert "the portal does not send an OCSP response" in examined(portal, "OCSP served")["OCSP served"].detail


# --- Time ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ahead", "name", "state", "said"),
    [
        ({"hours": -2}, "clock", State.PROBLEM, "the clock was set back"),
        ({"hours": -2}, "CRL", State.PROBLEM, "not valid yet"),
        ({"days": 4}, "CRL", State.WARNING, "should have been renewed"),
        ({"days": 5}, "CRL", State.PROBLEM, "was not renewed"),
        ({"days": 8}, "CRL", State.PROBLEM, "was not renewed"),
        ({"days": 9}, "OCSP responders", State.OK, "renewed in time"),
        ({"days": 10}, "OCSP responders", State.WARNING, "should have been renewed"),
        ({"days": 14}, "OCSP responders", State.PROBLEM, "not valid now"),
        ({"days": 4}, "expiry", State.OK, "Nothing expires"),
        ({"days": 5}, "expiry", State.WARNING, "The revoked probe certificate expires"),
        ({"days": 8}, "expiry", State.PROBLEM, "The revoked probe certificate expired"),
        ({"days": 91}, "expiry", State.PROBLEM, "The broker's certificate expired"),
        ({"days": 340}, "expiry", State.PROBLEM, "1 device certificate expires within 30 days"),
        ({"days": 350}, "CRL", State.PROBLEM, "The CRL of root expires"),
        ({"days": 1825 - 60}, "expiry", State.PROBLEM, "The CA issuing-1 expires"),
        ({"days": 1826}, "CA chain", State.PROBLEM, "issuing-1 is not valid now"),
        ({"hours": 25}, "links", State.WARNING, "1 bundle still exists"),
    ],
)
def test_what_the_time_brings_is_said(
    portal: Portal, clock: Clock, ahead: dict[str, float], name: str, state: State, said: str
) -> None:
    clock.advance(**ahead)
    finding = examined(portal, name)[name]
    assert finding.state is state, finding
    assert said in finding.detail


def test_certificates_that_expire_soon_are_listed_by_the_command_for_their_kind(
    make_settings: Callable[..., Settings], clock: Clock
) -> None:
    app = create_app(make_settings(PORTAL_BROKER_CONTROL="guard"), background=False, clock=clock)
    portal = portal_of(app)
    prepare(portal)
    reader = DeviceRequest(name="store", kind=ClientKind.APPLICATION, topics=[("devices/#", "read")], validity_days=20)
    portal.registrations.register(OPERATOR, reader)
    finding = examined(portal, "expiry")["expiry"]
    assert "1 application certificate expires within 30 days." in finding.detail
    assert "device certificates" not in finding.detail
    assert "./portal application list --expires-before 30d" in (finding.advice or "")
    portal.close()


@pytest.mark.parametrize(
    ("days", "state", "said"),
    [(59, State.OK, "Nothing expires"), (61, State.WARNING, "The portal's certificate expires")],
)
def test_own_certificates_that_were_not_renewed_are_said(
    portal: Portal, clock: Clock, days: int, state: State, said: str
) -> None:
    clock.advance(days=5)
    # The one that came with the CRL lives as long as that.
    assert portal.own_certificates.renew() == ["revoked probe certificate"]
    clock.advance(days=days - 5)
    finding = examined(portal, "expiry")["expiry"]
    assert finding.state is state, finding
    assert said in finding.detail


def test_a_pending_generation_is_a_problem_until_the_broker_was_seen_to_enforce_it(portal: Portal) -> None:
    finding = examined(portal, "generation")["generation"]
    assert finding.state is State.PROBLEM
    assert "not in force" in finding.detail
    with portal.database.transaction() as tx:
        enforce_all(tx)
    assert examined(portal, "generation")["generation"].state is State.OK


def test_a_token_without_an_end_is_a_warning(portal: Portal) -> None:
    for name, end in (("ci", None), ("factory", portal.clock() + timedelta(days=1))):
        secret, record = new_token("default", name, Role.OPERATOR, end, now=portal.clock())
        with portal.database.transaction() as tx:
            tenants.add_token(tx, record, secret=secret)
    finding = examined(portal, "tokens")["tokens"]
    assert finding.state is State.WARNING
    assert "1 operator token never expires: ci." in finding.detail


def test_one_thing_is_spoken_of_as_one() -> None:
    """Words for several stand behind no number that may be 1."""
    number = re.compile(r"\{(?:len\([^}]*\)|count|number|devices|entries|expired)\} (?!more|beside)[a-z]+")
    texts = [path.read_text() for path in (PROJECT / "operations" / "doctor").glob("*.py")]
    # Those are more than one where they are said.
    assert {found for one in texts for found in number.findall(one)} == {"{devices} devices", "{len(names)} tenants"}
    assert [counted(number, "token", "tokens") for number in (0, 1, 2)] == ["0 tokens", "1 token", "2 tokens"]


def test_where_all_is_stopped_no_line_says_that_something_runs(portal: Portal) -> None:
    with portal.database.transaction() as tx:
        enforce_all(tx)
    found = examined(portal, "CRL served", "broker service", "front server", "generation", "certificate profiles")
    assert found["CRL served"].detail.startswith(f"The portal does not answer at http://{portal.settings.pki_bind}: ")
    assert found["CRL served"].advice == START_PORTAL
    assert found["broker service"].detail.startswith("Not looked at: ")
    assert found["front server"].detail.startswith("The portal's address is ")
    assert found["generation"].detail.startswith("Last the broker was seen to enforce generation ")
    assert found["certificate profiles"].detail == "There is the built-in one alone."


def test_bundles_that_wait_are_counted(portal: Portal) -> None:
    waits = portal.registrations.register(OPERATOR, PUMP)
    assert token_of(waits)
    assert examined(portal, "links")["links"].detail.startswith("2 bundles wait")


def test_a_device_that_has_a_name_of_the_broker_since_a_setting_changed_is_a_problem(portal: Portal) -> None:
    portal.profiles.add(OPERATOR, CertificateProfile("named", dns_names=("{name}.devices.example.com",)))
    device = portal.registrations.register(OPERATOR, dataclasses.replace(PUMP, name="mqtt", profile="named"))
    assert examined(portal, "device names")["device names"].state is State.OK
    for own in ("mqtt.devices.example.com", "*.devices.example.com"):
        changed = portal.settings.model_copy(update={"broker_names": ("localhost", own)})
        [finding] = doctor.examine(changed, portal.clock, checks=(("device names", data.device_names),))
        assert finding.state is State.PROBLEM
        assert f"mqtt.devices.example.com (device {device.device_id})" in finding.detail


def test_little_room_is_said(portal: Portal, monkeypatch: pytest.MonkeyPatch) -> None:
    for free, state in ((1 << 40, State.OK), (1 << 29, State.WARNING), (1 << 20, State.PROBLEM)):
        monkeypatch.setattr("shutil.disk_usage", lambda _, free=free: dataclasses.make_dataclass("U", ["free"])(free))
        assert examined(portal, "disk space")["disk space"].state is state


# --- The broker's configuration -----------------------------------------------------------------------------------


def without(option: str) -> Callable[[str], str]:
    return lambda text: "".join(line for line in text.splitlines(keepends=True) if not line.startswith(f"{option} "))


def with_line(line: str) -> Callable[[str], str]:
    return lambda text: f"{text}\n{line}\n"


def bridge(*lines: str) -> Callable[[str], str]:
    return with_line("\n".join(["connection far", "address far.example.org:8883", *lines]))


@pytest.mark.parametrize(
    ("change", "state", "said"),
    [
        (without("use_username_as_clientid"), State.PROBLEM, "use_username_as_clientid is not true"),
        (with_line("use_username_as_clientid false"), State.PROBLEM, "use_username_as_clientid is not true"),
        (without("use_identity_as_username"), State.PROBLEM, "use_identity_as_username is not true"),
        (with_line("use_subject_as_username true"), State.PROBLEM, "use_subject_as_username is true"),
        (without("require_certificate"), State.PROBLEM, "require_certificate is not true"),
        (without("check_retain_source"), State.PROBLEM, "check_retain_source is not true"),
        (without("set_tcp_nodelay"), State.WARNING, "set_tcp_nodelay is not true"),
        (with_line("allow_anonymous true"), State.PROBLEM, "allow_anonymous is true"),
        (with_line("per_listener_settings true"), State.PROBLEM, "per_listener_settings is true"),
        (without("acl_file"), State.PROBLEM, "acl_file is missing"),
        (with_line("acl_file /etc/mosquitto/acl"), State.PROBLEM, "acl_file is /etc/mosquitto/acl, not"),
        (without("crlfile"), State.PROBLEM, "crlfile is missing: revoked certificates are accepted"),
        (with_line("crlfile /etc/ssl/crl.pem"), State.PROBLEM, "crlfile is /etc/ssl/crl.pem"),
        (with_line("cafile /etc/ssl/certs/ca.pem"), State.PROBLEM, "cafile is /etc/ssl"),
        (with_line("capath /etc/ssl/certs"), State.PROBLEM, "capath is /etc/ssl/certs, not"),
        (with_line("password_file /x"), State.PROBLEM, "password_file is /x"),
        (with_line("certfile /x"), State.PROBLEM, "certfile is /x"),
        (with_line("keyfile /x"), State.PROBLEM, "keyfile is /x"),
        (without("pid_file"), State.PROBLEM, "pid_file is not"),
        (with_line("tls_version tlsv1.1"), State.WARNING, "tls_version is tlsv1.1"),
        (with_line("tls_version tlsv1.2"), State.WARNING, "can resume such a session for two hours"),
        (with_line("listener 1883"), State.PROBLEM, "Another listener, 1883, does not require a certificate"),
        (with_line("plugin /usr/lib/x.so"), State.WARNING, "The plugin /usr/lib/x.so is loaded"),
        (with_line("persistent_client_expiration 14d"), State.WARNING, "persistent_client_expiration is set"),
        (bridge("topic devices/# out 1"), State.WARNING, "copies devices' messages to far.example.org:8883"),
        (without("listener"), State.PROBLEM, "There is no listener"),
        (lambda text: text.replace("\n", "\r\n"), State.OK, "Found no problems in"),
    ],
)
def test_a_trap_of_the_configuration_is_named(
    tmp_path: Path, change: Callable[[str], str], state: State, said: str
) -> None:
    settings = settings_for(tmp_path)
    path = tmp_path / "mosquitto.conf"
    path.write_text(installed_configuration(settings))
    assert mistakes(read_configuration(path), settings) == []
    path.write_text(change(path.read_text()))
    verdict = combine(mistakes(read_configuration(path), settings), "Found no problems in it.")
    assert verdict.state is state, verdict
    assert said in verdict.detail


@pytest.mark.parametrize(
    ("change", "state", "said"),
    [
        (without("plugin"), State.PROBLEM, "The guard is not loaded"),
        (without("plugin_opt_journal"), State.PROBLEM, "plugin_opt_journal is missing: the guard refuses every device"),
        (without("capath"), State.PROBLEM, "capath is missing: new CRLs and CAs are not read"),
        (
            lambda text: f"plugin /x/dynsec.so\n{text}",
            State.PROBLEM,
            "The plugin /x/dynsec.so is loaded before the guard",
        ),
        (with_line("plugin /x/dynsec.so"), State.OK, "Found no problems in"),
        (with_line("password_file /etc/mosquitto/passwd\nacl_file /x"), State.OK, "Found no problems in"),
        (with_line("listener 1883"), State.OK, "Found no problems in"),
    ],
)
def test_under_the_guard_others_may_be_beside_it_and_nobody_before_it(
    tmp_path: Path, change: Callable[[str], str], state: State, said: str
) -> None:
    settings = Settings.from_env({"PORTAL_DATA_DIR": str(tmp_path), "PORTAL_BROKER_CONTROL": "guard"})
    path = tmp_path / "mosquitto.conf"
    path.write_text(change(installed_configuration(settings)))
    verdict = combine(mistakes(read_configuration(path), settings), "Found no problems in it.")
    assert verdict.state is state, verdict
    assert said in verdict.detail


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("topic # out 1", ["copies"]),
        ("topic devices/+/telemetry", ["copies"]),
        ("topic +/+/x both 1", ["copies", "brings messages from far.example.org"]),
        ("topic +/cmd in 1 devices/ far/", ["brings messages from far.example.org"]),
        ('topic devices/# out 1 "" far/', ["copies"]),
        ("topic devices", []),
        ("topic house/# both", []),
        ("topic # out 1 house/", []),
        ("topic", []),
    ],
)
def test_a_bridge_is_named_if_devices_topics_pass_it(tmp_path: Path, line: str, said: list[str]) -> None:
    path = tmp_path / "mosquitto.conf"
    path.write_text(bridge(line)(""))
    found = [*bridge_warnings(read_configuration(path).bridges, "devices")]
    assert len(found) == len(said)
    assert all(part in one.detail for part, one in zip(said, found, strict=True))


def test_the_part_for_a_broker_with_other_users_is_as_the_whole_configuration(tmp_path: Path) -> None:
    whole = CONFIGURATION.read_text().splitlines()
    assert [line for line in BESIDE.read_text().splitlines() if not line.startswith("#") and line not in whole] == []
    settings = Settings.from_env({"PORTAL_DATA_DIR": str(tmp_path), "PORTAL_BROKER_CONTROL": "guard"})
    (tmp_path / "portal.conf").write_text(BESIDE.read_text().replace(INSTALLED_FOLDER, str(settings.broker_dir)))
    (tmp_path / "main").write_text(f"listener 1883\npassword_file /x\ninclude_dir {tmp_path}\n")
    assert mistakes(read_configuration(tmp_path / "main"), settings) == []


def test_included_files_count(tmp_path: Path, portal: Portal) -> None:
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d" / "portal.conf").write_text((portal.settings.broker_dir / "mosquitto.conf").read_text())
    (tmp_path / "mosquitto.conf").write_text(f"include_dir {tmp_path / 'conf.d'}\n")
    assert mistakes(read_configuration(tmp_path / "mosquitto.conf"), portal.settings) == []


def test_a_configuration_that_is_not_there_is_said(portal: Portal) -> None:
    checks = tuple(pair for pair in doctor.CHECKS if pair[0] == "broker configuration")
    named = Path("/nonexistent/mosquitto.conf")
    (finding,) = doctor.examine(portal.settings, portal.clock, broker_config=named, checks=checks)
    assert finding.state is State.PROBLEM
    assert "--broker-config" in finding.advice
    (portal.settings.broker_dir / "mosquitto.conf").unlink()
    (finding,) = doctor.examine(portal.settings, portal.clock, checks=checks)
    assert finding.state is State.WARNING


@pytest.mark.parametrize(
    ("version", "style", "devices", "slow"),
    [
        ((2, 0, 11), AclStyle.PER_DEVICE, 10_000, False),
        ((2, 0, 22), AclStyle.PER_DEVICE, 10_001, True),
        ((2, 0, 22), AclStyle.PATTERN, 100_000, False),
        ((2, 1, 2), AclStyle.PER_DEVICE, 100_000, False),
    ],
)
def test_an_acl_too_slow_for_the_fleet_is_a_warning(
    version: tuple[int, ...], style: AclStyle, devices: int, slow: bool
) -> None:
    assert bool(size_warnings(version, style, devices)) is slow


@pytest.mark.parametrize("version", [(2, 0, 11), (2, 0, 22), (2, 1, 0), (2, 1, 2)])
@pytest.mark.parametrize("acl_style", ["per-device", "pattern"], indirect=True)
def test_a_broker_that_nobody_restarts_for_new_topics_is_a_warning(
    portal: Portal, monkeypatch: pytest.MonkeyPatch, version: tuple[int, ...], acl_style: str
) -> None:
    monkeypatch.setattr("operations.doctor.mosquitto.version_of", lambda _: version)
    finding = examined(portal, "broker version")["broker version"]
    if version >= (2, 1, 0):
        assert finding.state is State.OK
        assert f"in style {acl_style}" in finding.detail
        return
    assert finding.state is State.WARNING
    assert ("each new device waits" in finding.detail) == (acl_style == "per-device")
    assert "(SIGHUP) harms sleeping sessions" in finding.detail
    assert "Set PORTAL_BROKER_RESTART" in finding.advice


def test_the_installed_configuration_does_not_shorten_sessions() -> None:
    assert "persistent_client_expiration" not in CONFIGURATION.read_text()


@pytest.mark.parametrize(
    ("output", "version"),
    [("mosquitto version 2.0.11\n\nUsage", (2, 0, 11)), ("mosquitto version 2.1.2-rc1\n", (2, 1, 2)), ("bash", None)],
)
def test_the_version_is_what_the_program_says(output: str, version: tuple[int, ...] | None) -> None:
    assert version_of("x", lambda *_, **__: subprocess.CompletedProcess([], 0, output, "")) == version


# --- The command --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("states", "status"),
    [([], 0), ([well("")], 0), ([well(""), warning("", "")], 2), ([warning("", ""), problem("", "")], 1)],
)
def test_the_exit_status_tells_problems_from_warnings(states: list[Finding], status: int) -> None:
    assert exit_status([Finding("", verdict.state, "", "") for verdict in states]) == status


def test_a_check_that_fails_unexpectedly_is_a_line_of_its_own(portal: Portal) -> None:
    def fail(_: Installation) -> Finding:
        raise ZeroDivisionError("a mistake in the check")

    findings = list(doctor.examine(portal.settings, portal.clock, checks=(("one", fail), ("two", lambda _: well("x")))))
    assert [(finding.name, finding.state) for finding in findings] == [("one", State.PROBLEM), ("two", State.OK)]
    assert "ZeroDivisionError" in findings[0].detail


def test_the_command_prints_a_line_a_check_or_json(make_settings: Callable[..., Settings]) -> None:
    app = create_app(make_settings(PORTAL_ENFORCE_TIMEOUT="0.1"), background=False)
    with app.app_context():
        plain = app.test_cli_runner().invoke(args=["doctor"])
        as_json = app.test_cli_runner().invoke(args=["doctor", "--json"])
    assert (plain.exit_code, as_json.exit_code) == (1, 1)
    findings = json.loads(as_json.output)
    assert [line[9:].split("  ")[0] for line in plain.output.splitlines()] == [finding["name"] for finding in findings]
    assert [finding["name"] for finding in findings] == NAMES
    assert all(list(finding) == ["name", "state", "detail", "advice"] for finding in findings)


def test_without_a_data_folder_that_alone_is_said_with_what_to_do(tmp_path: Path, portal: Portal) -> None:
    settings = portal.settings.model_copy(update={"data_dir": tmp_path / "nothing"})
    [finding] = doctor.examine(settings, portal.clock)
    assert (finding.name, finding.state) == ("data folder", State.PROBLEM)
    assert all(command in finding.advice for command in ("PORTAL_DATA_DIR", "init", "restore FILE"))
    assert not (tmp_path / "nothing").exists()


def test_what_keeps_several_checks_from_being_made_is_said_once(tmp_path: Path, portal: Portal) -> None:
    gone = {"database_url": f"sqlite:///{tmp_path / 'nothing.db'}", "broker_dir": tmp_path / "none"}
    findings = list(doctor.examine(portal.settings.model_copy(update=gone), portal.clock))
    [without] = [finding for finding in findings if "no database at" in finding.detail]
    assert (without.name, without.state) == ("database", State.PROBLEM)
    assert "restore FILE" in without.advice
    assert {"data folder", "broker certificate", "mail"} <= {finding.name for finding in findings}
    assert {"CRL", "links", "tokens"}.isdisjoint({finding.name for finding in findings})
    assert not (tmp_path / "nothing.db").exists()
    assert all("unexpectedly" not in finding.detail for finding in findings)


def test_a_file_that_is_missing_is_named(portal: Portal) -> None:
    for path in (portal.settings.broker_file("ca.pem"), probe_certificates(portal.settings).good.key):
        path.rename(path.with_suffix(".gone"))
        assert str(path) in examined(portal, "broker certificate")["broker certificate"].detail
        path.with_suffix(".gone").rename(path)


def test_what_each_tenant_has_is_looked_at(portal: Portal) -> None:
    add_tenant(portal, "acme")
    secret, record = new_token("acme", "endless", Role.ADMIN, None, now=portal.clock())
    with portal.database.transaction() as tx:
        tenants.add_token(tx, record, secret=secret)
    portal.profiles.add(dataclasses.replace(OPERATOR, tenant_id="acme"), CertificateProfile("theirs"))
    found = examined(portal, "tokens", "certificate profiles")
    assert "1 operator token never expires: endless." in found["tokens"].detail
    assert found["certificate profiles"].detail.startswith("1 beside the built-in one; the CA may issue by it.")


def test_an_address_of_the_broker_that_only_this_machine_reaches_is_found(
    make_settings: Callable[..., Settings], clock: Clock
) -> None:
    check = (("broker address", network.broker_address),)
    for host, url, state in (
        ("localhost", "https://localhost:8443", State.OK),
        ("mqtt.example.com", "https://portal.example.com", State.OK),
        ("localhost", "https://portal.example.com", State.WARNING),
        ("127.0.0.1", "https://192.0.2.7:8443", State.WARNING),
    ):
        settings = make_settings(PORTAL_MQTT_HOST=host, PORTAL_PUBLIC_URL=url)
        [finding] = examine(settings, clock, checks=check)
        assert finding.state is state, finding
    assert "PORTAL_MQTT_HOST" in finding.advice


def test_at_a_terminal_a_finding_is_broken_between_words_and_the_command_in_its_advice_is_not() -> None:
    found = dataclasses.replace(
        problem("There is no data folder at this place.", "Now run: ./portal-server init a b"), name="x"
    )
    assert len(line_of(found, None).splitlines()) == 1
    first, *others = line_of(found, 55).splitlines()
    assert len(click.unstyle(first)) <= 55
    assert [line[:31].strip() for line in others] == [""] * len(others)
    assert others[-1].strip() == "-> Now run: ./portal-server init a b"
