"""The portal's settings: one frozen object, read once from the environment and a file."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Self
from urllib.parse import urlsplit

from pydantic import Field, PlainValidator, SecretStr, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from core.broker_control import AclStyle, ControlKind, default_control, installed_style
from core.errors import SettingInvalid
from core.given_settings import gathered, sentences, variable_of
from core.rabbitmq_nodes import RabbitmqNode, parse_rabbitmq_nodes, parse_tenant_ports
from core.setting_values import (
    UNIX_SOCKET_PATH_LIMIT,
    Address,
    ClaimName,
    GroupGrantsSetting,
    KeyPlaces,
    MailAddresses,
    Names,
    Networks,
    OidcClientId,
    OidcIssuer,
    OidcScopes,
    OptionalPath,
    OptionalUrl,
    PathSetting,
    PkiAddressSetting,
    Text,
    Url,
    choice,
    count,
    is_ip_address,
    is_loopback,
    long_enough,
    parse_address_or_socket,
    parse_database_url,
    parse_distinguished_name_part,
    parse_ip_address,
    parse_optional_address,
    parse_owner_url,
    parse_passphrase,
    parse_topic_prefix,
    parse_topic_prefixes,
    seconds,
)

CA_KEY_TYPES = ("ec-p256", "ec-p384", "ed25519", "rsa-3072", "rsa-4096")
KEY_TYPES = ("ec-p256", "ec-p384", "ed25519", "rsa-2048", "rsa-3072", "rsa-4096")
_PASSPHRASE = ("ca_passphrase", "ca_passphrase_file")
LOG_LEVELS = ("debug", "info", "warning", "error")
PORTAL_CA_FILE = "portal-ca.pem"  # in the data folder and in bundles, where HTTPS has a certificate of another issuer


class EndOfPrevious(StrEnum):
    """When a device that renews by itself loses its previous certificate."""

    AFTER_OVERLAP = "after_overlap"
    WHEN_USED = "when_used"


class LogFormat(StrEnum):
    """The format of the log's lines."""

    TEXT = "text"
    JSON = "json"


def setting(default: str, description: str, *, shown: bool = True) -> Any:
    """Return a field whose default is a text as in the environment; its type is that of the parsed value."""
    return Field(default, description=description, repr=shown)


def derived(default: Callable[[dict[str, Any]], Any], description: str, *, shown: bool = True) -> Any:
    """Return a field whose default follows from the fields above it."""
    return Field(default_factory=default, description=description, repr=shown)


def _base_url(scheme: str, bind: str, address: Address, variable: str) -> str:
    if address.is_unix:
        raise SettingInvalid(f"{variable} must be set, because the portal listens on {address}.", bind)
    try:
        on_all_addresses = ipaddress.ip_address(address.host).is_unspecified
    except ValueError:
        on_all_addresses = False
    if on_all_addresses:
        raise SettingInvalid(f"{variable} must be set, because the portal listens on every address ({address}).", bind)
    return f"{scheme}://{address}"


def _inner_url(address: Address | None, of: str) -> str:
    return "" if address is None else _base_url("https", f"{of}_bind", address, f"PORTAL_{of.upper()}_URL")


class Settings(BaseSettings):
    """All settings, each from an environment variable or a key of the file; create it with ``Settings.from_env``.

    Times are in the unit that the name says. Paths are absolute.
    """

    model_config = SettingsConfigDict(
        env_prefix="PORTAL_",
        enable_decoding=False,
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
        validate_default=True,
    )

    data_dir: PathSetting = setting("data", "Folder of the database, CA, keys and broker files")
    bind: Annotated[Address, PlainValidator(parse_address_or_socket)] = setting(
        "127.0.0.1:8443", "HTTPS listener; or unix:/PATH, for a front server"
    )
    pki_bind: PkiAddressSetting = setting("127.0.0.1:8080", "Plain HTTP listener: CRLs, OCSP and CA certificates only")
    public_url: Url = derived(
        lambda data: _base_url("https", "bind", data["bind"], "PORTAL_PUBLIC_URL"),
        "Base of download links; https:// and the HTTPS listener if empty",
    )
    pki_url: Url = derived(
        lambda data: _base_url("http", "pki_bind", data["pki_bind"], "PORTAL_PKI_URL"),
        "Base of the URLs put into certificates; http:// and the PKI listener if empty",
    )
    agents_bind: Annotated[Address | None, PlainValidator(parse_optional_address)] = setting(
        "", "Listener for agents beside brokers elsewhere (mutual TLS), HOST:PORT; none if empty"
    )
    agents_url: OptionalUrl = derived(
        lambda data: _inner_url(data["agents_bind"], "agents"),
        "What agents connect to; https:// and PORTAL_AGENTS_BIND if empty",
    )
    database_url: Annotated[str, PlainValidator(parse_database_url)] = derived(
        lambda data: f"sqlite:///{data['data_dir'] / 'portal.db'}",
        "SQLAlchemy URL (sqlite or postgresql); portal.db in the data folder if empty",
        shown=False,
    )
    database_owner_url: Annotated[str, PlainValidator(parse_owner_url)] = setting(
        "", "The same PostgreSQL database for the role that owns its tables and changes the schema", shown=False
    )
    tls_certificate: OptionalPath = setting(
        "", "Chain (PEM) of another issuer, for HTTPS, read again when it is renewed; the portal's own if empty"
    )
    tls_key: OptionalPath = setting("", "Private key (PEM) of PORTAL_TLS_CERTIFICATE, which no others may read")
    server_names: Names = derived(
        lambda data: "" if data["tls_certificate"] else "localhost,127.0.0.1",
        "Names and addresses in the portal's certificate; localhost,127.0.0.1 if empty and it is the portal's own",
    )
    workers: Annotated[int, count(1, 64)] = setting(
        "2", "Worker processes of each of the two listeners; best is one for each processor, which it then keeps to"
    )
    threads: Annotated[int, count(1, 128)] = setting("8", "Threads in each worker process")
    max_connections: Annotated[int, count(16, 65536)] = setting("1000", "Open connections in each worker process")
    max_body_bytes: Annotated[int, count(1024, 1 << 30)] = setting("1048576", "Longest request body, in bytes")
    request_timeout: Annotated[float, seconds(1, 600)] = setting(
        "15", "Seconds a client has for its handshake and its request"
    )
    bulk_max_bytes: Annotated[int, count(1024, 1 << 40)] = setting("1073741824", "Longest bulk upload, in bytes")
    bulk_max_rows: Annotated[int, count(1, 100000000)] = setting("1000000", "Maximum rows of a bulk upload")
    bulk_uploads: Annotated[int, count(1, 8)] = setting("2", "Bulk uploads at a time")
    bulk_processes: Annotated[int, count(0, 64)] = setting(
        "0", "Processes that create an upload's keys; 0: one for each processor, at most 4"
    )
    login_failures: Annotated[int, count(1, 1000000)] = setting(
        "20", "Failed logins a minute after which an address must wait"
    )
    trusted_proxies: Networks = setting(
        "", "Front servers whose headers about a client's certificate and address are believed: addresses and networks"
    )
    log_format: Annotated[LogFormat, choice(LogFormat, LogFormat)] = setting("text", "text or json")
    log_level: Annotated[str, choice(LOG_LEVELS)] = setting("info", "debug, info, warning or error")

    ca_name: Annotated[str, PlainValidator(parse_distinguished_name_part)] = setting(
        "Device Onboarding", "Begins the common names of the CAs"
    )
    ca_passphrase_file: OptionalPath = setting("", "File with the passphrase, such as a service's credential")
    ca_passphrase: Annotated[SecretStr, PlainValidator(parse_passphrase)] = setting(
        "", "Decrypts the CA keys; a 0600 file created at the first start if empty", shown=False
    )
    ca_keys: KeyPlaces = setting(
        "file",
        "Where keys of issuing CAs are: file, or a token's URI (RFC 7512); several with blanks, new keys in the first",
    )
    root_keys: KeyPlaces = derived(
        lambda data: " ".join("file" if place is None else str(place) for place in data["ca_keys"]),
        "The same for the root's key; PORTAL_CA_KEYS if empty",
    )
    root_key_type: Annotated[str, choice(CA_KEY_TYPES)] = setting(
        "ec-p384", "The root's key, when it is made: " + ", ".join(CA_KEY_TYPES)
    )
    issuing_key_type: Annotated[str, choice(CA_KEY_TYPES)] = setting(
        "ec-p256", "Keys of issuing CAs, when they are made: " + ", ".join(CA_KEY_TYPES)
    )
    token_timeout: Annotated[float, seconds(0.5, 120)] = setting(
        "5", "Seconds a request waits for a signature of a token"
    )
    root_days: Annotated[int, count(2, 36500)] = setting("7300", "Life of the root CA, in days")
    issuing_days: Annotated[int, count(1, 36500)] = setting("1825", "Life of an issuing CA, in days")
    device_days: Annotated[int, count(1, 36500)] = setting("365", "Life of a device certificate, in days")
    server_days: Annotated[int, count(1, 398)] = setting(
        "90", "Life of the portal's and the broker's certificates, in days"
    )
    renewal_from: Annotated[int, count(0, 99)] = setting(
        "66", "Percent of a certificate's life after which a device may renew"
    )
    renewal_grace_days: Annotated[int, count(0, 3650)] = setting(
        "0", "Days after its expiry in which a certificate may be renewed"
    )
    renewal_overlap_hours: Annotated[int, count(0, 8760)] = setting(
        "24", "Hours for which the previous certificate keeps working after a renewal"
    )
    renewal_revoke_previous: Annotated[EndOfPrevious, choice(EndOfPrevious, EndOfPrevious)] = setting(
        "after_overlap",
        "When a device that renews by itself loses its previous certificate: after_overlap, or when_used if that is"
        " earlier",
    )
    crl_days: Annotated[int, count(1, 365)] = setting("7", "Life of a CRL, in days")
    ocsp_hours: Annotated[int, count(1, 96)] = setting("24", "Life of an OCSP response, in hours")
    key_type: Annotated[str, choice(KEY_TYPES)] = setting("ec-p256", "Device keys: " + ", ".join(KEY_TYPES))

    topic_prefix: Annotated[str, PlainValidator(parse_topic_prefix)] = setting(
        "devices", "What every topic begins with"
    )
    topic_prefixes: Annotated[tuple[str, ...], PlainValidator(parse_topic_prefixes)] = setting(
        "", "What topics of applications may begin with, too: prefixes separated by commas, such as homeassistant"
    )
    mqtt_host: Text = setting("localhost", "The broker's name, as devices reach it")
    mqtt_port: Annotated[int, count(1, 65535)] = setting("8883", "The broker's TLS port")
    mqtt_bind: Annotated[str, PlainValidator(parse_ip_address)] = setting(
        "127.0.0.1", "Where the broker of scripts/run listens: an IP address, 0.0.0.0 for all"
    )
    broker_probe_address: Annotated[Address | None, PlainValidator(parse_optional_address)] = setting(
        "", "Where the portal itself tries the broker's TLS port, HOST:PORT; if empty localhost, else as devices do"
    )
    broker_certificate: OptionalPath = setting(
        "", "Chain (PEM) of another issuer, for the broker, read again when it is renewed; one of the portal's if empty"
    )
    broker_key: OptionalPath = setting("", "Private key (PEM) of PORTAL_BROKER_CERTIFICATE, which no others may read")
    broker_names: Names = derived(
        lambda data: "" if data["broker_certificate"] else "localhost,127.0.0.1",
        "Names and addresses in the broker's certificate; localhost,127.0.0.1 if empty and it is one of the portal's",
    )
    broker_dir: PathSetting = derived(
        lambda data: data["data_dir"] / "broker", "Folder of the broker's files; broker in the data folder if empty"
    )
    acl_style: Annotated[AclStyle, choice(AclStyle, AclStyle)] = derived(
        lambda data: installed_style(data["broker_dir"]) or AclStyle.PATTERN,
        "per-device (an allow-list) or pattern (one line for all); as the ACL file says if empty, pattern if new",
    )
    broker_control: Annotated[ControlKind, choice(ControlKind, ControlKind)] = derived(
        lambda data: default_control(data["broker_dir"]),
        "guard (a plugin in the broker), files (an ACL that it reads at its start), rabbitmq (a cluster of RabbitMQ) or"
        " none (no broker beside this portal); if empty guard where the plugin is installed, else as the broker folder"
        " says",
    )
    mqtt_tls: Annotated[str, choice(("1.2", "1.3"))] = derived(
        lambda data: "1.2" if data["broker_control"].by_journal else "1.3",
        "Oldest TLS version that the broker accepts, 1.2 or 1.3; if empty 1.3 under files, else 1.2",
    )
    broker_socket: PathSetting = derived(
        lambda data: data["broker_dir"] / "portal.sock",
        "The broker's internal listener; portal.sock in the broker folder if empty",
    )
    broker_pid_file: PathSetting = derived(
        lambda data: data["broker_dir"] / "mosquitto.pid",
        "The broker's pid file; mosquitto.pid in the broker folder if empty",
    )
    broker_reload: Text = setting(
        "",
        "Command that reloads Mosquitto 2.1 under files, no older one; SIGHUP by pid file if empty",
    )
    broker_restart: Text = setting(
        "", "Command that restarts the broker, for what it reads at its start only; none if empty"
    )
    broker_group: Text = setting("", "Group that may read the broker's files; mosquitto if empty and permitted")
    enforce_timeout: Annotated[float, seconds(0.1, 120)] = derived(
        lambda data: "10" if data["broker_control"] is ControlKind.RABBITMQ else "5",
        "Seconds a request waits for the broker; if empty 5, at RabbitMQ 10",
    )
    agent_deny_all_after: Annotated[float, seconds(0, 31536000)] = setting(
        "0", "Seconds without the portal after which an agent's broker denies every device; 0: never"
    )

    rabbitmq_nodes: Annotated[tuple[RabbitmqNode, ...], PlainValidator(parse_rabbitmq_nodes)] = setting(
        "", "Nodes of RabbitMQ, as JSON: a list of objects with name, mqtt, management and folder"
    )
    rabbitmq_tenant_ports: Annotated[Mapping[str, int], PlainValidator(parse_tenant_ports)] = setting(
        "", "Listeners of RabbitMQ for further tenants, as JSON: an object with the port of each tenant"
    )
    rabbitmq_user: Text = setting("portal", "The portal's user at RabbitMQ's management API")
    rabbitmq_password_file: OptionalPath = setting("", "File with that user's password, which no others may read")
    rabbitmq_cache_seconds: Annotated[float, seconds(0, 2)] = setting(
        "1", "Seconds for which RabbitMQ believes what it was answered, its auth_cache.cache_ttl"
    )
    rabbitmq_bind: Annotated[Address | None, PlainValidator(parse_optional_address)] = setting(
        "", "Listener for RabbitMQ's questions about its clients (mutual TLS), HOST:PORT"
    )
    rabbitmq_url: OptionalUrl = derived(
        lambda data: _inner_url(data["rabbitmq_bind"], "rabbitmq"),
        "What RabbitMQ connects to for them; https:// and PORTAL_RABBITMQ_BIND if empty",
    )

    link_hours: Annotated[int, count(1, 8760)] = setting("24", "Life of a download link, in hours")
    link_grace: Annotated[float, seconds(0, 86400)] = setting(
        "300", "Seconds in which the client that fetched a bundle may fetch it again, by the idempotency key it gave"
    )

    webhook_allow: Networks = setting("", "Internal networks (CIDR) that events may be sent to; none if empty")
    webhook_ca_file: OptionalPath = setting("", "CA certificates (PEM) of receivers, beside the system's")
    mail_server: Annotated[Address | None, PlainValidator(parse_optional_address)] = setting(
        "", "SMTP server for mail to people, HOST:PORT; no mail is sent if empty"
    )
    mail_tls: Annotated[str, choice(("starttls", "tls", "none"))] = setting(
        "starttls", "starttls (required), tls from the first byte, or none"
    )
    mail_ca_file: OptionalPath = setting("", "CA certificates (PEM) of the SMTP server, beside the system's")
    mail_login_file: OptionalPath = setting(
        "", "File with user and password for the SMTP server, a line each, which no others may read"
    )
    mail_from: MailAddresses = setting("", "Sender of the mail, an address")
    mail_to: MailAddresses = setting("", "Addresses that get the mail, separated by commas")
    mail_minutes: Annotated[int, count(1, 10080)] = setting("15", "Minutes between two messages, at least")
    oidc_issuer: OidcIssuer = setting(
        "", "Identity provider (OpenID Connect) by which operators log in, its issuer URL; none if empty"
    )
    oidc_client_id: OidcClientId = setting("", "The portal's client id at the identity provider")
    oidc_client_secret_file: OptionalPath = setting(
        "", "File with that client's secret, which no others may read; a public client, with PKCE alone, if empty"
    )
    oidc_cli_client_id: OidcClientId = derived(
        lambda data: "" if data.get("oidc_client_secret_file") else data.get("oidc_client_id", ""),
        "Public client id for portal login --oidc; PORTAL_OIDC_CLIENT_ID if empty and that has no secret",
    )
    oidc_ca_file: OptionalPath = setting("", "CA certificates (PEM) of the identity provider, in place of the system's")
    oidc_scopes: OidcScopes = setting("openid profile", "Scopes that are asked for, openid among them")
    oidc_groups_claim: ClaimName = setting("groups", "Claim of the ID token that lists a person's groups")
    oidc_groups: GroupGrantsSetting = setting(
        "", "Roles of groups, as JSON: group to ROLE, or ROLE@TENANT for another tenant than the first; or a list"
    )
    event_days: Annotated[int, count(1, 3650)] = setting(
        "30", "Days for which events that were sent or given up are kept"
    )
    tenant_grace_days: Annotated[int, count(1, 3650)] = setting(
        "30", "Days after which the rows of a removed tenant are deleted"
    )
    console: Annotated[str, choice(("on", "off"))] = setting("on", "on or off: the web console under /ui")
    metrics_tenants: Annotated[int, count(1, 10000)] = setting(
        "50", "With so many tenants at most, metrics are by tenant; with more they are sums"
    )

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Settings:
        """Read and check the settings of the environment, and of the file that its ``PORTAL_CONFIG`` names, if any.

        The environment wins. Raises ``SettingInvalid`` with a sentence that names the first setting that is wrong.
        """
        given = gathered(environ, cls.model_fields)
        if given.problems:
            raise SettingInvalid(given.problems[0])
        try:
            return cls.of_texts(given.texts)
        except ValidationError as error:
            raise SettingInvalid(given.in_its_words(sentences(error)[0][1])) from None
        except SettingInvalid as error:
            raise SettingInvalid(given.in_its_words(error.detail)) from None

    @classmethod
    def of_texts(cls, texts: Mapping[str, str]) -> Settings:
        """Check the texts of settings, by field; raises ``ValidationError`` and ``SettingInvalid``."""
        source = EnvSettingsSource(cls)
        source.env_vars = {variable_of(name).lower(): text for name, text in texts.items()}
        return cls(**source())

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take the values given by ``from_env`` only, never those of this process's environment or of files."""
        return (init_settings,)

    @field_validator("server_names", "broker_names", mode="after")
    @classmethod
    def _add_own_name(cls, names: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if info.field_name == "broker_names":
            host = info.data.get("mqtt_host")
        else:
            host = urlsplit(info.data.get("public_url", "")).hostname
        return (*names, host) if host and host not in names else names

    @field_validator("ca_passphrase", mode="after")
    @classmethod
    def _read_passphrase(cls, given: SecretStr, info: ValidationInfo) -> SecretStr:
        path: Path | None = info.data.get("ca_passphrase_file")
        if path is None:
            return given
        if given:
            raise SettingInvalid("PORTAL_CA_PASSPHRASE and PORTAL_CA_PASSPHRASE_FILE cannot both be set.", *_PASSPHRASE)
        try:
            if path.stat().st_mode & 0o027:  # a group may read it, as it may read systemd's credentials
                raise SettingInvalid(
                    f"PORTAL_CA_PASSPHRASE_FILE names a file that is open to others; chmod 600 {path}.", *_PASSPHRASE
                )
            return long_enough(path.read_text(encoding="utf-8").strip())
        except OSError as error:
            raise SettingInvalid(
                f"PORTAL_CA_PASSPHRASE_FILE names {path}, which cannot be read ({error.strerror}).", *_PASSPHRASE
            ) from None
        except ValueError as error:
            said = f"PORTAL_CA_PASSPHRASE_FILE names {path}, whose content {error}."
            raise SettingInvalid(said, *_PASSPHRASE) from None

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if len(str(self.broker_socket).encode()) > UNIX_SOCKET_PATH_LIMIT:
            raise SettingInvalid(
                f"The path of the broker's internal socket is longer than {UNIX_SOCKET_PATH_LIMIT} bytes;"
                " set PORTAL_BROKER_SOCKET or PORTAL_DATA_DIR to a shorter one.",
                *("broker_socket", "broker_dir", "data_dir"),
            )
        for of in ("tls", "broker"):
            pair = f"{of}_certificate", f"{of}_key"
            if [getattr(self, name) for name in pair].count(None) == 1:
                first, second = map(variable_of, pair)
                raise SettingInvalid(f"{first} and {second} must be set together, or neither.", *pair)
        if self.mail_server is not None and (len(self.mail_from) != 1 or not self.mail_to):
            said = "PORTAL_MAIL_SERVER needs PORTAL_MAIL_FROM, one address, and PORTAL_MAIL_TO."
            raise SettingInvalid(said, "mail_server", "mail_from", "mail_to")
        if self.mail_login_file is not None and self.mail_tls == "none":
            said = "PORTAL_MAIL_LOGIN_FILE needs TLS, since a password is not sent in the clear."
            raise SettingInvalid(said, "mail_login_file", "mail_tls")
        if self.oidc_issuer and not (self.oidc_client_id and self.oidc_groups):
            said = "PORTAL_OIDC_ISSUER needs PORTAL_OIDC_CLIENT_ID and PORTAL_OIDC_GROUPS."
            raise SettingInvalid(said, "oidc_issuer", "oidc_client_id", "oidc_groups")
        if not self.oidc_issuer and (self.oidc_client_id or self.oidc_groups):
            said = "PORTAL_OIDC_CLIENT_ID and PORTAL_OIDC_GROUPS need PORTAL_OIDC_ISSUER."
            raise SettingInvalid(said, "oidc_issuer", "oidc_client_id", "oidc_groups")
        if self.issuing_days >= self.root_days:
            said = "PORTAL_ISSUING_DAYS must be less than PORTAL_ROOT_DAYS."
            raise SettingInvalid(said, "issuing_days", "root_days")
        return self

    @model_validator(mode="after")
    def _check_listeners(self) -> Self:
        if self.bind == self.pki_bind:
            raise SettingInvalid("PORTAL_BIND and PORTAL_PKI_BIND must differ.", "bind", "pki_bind")
        before = ["bind", "pki_bind"]
        for name in ("agents_bind", "rabbitmq_bind"):
            address = getattr(self, name)
            if address is not None and address in [getattr(self, other) for other in before]:
                *some, last = map(variable_of, before)
                said = f"{variable_of(name)} must be another address than {', '.join(some)} and {last}."
                raise SettingInvalid(said, name, *before)
            before.append(name)
        return self

    @model_validator(mode="after")
    def _check_rabbitmq(self) -> Self:
        needed = "rabbitmq_nodes", "rabbitmq_password_file", "rabbitmq_bind"
        missing = [name for name in needed if not getattr(self, name)]
        if self.broker_control is ControlKind.RABBITMQ and missing:
            said = f"PORTAL_BROKER_CONTROL=rabbitmq needs {' and '.join(map(variable_of, missing))}."
            raise SettingInvalid(said, "broker_control", *missing)
        if self.broker_control is ControlKind.RABBITMQ and is_ip_address(urlsplit(self.rabbitmq_url).hostname or ""):
            said = "PORTAL_RABBITMQ_URL must have a name and no IP address, since RabbitMQ verifies only names."
            raise SettingInvalid(said, "rabbitmq_url", "rabbitmq_bind")
        if self.broker_control is not ControlKind.RABBITMQ and len(missing) < len(needed):
            given = [name for name in needed if name not in missing]
            said = f"{variable_of(given[0])} needs PORTAL_BROKER_CONTROL=rabbitmq."
            raise SettingInvalid(said, "broker_control", *given)
        if {self.mqtt_port, *(node.mqtt.port for node in self.rabbitmq_nodes)} & {*self.rabbitmq_tenant_ports.values()}:
            said = "PORTAL_RABBITMQ_TENANT_PORTS must have other ports than PORTAL_MQTT_PORT and PORTAL_RABBITMQ_NODES."
            raise SettingInvalid(said, "rabbitmq_tenant_ports", "mqtt_port", "rabbitmq_nodes")
        return self

    @property
    def faces_network(self) -> bool:
        """Whether other machines reach the HTTPS listener with no front server that waits for slow clients."""
        if self.bind.is_unix or self.trusted_proxies:
            return False
        return not is_loopback(self.bind.host)

    @property
    def broker_addresses(self) -> tuple[Address, ...]:
        """Where devices of the first tenant reach the broker, as bundles and ``/.well-known/onboarding/config`` say."""
        return (Address(self.mqtt_host, self.mqtt_port),)

    def broker_addresses_of(self, tenant_id: str) -> tuple[Address, ...]:
        """Return where devices of a tenant reach the broker: a RabbitMQ has a listener for each."""
        return (Address(self.mqtt_host, self.rabbitmq_tenant_ports.get(tenant_id, self.mqtt_port)),)

    @property
    def probe_addresses(self) -> tuple[Address, ...]:
        """Where the portal tries the broker's TLS port: the next one if nothing listens at the one before.

        The name and port by which devices reach it need not work on this machine, behind a port forwarding without
        hairpin NAT for one.
        """
        if self.broker_probe_address is not None:
            return (self.broker_probe_address,)
        return tuple(dict.fromkeys(Address(host, self.mqtt_port) for host in ("localhost", self.mqtt_host)))

    def broker_file(self, name: str) -> Path:
        """Return the path of a file in the broker's folder."""
        return self.broker_dir / name

    @property
    def application_prefixes(self) -> tuple[str, ...]:
        """What topics of applications may begin with; that of the devices' is the first."""
        return tuple(dict.fromkeys((self.topic_prefix, *self.topic_prefixes)))

    @cached_property
    def granting_style(self) -> AclStyle:
        """How devices are granted topics: a journal tells of each device, as an ACL in style per-device does."""
        return AclStyle.PER_DEVICE if self.broker_control.by_journal else self.acl_style

    @property
    def has_broker(self) -> bool:
        """Whether a broker runs beside the portal; else agents and other nodes tell those that there are."""
        return self.broker_control is not ControlKind.NONE

    @cached_property
    def secrets_dir(self) -> Path:
        """The folder, mode 0700, of secrets that only the portal may read."""
        return self.data_dir / "secrets"

    @cached_property
    def ca_dir(self) -> Path:
        """The folder, mode 0700, of the encrypted CA keys."""
        return self.data_dir / "ca"

    @cached_property
    def tls_dir(self) -> Path:
        """The folder, mode 0700, of the portal's own server certificate and key."""
        return self.data_dir / "tls"

    @cached_property
    def https_ca_file(self) -> Path:
        """What clients of HTTPS trust: the portal's CAs, or the root of the issuer of PORTAL_TLS_CERTIFICATE."""
        return self.data_dir / ("ca.pem" if self.tls_certificate is None else PORTAL_CA_FILE)

    @cached_property
    def broker_ca_file(self) -> Path:
        """The root of the issuer of PORTAL_BROKER_CERTIFICATE, which clients trust beside the portal's CAs."""
        return self.data_dir / "broker-ca.pem"

    @cached_property
    def probe_ca_files(self) -> tuple[Path, ...]:
        """What the portal trusts of the broker beside its own CAs: the root now, and the one before until a restart."""
        return self.broker_ca_file, self.data_dir / ".broker-ca.before.pem"

    @cached_property
    def ocsp_dir(self) -> Path:
        """The folder, mode 0700, of the certificates and keys that sign OCSP responses."""
        return self.data_dir / "ocsp"
