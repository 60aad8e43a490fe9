"""Settings from a file and the environment: each of them, which counts, whose secrets, and all problems at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from config import Settings
from core.errors import SettingInvalid
from core.given_settings import MASK, gathered, masked, variable_of

# A valid value of each setting that is not its default.
VALUES: dict[str, Any] = {
    "data_dir": "/srv/portal",
    "bind": "127.0.0.1:9443",
    "pki_bind": "127.0.0.1:9080",
    "agents_bind": "127.0.0.1:9444",
    "agents_url": "https://agents.example.com",
    "agent_deny_all_after": 3600.0,
    "public_url": "https://portal.example.com",
    "pki_url": "http://pki.example.com",
    "database_url": "postgresql://portal:secret@db/portal",
    "database_owner_url": "postgresql://owner:secret@db/portal",
    "tls_certificate": "/etc/portal/tls.pem",
    "tls_key": "/etc/portal/tls.key",
    "server_names": ["portal.example.com", "10.0.0.1"],
    "workers": 4,
    "threads": 16,
    "max_connections": 2000,
    "max_body_bytes": 65536,
    "request_timeout": 7.5,
    "bulk_max_bytes": 4096,
    "bulk_max_rows": 10,
    "bulk_uploads": 1,
    "bulk_processes": 1,
    "login_failures": 5,
    "trusted_proxies": ["10.0.0.0/8", "fd00::1"],
    "log_format": "json",
    "log_level": "debug",
    "ca_name": "Example Devices",
    "ca_passphrase_file": "",
    "ca_passphrase": "a passphrase to keep",
    "ca_keys": ["pkcs11:token=a?module-path=/m.so&pin-source=file:/pin", "file"],
    "root_keys": ["file"],
    "root_key_type": "rsa-3072",
    "issuing_key_type": "ed25519",
    "token_timeout": 1.5,
    "root_days": 3000,
    "issuing_days": 400,
    "device_days": 30,
    "server_days": 30,
    "renewal_from": 50,
    "renewal_grace_days": 3,
    "renewal_overlap_hours": 12,
    "renewal_revoke_previous": "when_used",
    "crl_days": 3,
    "ocsp_hours": 12,
    "key_type": "ec-p384",
    "topic_prefix": "sites/one",
    "topic_prefixes": ["homeassistant", "zigbee2mqtt"],
    "mqtt_host": "mqtt.example.com",
    "mqtt_port": 443,
    "mqtt_bind": "127.0.0.2",
    "broker_probe_address": "127.0.0.1:443",
    "broker_certificate": "/etc/portal/broker.pem",
    "broker_key": "/etc/portal/broker.key",
    "broker_names": ["mqtt.example.com"],
    "broker_dir": "/srv/broker",
    "acl_style": "per-device",
    "broker_control": "rabbitmq",
    "mqtt_tls": "1.2",
    "broker_socket": "/srv/broker.sock",
    "broker_pid_file": "/srv/broker.pid",
    "broker_reload": "true",
    "broker_restart": "systemctl restart mosquitto",
    "broker_group": "mosquitto",
    "enforce_timeout": 2,
    "rabbitmq_nodes": '[{"name": "rabbit@a", "mqtt": "a.example.com:8883", "management": "http://127.0.0.1:15672"}]',
    "rabbitmq_tenant_ports": '{"acme": 8884}',
    "rabbitmq_user": "onboarding",
    "rabbitmq_password_file": "/etc/portal/rabbitmq.password",
    "rabbitmq_cache_seconds": 0.5,
    "rabbitmq_bind": "127.0.0.1:9445",
    "rabbitmq_url": "https://portal.example.com:9445",
    "link_hours": 4,
    "link_grace": 60,
    "webhook_allow": ["192.0.2.0/24"],
    "webhook_ca_file": "/etc/portal/hooks.pem",
    "mail_server": "mail.example.com:587",
    "mail_tls": "tls",
    "mail_ca_file": "/etc/portal/mail.pem",
    "mail_login_file": "/etc/portal/mail.login",
    "mail_from": ["portal@example.com"],
    "mail_to": ["a@example.com", "b@example.com"],
    "mail_minutes": 30,
    "event_days": 7,
    "oidc_issuer": "https://login.example.com",
    "oidc_client_id": "portal",
    "oidc_client_secret_file": "/etc/portal/oidc.secret",
    "oidc_cli_client_id": "portal-cli",
    "oidc_ca_file": "/etc/portal/oidc.pem",
    "oidc_scopes": ["openid", "groups"],
    "oidc_groups_claim": "roles",
    "oidc_groups": '{"line-4": "operator", "ops": ["admin", "operator@acme"]}',
    "console": "off",
    "tenant_grace_days": 7,
    "metrics_tenants": 10,
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "portal.toml"
    path.touch(mode=0o600)
    return path


def toml(values: dict[str, Any]) -> str:
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())


def text(name: str, value: Any) -> str:
    between = " " if name in ("ca_keys", "root_keys", "oidc_scopes") else ","
    return between.join(value) if isinstance(value, list) else str(value)


def test_each_setting_can_be_in_the_file_and_means_what_it_means_in_the_environment(path: Path, tmp_path: Path) -> None:
    assert VALUES.keys() >= Settings.model_fields.keys()
    passphrase = tmp_path / "passphrase"
    passphrase.touch(mode=0o600)
    passphrase.write_text("another passphrase")
    for values in (VALUES, VALUES | {"ca_passphrase": "", "ca_passphrase_file": str(passphrase)}):
        path.write_text(toml(values))
        by_file = Settings.from_env({"PORTAL_CONFIG": str(path)})
        by_environment = Settings.from_env({variable_of(name): text(name, value) for name, value in values.items()})
        assert by_file == by_environment
        same = [name for name, field in Settings.model_fields.items() if getattr(by_file, name) == field.default]
        assert same == []


def test_a_setting_that_is_json_in_the_environment_may_be_a_table(path: Path) -> None:
    values = {name: value for name, value in VALUES.items() if name.startswith("oidc_") and name != "oidc_groups"}
    environment = {variable_of(name): text(name, VALUES[name]) for name in (*values, "oidc_groups")}
    path.write_text(toml(values) + '[oidc_groups]\nline-4 = "operator"\nops = ["admin", "operator@acme"]\n')
    assert Settings.from_env({"PORTAL_CONFIG": str(path)}).oidc_groups == Settings.from_env(environment).oidc_groups
    path.write_text(toml(values) + "[oidc_groups]\nline-4 = 2026-01-01\n")
    with pytest.raises(SettingInvalid, match="must be a table of texts"):
        Settings.from_env({"PORTAL_CONFIG": str(path)})


def test_the_environment_wins_unless_it_is_empty(path: Path) -> None:
    path.write_text(toml({"workers": 4, "threads": 4, "data_dir": "/srv/portal"}))
    settings = Settings.from_env({"PORTAL_CONFIG": str(path), "PORTAL_WORKERS": "5", "PORTAL_THREADS": " "})
    assert (settings.workers, settings.threads, str(settings.data_dir)) == (5, 4, "/srv/portal")


@pytest.mark.parametrize(
    "values",
    [
        {"ca_passphrase": "a passphrase to keep"},
        {"database_url": "postgresql://portal:to keep@db/portal"},
        {"database_owner_url": "postgresql://portal@db/portal?password=to keep"},
    ],
)
def test_a_secret_is_refused_in_a_file_that_others_can_read(path: Path, values: dict[str, str]) -> None:
    path.write_text(toml(values))
    path.chmod(0o644)
    (name,) = values
    with pytest.raises(
        SettingInvalid, match=rf"{name} \(line 1 of .*\) is a secret, and other users can read"
    ) as caught:
        Settings.from_env({"PORTAL_CONFIG": str(path)})
    assert "to keep" not in caught.value.detail
    path.chmod(0o640)
    Settings.from_env({"PORTAL_CONFIG": str(path)})


def test_a_file_without_secrets_may_be_read_by_all(path: Path) -> None:
    path.write_text(toml({"database_url": "postgresql://portal@db/portal", "workers": 3}))
    path.chmod(0o644)
    assert Settings.from_env({"PORTAL_CONFIG": str(path)}).workers == 3


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("wrokers = 2\n", r"wrokers \(line 1 of .*\) is not a setting of the portal; did you mean workers\?"),
        ("PORTAL_BIND = 'x'\n", r"did you mean bind\?"),
        ("sesame = 2\n", r"see the table in docs/operating.md\."),
        ("\n[server]\nworkers = 2\n", r"keys stand at the top, without a \[section\]\."),
        ('"\\u001b[31m" = 2\n', r"'\\x1b\[31m' \("),
        ("workers = 0\n", r"^workers \(line 1 of .*\) must be a whole number from 1 to 64\.$"),
        ("workers = true\n", r"workers \(line 1 of .*\) must be a text or a number\."),
        ("data_dir = 'data'\n", "must be an absolute path"),
        ("root_days = 9\n", r"PORTAL_ISSUING_DAYS must be less than root_days \(line 1 of"),
        ("workers = \n", "is not TOML"),
    ],
)
def test_what_is_wrong_is_a_sentence_with_the_key_and_its_line(path: Path, content: str, said: str) -> None:
    path.write_text(content)
    with pytest.raises(SettingInvalid, match=said):
        Settings.from_env({"PORTAL_CONFIG": str(path)})


def problems(path: Path, values: dict[str, Any], **environment: str) -> list[str]:
    path.write_text(toml(values))
    given = gathered({"PORTAL_CONFIG": str(path), **environment}, Settings.model_fields)
    return given.all_problems(Settings.of_texts)


def test_all_problems_are_named_at_once(path: Path) -> None:
    values = {"workers": 0, "threads": "x", "mail_server": "mail.example.com:25", "issuing_days": 9000, "typo": 1}
    found = problems(path, values, PORTAL_LOG_LEVEL="loud", PORTAL_BIND="0.0.0.0:443", PORTAL_TYPO="1")
    about = ("PORTAL_TYPO", "typo", "workers", "threads", "PORTAL_LOG_LEVEL", "PORTAL_PUBLIC_URL", "mail_server")
    assert sorted(sentence.split()[0] for sentence in found) == sorted([*about, "issuing_days"])


def test_what_follows_from_another_problem_is_not_named(path: Path) -> None:
    # Without root_days, which is wrong, its default would be less.
    assert len(problems(path, {"root_days": "x", "issuing_days": 9000})) == 1
    assert len(problems(path, {"bind": "x"})) == 1
    assert problems(path, {"root_days": 9001, "issuing_days": 9000}) == []


def test_a_pair_that_is_not_whole_and_a_passphrase_file_are_problems_among_others(path: Path) -> None:
    values = {"tls_key": "/k", "broker_key": "/k", "ca_passphrase_file": "/missing", "pki_bind": "127.0.0.1:8443"}
    found = problems(path, values)
    assert len(found) == 4, found


@pytest.mark.parametrize(
    ("name", "given", "shown"),
    [
        ("ca_passphrase", "x", MASK),
        ("database_url", "postgresql://portal:a@b/c@db/portal", f"postgresql://portal:{MASK}@db/portal"),
        (
            "database_url",
            "postgresql://db/p?sslmode=require&password=x&a=b",
            f"postgresql://db/p?sslmode=require&password={MASK}&a=b",
        ),
        ("database_url", "sqlite:////srv/portal.db", "sqlite:////srv/portal.db"),
        ("bind", "127.0.0.1:8443", "127.0.0.1:8443"),
    ],
)
def test_secrets_are_masked(name: str, given: str, shown: str) -> None:
    assert masked(Settings.model_fields[name], name, given) == shown
