"""The house rules that no linter checks: imports, packaging, and what the files may name."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest

from teacher_cache.cache.codecs.named import CODECS
from teacher_cache.pipeline.options import CacheTeacherOptions, EvaluateCommandOptions
from teacher_cache.stages.tasks import TASKS
from teacher_cache.stages.training.config import TrainStudentConfig

ROOT = Path(__file__).parents[1]
FOLDERS = ("cache", "configs", "pipeline", "stages")
PACKAGE = ROOT / "teacher_cache"
BENCHMARKS = "benchmarks"  # may import all of them, and is no part of the package
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# What each folder may import of the others: pipeline -> stages -> cache, and nothing the other way.
MAY_IMPORT = {
    "cache": {"cache"},
    "configs": {"configs"},
    "stages": {"stages", "cache"},
    "pipeline": {"pipeline", "stages", "cache", "configs"},
}


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


def test_every_folder_is_linked_into_the_package() -> None:
    """So that pyright, an editor and a newcomer's search find what an import names."""
    inside = {path.name for path in PACKAGE.iterdir() if path.is_symlink()}
    assert inside == set(FOLDERS)
    for folder in FOLDERS:
        assert (PACKAGE / folder).resolve() == ROOT / folder
        for module in modules(folder):
            assert (module.parent / "__init__.py").is_file(), f"{module.parent} is no package"


def test_pyright_checks_every_python_file() -> None:
    included = set(PYPROJECT["tool"]["pyright"]["include"])
    for path in tracked_files():
        top = path.relative_to(ROOT).parts[0]
        if path.suffix == ".py" and top not in FOLDERS:
            assert top in included, f"pyproject.toml: pyright does not check {top}"


def test_public_names_are_there_and_load_nothing_before() -> None:
    script = (
        "import sys, teacher_cache as package\n"
        "assert 'torch' not in sys.modules and set(package.__all__) <= set(dir(package))\n"
        "for name in package.__all__: getattr(package, name)\n"
        "try: package.nothing_of_ours\n"
        "except AttributeError as error: print(error)"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "nothing_of_ours" in ran.stdout, ran.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a release is built from: the tracked tree, its links as links."""
    source = tmp_path_factory.mktemp("source")
    for folder in (*FOLDERS, PACKAGE.name):
        copytree(
            ROOT / folder, source / folder, symlinks=True, ignore=ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    return source


def packaged_files() -> set[str]:
    """By the names that an installed package gives them."""
    suffixes = {".py", ".yaml", ".jinja"}
    found = {
        f"teacher_cache/{path.relative_to(ROOT).as_posix()}"
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.suffix in suffixes
    }
    return found | {"teacher_cache/__init__.py", "teacher_cache/py.typed"}


def build(kind: str, source: Path, out: Path) -> Path:
    """A wheel or an sdist, without an index and without a build environment."""
    script = f"import setuptools.build_meta as b, sys; b.build_{kind}(sys.argv[1])"
    built = subprocess.run(
        [sys.executable, "-c", script, str(out)], cwd=source, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    (found,) = out.iterdir()
    return found


def names_in_wheel(wheel: Path) -> set[str]:
    """All files of it but its own metadata."""
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.split("/")[0] for name in names}
    assert tops == {"teacher_cache", wheel.name.split("-py3")[0] + ".dist-info"}
    return {name for name in names if name.startswith("teacher_cache/")}


def test_wheel_contains_everything(source: Path, tmp_path: Path) -> None:
    assert names_in_wheel(build("wheel", source, tmp_path)) == packaged_files()


def test_a_wheel_of_the_sdist_is_the_same(source: Path, tmp_path: Path) -> None:
    sdist = build("sdist", source, tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = tmp_path / sdist.name.removesuffix(".tar.gz")
    assert names_in_wheel(build("wheel", unpacked, tmp_path / "wheel")) == packaged_files()


def test_an_editable_install_adds_the_package_and_no_other_name(
    source: Path, tmp_path: Path
) -> None:
    installed = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"),
            *("--no-build-isolation", "--target", str(tmp_path), "-e", str(source)),
        ],
        capture_output=True,
        text=True,
    )
    assert installed.returncode == 0, installed.stderr
    script = (
        "import importlib.util as u, site, sys\n"
        f"site.addsitedir({str(tmp_path)!r})\n"
        "from teacher_cache.cache import errors\n"
        f"print(errors.__file__.startswith({str(source)!r}),"
        f" *[name for name in {FOLDERS!r} if u.find_spec(name)])"
    )
    ran = subprocess.run(
        [sys.executable, "-P", "-S", "-c", script], cwd=tmp_path, capture_output=True, text=True
    )
    assert ran.stdout.split() == ["True"], ran.stdout + ran.stderr


MOST_QUESTIONS = 0
# 175 were enough for what the house held when it was rebuilt. Devices, stores, pages and kinds of
# heads are concepts of their own, and one concept a module weighs more than the count.
MOST_MODULES = 205


def asks_the_task(node: ast.AST) -> bool:
    """Whether code decides by the task: a comparison with its name, or a helper that makes one."""
    if isinstance(node, ast.Compare):
        return any(getattr(one, "value", None) in TASKS for one in ast.walk(node))
    if isinstance(node, ast.MatchValue):
        return getattr(node.value, "value", None) in TASKS
    if isinstance(node, ast.Call):
        return getattr(node.func, "id", getattr(node.func, "attr", "")) == "task_of"
    return getattr(node, "id", getattr(node, "arg", None)) == "is_language_model"


def test_few_places_ask_which_task_it_is() -> None:
    places = [
        f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        for folder in FOLDERS
        for path in modules(folder)
        for node in ast.walk(ast.parse(path.read_text()))
        if asks_the_task(node)
    ]
    assert len(places) <= MOST_QUESTIONS, f"these ask for the task: {places}"


@pytest.mark.parametrize(
    ("code", "asks"),
    [
        ('task == "lm"', True),
        ('settings.get("task") != "classification"', True),
        ('task in ("lm", "other")', True),
        ("task_of(runs)", True),
        ("runs.task_of([run])", True),
        ("f(is_language_model=True)", True),
        ('match task:\n    case "lm":\n        pass', True),
        ('TASKS["lm"]', False),
        ('dict(task="lm")', False),
    ],
)
def test_the_count_sees_questions_and_nothing_else(code: str, asks: bool) -> None:
    assert any(asks_the_task(node) for node in ast.walk(ast.parse(code))) == asks


def test_the_house_has_no_more_rooms_than_it_needs() -> None:
    """One concept a module: what one module alone imports often stands in it."""
    found = [path for folder in ("cache", "stages", "pipeline") for path in modules(folder)]
    num = sum(path.name != "__init__.py" for path in found)
    assert num <= MOST_MODULES, f"{num} modules: fold what is one concept"


def test_a_tasks_rooms_are_named_in_the_table_of_tasks_alone() -> None:
    """So that another one is its rooms and an entry."""
    rooms = {
        f"teacher_cache.stages.{stage}.{name}"
        for stage in ("teacher", "training", "evaluation")
        for name in ("classification", "language_modeling")
    }
    for folder in ("cache", "stages", "pipeline"):
        for module in modules(folder):
            if module != ROOT / "stages" / "tasks.py":
                named = {name.rpartition(".")[0] for name in imported_names(module)}
                assert not named & rooms, f"{module} imports {named & rooms}"


def test_no_setting_stands_twice_in_a_configuration() -> None:
    """A part's settings are flat where a person writes them, beside those of the other parts."""
    for config in (TrainStudentConfig, CacheTeacherOptions, EvaluateCommandOptions):
        names = [name for part in config.parts().values() for name in part.options()]
        names += [name for name in config.model_fields if name not in config.parts()]
        twice = {name for name in names if names.count(name) > 1} | {*config.parts()} & {*names}
        assert not twice, f"{config.__name__}: {twice}"


# Distributions whose modules are called otherwise; the others differ by hyphens at most.
MODULE_OF = {"pyyaml": "yaml"}


def test_what_is_imported_is_declared_and_the_other_way_round() -> None:
    project = PYPROJECT["project"]

    def declared(requirements: list[str]) -> set[str]:
        names = {re.split(r"[<>=\[ ]", one)[0].lower().replace("-", "_") for one in requirements}
        return {MODULE_OF.get(name, name) for name in names}

    needed = declared(project["dependencies"])
    optional = declared(
        [one for extra in project["optional-dependencies"].values() for one in extra]
    )
    imported = {
        name.split(".")[0]
        for folder in FOLDERS
        for module in modules(folder)
        for name in imported_names(module)
    } - {"teacher_cache", *sys.stdlib_module_names}
    assert not imported - needed - optional, "imported, and not declared"
    assert not needed - imported, "declared, and not imported"


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


CITED = re.compile(r"`((?:cache|stages|pipeline)/[\w/]+\.py): ([^`]+)`((?:, `\w+`)*)")


def test_the_maths_page_names_functions_that_exist() -> None:
    page = (ROOT / "docs" / "maths.md").read_text()
    divergences = re.findall(r"\| `(\w+)` \|$", page, re.MULTILINE)
    cited = {("stages/losses/divergences.py", name) for name in divergences}
    for path, first, others in CITED.findall(page):
        names = [first, *re.findall(r"`(\w+)`", others)]
        cited |= {(path, name) for name in names}
    assert len(cited) > 30
    for path, name in sorted(cited):
        found = {
            node.name
            for node in ast.parse((ROOT / path).read_text()).body
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
        }
        assert name in found, f"docs/maths.md names {name}, which {path} does not define"


CODEC_ROOMS = ("cache/codecs", "stages/codecs")


def asks_which_codec(node: ast.AST) -> bool:
    """Whether code asks for a codec's class, compares its name or lists several of them."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        names = {getattr(one, "id", getattr(one, "attr", "")) for one in ast.walk(node)}
        return node.func.id == "isinstance" and bool(names & set(CODECS.values()))
    if isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
        return any(isinstance(one, ast.Constant) and one.value in CODECS for one in sides)
    if isinstance(node, ast.Tuple | ast.List | ast.Set | ast.Dict):
        listed = node.keys if isinstance(node, ast.Dict) else node.elts
        return sum(isinstance(one, ast.Constant) and one.value in CODECS for one in listed) > 1
    return False


def test_only_a_codecs_room_knows_which_codec_it_is() -> None:
    found = {
        module.relative_to(ROOT).as_posix(): sum(map(asks_which_codec, ast.walk(tree)))
        for folder in ("cache", "stages", "pipeline")
        for module in modules(folder)
        if not module.relative_to(ROOT).as_posix().startswith(CODEC_ROOMS)
        for tree in [ast.parse(module.read_text())]
    }
    assert not {path: num for path, num in found.items() if num}
