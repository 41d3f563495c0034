"""The house rules that no linter checks: imports, packaging, size, and what the files may name."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("cache", "configs", "pipeline", "stages")
BENCHMARKS = "benchmarks"  # may import all of them, and is no part of the package
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# What each folder may import of the others: pipeline -> stages -> cache, and nothing the other way.
MAY_IMPORT = {
    "cache": {"cache"},
    "configs": {"configs"},
    "stages": {"stages", "cache"},
    "pipeline": {"pipeline", "stages", "cache", "configs"},
}
LIMIT_LINES = 300  # a module stays under it
HARD_LIMIT_LINES = 350


def modules(folder: str) -> list[Path]:
    """The Python files of a folder, tracked or not."""
    return sorted((ROOT / folder).rglob("*.py"))


def imported_names(module: Path) -> Iterator[str]:
    """The absolute dotted names that a module's import statements mention, wherever they stand."""
    for node in ast.walk(ast.parse(module.read_text(), filename=str(module))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = ("teacher_cache", *module.relative_to(ROOT).parts[: -node.level])
                base = ".".join((*package, base)).rstrip(".")
            yield from (f"{base}.{alias.name}" for alias in node.names)


def tracked_files() -> list[Path]:
    """What git would commit: tracked files and new ones that it does not ignore, links left out."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip(f"needs a git checkout: {listed.stderr.strip()}")
    paths = (ROOT / name for name in listed.stdout.split("\0") if name)
    return sorted({path for path in paths if path.is_file() and not path.is_symlink()})


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_point_one_way(folder: str) -> None:
    for module in modules(folder):
        for name in imported_names(module):
            parts = name.split(".")
            assert parts[0] not in FOLDERS, f"{module}: `{name}` lacks its `teacher_cache.`"
            assert parts[0] != BENCHMARKS, f"{module} may not import `{name}`"
            if parts[0] == "teacher_cache":
                assert parts[1] in MAY_IMPORT[folder], f"{module} may not import `{name}`"


def test_cache_imports_no_model_library() -> None:
    for module in modules("cache"):
        for name in imported_names(module):
            assert name.split(".")[0] not in {"torch", "transformers"}, f"{module}: `{name}`"


def test_cache_loads_no_model_library() -> None:
    """Not even through what it imports: a reader needs no torch on the machine."""
    names = [
        ".".join(("teacher_cache", *path.relative_to(ROOT).with_suffix("").parts))
        for path in modules("cache")
    ]
    script = (
        "import importlib, sys\n"
        f"for name in {names!r}: importlib.import_module(name.removesuffix('.__init__'))\n"
        "print(*sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stderr
    assert not loaded.stdout.strip(), f"importing cache loads {loaded.stdout.strip()}"


def test_every_package_is_listed() -> None:
    there = {
        ".".join(("teacher_cache", *path.parent.relative_to(ROOT).parts))
        for folder in FOLDERS
        for path in modules(folder)
    }
    listed = PYPROJECT["tool"]["setuptools"]["packages"]
    assert sorted(there) == listed, "pyproject.toml, [tool.setuptools] packages"
    for name in listed:
        folder = ROOT.joinpath(*name.split(".")[1:])
        assert (folder / "__init__.py").is_file(), f"{folder} lacks its __init__.py"


def test_pyright_sees_every_folder() -> None:
    """By the link in typings/, so that a class is one type (pyproject.toml says more)."""
    included = set(PYPROJECT["tool"]["pyright"]["include"])
    for path in tracked_files():
        top = path.relative_to(ROOT).parts[0]
        if path.suffix == ".py" and top not in FOLDERS:
            assert top in included, f"pyproject.toml: pyright does not check {top}"
    for folder in FOLDERS:
        link = ROOT / "typings" / "teacher_cache" / folder
        assert link.resolve() == ROOT / folder
        assert str(link.relative_to(ROOT)) in included


def test_wheel_contains_everything(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for folder in FOLDERS:
        copytree(ROOT / folder, source / folder, ignore=ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    built = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps"),
            *("--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)),
        ],
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        f"teacher_cache/{path.relative_to(source).as_posix()}"
        for folder in FOLDERS
        for path in (source / folder).rglob("*")
        if path.suffix in {".py", ".yaml"} or path.name == "py.typed"
    }
    assert wanted <= inside, f"missing from the wheel: {sorted(wanted - inside)}"
    tops = {name.split("/")[0] for name in inside}
    assert tops == {"teacher_cache", wheel.name.split("-py3")[0] + ".dist-info"}


def test_modules_are_short() -> None:
    for folder in (*FOLDERS, BENCHMARKS):
        for path in modules(folder):
            lines = len(path.read_text().splitlines())
            assert lines < HARD_LIMIT_LINES, f"{path} has {lines} lines: split it"
            if lines >= LIMIT_LINES:
                warnings.warn(f"{path} has {lines} lines: split it soon", stacklevel=1)


def test_every_config_begins_with_its_command() -> None:
    yamls = sorted((ROOT / "configs").glob("*.yaml"))
    assert yamls, "configs/ holds no YAML"
    for path in yamls:
        first = path.read_text().splitlines()[0]
        assert re.match(rf"# pipe run --config {re.escape(path.stem)}\b", first), (
            f"{path} begins with {first!r}, not with `# pipe run --config {path.stem}`"
        )


# Registries are the user's own business (pip and npm are configured where they run); torch's
# public index of CPU builds is the one address that the README has to give.
CPU_TORCH_INDEX = "https://download.pytorch." + "org/whl/cpu"
HOSTS = re.compile(
    r"pypi\.org|pythonhosted\.org|registry\.npmjs|anaconda\.(?:org|com)|deb\.debian\.org"
    r"|download\.pytorch\.org|mirrors?\.[a-z]+\.|index-url[ =]+https?:"
)
HOMES = re.compile(r"(?<![\w.}])/(?:home|Users|root)/\w|[A-Z]:\\Users")


def test_no_file_names_a_registry_or_a_machine() -> None:
    places = [str(path) + "/" for path in (ROOT, Path.home()) if len(path.parts) > 2]
    for path in tracked_files():
        text = path.read_bytes().decode("utf-8", errors="replace")
        if path.name == "README.md":
            text = text.replace(CPU_TORCH_INDEX, "")
        for found in (HOSTS.search(text), HOMES.search(text)):
            assert not found, f"{path} names {found.group()!r}"
        assert not any(place in text for place in places), f"{path} names a path of this machine"
