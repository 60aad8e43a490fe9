"""The house: who may import whom, how long a file may be, and that each file says its one job."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# From the top: a room imports rooms of the floors below its own and none beside it. ``NAME_*`` stands for every
# module of that prefix, all one room; where two entries fit a module, the longer one counts.
FLOORS = (
    {"app"},
    {"admin_*"},
    {"serving_*", "jobs_*", "api", "web", "backup_*", "doctor_*"},
    {"installation_*"},
    {"bulk_*", "monitoring", "readiness"},
    {"onboarding_*", "webhooks_*", "inventory", "operators", "responder_*"},
    {"enforcement_*"},
    {"authority_*", "restore_journal"},
    {"audit", "access", "events"},
    {"ca_*", "ca_keys", "db_*", "broker_*", "credential_*", "transport"},
    {"ca_pkcs8", "ca_signatures"},  # these four: what certificates, the keeping of keys and the broker's checks share
    {"ca_algorithms", "ca_parsing", "ca_pem"},
    {"lifecycle", "topics"},
    {"logs", "metrics", "throttle"},
    {"config_*", "failpoints", "files"},
    {"errors", "failpoints", "turnstile", "processors"},
)
FLOOR_OF = {room: len(FLOORS) - number for number, floor in enumerate(FLOORS) for room in floor}
# Stands beside the house and talks to it over HTTP.
BESIDE = "cli_*"

MOST_LINES = {
    "app": 220,
    "api": 200,
    "ca_keys": 150,
    "credential_delivery": 250,
    "audit": 150,
    "admin": 250,
    "jobs": 200,
    "lifecycle": 80,
    "errors": 400,
    "config": 350,
}
MOST_LINES_OF_ANY = 400

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for folder in (".", "api", "web")
    for path in sorted((ROOT / folder).glob("*.py"))
}


def room_of(module: str) -> str:
    """The room that a module belongs to, as ``FLOORS`` names it."""
    name = module.partition(".")[0]
    fitting = [room for room in (*FLOOR_OF, BESIDE) if name == room or is_of_prefix(name, room)]
    assert fitting, f"{module} stands on no floor: decide on which, in FLOORS"
    return max(fitting, key=lambda room: len(room.removesuffix("*")))


def is_of_prefix(name: str, room: str) -> bool:
    return room.endswith("_*") and (name + "_").startswith(room.removesuffix("*"))


def imports_of(module: str) -> set[str]:
    """The project's modules that a module imports when it runs, inside functions, too."""
    found: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(MODULES[module].read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue  # for types alone
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
        waiting.extend(ast.iter_child_nodes(node))
    return found & set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_downward_and_never_sideways(module: str) -> None:
    room = room_of(module)
    for imported in imports_of(module):
        other = room_of(imported)
        if other == room:
            continue
        assert room != BESIDE, f"{module} imports {imported}: it speaks HTTP only"
        assert other != BESIDE, f"{module} imports {imported}, which stands beside the house"
        assert FLOOR_OF[other] < FLOOR_OF[room], f"{module} imports {imported}, which is no floor below it"


def test_every_floor_is_that_of_a_room_there_is() -> None:
    planned = {"web"}
    assert {room_of(module) for module in MODULES} == set(FLOOR_OF) - planned | {BESIDE}


@pytest.mark.parametrize("module", MODULES)
def test_a_file_is_short_enough_to_be_read(module: str) -> None:
    most = MOST_LINES.get(module, MOST_LINES.get(module.partition(".")[0], MOST_LINES_OF_ANY))
    assert len(MODULES[module].read_text().splitlines()) <= most


@pytest.mark.parametrize("module", MODULES)
def test_a_module_opens_with_one_sentence_that_says_its_one_job(module: str) -> None:
    docstring = ast.get_docstring(ast.parse(MODULES[module].read_text()))
    assert docstring is not None
    assert docstring.endswith(".")
    assert ". " not in docstring.replace("\n", " ")
    assert "\n\n" not in docstring


@pytest.mark.parametrize("module", [module for module in MODULES if not room_of(module).startswith(("ca_", "cli_"))])
def test_the_ca_is_the_only_room_that_signs_certificates(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text())
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert not [call for call in calls if isinstance(call, ast.Attribute) and call.attr == "sign"]
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr.endswith("Builder")]


@pytest.mark.parametrize("module", [module for module in MODULES if module.partition(".")[0] in ("api", "web")])
def test_the_ways_in_hold_no_sql_and_no_x509(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not [name for name in imported if name.startswith(("sqlalchemy", "cryptography", "sqlite3", "psycopg"))]
