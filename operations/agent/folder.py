"""What an agent keeps on the disk: who it is, how far it has come, whom it trusts."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from broker.crl import Trust
from broker.folder import CA_FOLDER, SERVER_CERTIFICATE_FILE, SERVER_KEY_FILE
from broker.guard.feed import NOTHING, Mark, TrustNames
from broker.probe import ProbeCertificate, ProbeCertificates
from config import Settings
from core.boot import boot_id, boot_seconds
from core.errors import StartupError
from core.files import private_folder, remove_leftovers, replace_file

NOT_JOINED = "This agent has not joined a portal; see portal broker add, and portal-server agent join --help."
_PORTAL_DECIDES = ("topic_prefix", "topic_prefixes", "mqtt_host", "mqtt_port")


@dataclass(frozen=True, slots=True)
class Identity:
    """Which broker the agent is beside, and where its portal is."""

    name: str
    url: str


@dataclass(frozen=True, slots=True)
class State:
    """How far an agent has come.

    ``mark`` is the newest page of changes that its broker was seen to obey, ``heard_at`` when the portal last said that
    there is nothing newer or gave something newer, in seconds since 1970, and ``heard_since_boot`` the same by the
    clock of the boot ``boot``; ``denies_all`` whether the broker denies all because that was long ago; ``problem`` what
    is wrong, or none.
    """

    mark: Mark = NOTHING
    heard_at: float = 0.0
    boot: str = ""
    heard_since_boot: float = 0.0
    denies_all: bool = False
    problem: str = ""

    def heard(self, now: float) -> State:
        """Return the state in which the portal was heard just now."""
        return dataclasses.replace(self, heard_at=now, boot=boot_id(), heard_since_boot=boot_seconds())

    def age(self, now: float) -> float:
        """Return how old its knowledge is, in seconds.

        Within a boot by the clock that nobody moves. After another one only the time of day is left: if that was set
        back before the portal was heard last, nobody knows how old it is, and it is older than any limit.
        """
        passed = now - self.heard_at
        if self.boot and self.boot == boot_id():
            return max(passed, boot_seconds() - self.heard_since_boot, 0.0)
        return passed if passed >= 0 else math.inf


class AgentFolder:
    """The agent's data folder: everything in it is the portal's user's alone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.pair = path / "agent.pem"  # key and certificate, in one file so that they are always of each other
        self.portal_ca = path / "portal-ca.pem"
        self._identity, self._state, self._trust = path / "agent.json", path / "state.json", path / "trust.json"

    @property
    def probes(self) -> ProbeCertificates:
        """The files of the two certificates that the broker is probed with, one good and one revoked."""
        folder = self.path / "canaries"
        return ProbeCertificates(
            good=ProbeCertificate(folder / "good.pem", folder / "good.key"),
            revoked=ProbeCertificate(folder / "revoked.pem", folder / "revoked.key"),
        )

    @property
    def has_joined(self) -> bool:
        """Whether it has joined a portal."""
        return self._identity.exists()

    def identity(self) -> Identity:
        """Return who it is; raise ``StartupError`` if it has not joined."""
        try:
            said = json.loads(self._identity.read_bytes())
            return Identity(str(said["name"]), str(said["url"]))
        except FileNotFoundError:
            raise StartupError(NOT_JOINED) from None
        except (OSError, ValueError, KeyError, TypeError):
            raise StartupError(f"{self._identity} cannot be read; remove {self.path} and join again.") from None

    def join(self, identity: Identity, key: bytes, chain: str, portal_ca: str, settings: Mapping[str, str]) -> None:
        """Keep what was learnt by joining; who the agent is comes last, so that half of it is nothing."""
        private_folder(self.path)
        private_folder(self.path / "canaries")
        self.keep_pair(key, chain)
        replace_file(self.portal_ca, portal_ca.encode())
        replace_file(self._trust, json.dumps({"settings": _decided(settings)}).encode())
        self.keep_state(State().heard(utc_seconds()))
        replace_file(self._identity, json.dumps(dataclasses.asdict(identity)).encode())

    def keep_pair(self, key: bytes, chain: str) -> None:
        """Keep the agent's own key and certificate with its chain (PEM)."""
        replace_file(self.pair, key + chain.encode())

    def expired_at(self, now: float) -> datetime | None:
        """Return when the agent's own certificate expired, ``None`` if it has not or cannot be read."""
        try:
            ends = x509.load_pem_x509_certificate(self.pair.read_bytes()).not_valid_after_utc
        except (OSError, ValueError):
            return None
        return ends if ends.timestamp() <= now else None

    def state(self) -> State:
        """Return how far it has come, nothing if that cannot be read."""
        try:
            said = json.loads(self._state.read_bytes())
            mark = Mark(int(said["generation"]), str(said["digest"]))
            heard_at, boot, since_boot = said["heard_at"], said.get("boot", ""), said.get("heard_since_boot", 0.0)
            heard = float(heard_at), str(boot), float(since_boot)
            return State(mark, *heard, bool(said["denies_all"]), str(said["problem"]))
        except (OSError, ValueError, KeyError, TypeError):
            return State()

    def keep_state(self, state: State) -> None:
        """Keep how far it has come."""
        said = {"generation": state.mark.generation, "digest": state.mark.digest, "heard_at": state.heard_at}
        said |= {"boot": state.boot, "heard_since_boot": state.heard_since_boot}
        said |= {"denies_all": state.denies_all, "problem": state.problem}
        replace_file(self._state, json.dumps(said).encode())

    # --- Trust

    def trust(self) -> tuple[TrustNames, Trust] | None:
        """Return the CAs and CRLs that were fetched last, with their names; ``None`` if there are none."""
        said = self._said_of_trust()
        try:
            tenants = {str(key): str(name) for key, name in said["tenants"].items()}
            return TrustNames(*said["names"]), Trust(said["crl"].encode(), said["ca"].encode(), tenants)
        except (KeyError, TypeError, AttributeError):
            return None

    def keep_trust(self, names: TrustNames, said: Mapping[str, Any]) -> Trust:
        """Keep CAs, CRLs and settings as the portal has said them; raise ``ValueError`` if it has not."""
        portal_ca = said["portal_ca"]
        x509.load_pem_x509_certificates(portal_ca.encode())
        settings = self._said_of_trust().get("settings", {}) | _decided(said["settings"])
        kept = {"names": [names.cas, names.crls], "settings": settings}
        kept |= {name: said[name] for name in ("ca", "crl", "tenants")}
        replace_file(self._trust, json.dumps(kept).encode())
        replace_file(self.portal_ca, portal_ca.encode())
        found = self.trust()
        if found is None:
            raise ValueError("the portal's CAs cannot be read")
        return found[1]

    def _said_of_trust(self) -> dict[str, Any]:
        try:
            said = json.loads(self._trust.read_bytes())
        except (OSError, ValueError):
            return {}
        return said if isinstance(said, dict) else {}

    def settings_of_portal(self) -> dict[str, str]:
        """Return what the portal decides of the agent's settings, as variables of the environment."""
        said = self._said_of_trust().get("settings", {})
        return {f"PORTAL_{name.upper()}": str(text) for name, text in said.items()}


def _decided(settings: Mapping[str, str]) -> dict[str, str]:
    return {name: str(settings[name]) for name in _PORTAL_DECIDES if name in settings}


def settings_of(environ: Mapping[str, str]) -> tuple[Settings, AgentFolder]:
    """Return the settings of the environment with what the portal decides, and the agent's folder.

    The broker is under the control of the guard. Raise ``SettingInvalid``.
    """
    guarded = {**environ, "PORTAL_BROKER_CONTROL": "guard"}
    folder = AgentFolder(Settings.from_env(guarded).data_dir / "agent")
    return Settings.from_env({**guarded, **folder.settings_of_portal()}), folder


def remove_leftovers_of_agent(settings: Settings, folder: AgentFolder) -> None:
    """Remove what an agent that was killed has not finished; only one that holds the lock of the folder calls this."""
    broker = settings.broker_dir
    agent = (folder.path, folder.probes.good.key.parent)
    for path in (settings.data_dir, settings.secrets_dir, *agent, broker, broker / CA_FOLDER):
        remove_leftovers(path, alone=True)


def is_due(certificate: Path, key: Path, now: float, *, name: str = "") -> bool:
    """Return whether a certificate must be replaced: it lacks or is not its key's, or two thirds of its life are over.

    Or whether it is not for the host ``name``, if that is given.
    """
    try:
        read = x509.load_pem_x509_certificate(certificate.read_bytes())
        if load_pem_private_key(key.read_bytes(), password=None).public_key() != read.public_key():
            return True
        if name:
            extension = read.extensions.get_extension_for_class(x509.SubjectAlternativeName)
            if name not in map(str, (each.value for each in extension.value)):
                return True
    except (OSError, ValueError, x509.ExtensionNotFound):
        return True
    begins, ends = read.not_valid_before_utc.timestamp(), read.not_valid_after_utc.timestamp()
    return not begins <= now < begins + (ends - begins) * 2 / 3


def server_files(settings: Settings) -> tuple[Path, Path]:
    """Return the files of the broker's own certificate and key."""
    return settings.broker_file(SERVER_CERTIFICATE_FILE), settings.broker_file(SERVER_KEY_FILE)


def utc_seconds() -> float:
    """Return the time in seconds since 1970."""
    return time.time()
