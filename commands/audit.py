"""The commands about the audit record: list it, export it, and verify an export by checkpoints, without the portal."""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from commands.context import FORCE_HELP, Remote, command, output_file, paging_options, saved_in
from commands.errors import CheckFailed, Misused
from commands.files import NewFile, read_input, reason, whole_file, write_new
from commands.names import DEVICE
from commands.output import clean, state, text, time_of
from commands.times import Time

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

MAX_LINE = 1 << 20  # bytes
MAX_SIGNATURES = 100  # of a note, of which one is the portal's and the others are witnesses'
# What is hashed of an entry, in this order.
HASHED = (
    "tenant_id", "at", "number", "previous_hash", "actor", "action", "object", "outcome", "request_id", "address",
    "detail",
)  # fmt: skip
_KEY = re.compile(r"([^+\s]+)\+([0-9a-f]{8})\+([A-Za-z0-9+/=]+)")
_SIZE = re.compile("0|[1-9][0-9]{0,18}")


class AuditGroup(click.Group):
    """Lists the record if no other command is named."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put ``list`` before options that are none of the group's."""
        if not args or (args[0] not in self.commands and args[0] not in ctx.help_option_names):
            args = ["list", *args]
        return super().parse_args(ctx, args)


@click.group("audit", cls=AuditGroup)
def audit() -> None:
    """Read the audit record, export it, verify it.

    Without a command: list it.
    """


@command(
    "list", audit, examples=["portal audit --limit 20", "portal audit --action device:revoke --since 30d --all --json"]
)
@click.option("--action", metavar="TAG", help="Only this action, such as device:register.")
@click.option("--actor", metavar="NAME", help="Only actions of this actor, by the name of its token or all of it.")
@click.option("--device", "device_id", type=DEVICE, metavar="DEVICE", help="Only actions on this device.")
@click.option("--object", metavar="OBJECT", help="Only actions on this object, such as application:ID.")
@click.option("--outcome", type=click.Choice(("done", "refused")), help="Only actions with this outcome.")
@click.option("--since", type=Time(past=True), metavar="TIME", help="Only from a date, a time, or 12h ago on.")
@click.option("--until", type=Time(past=True), metavar="TIME", help="Only before a date, a time, or 12h ago.")
@paging_options
def list_entries(
    portal: Remote,
    /,
    limit: int,
    all_: bool,
    cursor: str | None,
    device_id: str | None,
    **filters: str | None,
) -> None:
    """Read the audit record, newest entry first.

    When piped, prints tab-separated lines: time, actor, action, object, outcome, address, request id, detail.
    """
    if device_id is not None and filters["object"] is not None:
        raise click.UsageError("Use either --device or --object.")
    filters["object"] = filters["object"] if device_id is None else f"device:{device_id}"
    answer = portal.client.read_pages("/audit", "entries", limit=None if all_ else limit, cursor=cursor, **filters)
    portal.out.table(
        answer,
        "entries",
        {
            "time": time_of("at"),
            "actor": "actor",
            "action": "action",
            "object": "object",
            "outcome": lambda row: state(row.get("outcome")),
            "address": "address",
            "request id": "request_id",
            "detail": lambda row: text(row.get("detail") or None),
        },
        empty="No matching entries." if any(filters.values()) else "No entries yet.",
        spare=("address", "request id", "detail"),
        whole=("actor", "action", "object", "outcome"),
    )


@command("export", audit, examples=["portal audit export --out audit.ndjson"])
@output_file("Save it in FILE.")
@click.option("--force", is_flag=True, help=FORCE_HELP)
def export(portal: Remote, out: Path | None, file: Path | None, force: bool) -> None:
    """Save the whole audit record with its hashes.

    A JSON object a line, the oldest entry first.
    """
    path = saved_in(out, file, force=force)
    size = 0
    with whole_file(path) as writer:
        for part in portal.client.stream("/audit/export"):
            writer.write(part)
            size += len(part)
    portal.out.result({"file": str(path), "size": size}, done=f"Saved the audit record in {path}")
    portal.out.next_step(f"portal audit verify {shlex.quote(str(path))} --key KEY --checkpoint FILE")


@command("checkpoint", audit, examples=["portal audit checkpoint", "portal audit checkpoint --out today.checkpoint"])
@click.option("--out", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False), help="Save it in FILE.")
@click.option("--force", is_flag=True, help=FORCE_HELP)
def checkpoint(portal: Remote, out: Path | None, force: bool) -> None:
    """Print or save the newest checkpoint of the audit record.

    It signs how many entries the record has, and what they are. Keep it where the portal's administrators cannot
    change it: whoever has it can tell later whether they are still the same.
    """
    note = portal.client.call("GET", "/audit/checkpoint", anonymous=portal.settings.token is None).body
    if len(_lines_of(note)) < 3:
        raise CheckFailed("The answer of the portal is not a checkpoint; check whether a proxy answers.")
    if out is not None:
        write_new(out, NewFile(note), force=force)
    if portal.out.as_json:
        portal.out.json({"checkpoint": note.decode(), "file": str(out) if out else None})
    elif out is None:
        portal.out.raw("\n".join(map(clean, note.decode().splitlines())))
    else:
        portal.out.done(f"Saved the checkpoint in {out}")


@command("key", audit, examples=["portal audit key"])
def key(portal: Remote) -> None:
    """Print the public key of the checkpoints.

    Compare it with what portal-server audit key prints on the portal's machine, and keep it with the checkpoints.
    """
    found = portal.client.call("GET", "/audit/key", anonymous=portal.settings.token is None).body
    lines = found.decode("ascii", "replace").split()
    if len(lines) != 1 or _KEY.fullmatch(lines[0]) is None:
        raise CheckFailed("The answer of the portal is not a key; check whether a proxy answers.")
    portal.out.result({"key": lines[0]})
    if not portal.out.as_json:
        portal.out.raw(clean(lines[0]))


@command(
    "verify",
    audit,
    connects=False,
    examples=["portal audit verify audit.ndjson --key audit.key --checkpoint monday.checkpoint --checkpoint today"],
)
@click.argument("file", help="An export of the record; - for standard input.")
@click.option("--key", "keys", metavar="KEY", multiple=True, required=True, help="Public key, or a file with it.")
@click.option(
    "--checkpoint", "notes", metavar="FILE", multiple=True, required=True, help="A checkpoint to check by. Repeatable."
)
def verify(portal: Remote, file: str, keys: tuple[str, ...], notes: tuple[str, ...]) -> None:
    """Verify an export of the audit record, offline.

    It must agree with each checkpoint. The more checkpoints you kept, the more is certain: an entry that the oldest
    one signs has not changed since. The exit status is 1 if anything was changed, removed, inserted or moved.
    """
    verifiers = [CheckpointKey.read(given) for given in keys]
    checkpoints = [_checkpoint(path, verifiers) for path in notes]
    try:
        with click.open_file(file, "rb") as source:
            found = check_export(source, checkpoints)
    except OSError as error:
        raise Misused(f"{file} cannot be read: {reason(error)}.") from None
    signed = max(one.size for one in checkpoints)
    answer = {"entries": found.entries, "hash": found.head, "signed_entries": signed, "checkpoints": len(checkpoints)}
    portal.out.result(answer, done=f"All {found.entries} entries are sound; checkpoints sign the first {signed}.")


# --- Keys and checkpoints: c2sp.org/signed-note, c2sp.org/tlog-checkpoint -------------------------------------------


@dataclass(frozen=True, slots=True)
class CheckpointKey:
    """A public key of checkpoints: its name, its id of 4 bytes, and the Ed25519 key."""

    name: str
    id: bytes
    key: Ed25519PublicKey

    @classmethod
    def read(cls, given: str) -> CheckpointKey:
        """Read a key, or the file that it is in; raises ``Misused``."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        content = given if _KEY.fullmatch(given) else read_input(given, limit=4096).decode("utf-8", "replace").strip()
        match = _KEY.fullmatch(content)
        encoded = _decoded(match[3]) if match else b""
        if match is None or len(encoded) != 33 or encoded[0] != 1:
            raise Misused(f"{clean(given)} is not a public key of checkpoints (see: portal audit key).")
        wanted = hashlib.sha256(match[1].encode() + b"\n" + encoded).digest()[:4]
        if wanted.hex() != match[2]:
            raise Misused(f"{clean(given)} is damaged: the key's id does not fit it.")
        return cls(match[1], wanted, Ed25519PublicKey.from_public_bytes(encoded[1:]))

    def signs(self, body: bytes, signatures: list[str]) -> bool:
        """Return whether one of the signature lines is this key's; raises ``CheckFailed`` if one is, but is wrong."""
        from cryptography.exceptions import InvalidSignature

        start = f"\u2014 {self.name} "
        decoded = [_decoded(line.removeprefix(start)) for line in signatures if line.startswith(start)]
        own = [signature[4:] for signature in decoded if signature[:4] == self.id]
        try:
            for signature in own:
                self.key.verify(signature, body)
        except InvalidSignature:
            raise CheckFailed(f"A checkpoint has a forged signature of {clean(self.name)}.") from None
        return bool(own)


@dataclass(frozen=True, slots=True)
class GivenCheckpoint:
    """The content of a checkpoint whose signature is good: how many entries, and the root of their Merkle tree."""

    place: str
    size: int
    root: bytes


def _checkpoint(path: str, keys: list[CheckpointKey]) -> GivenCheckpoint:
    lines = _lines_of(read_input(path, limit=64 * 1024))
    end = len(lines) - 1 - lines[::-1].index("") if "" in lines else 0
    body = "".join(f"{line}\n" for line in lines[:end]).encode()
    signers = [key for key in keys if len(lines) - end <= MAX_SIGNATURES and key.signs(body, lines[end + 1 :])]
    if end < 3 or not signers:
        raise CheckFailed(f"{clean(path)} is not a checkpoint that one of the given keys has signed.")
    origin, size, root = lines[0], lines[1], _decoded(lines[2])
    if origin not in [key.name for key in signers] or not _SIZE.fullmatch(size) or len(root) != 32:
        raise CheckFailed(f"{clean(path)} is signed, but it is not a checkpoint of the key's log.")
    return GivenCheckpoint(clean(path), int(size), root)


def _lines_of(note: bytes) -> list[str]:
    """Return the lines of a note, none if it is no text that ends with a newline."""
    try:
        content = note.decode()
    except UnicodeDecodeError:
        return []
    return content[:-1].split("\n") if content.endswith("\n") else []


def _decoded(encoded: str) -> bytes:
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        return b""


# --- The record -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Verified:
    """How many entries an export has, all sound, and the hash of the last one, in hex."""

    entries: int
    head: str


def check_export(source: IO[bytes], checkpoints: list[GivenCheckpoint]) -> Verified:
    """Check the chain of an export's entries, and its Merkle tree by each checkpoint; raises ``CheckFailed``.

    The leaves of the tree (RFC 6962 section 2.1) are the canonical JSON texts that the chain hashes.
    """
    number, previous, subtrees = 0, "0" * 64, list[tuple[int, bytes]]()
    sizes = {one.size for one in checkpoints}
    roots = {0: _root(subtrees)}
    for line in _entries(source):
        entry = _entry(line, number + 1)
        leaf = json.dumps([entry[name] for name in HASHED], sort_keys=True, separators=(",", ":")).encode()
        if entry["number"] != number + 1:
            raise CheckFailed(f"Entry {number + 1} is missing: after {number} comes {entry['number']}.")
        if entry["previous_hash"] != previous:
            raise CheckFailed(
                f"Entry {number + 1} does not follow entry {number}: one was replaced, inserted or moved."
            )
        if entry["hash"] != hashlib.sha256(leaf).hexdigest():
            raise CheckFailed(f"Entry {number + 1} was altered: its hash is not that of its content.")
        number, previous = number + 1, entry["hash"]
        _grow(subtrees, leaf)
        if number in sizes:
            roots[number] = _root(subtrees)
    _compare(checkpoints, roots, number)
    return Verified(number, previous)


def _compare(checkpoints: list[GivenCheckpoint], roots: Mapping[int, bytes], entries: int) -> None:
    good = 0
    for one in sorted(checkpoints, key=lambda one: one.size):
        if one.size > entries:
            raise CheckFailed(
                f"The export ends with entry {entries}, but {one.place} signs {one.size}: the end of the record was"
                " removed, or the export is older than the checkpoint."
            )
        if roots[one.size] != one.root:
            between = f"between {good + 1} and {one.size}"
            raise CheckFailed(
                f"The entries up to {one.size} are not those that {one.place} signs: one {between} was changed,"
                " inserted or removed, and the chain computed again."
            )
        good = one.size


def _entries(source: IO[bytes]) -> Iterator[bytes]:
    while line := source.readline(MAX_LINE):
        if not line.endswith(b"\n"):
            raise CheckFailed("A line of the export is cut off or too long; export the record again.")
        yield line[:-1]


def _entry(line: bytes, number: int) -> dict[str, Any]:
    """Return an entry; raises ``CheckFailed`` unless the line is just as the portal writes it.

    Else another reader, for example of an object with two fields of one name, could find another entry in it.
    """
    try:
        entry = json.loads(line)
        same = json.dumps(entry, sort_keys=True, separators=(",", ":"), allow_nan=False).encode() == line
    except (ValueError, RecursionError):
        entry, same = None, False
    if not same or not isinstance(entry, dict) or set(entry) != {*HASHED, "hash"}:
        raise CheckFailed(f"Line {number} of the export is not an entry as the portal writes it.")
    return entry


def _grow(subtrees: list[tuple[int, bytes]], leaf: bytes) -> None:
    """Add a leaf to a tree, held as the sizes and roots of its perfect subtrees, from left to right."""
    size, root = 1, hashlib.sha256(b"\0" + leaf).digest()
    while subtrees and subtrees[-1][0] == size:
        size, root = size * 2, hashlib.sha256(b"\1" + subtrees.pop()[1] + root).digest()
    subtrees.append((size, root))


def _root(subtrees: list[tuple[int, bytes]]) -> bytes:
    if not subtrees:
        return hashlib.sha256(b"").digest()
    roots = [root for _, root in reversed(subtrees)]
    return functools.reduce(lambda right, left: hashlib.sha256(b"\1" + left + right).digest(), roots)
