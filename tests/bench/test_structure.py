"""The figures of `bench/structure`, on small trees made for them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support.structure import Module, ModuleTrace, figures, importers, read_modules

LONG = "def long(a):\n" + "    a += 1\n" * 40
BRANCHES = "def tangled(a):\n" + "".join(f"    if a == {n}:\n        return {n}\n" for n in range(11))
FILES = {
    "app.py": "import shop.till\nfrom shop import goods\nfrom shop.names import *\n",
    "shop/till.py": "from shop.goods import Apple\nfrom shop import names\nclass Box: pass\nclass _Hidden: pass\n",
    "shop/goods.py": f"class Apple: pass\nclass Box: pass\nclass _Hidden: pass\n{LONG}",
    "shop/names.py": "import shop.only_here\n" + "x = 1\n" * 79,
    "shop/only_here.py": BRANCHES,
    "shop/unused.py": "x = 1\n",
    "shop/worker.py": "if __name__ == '__main__':\n    print()\n",
    "tests/test_till.py": "import shop.unused\nclass Apple: pass\n",
    "migrations/versions/0001.py": "x = 1\n",
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    return tmp_path


def test_the_figures_of_a_tree(tree: Path) -> None:
    counted = figures(tree)
    assert counted["modules"] == 7
    assert counted["lines"] == 3 + 4 + 44 + 80 + 23 + 1 + 2
    assert counted["small_with_one_importer"] == [
        ("shop/only_here.py", "shop.names"),
        ("shop/till.py", "app"),
        ("shop/unused.py", "nothing"),
    ]
    assert counted["small_entry_points"] == ["app.py", "shop/worker.py"]
    assert counted["classes_of_one_name"] == {"Box": ["shop/goods.py", "shop/till.py"]}
    assert counted["long_functions"] == [("shop/goods.py", "long", 41)]
    [message] = counted["complex_functions"]
    assert message.startswith("shop/only_here.py:1 `tangled` is too complex (12")


def test_importers_are_found_however_the_import_is_written(tree: Path) -> None:
    modules: list[Module] = read_modules(tree, [name for name in FILES if not name.startswith(("tests", "migr"))])
    found = importers(modules)
    assert found["shop.goods"] == {"app", "shop.till"}
    assert found["shop.names"] == {"app", "shop.till"}
    assert found["shop.only_here"] == {"shop.names"}
    assert found["app"] == set()


def test_a_trace_holds_the_files_below_the_root_that_ran(tree: Path) -> None:
    texts = {"shop/a.py": "def f(g): return g()", "shop/b.py": "def g(): return 1", "tests/c.py": "def h(): 0"}
    namespaces: dict[str, dict[str, object]] = {name: {} for name in texts}
    for name, text in texts.items():
        exec(compile(text, str(tree / name), "exec"), namespaces[name])  # noqa: S102 - texts of this test
    f, g, h = namespaces["shop/a.py"]["f"], namespaces["shop/b.py"]["g"], namespaces["tests/c.py"]["h"]
    assert callable(f)
    assert callable(h)
    with ModuleTrace(tree) as trace:
        f(g)
        h()
        f(g)
    f(g)
    assert trace.files == {"shop/a.py", "shop/b.py"}
    assert trace.calls == {"shop/a.py": 2, "shop/b.py": 2}
    assert trace.changes == 4
