"""Checks of the data folder and the database: access to files, disk space, schema, audit record, links, tokens."""

from __future__ import annotations

import os
import pwd
import shutil
import stat
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import sqlalchemy as sa
from cryptography import x509
from sqlalchemy.engine import Connection

from broker.capath import FILE_MODE
from broker.folder import FOLDER_MODE
from config import Settings
from core.roles import Role
from core.server_command import client_command, server_command
from core.states import PENDING_DELIVERY
from operations import node_settings
from operations.data_folder import own_folders
from operations.doctor.base import Finding, Findings, Installation, combine, counted, problem, summarize, warning, well
from pki.outer_chain import decode_above
from pki.profiles import is_own_name, violated_constraint
from store import brokers, generations, grants, nodes, schema, tenants
from store.issuers import IssuerRecord
from store.names import living_names
from store.tables import Delivery
from workflows.audit import KEY_FOLDER, problem_of
from workflows.brokers import states_of
from workflows.credentials import own_names
from workflows.other_brokers import NONE_COUNTS
from workflows.profiles import list_profiles

LOW_BYTES, TOO_LOW_BYTES = 1 << 30, 100 << 20
LATE = timedelta(minutes=5)


def settings_of_nodes(installation: Installation) -> Finding:
    """Check that the nodes which work now have the same settings, as far as these belong to all."""
    if installation.settings.database_url.startswith("sqlite"):
        return well("There is one node.")
    with installation.snapshot() as tx:
        working = nodes.working(tx)
        found = node_settings.differences(tx)
    if not found:
        return well(f"The nodes that work have the same settings: {summarize([one.name for one in working])}.")
    return warning(node_settings.sentence_about(found), "Or see docs/nodes.md, if they are being changed.")


def data_folder(installation: Installation) -> Finding:
    """Check modes and owners of the folders, and that this is the portal's user."""
    settings = installation.settings
    if not settings.data_dir.is_dir():
        return problem(
            f"There is no {settings.data_dir}, and nothing else can be checked without it.",
            f"Set PORTAL_DATA_DIR to the portal's folder, or make one: {server_command('init')}. A lost one is brought"
            f" back from a backup: {server_command('restore FILE')}",
        )
    owner = settings.data_dir.stat().st_uid
    folders = {
        settings.data_dir: {0o711, 0o700},
        **{folder: {0o700} for folder in own_folders(settings)},
        settings.broker_dir: {FOLDER_MODE, 0o700},
    }
    if (keys := settings.secrets_dir / KEY_FOLDER).is_dir():
        folders[keys] = {0o700}
    found = Findings()
    if os.geteuid() != owner:
        name = _user(owner)
        found.warning(f"The data folder belongs to {name}.", f"Run the doctor as {name}: other checks depend on it.")
    for path, modes in folders.items():
        if not path.is_dir():
            found.problem(f"{path} is missing.", "Start the portal, which creates it.")
            continue
        status = path.lstat()
        if stat.S_IMODE(status.st_mode) not in modes:
            wanted = f"{max(modes):o}"
            found.problem(f"{path} has mode {stat.S_IMODE(status.st_mode):o}, not {wanted}.", f"chmod {wanted} {path}")
        if status.st_uid != owner and path != settings.broker_dir:
            found.problem(f"{path} belongs to {_user(status.st_uid)}.", f"chown {_user(owner)} {path}")
    return combine(found, f"{settings.data_dir} with its folders is as it should be.")


def secret_files(installation: Installation) -> Finding:
    """Check that nobody else can read the files of keys and secrets."""
    settings = installation.settings
    owner = settings.data_dir.stat().st_uid
    found, count = Findings(), 0
    for path in _secret_paths(installation):
        count += 1
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            found.problem(f"{path} is not a plain file.", f"Find out who created it, then remove it: rm {path}")
        elif status.st_mode & 0o077:
            mode = stat.S_IMODE(status.st_mode)
            found.problem(
                f"{path} has mode {mode:o}, not 600.", f"Others may have read it, so replace it, then: chmod 600 {path}"
            )
        elif status.st_uid != owner:
            found.problem(f"{path} belongs to {_user(status.st_uid)}.", f"chown {_user(owner)} {path}")
    key = settings.broker_file("server.key")
    if key.exists() and stat.S_IMODE(key.lstat().st_mode) & ~FILE_MODE:
        found.problem(f"{key} can be read by others.", f"Others may have read it, so replace it, then: chmod 640 {key}")
    return combine(found, f"{counted(count, 'file', 'files')} of keys and secrets can be read only by the owner.")


def _is_tenants_keys(settings: Settings, path: Path) -> bool:
    """Return whether this is the folder with the keys of further tenants' audit records, and not a link to one."""
    return path == settings.secrets_dir / KEY_FOLDER and stat.S_ISDIR(path.lstat().st_mode)


def _secret_paths(installation: Installation) -> Iterator[Path]:
    settings = installation.settings
    for folder in own_folders(settings):
        if folder.is_dir():
            for path in sorted(folder.iterdir()):
                yield from sorted(path.iterdir()) if _is_tenants_keys(settings, path) else (path,)
    yield from sorted(settings.data_dir.glob("before-restore.backup*"))
    environment = settings.data_dir / "operator.env"
    if environment.exists():
        yield environment
    url = sa.make_url(settings.database_url)
    if url.get_backend_name() == "sqlite":
        database = Path(url.database or "")
        yield from sorted(database.parent.glob(f"{database.name}*"))


def disk_space(installation: Installation) -> Finding:
    """Check the disk space where the portal and the broker write."""
    folders = {installation.settings.data_dir, installation.settings.broker_dir}
    free = {folder: shutil.disk_usage(folder).free for folder in folders if folder.is_dir()}
    if not free:
        return problem("There is no data folder.", "Set PORTAL_DATA_DIR to the portal's folder.")
    folder, least = min(free.items(), key=lambda item: item[1])
    said = f"{least // (1 << 20)} MiB are free in {folder}."
    advice = "Free disk space: without it neither a registration nor a revocation can be recorded."
    if least < TOO_LOW_BYTES:
        return problem(said, advice)
    return warning(said, advice) if least < LOW_BYTES else well(said)


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


# --- The database -----------------------------------------------------------------------------------------------------


def database(installation: Installation) -> Finding:
    """Check that the database answers, has the schema of this version, and keeps tenants apart."""
    url = sa.make_url(installation.settings.database_url)
    if url.get_backend_name() == "sqlite" and not Path(url.database or "").is_file():
        return problem(
            f"There is no database at {url.database}.",
            "Check PORTAL_DATA_DIR and PORTAL_DATABASE_URL. A lost one is brought back from a backup:"
            f" {server_command('restore FILE')}",
        )
    with installation.snapshot() as tx:
        found, expected = schema.revision(tx), schema.newest_revision()
        if found != expected:
            return problem(
                f"The database has schema {found}, this version of the portal needs {expected}.",
                "Start the portal of this version, which migrates an older schema, or install the version that wrote"
                " it.",
            )
        if tx.dialect.name == "sqlite":
            sound = tx.exec_driver_sql("PRAGMA quick_check(1)").scalar_one()
            if sound != "ok":
                return problem(
                    f"The database file is damaged: {sound}.",
                    f"Stop the portal and restore a backup: {server_command('restore FILE')}.",
                )
        elif (found_role := _unbound_role(tx, installation.settings)) is not None:
            return found_role
    return well(f"It answers, with schema {found}.")


def _unbound_role(tx: Connection, settings: Settings) -> Finding | None:
    """Warn if PostgreSQL does not keep the rows of tenants apart, where there are several or it is meant to."""
    role = grants.role_of(tx)
    if role.unbound is None or (len(tenants.tenant_ids(tx)) == 1 and not settings.database_owner_url):
        return None
    return warning(
        f"The database's role {role.name} {role.unbound}, so that only the portal's queries keep the rows of tenants"
        " apart, and not PostgreSQL itself.",
        "Let the portal run as a role that owns nothing (PORTAL_DATABASE_URL), and name the owner of the tables in"
        " PORTAL_DATABASE_OWNER_URL: see PostgreSQL in docs/operating.md.",
    )


def audit_record(installation: Installation) -> Finding:
    """Check each tenant's chain from the first entry to the last, and its newest checkpoint in the data folder."""
    entries = 0
    with installation.snapshot() as tx:
        names = tenants.tenant_ids(tx)
        for name in names:
            found, verdict = problem_of(tx, name, installation.settings, whole=True)
            if found is not None:
                whose = "" if len(names) == 1 else f"Tenant {name}: "
                return problem(whose + found, "Somebody changed the database by hand: compare it with a backup.")
            entries += verdict.entries
    whose = "" if len(names) == 1 else f" of {len(names)} tenants"
    return well(f"{counted(entries, f'entry{whose} is', f'entries{whose} are')} sound.")


def generation(installation: Installation) -> Finding:
    """Check that each broker that counts enforces the newest generation, now or within ``PORTAL_ENFORCE_TIMEOUT``."""
    with installation.snapshot() as tx:
        wanted = generations.get_broker_state(tx).generation
    deadline = time.monotonic() + installation.settings.enforce_timeout
    while True:
        with installation.snapshot() as tx:
            state, behind = generations.get_broker_state(tx), brokers.behind(tx, wanted)
            states = states_of(tx, installation.clock())
        if state.applied_generation >= wanted:
            silent = [one.sentence for one in states if one.is_silent and one.sentence]
            if silent:
                return warning(" ".join(silent), "All it has proven stays enforced; the next change is pending there.")
            who = "the broker was" if installation.settings.has_broker else "the brokers elsewhere were"
            return well(f"Last {who} seen to enforce generation {state.applied_generation}, the newest.")
        if time.monotonic() >= deadline:
            break
        time.sleep(0.1)
    if not behind:
        return problem(NONE_COUNTS, "docs/how-to/edge.md says how an agent joins.")
    if len(states) > 1 or not installation.settings.has_broker:
        return problem(
            f"Generation {wanted} is not enforced yet at {', '.join(behind)}: revocations made since"
            f" {state.applied_generation} are not in force there.",
            "portal broker list says what was last heard of each; declare one away that is gone for good.",
        )
    since = f" since {state.applied_at:%Y-%m-%d %H:%M:%S} UTC" if state.applied_at else ""
    return problem(
        f"The broker enforces generation {state.applied_generation}{since}, the newest is {wanted}:"
        " revocations made since are not in force.",
        "The portal keeps trying; its log and /readyz say what prevents it.",
    )


def links(installation: Installation) -> Finding:
    """Check that bundles whose links have expired are destroyed."""
    now = installation.clock()
    waiting = Delivery.status.in_(PENDING_DELIVERY)
    with installation.snapshot() as tx:
        count, oldest = tx.execute(sa.select(sa.func.count(), sa.func.min(Delivery.created_at)).where(waiting)).one()
        expired = tx.execute(
            sa.select(sa.func.count()).select_from(Delivery).where(waiting, Delivery.expires_at <= now - LATE)
        ).scalar_one()
    if expired:
        return warning(
            f"{counted(expired, 'bundle still exists', 'bundles still exist')} after the link has expired.",
            "A running portal destroys them within a minute: check that it runs, and its log.",
        )
    return well(
        counted(count, "bundle waits for its download", "bundles wait for their download")
        + (f", since {oldest:%Y-%m-%d %H:%M} UTC." if count else ".")
    )


def device_names(installation: Installation) -> Finding:
    """Check that no device's certificate has a name of the portal or the broker, whose settings may have changed."""
    own = own_names(installation.settings)
    with installation.snapshot() as tx:
        found = living_names(tx, sorted(own), now=installation.clock())
    shared = [f"{name} (device {device_id})" for name, device_id in found.items() if is_own_name(name, own)]
    if shared:
        return problem(
            f"Certificates of devices have names of the portal or the broker: {summarize(shared)}.",
            "If the device may be a TLS server, clients take it for the portal or the broker: revoke these devices, or"
            " give them other values and renew them with --overlap-hours 0.",
        )
    return well("No certificate of a device has a name of the portal or the broker.")


def certificate_profiles(installation: Installation) -> Finding:
    """Check that the name constraints of a tenant's CA, and of those above it, let its certificate profiles issue."""
    issuing: dict[str, IssuerRecord] = {}
    begun = [record for record in installation.issuers() if record.issuing_since is not None]
    for record in sorted(begun, key=lambda one: str(one.issuing_since)):
        issuing[record.tenant_id] = record
    found, count = Findings(), 0
    with installation.snapshot() as tx:
        for tenant_id, record in issuing.items():
            chain = (x509.load_der_x509_certificate(record.der), *decode_above(record.above))
            whose = "" if len(issuing) == 1 else f"Tenant {tenant_id}, "
            for listed in list_profiles(tx, tenant_id):
                count += 1
                if (violated := violated_constraint(listed.profile, chain)) is not None:
                    found.problem(
                        f"{whose}{listed.profile.name}: {violated[0]} {violated[1]}.",
                        "No device gets a certificate under it: change the profile (portal profile update), or have the"
                        " CA certified for these names.",
                    )
    if not count:
        return well("There is the built-in one alone.")
    them = "it" if count == 1 else "all of them"
    return combine(found, f"{count} beside the built-in one; the CA may issue by {them}.")


def tokens(installation: Installation) -> Finding:
    """Check that operator tokens expire, and that there is an admin's."""
    now, found = installation.clock(), Findings()
    with installation.snapshot() as tx:
        valid = [token for token in tenants.list_tokens(tx) if token.is_valid(now)]
    endless = [token.name for token in valid if token.expires_at is None]
    if endless:
        those = counted(len(endless), "operator token never expires", "operator tokens never expire")
        found.warning(
            f"{those}: {summarize(endless)}.",
            f"Create others that expire ({client_command('token create NAME --expires-in 90d')}), then revoke these"
            f" ({client_command('token revoke')}).",
        )
    own = [token for token in valid if token.tenant_id == installation.first_tenant and token.subject is None]
    if not any(token.role in (Role.SYSTEM, Role.ADMIN) for token in own):
        found.warning("No admin token is valid.", f"Make one, valid for a day: {server_command('admin-token')}")
    each = counted(len(valid), "operator token is valid, and", "operator tokens are valid; each")
    return combine(found, f"{each} expires.")
