"""Settings: checked at start, one sentence for each mistake, every one of them in the docs."""

from __future__ import annotations

import re
import traceback
from pathlib import Path

import pytest
from pydantic import ValidationError

from config import Settings
from core.broker_control import AclStyle, ControlKind, default_control
from core.errors import SettingInvalid
from core.given_settings import variable_of
from core.pkcs11_uri import parse_token_uri
from core.setting_values import Address
from tests.support.programs import ROOT


def test_the_defaults_are_those_of_the_docs(tmp_path: Path) -> None:
    settings = Settings.from_env({"PORTAL_DATA_DIR": str(tmp_path)})
    assert settings.bind == Address("127.0.0.1", 8443)
    assert settings.public_url == "https://127.0.0.1:8443"
    assert settings.pki_url == "http://127.0.0.1:8080"
    assert settings.database_url == f"sqlite:///{tmp_path}/portal.db"
    assert settings.broker_dir == tmp_path / "broker"
    assert settings.acl_style is AclStyle.PATTERN


ACL = "# Written by the device onboarding portal.\n# generation 7\n"
PER_DEVICE, PATTERN = AclStyle.PER_DEVICE, AclStyle.PATTERN


@pytest.mark.parametrize(
    ("acl", "record", "style"),
    [
        (f"{ACL}# style per-device\nuser portal\n", '{"generation": 7}', PER_DEVICE),
        (f"{ACL}# style pattern\n", '{"generation": 7}', PATTERN),
        (f"{ACL}# style per-device\n", '{"style": "pattern"}', PER_DEVICE),  # the ACL is what the broker obeys
        (None, None, PATTERN),
        # Damaged, so that it does not say: the record beside it does, else what opens nothing.
        ("", '{\n "style": "pattern",\n "generation": 7}', PATTERN),
        (None, '{\n "style": "per-device",\n "generation": 7}', PER_DEVICE),
        ("", '{"generation": 7}', PER_DEVICE),
        (f"{ACL}# style open\n", None, PER_DEVICE),
        (None, "", PER_DEVICE),
    ],
)
def test_an_installation_keeps_the_style_that_it_has(
    tmp_path: Path, acl: str | None, record: str | None, style: AclStyle
) -> None:
    for name, content in (("acl", acl), ("projection.json", record)):
        if content is not None:
            (tmp_path / name).write_text(content)
    environment = {"PORTAL_DATA_DIR": str(tmp_path / "data"), "PORTAL_BROKER_DIR": str(tmp_path)}
    assert Settings.from_env(environment).acl_style is style
    for explicit in AclStyle:
        assert Settings.from_env({**environment, "PORTAL_ACL_STYLE": explicit}).acl_style is explicit


def test_an_acl_that_cannot_be_read_opens_nothing(tmp_path: Path) -> None:
    (tmp_path / "acl").mkdir()
    settings = Settings.from_env({"PORTAL_DATA_DIR": str(tmp_path / "data"), "PORTAL_BROKER_DIR": str(tmp_path)})
    assert settings.acl_style is AclStyle.PER_DEVICE


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("PORTAL_BIND", "8443", "HOST:PORT"),
        ("PORTAL_BIND", "127.0.0.1:99999", "HOST:PORT"),
        ("PORTAL_BIND", "unix:relative", "absolute path"),
        ("PORTAL_BIND", "unix:/" + "x" * 120, "at most 107 bytes"),
        ("PORTAL_BIND", "unix:/run/portal.sock", "PORTAL_PUBLIC_URL must be set"),
        ("PORTAL_PKI_BIND", "unix:/run/portal.sock", "HOST:PORT, such as 127.0.0.1:8080"),
        ("PORTAL_BIND", "0.0.0.0:8443", "PORTAL_PUBLIC_URL must be set"),
        ("PORTAL_PKI_BIND", "[::]:8080", "PORTAL_PKI_URL must be set"),
        ("PORTAL_AGENTS_BIND", "0.0.0.0:8444", "PORTAL_AGENTS_URL must be set"),
        ("PORTAL_AGENTS_BIND", "127.0.0.1:8443", "PORTAL_AGENTS_BIND must be another address"),
        ("PORTAL_AGENTS_URL", "http://portal.example.org:8444", "https:// URL"),
        ("PORTAL_PKI_BIND", "127.0.0.1:8443", "must differ"),
        ("PORTAL_PUBLIC_URL", "ftp://x", "http:// or https://"),
        ("PORTAL_DATABASE_URL", "mysql://x", "sqlite:/// or postgresql://"),
        ("PORTAL_LOGIN_FAILURES", "0", "from 1 to 1000000"),
        ("PORTAL_CA_KEYS", "hsm", "PORTAL_CA_KEYS must be file or begin with pkcs11:"),
        ("PORTAL_CA_KEYS", "file file", "each once"),
        ("PORTAL_ROOT_KEYS", "pkcs11:token=a", "PORTAL_ROOT_KEYS must have an absolute path after module-path="),
        ("PORTAL_WORKERS", "0", "from 1 to 64"),
        ("PORTAL_WORKERS", "two", "whole number"),
        ("PORTAL_DEVICE_DAYS", "-1", "whole number"),
        ("PORTAL_ACL_STYLE", "open", "per-device, pattern"),
        ("PORTAL_KEY_TYPE", "rsa-1024", "ec-p256"),
        ("PORTAL_CA_NAME", "x\ny", "simple punctuation"),
        ("PORTAL_CA_PASSPHRASE", "short", "16 characters"),
        ("PORTAL_TOPIC_PREFIX", "#", "topic levels"),
        ("PORTAL_LOG_LEVEL", "loud", "debug, info"),
        ("PORTAL_ENFORCE_TIMEOUT", "inf", "number of seconds"),
        ("PORTAL_ISSUING_DAYS", "7300", "less than PORTAL_ROOT_DAYS"),
        ("PORTAL_SERVER_NAMES", "a b", "DNS name"),
        ("PORTAL_BROKER_SOCKET", "/" + "x" * 120, "longer than 107 bytes"),
        ("PORTAL_TYPO", "1", "PORTAL_TYPO is not a setting of the portal; see the table in docs/operating.md"),
        ("PORTAL_BIN", "1", "PORTAL_BIN is not a setting of the portal; did you mean PORTAL_BIND?"),
        # Only like a service link of Kubernetes.
        ("PORTAL_PORT", "8443", "PORTAL_PORT is not a setting"),
        ("PORTAL_SERVICE_HOST", "portal.example.org", "PORTAL_SERVICE_HOST is not a setting"),
        ("PORTAL_SERVICE_NAME", "10.0.0.1", "PORTAL_SERVICE_NAME is not a setting"),
        ("PORTAL_BROKER_PROBE_ADDRESS", "8883", "HOST:PORT"),
        ("PORTAL_MQTT_BIND", "everywhere", "must be an IP address"),
        ("PORTAL_OIDC_ISSUER", "https://sso.example.com", "needs PORTAL_OIDC_CLIENT_ID and PORTAL_OIDC_GROUPS"),
        ("PORTAL_OIDC_ISSUER", "http://sso.example.com", "https:// URL"),
        ("PORTAL_OIDC_ISSUER", "https://sso.example.com/?tenant=1", "https:// URL"),
        ("PORTAL_OIDC_ISSUER", "https://user@sso.example.com", "https:// URL"),
        ("PORTAL_OIDC_ISSUER", "https://sso.example.com/" + "x" * 100, "at most 100 characters"),
        ("PORTAL_OIDC_CLIENT_ID", "portal", "need PORTAL_OIDC_ISSUER"),
        ("PORTAL_OIDC_CLIENT_ID", "port\tal", "printable ASCII"),
        ("PORTAL_OIDC_GROUPS", "admins", "must be a JSON object of groups"),
        ("PORTAL_OIDC_SCOPES", "profile", "openid among them"),
        ("PORTAL_OIDC_GROUPS_CLAIM", "a b", "must be the name of a claim"),
        ("PORTAL_MQTT_PROT", "8883", "did you mean PORTAL_MQTT_PORT?"),
        ("PORTAL_MQTT_PORT", "tcp://10.0.0.1:8883", "PORTAL_MQTT_PORT"),
    ],
)
def test_a_bad_setting_is_refused_with_a_sentence(tmp_path: Path, name: str, value: str, said: str) -> None:
    with pytest.raises(SettingInvalid, match=re.escape(said)) as caught:
        Settings.from_env({"PORTAL_DATA_DIR": str(tmp_path), name: value})
    assert caught.value.detail.endswith(".")


def test_variables_that_the_tests_read_may_be_in_the_environment_of_a_portal(tmp_path: Path) -> None:
    files = [ROOT / "scripts/test", *ROOT.glob("tests/**/*.py")]
    read = {name for path in files for name in re.findall(r"\bPORTAL_TEST_[A-Z_]*[A-Z]\b", path.read_text())}
    assert "PORTAL_TEST_ALL" in read
    Settings.from_env({"PORTAL_DATA_DIR": str(tmp_path), **dict.fromkeys(read, "yes")})


def test_the_service_links_of_kubernetes_are_ignored_with_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    links = {
        "PORTAL_SERVICE_HOST": "10.96.0.7",
        "PORTAL_SERVICE_PORT": "8443",
        "PORTAL_SERVICE_PORT_HTTPS": "8443",
        "PORTAL_PORT": "tcp://10.96.0.7:8443",
        "PORTAL_PORT_8443_TCP": "tcp://10.96.0.7:8443",
        "PORTAL_PORT_8443_TCP_PROTO": "tcp",
        "PORTAL_PORT_8443_TCP_PORT": "8443",
        "PORTAL_PORT_8443_TCP_ADDR": "10.96.0.7",
        "PORTAL_WEB_SERVICE_HOST": "fd00::7",
        "PORTAL_WEB_PORT": "tcp://[fd00::7]:80",
    }
    Settings.from_env({"PORTAL_DATA_DIR": str(tmp_path), **links})
    (record,) = caplog.records
    assert all(name in record.getMessage() for name in links)
    with pytest.raises(SettingInvalid, match="PORTAL_TYPO"):
        Settings.from_env({"PORTAL_DATA_DIR": str(tmp_path), "PORTAL_TYPO": "1", **links})


@pytest.mark.parametrize(
    ("content", "mode", "said"),
    [
        ("a passphrase to keep", 0o644, "open to others"),
        ("a passphrase to keep", 0o660, "open to others"),
        ("short", 0o600, "16 characters"),
        (None, 0o600, "cannot be read"),
    ],
)
def test_a_passphrase_file_that_cannot_be_used_is_refused(
    tmp_path: Path, content: str | None, mode: int, said: str
) -> None:
    path = tmp_path / "passphrase"
    if content is not None:
        path.write_text(content)
        path.chmod(mode)
    with pytest.raises(SettingInvalid, match=said) as caught:
        Settings.from_env({"PORTAL_DATA_DIR": str(tmp_path), "PORTAL_CA_PASSPHRASE_FILE": str(path)})
    assert "to keep" not in caught.value.detail


def test_a_passphrase_comes_from_one_place(tmp_path: Path) -> None:
    both = {"PORTAL_CA_PASSPHRASE": "a passphrase to keep", "PORTAL_CA_PASSPHRASE_FILE": "/some/file"}
    with pytest.raises(SettingInvalid, match="both"):
        Settings.from_env({"PORTAL_DATA_DIR": str(tmp_path), **both})


def test_secrets_do_not_stand_in_the_representation(tmp_path: Path) -> None:
    settings = Settings.from_env(
        {
            "PORTAL_DATA_DIR": str(tmp_path),
            "PORTAL_CA_PASSPHRASE": "a passphrase to keep",
            "PORTAL_DATABASE_URL": "postgresql://portal:pass-to-keep@db/portal",
        }
    )
    for text in (repr(settings), str(settings), f"{settings.ca_passphrase}"):
        assert "to keep" not in text
        assert "pass-to-keep" not in text


@pytest.mark.parametrize(
    "environment",
    [
        {"PORTAL_CA_PASSPHRASE": "to keep"},
        {"PORTAL_DATABASE_URL": "mysql://portal:to keep@db/portal"},
        {"PORTAL_CA_PASSPHRASE": "a passphrase to keep", "PORTAL_WORKERS": "0"},
        {"PORTAL_CA_PASSPHRASE": "a passphrase to keep", "PORTAL_CA_PASSPHRASE_FILE": "/some/file"},
        {"PORTAL_CA_PASSPHRASE": "a passphrase to keep", "PORTAL_ISSUING_DAYS": "7300"},
    ],
)
def test_secrets_do_not_stand_in_errors(tmp_path: Path, environment: dict[str, str]) -> None:
    with pytest.raises(SettingInvalid) as caught:
        Settings.from_env({"PORTAL_DATA_DIR": str(tmp_path), **environment})
    assert "to keep" not in "".join(traceback.format_exception(caught.value))


def test_settings_cannot_be_changed(tmp_path: Path) -> None:
    settings = Settings.from_env({"PORTAL_DATA_DIR": str(tmp_path)})
    with pytest.raises(ValidationError):
        setattr(settings, "workers", 3)  # noqa: B010 - mypy knows that it is frozen


def test_only_the_given_environment_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORTAL_WORKERS", "7")
    assert Settings.from_env({"PORTAL_DATA_DIR": str(tmp_path)}).workers == 2


def test_the_roots_key_is_where_the_others_are_unless_a_setting_says_otherwise(tmp_path: Path) -> None:
    token = "pkcs11:token=portal?module-path=/m.so&pin-source=file:/pin"
    environment = {"PORTAL_DATA_DIR": str(tmp_path)}
    assert Settings.from_env(environment).root_keys == (None,)
    both = Settings.from_env({**environment, "PORTAL_CA_KEYS": f"{token} file"})
    assert both.root_keys == both.ca_keys == (parse_token_uri(token), None)
    apart = Settings.from_env({**environment, "PORTAL_CA_KEYS": token, "PORTAL_ROOT_KEYS": "file"})
    assert (apart.ca_keys, apart.root_keys) == ((parse_token_uri(token),), (None,))


def test_the_client_of_the_command_line_is_the_portals_unless_that_has_a_secret(tmp_path: Path) -> None:
    environment = {
        "PORTAL_DATA_DIR": str(tmp_path),
        "PORTAL_OIDC_ISSUER": "https://sso.example.com/",
        "PORTAL_OIDC_CLIENT_ID": "portal",
        "PORTAL_OIDC_GROUPS": '{"admins": "admin"}',
    }
    settings = Settings.from_env(environment)
    assert settings.oidc_issuer == "https://sso.example.com/"  # as it is: issuers are compared by character
    assert settings.oidc_cli_client_id == "portal"
    environment["PORTAL_OIDC_CLIENT_SECRET_FILE"] = str(tmp_path / "secret")
    assert Settings.from_env(environment).oidc_cli_client_id == ""
    assert Settings.from_env({**environment, "PORTAL_OIDC_CLI_CLIENT_ID": "cli"}).oidc_cli_client_id == "cli"


def test_every_setting_is_in_the_operators_guide() -> None:
    guide = (Path(__file__).parent.parent / "docs" / "operating.md").read_text()
    for name, field in Settings.model_fields.items():
        default = field.default if isinstance(field.default, str) else ""
        row = f"| `{variable_of(name)}`, `{name}` | {f'`{default}`' if default else ''} | {field.description} |"
        assert row.replace("|  |", "| |") in guide, row


@pytest.mark.parametrize(
    ("environment", "faces"),
    [
        ({}, False),
        ({"PORTAL_BIND": "localhost:8443"}, False),
        ({"PORTAL_BIND": "[::1]:8443"}, False),
        ({"PORTAL_BIND": "192.0.2.1:8443"}, True),
        ({"PORTAL_BIND": "portal.example:8443"}, True),
        ({"PORTAL_BIND": "0.0.0.0:8443", "PORTAL_PUBLIC_URL": "https://portal.example"}, True),
        ({"PORTAL_BIND": "192.0.2.1:8443", "PORTAL_TRUSTED_PROXIES": "192.0.2.7"}, False),
        ({"PORTAL_BIND": "unix:/run/portal.sock", "PORTAL_PUBLIC_URL": "https://portal.example"}, False),
    ],
)
def test_a_listener_that_other_machines_reach_with_no_front_server_is_known(
    environment: dict[str, str], faces: bool
) -> None:
    assert Settings.from_env(environment).faces_network is faces


# --- The control of the broker ----------------------------------------------------------------------------------------

GUARD, FILES, RABBITMQ, _ = ControlKind


@pytest.mark.parametrize(
    ("installed", "files", "control"),
    [
        pytest.param(False, {}, FILES, id="new, no plugin"),
        pytest.param(True, {}, GUARD, id="new, with the plugin"),
        pytest.param(False, {"projection.json": '{\n "style": "pattern"\n}'}, FILES, id="under files, no plugin"),
        pytest.param(True, {"projection.json": '{\n "style": "pattern"\n}'}, GUARD, id="under files, with the plugin"),
        pytest.param(False, {"projection.json": '{\n "control": "guard"\n}'}, GUARD, id="under the guard"),
        pytest.param(False, {"projection.json": '{\n "control": "rabbitmq"\n}'}, RABBITMQ, id="under RabbitMQ"),
        pytest.param(False, {"guard.journal": ""}, GUARD, id="under the guard, restored"),
        pytest.param(
            False, {"guard.journal": "", "projection.json": '{\n "style": "pattern"\n}'}, FILES, id="gone back to files"
        ),
    ],
)
def test_without_a_setting_the_guard_is_the_control_where_its_plugin_is_installed(
    tmp_path: Path, installed: bool, files: dict[str, str], control: ControlKind
) -> None:
    plugin = tmp_path / "portal_guard.so"
    if installed:
        plugin.touch()
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert default_control(tmp_path, [plugin]) is control


@pytest.mark.parametrize(
    ("environment", "addresses"),
    [
        ({}, ["localhost:8883"]),
        (
            {"PORTAL_MQTT_HOST": "mqtt.example.com", "PORTAL_MQTT_PORT": "443"},
            ["localhost:443", "mqtt.example.com:443"],
        ),
        ({"PORTAL_MQTT_PORT": "443", "PORTAL_BROKER_PROBE_ADDRESS": "[::1]:8883"}, ["[::1]:8883"]),
    ],
)
def test_the_broker_is_probed_here_first_unless_a_setting_says_where(
    tmp_path: Path, environment: dict[str, str], addresses: list[str]
) -> None:
    settings = Settings.from_env({"PORTAL_DATA_DIR": str(tmp_path), **environment})
    assert [str(address) for address in settings.probe_addresses] == addresses
