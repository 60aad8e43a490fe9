"""What tests of several rooms share: a clock to set, settings on free ports, a client that speaks JSON."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from flask import Flask
from flask.testing import FlaskClient

from app import portal_of
from config import Settings
from core.roles import Role
from operations.owner_tokens import first_token
from operations.wiring import Portal, open_portal, prepare, utc_now
from pki.algorithms import encrypt_private_key
from pki.keys import files
from store import tenants
from store.tables import METADATA
from tests.support.databases import POSTGRES_URL
from tests.support.ports import free_port
from tests.support.tenants import add_issuer
from workflows.operators import new_token

# Whether `scripts/test --all` runs the tests: those that generate their input make more of it then.
ALL = os.environ.get("PORTAL_TEST_ALL") == "yes"
# For tests to which the database makes no difference.
ON_SQLITE = pytest.mark.parametrize("prepared", ["sqlite"], indirect=True)
# For tests of what it alone does.
ON_POSTGRESQL = pytest.mark.parametrize(
    "prepared",
    [pytest.param("postgresql", marks=pytest.mark.skipif(not POSTGRES_URL, reason="needs one"))],
    indirect=True,
)
# For tests of what the allow-list alone does: narrower topics, a block for each active device.
PER_DEVICE = pytest.mark.parametrize("acl_style", ["per-device"], indirect=True)


class Clock:
    """The time that a test says it is."""

    def __init__(self) -> None:
        self._ahead = timedelta(0)

    def __call__(self) -> datetime:
        return utc_now() + self._ahead

    def advance(self, **amount: float) -> None:
        """Move on, by ``timedelta``'s words."""
        self._ahead += timedelta(**amount)


def settings_for(folder: Path, **environment: str) -> Settings:
    """Settings of a portal in ``folder`` on free ports, with no broker running there yet."""
    ports = {"PORTAL_BIND": f"127.0.0.1:{free_port()}", "PORTAL_PKI_BIND": f"127.0.0.1:{free_port()}"}
    quick = {"PORTAL_ENFORCE_TIMEOUT": "5", "PORTAL_MQTT_PORT": str(free_port())}
    quick |= {"PORTAL_LOGIN_FAILURES": "1000000"}  # tests have one address, from which they try many bad tokens
    return Settings.from_env({"PORTAL_DATA_DIR": str(folder), **ports, **quick, **environment})


def key_path(settings: Settings, name: str) -> Path:
    """The file of a CA's key, or that which says where in a token it is."""
    (path,) = (path for path in settings.ca_dir.glob(f"{name}.*") if path.name.endswith((".key.pem", ".token.json")))
    return path


@contextlib.contextmanager
def derived_quickly() -> Iterator[None]:
    """Encrypt CA keys that are made in the ``with`` block with one round of PBKDF2: to open one takes 0.1 s else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "encrypt_private_key", functools.partial(encrypt_private_key, rounds=1))
        yield


def first_start(settings: Settings) -> None:
    """Do as ``flask init`` does, in this process."""
    with derived_quickly(), contextlib.closing(open_portal(settings)) as portal:
        prepare(portal)
        first_token(portal)


def copy_with_groups(source: Path, target: Path) -> None:
    """Copy a data folder with the groups of its files, which are how the broker may read some of them."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    for path in source.rglob("*"):
        os.chown(target / path.relative_to(source), -1, path.stat().st_gid)


def state_of(portal: Portal) -> dict[str, object]:
    """All that a portal keeps, but for the audit record: what a request that is refused must leave as it was.

    Attempts with wrong tokens are counted, of several nodes in the table ``pages``.
    """
    state: dict[str, object] = {}
    with portal.database.snapshot() as tx:
        for table in METADATA.sorted_tables:
            if not table.name.startswith(("audit_", "pages")):
                state[table.name] = sorted(repr(tuple(row)) for row in tx.execute(sa.select(table)))
    for path in portal.settings.data_dir.rglob("*"):
        if path.is_file() and not path.name.startswith(("portal.db", "attempts", ".served")) and path.suffix != ".lock":
            state[str(path)] = (path.read_bytes(), path.stat().st_mode, path.stat().st_mtime_ns)
    return state


class Api:
    """Speaks JSON to an application in this process, as the operator with ``token``."""

    def __init__(self, client: FlaskClient, token: str | None) -> None:
        self.client = client
        self.token = token

    def call(self, method: str, path: str, json: Any = None, **options: Any) -> Any:
        """Make a request; returns Werkzeug's test response."""
        headers = dict(options.pop("headers", {}))
        if self.token is not None:
            headers.setdefault("Authorization", f"Bearer {self.token}")
        if json is not None:
            options["json"] = json
        return self.client.open(path, method=method, headers=headers, **options)

    def get(self, path: str, **options: Any) -> Any:
        return self.call("GET", path, **options)

    def post(self, path: str, json: Any = None, **options: Any) -> Any:
        return self.call("POST", path, json, **options)

    def patch(self, path: str, json: Any = None, **options: Any) -> Any:
        return self.call("PATCH", path, json, **options)

    def delete(self, path: str, **options: Any) -> Any:
        return self.call("DELETE", path, **options)

    def register(self, **fields: Any) -> dict[str, Any]:
        """Register a device that is as plain as can be, but for ``fields``; returns the answer."""
        answer = self.post(
            "/register", {"name": "pump-1", "type": "pump", "location": "hall 1", "firmware": "1.0"} | fields
        )
        assert answer.status_code == 201, answer.text
        registered: dict[str, Any] = answer.json
        return registered


def api_as(app: Flask, role: Role | None, tenant_id: str = "default") -> Api:
    """An ``Api`` with a fresh token of the role in a tenant, which is added if there is none; or with no token."""
    if role is None:
        return Api(app.test_client(), None)
    portal = portal_of(app)
    secret, record = new_token(tenant_id, f"a test's {role}", role, None, now=portal.clock())
    with portal.database.transaction() as tx:
        tenants.add_tenant(tx, tenant_id, created_at=portal.clock())
        tenants.add_token(tx, record, secret=secret)
    if tenant_id != portal.first_tenant:
        add_issuer(portal, tenant_id)
    return Api(app.test_client(), secret)


@contextlib.contextmanager
def as_owner(portal: Portal) -> Iterator[sa.Connection]:
    """A transaction in the role that owns the tables."""
    engine = sa.create_engine(portal.settings.database_owner_url or portal.settings.database_url)
    with engine.begin() as connection:
        yield connection
    engine.dispose()


def csr_pem(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | None = None) -> str:
    """A certificate signing request for a new key, or for the one given."""
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "somebody else")])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    signed = builder.sign(key or ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())
    return signed.public_bytes(Encoding.PEM).decode()


def problem_of(answer: Any, status: int, code: str) -> dict[str, Any]:
    """The problem document of an answer (RFC 9457), seen to be as complete as every error is."""
    assert answer.status_code == status, answer.data
    assert answer.content_type == "application/problem+json"
    problem: dict[str, Any] = answer.json
    assert problem["code"] == code, problem
    assert problem["type"] == f"urn:onboarding-portal:error:{code}"
    assert problem["status"] == status
    assert problem["title"]
    assert problem["detail"].endswith(".")
    assert problem["request_id"] == answer.headers["X-Request-Id"]
    assert ("errors" in problem) == (status == 422)
    return problem
