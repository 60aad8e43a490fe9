"""The layers that import-linter does not see: what the root modules import, and who may sign."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SERVER = {"attestation", "broker", "core", "delivery", "operations", "pki", "store", "web", "workflows"}
PARTS = {"ca", "db", "broker_provisioning", "credential_delivery"}
MAY_IMPORT = {
    "config": {"core"},
    "ca": {"core", "pki"},
    "db": {"core", "pki", "store"},
    "broker_provisioning": {"core", "config", "broker", "pki"},
    "credential_delivery": {"core", "delivery", "pki"},
    "app": SERVER | PARTS | {"config"},
    "cli": {"commands"},
}
OURS = SERVER | set(MAY_IMPORT) | {"commands"}


def imported_by(path: Path) -> set[str]:
    """The top-level names of what a module imports, inside functions, too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found.add((node.module or "").partition(".")[0])
    return found


def test_the_root_modules_are_the_ones_of_the_architecture() -> None:
    assert {path.stem for path in ROOT.glob("*.py")} == set(MAY_IMPORT)


@pytest.mark.parametrize("module", MAY_IMPORT)
def test_a_root_module_imports_only_what_is_below_it(module: str) -> None:
    assert imported_by(ROOT / f"{module}.py") & OURS <= MAY_IMPORT[module]


@pytest.mark.parametrize(
    "path",
    [path for package in sorted(SERVER - {"pki"}) for path in sorted((ROOT / package).rglob("*.py"))],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_only_ca_and_pki_sign_certificates(path: Path) -> None:
    attributes = [node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
    assert not [name for name in attributes if name == "sign" or name.endswith("Builder")]
