"""The portal's settings, read once from the environment."""

from __future__ import annotations

import dataclasses
import ipaddress
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from core.errors import SettingInvalid
from core.installed_style import installed_style
from core.setting_values import (
    KEY_TYPES,
    AclStyle,
    Address,
    EndOfPrevious,
    LogFormat,
    Network,
    choice,
    count,
    parse_address,
    parse_database_url,
    parse_distinguished_name_part,
    parse_key_type,
    parse_names,
    parse_networks,
    parse_path,
    parse_secret,
    parse_text,
    parse_topic_prefix,
    parse_url,
    seconds,
)

__all__ = ["KEY_TYPES", "AclStyle", "Address", "LogFormat", "Settings"]

UNIX_SOCKET_PATH_LIMIT = 107  # bytes in sockaddr_un.sun_path, less the closing NUL


def _setting(env: str, default: str, parse: Callable[[str], Any], help_text: str) -> Any:
    shown = parse not in (parse_secret, parse_database_url)  # a database URL may hold a password
    return dataclasses.field(metadata={"env": env, "default": default, "parse": parse, "help": help_text}, repr=shown)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that can be set, each from one environment variable; build it with ``Settings.from_env``.

    Times are in the unit that the name says. Paths are absolute. An empty text means: derive it (see the
    ``effective`` properties below).
    """

    data_dir: Path = _setting(
        "PORTAL_DATA_DIR", "data", parse_path, "Folder of the database, CA, keys and broker files"
    )
    bind: Address = _setting("PORTAL_BIND", "127.0.0.1:8443", parse_address, "HTTPS listener")
    pki_bind: Address = _setting(
        "PORTAL_PKI_BIND", "127.0.0.1:8080", parse_address, "Plain HTTP listener: CRLs, OCSP and CA certificates only"
    )
    public_url: str = _setting(
        "PORTAL_PUBLIC_URL", "", parse_url, "Base of download links; https:// and the HTTPS listener if empty"
    )
    pki_url: str = _setting(
        "PORTAL_PKI_URL", "", parse_url, "Base of the URLs put into certificates; http:// and the PKI listener if empty"
    )
    database_url: str = _setting(
        "PORTAL_DATABASE_URL",
        "",
        parse_database_url,
        "SQLAlchemy URL (sqlite or postgresql); portal.db in the data folder if empty",
    )
    server_names: tuple[str, ...] = _setting(
        "PORTAL_SERVER_NAMES", "localhost,127.0.0.1", parse_names, "Names and addresses in the portal's own certificate"
    )
    workers: int = _setting("PORTAL_WORKERS", "2", count(1, 64), "Worker processes; as many as processors are best")
    threads: int = _setting("PORTAL_THREADS", "8", count(1, 128), "Threads in each worker process")
    max_connections: int = _setting(
        "PORTAL_MAX_CONNECTIONS", "1000", count(16, 65536), "Open connections in each worker process"
    )
    max_body_bytes: int = _setting(
        "PORTAL_MAX_BODY_BYTES", "1048576", count(1024, 1 << 30), "Longest request body, in bytes"
    )
    request_timeout: float = _setting(
        "PORTAL_REQUEST_TIMEOUT", "15", seconds(1, 600), "Seconds a client has for its handshake and its request"
    )
    bulk_max_bytes: int = _setting(
        "PORTAL_BULK_MAX_BYTES", "1073741824", count(1024, 1 << 40), "Longest bulk upload, in bytes"
    )
    bulk_max_rows: int = _setting("PORTAL_BULK_MAX_ROWS", "1000000", count(1, 100000000), "Most rows of a bulk upload")
    bulk_uploads: int = _setting("PORTAL_BULK_UPLOADS", "2", count(1, 8), "Bulk uploads at a time")
    bulk_processes: int = _setting(
        "PORTAL_BULK_PROCESSES",
        "0",
        count(0, 64),
        "Processes that make an upload's keys; 0: a processor each, 4 at most",
    )
    login_failures: int = _setting(
        "PORTAL_LOGIN_FAILURES", "20", count(1, 1000000), "Failed logins a minute after which an address must wait"
    )
    trusted_proxies: tuple[Network, ...] = _setting(
        "PORTAL_TRUSTED_PROXIES",
        "",
        parse_networks,
        "Proxies whose Client-Cert header is believed: addresses and networks; none if empty",
    )
    log_format: LogFormat = _setting("PORTAL_LOG_FORMAT", "text", choice(LogFormat), "text or json")
    log_level: str = _setting("PORTAL_LOG_LEVEL", "info", parse_text, "debug, info, warning or error")

    ca_name: str = _setting(
        "PORTAL_CA_NAME", "Device Onboarding", parse_distinguished_name_part, "Begins the common names of the CAs"
    )
    ca_passphrase: str = _setting(
        "PORTAL_CA_PASSPHRASE", "", parse_secret, "Opens the CA keys; a 0600 file made at first start if empty"
    )
    ca_passphrase_file: Path | None = _setting(
        "PORTAL_CA_PASSPHRASE_FILE", "", parse_path, "File with the passphrase, such as a service's credential"
    )
    root_days: int = _setting("PORTAL_ROOT_DAYS", "7300", count(2, 36500), "Life of the root CA, in days")
    issuing_days: int = _setting("PORTAL_ISSUING_DAYS", "1825", count(1, 36500), "Life of an issuing CA, in days")
    device_days: int = _setting("PORTAL_DEVICE_DAYS", "365", count(1, 36500), "Life of a device certificate, in days")
    server_days: int = _setting(
        "PORTAL_SERVER_DAYS", "90", count(1, 398), "Life of the portal's and the broker's certificates, in days"
    )
    renewal_from: int = _setting(
        "PORTAL_RENEWAL_FROM", "66", count(0, 99), "Percent of a certificate's life after which a device may renew"
    )
    renewal_grace_days: int = _setting(
        "PORTAL_RENEWAL_GRACE_DAYS", "0", count(0, 3650), "Days after its end in which a certificate may be renewed"
    )
    renewal_overlap_hours: int = _setting(
        "PORTAL_RENEWAL_OVERLAP_HOURS", "24", count(0, 8760), "Hours for which a renewed certificate goes on"
    )
    renewal_revoke_previous: EndOfPrevious = _setting(
        "PORTAL_RENEWAL_REVOKE_PREVIOUS",
        "after_overlap",
        choice(EndOfPrevious),
        "When a device that renews by itself loses the one before: after_overlap, or when_used if that is earlier",
    )
    crl_days: int = _setting("PORTAL_CRL_DAYS", "7", count(1, 365), "Life of a CRL, in days")
    ocsp_hours: int = _setting("PORTAL_OCSP_HOURS", "24", count(1, 96), "Life of an OCSP answer, in hours")
    key_type: str = _setting("PORTAL_KEY_TYPE", "ec-p256", parse_key_type, "Device keys: " + ", ".join(KEY_TYPES))

    acl_style: AclStyle = _setting(
        "PORTAL_ACL_STYLE",
        "",
        choice(AclStyle),
        "per-device (an allow-list) or pattern (one line for all); as the ACL file says if empty, pattern if new",
    )
    topic_prefix: str = _setting("PORTAL_TOPIC_PREFIX", "devices", parse_topic_prefix, "What every topic begins with")
    mqtt_host: str = _setting("PORTAL_MQTT_HOST", "localhost", parse_text, "The broker's name, as devices reach it")
    mqtt_port: int = _setting("PORTAL_MQTT_PORT", "8883", count(1, 65535), "The broker's TLS port")
    broker_names: tuple[str, ...] = _setting(
        "PORTAL_BROKER_NAMES", "localhost,127.0.0.1", parse_names, "Names and addresses in the broker's certificate"
    )
    broker_dir: Path = _setting(
        "PORTAL_BROKER_DIR", "", parse_path, "Folder of the broker's files; broker in the data folder if empty"
    )
    broker_socket: Path = _setting(
        "PORTAL_BROKER_SOCKET",
        "",
        parse_path,
        "The broker's internal listener; portal.sock in the broker folder if empty",
    )
    broker_pid_file: Path = _setting(
        "PORTAL_BROKER_PID_FILE", "", parse_path, "The broker's pid file; mosquitto.pid in the broker folder if empty"
    )
    broker_reload: str = _setting(
        "PORTAL_BROKER_RELOAD", "", parse_text, "Command that reloads the broker; SIGHUP by pid file if empty"
    )
    broker_group: str = _setting(
        "PORTAL_BROKER_GROUP",
        "",
        parse_text,
        "Group that may read the broker's files; mosquitto if empty and permitted",
    )
    enforce_timeout: float = _setting(
        "PORTAL_ENFORCE_TIMEOUT", "5", seconds(0.1, 120), "Seconds a request waits for the broker"
    )

    link_hours: int = _setting("PORTAL_LINK_HOURS", "24", count(1, 8760), "Life of a download link, in hours")
    link_grace: float = _setting(
        "PORTAL_LINK_GRACE", "300", seconds(0, 86400), "Without effect: a link is spent by its first fetch"
    )

    webhook_allow: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...] = _setting(
        "PORTAL_WEBHOOK_ALLOW", "", parse_networks, "Internal networks (CIDR) that events may be sent to; none if empty"
    )
    webhook_ca_file: Path | None = _setting(
        "PORTAL_WEBHOOK_CA_FILE", "", parse_path, "CA certificates (PEM) of receivers, beside the system's"
    )
    event_days: int = _setting(
        "PORTAL_EVENT_DAYS", "30", count(1, 3650), "Days for which events that were sent or given up are kept"
    )

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Settings:
        """Read and check all settings; raises ``SettingInvalid`` with a sentence that names the variable."""
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            env = field.metadata["env"]
            text = environ.get(env, "").strip() or field.metadata["default"]
            if not text:
                values[field.name] = None
                continue
            try:
                values[field.name] = field.metadata["parse"](text)
            except ValueError as error:
                raise SettingInvalid(f"{env} {error}.") from None
        unknown = sorted(name for name in environ if name.startswith("PORTAL_") and name not in _known_variables())
        if unknown:
            raise SettingInvalid(f"{unknown[0]} is not a setting of the portal; see the table in docs/operating.md.")
        return cls(**_derived(values))

    def broker_file(self, name: str) -> Path:
        """Path of a file in the broker's folder."""
        return self.broker_dir / name

    @property
    def secrets_dir(self) -> Path:
        """Folder, 0700, of what must never be read by anybody but the portal."""
        return self.data_dir / "secrets"

    @property
    def ca_dir(self) -> Path:
        """Folder, 0700, of the encrypted CA keys."""
        return self.data_dir / "ca"

    @property
    def tls_dir(self) -> Path:
        """Folder, 0700, of the portal's own server certificate and key."""
        return self.data_dir / "tls"

    @property
    def ocsp_dir(self) -> Path:
        """Folder, 0700, of the certificates with their keys that answer OCSP."""
        return self.data_dir / "ocsp"


def _known_variables() -> frozenset[str]:
    # The last three are what operator.env holds for the CLI; they may stand in a server's environment too.
    return frozenset(field.metadata["env"] for field in dataclasses.fields(Settings)) | {
        "PORTAL_URL",
        "PORTAL_CA",
        "PORTAL_TOKEN",
        "PORTAL_BUNDLE_PASSWORD",
        "PORTAL_FAILPOINT",
        "PORTAL_DEBUG",
        "PORTAL_TEST_POSTGRES_URL",
        "PORTAL_VENV",
    }


def _passphrase(given: str | None, path: Path | None) -> str:
    if path is None:
        return given or ""
    if given:
        raise SettingInvalid("PORTAL_CA_PASSPHRASE and PORTAL_CA_PASSPHRASE_FILE cannot both be set.")
    try:  # a group may read it: systemd shows a service its credentials so
        if path.stat().st_mode & 0o007:
            raise SettingInvalid(f"PORTAL_CA_PASSPHRASE_FILE names a file that is open to others; chmod 600 {path}.")
        return parse_secret(path.read_text(encoding="utf-8").strip())
    except OSError as error:
        raise SettingInvalid(
            f"PORTAL_CA_PASSPHRASE_FILE names {path}, which cannot be read ({error.strerror})."
        ) from None
    except ValueError as error:
        raise SettingInvalid(f"PORTAL_CA_PASSPHRASE_FILE names {path}, whose content {error}.") from None


def _is_wildcard(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def _derived(values: dict[str, Any]) -> dict[str, Any]:
    """Fill in what follows from other settings, then check what only several together can show."""
    data_dir: Path = values["data_dir"]
    for name, scheme, bind in (("public_url", "https", values["bind"]), ("pki_url", "http", values["pki_bind"])):
        if values[name] is None:
            if _is_wildcard(bind.host):
                env = "PORTAL_PUBLIC_URL" if name == "public_url" else "PORTAL_PKI_URL"
                raise SettingInvalid(f"{env} must be set, because the portal listens on every address ({bind}).")
            values[name] = f"{scheme}://{bind}"
    host = urlsplit(values["public_url"]).hostname
    if host and host not in values["server_names"]:
        values["server_names"] = (*values["server_names"], host)
    if values["mqtt_host"] not in values["broker_names"]:
        values["broker_names"] = (*values["broker_names"], values["mqtt_host"])
    values["database_url"] = values["database_url"] or f"sqlite:///{data_dir / 'portal.db'}"
    values["broker_dir"] = values["broker_dir"] or data_dir / "broker"
    values["broker_socket"] = values["broker_socket"] or values["broker_dir"] / "portal.sock"
    values["broker_pid_file"] = values["broker_pid_file"] or values["broker_dir"] / "mosquitto.pid"
    values["acl_style"] = values["acl_style"] or installed_style(values["broker_dir"]) or AclStyle.PATTERN
    if len(str(values["broker_socket"]).encode()) > UNIX_SOCKET_PATH_LIMIT:
        raise SettingInvalid(
            f"The path of the broker's internal socket is longer than {UNIX_SOCKET_PATH_LIMIT} bytes;"
            " set PORTAL_BROKER_SOCKET or PORTAL_DATA_DIR to a shorter one."
        )
    if values["log_level"] not in ("debug", "info", "warning", "error"):
        raise SettingInvalid("PORTAL_LOG_LEVEL must be one of debug, info, warning, error.")
    if values["bind"] == values["pki_bind"]:
        raise SettingInvalid("PORTAL_BIND and PORTAL_PKI_BIND must differ.")
    if values["issuing_days"] >= values["root_days"]:
        raise SettingInvalid("PORTAL_ISSUING_DAYS must be less than PORTAL_ROOT_DAYS.")
    values["ca_passphrase"] = _passphrase(values["ca_passphrase"], values["ca_passphrase_file"])
    values["trusted_proxies"] = values["trusted_proxies"] or ()
    for name in ("broker_reload", "broker_group"):
        values[name] = values[name] or ""
    values["webhook_allow"] = values["webhook_allow"] or ()
    return values
