"""The rules of the tree: who may import whom, where torch may be, what our names are."""

import ast
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "common": {"common"},
    "kvtransfer": {"common", "kvtransfer"},
    "prefill": {"common", "kvtransfer", "prefill"},
    "decode": {"common", "kvtransfer", "decode"},
    "router": {"common", "router"},
    "benchmarks": {"common", "kvtransfer", "prefill", "decode", "router", "benchmarks"},
    "deploy": {"common", "kvtransfer", "prefill", "decode", "router", "benchmarks", "deploy"},
}
TORCH_PACKAGES = ("common.model", "prefill", "decode", "benchmarks")
TORCH_MODULES = ("common.kv.pool", "common.kv.stage")
TORCH_SCRIPTS = ("deploy.demo",)
"""Beside the packages that compute: the pool, and what is never part of a serving process."""
FORBIDDEN = ("pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib")
MOST_LINES = 600
SUPERVISOR = ("deploy.cli", "deploy.up", "deploy.child")
"""Entry points of the launcher, which starts everything and must stay light."""


def sources(package: str) -> Iterator[Path]:
    return (ROOT / package).rglob("*.py")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports, at any depth, absolute or relative.

    `from a import b` gives `a` and `a.b`, since `b` may be a module.
    """
    found: set[str] = set()
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            found.add(name)
            found.update(f"{name}.{alias.name}" for alias in node.names)
    return found


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def ours() -> Iterator[tuple[str, set[str]]]:
    for package in MAY_IMPORT:
        for path in sources(package):
            yield module_name(path), imports(path)


def test_every_package_is_listed() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages == {*MAY_IMPORT, "tests"}


def test_imports_go_down_the_table() -> None:
    wrong = [
        f"{module} imports {name}"
        for module, names in ours()
        for name in names
        if (top := name.split(".")[0]) in {*MAY_IMPORT, "tests"}
        and top not in MAY_IMPORT[module.split(".")[0]]
    ]
    assert wrong == []


def test_router_does_not_know_the_model_or_the_pool() -> None:
    wrong = [
        f"{module} imports {name}"
        for module, names in ours()
        if within(module, "router")
        for name in names
        if within(name, "common.model") or within(name, "common.kv")
    ]
    assert wrong == []


def test_torch_only_where_it_computes() -> None:
    wrong = [
        module
        for module, names in ours()
        if any(within(name, "torch") for name in names)
        and not any(within(module, allowed) for allowed in (*TORCH_PACKAGES, *TORCH_SCRIPTS))
        and module not in TORCH_MODULES
    ]
    assert wrong == []


def test_nothing_that_can_run_code_is_deserialised() -> None:
    wrong = [
        f"{module} imports {name}"
        for module, names in ours()
        for name in names
        if name.split(".")[0] in FORBIDDEN
    ]
    assert wrong == []


def test_files_are_short() -> None:
    long = {
        module_name(path): count
        for package in MAY_IMPORT
        for path in sources(package)
        if (count := len(path.read_text().splitlines())) > MOST_LINES
    }
    assert long == {}


def loads_torch(*modules: str) -> bool:
    """Whether a fresh interpreter that imports these modules has torch loaded afterwards."""
    program = f"import sys, {', '.join(modules)}; print('torch' in sys.modules)"
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=ROOT, check=True, timeout=60, stdout=subprocess.PIPE)
    return result.stdout.strip() == b"True"


def test_the_check_for_torch_bites() -> None:
    assert loads_torch("common.kv.pool")


@pytest.mark.parametrize("package", ["router", "kvtransfer"])
def test_packages_without_torch(package: str) -> None:
    assert not loads_torch(*sorted(module_name(path) for path in sources(package)))


def test_supervisor_never_loads_torch() -> None:
    assert not loads_torch(*SUPERVISOR, "common.model.hub", "common.model.spec")


def test_our_top_level_names_are_ours() -> None:
    owners = importlib.metadata.packages_distributions()
    for package in (*MAY_IMPORT, "tests"):
        assert set(owners.get(package, ())) <= {"tandem"}, package
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.origin is not None
        assert Path(spec.origin).parent == ROOT / package


def test_every_module_has_its_line_in_the_architecture() -> None:
    """`- `file`: what it is`, under the heading of its folder."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    sections = re.findall(r"\*\*`(\S+)/`.*\*\*\n\n((?:- .+\n)+)", page)
    named = {
        f"{folder}/{file}"
        for folder, lines in sections
        for file in re.findall(r"^- `([^`]+)`: \S", lines, re.MULTILINE)
    }
    modules = {
        path.relative_to(ROOT).as_posix()
        for package in MAY_IMPORT
        for path in sources(package)
        if path.name != "__init__.py"
    }
    assert modules <= named, f"docs/architecture.md lacks {sorted(modules - named)}"
    gone = {name for name in named if not (ROOT / name).is_file()}
    assert not gone, f"docs/architecture.md still has {sorted(gone)}"
