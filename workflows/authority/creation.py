"""Creates CAs: those of an installation at its first start, and that of each further tenant."""

from __future__ import annotations

import dataclasses
from datetime import datetime

from sqlalchemy.engine import Connection

import ca
import db
from config import Settings
from core.errors import CaKeyUnavailable, TokenUnavailable
from core.failpoints import failpoint
from core.server_command import server_command
from core.states import IssuerKind
from pki.algorithms import KeyType
from pki.issuers import Issuer, signing_key
from pki.keys.contract import check_that_it_signs
from pki.keys.stores import ROOT, KeyStores
from pki.outer_chain import named
from store import audit
from store import issuers as store_issuers
from store.audit import Actor
from store.database import Database
from store.issuers import CrlRecord
from store.scope import ALL_TENANTS
from workflows.authority.crls import empty_crl
from workflows.authority.issuers import Authority, Issuers, url_name_of_key
from workflows.authority.names import FIRST_ISSUING, common_name, issuing_name, next_number, root_names

# The root's key is meant to be kept elsewhere, so its CRL, which lists issuing CAs only, is valid for long.
ROOT_CRL_DAYS = 365


def open_authority(
    database: Database, keys: KeyStores, settings: Settings, tenant_id: str, *, now: datetime
) -> Authority:
    """Load the issuers; the first start creates root and issuing CA.

    Raises ``CaKeyUnavailable`` if an issuing key is missing or cannot be decrypted; the root's may be elsewhere.
    """
    with database.snapshot() as tx:
        there = store_issuers.are_any(tx)
    if not there:
        _create(database, keys, settings, tenant_id, now)
    return Authority(database, keys)


def _create(database: Database, keys: KeyStores, settings: Settings, tenant_id: str, now: datetime) -> None:
    # A key file may exist already, if an earlier first start was cut off before its commit.
    root_key, issuing_key = (
        keys.load(name) if keys.exists(name) else keys.create(name, KeyType(kind))
        for name, kind in ((ROOT, settings.root_key_type), (FIRST_ISSUING, settings.issuing_key_type))
    )
    root = ca.create_root(root_key, common_name=f"{settings.ca_name} Root CA", now=now, days=settings.root_days)
    root_issuer = Issuer(ROOT, root.certificate, root_key)
    issuing = ca.create_issuing(
        root_issuer,
        issuing_key.public_key(),
        common_name=f"{settings.ca_name} Issuing CA 1",
        now=now,
        days=settings.issuing_days,
        pki_url=settings.pki_url,
    )
    with database.transaction() as tx:
        root_id = _add(tx, tenant_id, ROOT, IssuerKind.ROOT, root, now)
        store_issuers.put_crl(tx, _of(root_id, empty_crl(root_issuer, days=ROOT_CRL_DAYS, now=now)))
        _add(tx, tenant_id, FIRST_ISSUING, IssuerKind.ISSUING, issuing, now)


def _add(tx: Connection, tenant_id: str, name: str, kind: IssuerKind, issued: ca.Issued, now: datetime) -> int:
    return store_issuers.add_issuer(
        tx,
        tenant_id=tenant_id,
        name=name,
        kind=kind,
        der=issued.der,
        fingerprint=issued.fingerprint,
        not_after=issued.not_after,
        created_at=now,
        issuing_since=None if kind == IssuerKind.ROOT else now,
    )


def _of(issuer_id: int, crl: CrlRecord, generation: int = 0) -> CrlRecord:
    return dataclasses.replace(crl, issuer_id=issuer_id, generation=generation)


# --- Those of other tenants ------------------------------------------------------------------------------------------


def create_tenant_issuer(
    database: Database,
    authority: Authority,
    keys: KeyStores,
    settings: Settings,
    actor: Actor,
    *,
    own_root: bool = False,
    now: datetime,
) -> str | None:
    """Create the issuing CA of the actor's tenant, which exists and has none, below the installation's root.

    With ``own_root`` below a root of the tenant's own, which is created with it. Returns ``None`` once the tenant has a
    CA that issues, also if it had one before; else a sentence that says why there is none, and what to do. It may be
    called again after it was cut off. Raises ``IssuerUnusable`` if the root has expired.
    """
    tenant_id = actor.tenant_id
    with database.snapshot(sees=ALL_TENANTS) as tx:
        issuers = store_issuers.list_issuers(tx, retired=True, tenant_id=tenant_id)
        current = authority.seen_by(tx)
    if current.has_issuing(tenant_id):
        return None
    if own_root:
        root, made = _new_root(keys, settings, tenant_id, now)
    else:
        found = _root_that_signs(authority, current, settings, tenant_id)
        if isinstance(found, str):
            return found
        root, made = found, None
    name = issuing_name(tenant_id, next_number(issuers, keys, tenant_id))
    key = keys.create(name, KeyType(settings.issuing_key_type))
    failpoint("tenant_add.key_made")
    issued = ca.create_issuing(
        root,
        key.public_key(),
        common_name=common_name(settings.ca_name, tenant_id, f"Issuing CA {name.rpartition('-')[2]}"),
        now=now,
        days=settings.issuing_days,
        pki_url=settings.pki_url,
    )
    # With its first CRL, so that the broker never has the CA without one.
    crl = empty_crl(Issuer(name, issued.certificate, key), days=settings.crl_days, now=now)
    root_crl = None if made is None else empty_crl(root, days=ROOT_CRL_DAYS, now=now)
    with database.transaction(sees=ALL_TENANTS) as tx:
        generation = db.next_generation(tx, at=now)
        if made is not None and root_crl is not None:
            row = _add(tx, tenant_id, root.name, IssuerKind.ROOT, made, now)
            store_issuers.put_crl(tx, _of(row, root_crl, generation))
            audit.record(tx, actor, "ca:create", f"issuer:{root.name}", at=now, fingerprint=made.fingerprint)
        row = _add(tx, tenant_id, name, IssuerKind.ISSUING, issued, now)
        store_issuers.put_crl(tx, _of(row, crl, generation))
        audit.record(tx, actor, "ca:create", f"issuer:{name}", at=now, fingerprint=issued.fingerprint)
        failpoint("tenant_add.before_ca_commit")
    failpoint("tenant_add.after_ca_commit")
    with database.snapshot(sees=ALL_TENANTS) as tx:
        authority.seen_by(tx)
    return None


def _new_root(keys: KeyStores, settings: Settings, tenant_id: str, now: datetime) -> tuple[Issuer, ca.Issued]:
    name = next(name for name in root_names(tenant_id) if not keys.is_taken(name))
    key = keys.create(name, KeyType(settings.root_key_type))
    failpoint("tenant_add.root_key_made")
    called = common_name(settings.ca_name, tenant_id, "Root CA")
    made = ca.create_root(key, common_name=called, now=now, days=settings.root_days)
    return Issuer(name, made.certificate, key, url_name=url_name_of_key(made.certificate)), made


def _root_that_signs(authority: Authority, current: Issuers, settings: Settings, tenant_id: str) -> Issuer | str:
    """Return the installation's root with its key, or a sentence that says what to do without it."""
    request = f"{server_command(f'ca request --tenant {tenant_id}')}, then ca install --tenant {tenant_id}"
    above = current.own_root(current.servers)
    if above is None:
        by = named(current.anchor(current.servers))
        return f"The tenant {tenant_id} has no CA yet: {by} has to sign it. Have a request signed by it: {request}."
    again = server_command(f"ca rollover --tenant {tenant_id}")
    try:
        root = authority.with_root_key(above)
        if root is not None:
            check_that_it_signs(signing_key(root.issuer))  # its token may be elsewhere
            return root.issuer
        why = f"the root's key is not in {settings.ca_dir}"
    except (CaKeyUnavailable, TokenUnavailable) as error:
        why = f"the root's key cannot be used ({error.detail.rstrip('.')})"
    return (
        f"The tenant {tenant_id} has no CA yet: {why}. Bring it back, then: {again}; or have a request signed where it"
        f" is: {request}."
    )
