"""The house rules that a machine can check: layers, light imports, sizes, docstrings, nothing unsafe, the wheel."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import featstore

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "featstore_align": ROOT / "align" / "featstore_align",
    "featstore": ROOT / "featstore",
    "featstore_extractors": ROOT / "extractors" / "featstore_extractors",
    "featstore_zoo": ROOT / "zoo" / "featstore_zoo",
    "featstore_cli": ROOT / "cli" / "featstore_cli",
}
MAY_IMPORT = {
    "featstore_align": set(),
    "featstore": {"featstore_align"},
    "featstore_extractors": {"featstore_align"},
    "featstore_zoo": {"featstore_align", "featstore", "featstore_extractors"},
    "featstore_cli": {"featstore_align", "featstore", "featstore_extractors", "featstore_zoo"},
}
LAYER_EXCEPTIONS = {("featstore/__main__.py", "featstore_cli")}  # `python -m featstore` is the command line
TORCH_EXCEPTIONS = {"featstore/torch.py"}                         # the loader: the only torch in `featstore`
SOURCES = [path for folder in PACKAGES.values() for path in sorted(folder.rglob("*.py"))]
WRITTEN = SOURCES + [path for folder in ("tests", "examples", "benchmarks") for path in (ROOT / folder).rglob("*.py")]


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _imports(path: Path) -> Iterator[str]:
    """The full names that a module imports, also inside functions; its own package's relative ones left out."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.module


def _calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize("package", PACKAGES)
def test_package_imports_only_the_layers_below_it(package):
    wrong = [(_name(path), name) for path in PACKAGES[package].rglob("*.py") for name in _imports(path)
             if (top := name.split(".")[0]) in PACKAGES and top != package and top not in MAY_IMPORT[package]
             and (_name(path), top) not in LAYER_EXCEPTIONS]
    assert wrong == []


def test_store_and_align_import_torch_nowhere_but_in_the_loader():
    wrong = [_name(path) for package in ("featstore",) for path in PACKAGES[package].rglob("*.py")
             if any(name.split(".")[0] == "torch" for name in _imports(path)) and _name(path) not in TORCH_EXCEPTIONS]
    assert wrong == []


def test_import_featstore_loads_nothing_heavy():
    heavy = ["torch", "librosa", "zarr", "numcodecs", "soundfile", "soxr", "scipy", "transformers", "click", "rich"]
    code = f"import sys, featstore; print([name for name in {heavy!r} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_import_extractors_loads_no_torch():
    code = "import sys, featstore_extractors; print([name for name in ('torch', 'librosa') if name in sys.modules])"
    path = {"PYTHONPATH": f"{ROOT / 'extractors'}:{ROOT / 'align'}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=path)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("package", PACKAGES)
def test_package_is_typed(package):
    assert (PACKAGES[package] / "py.typed").read_bytes() == b""


def test_readme_fits_under_150_lines():
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


def test_no_file_is_longer_than_700_lines():
    assert [(_name(path), lines) for path in WRITTEN if (lines := len(path.read_text().splitlines())) > 700] == []


@pytest.mark.parametrize("name", featstore.__all__)
def test_public_name_has_a_docstring(name):
    thing = getattr(featstore, name)
    assert inspect.getdoc(thing), f"featstore.{name} has no docstring"
    if inspect.isclass(thing):
        methods = [f"{name}.{member}" for member, value in vars(thing).items()
                   if not member.startswith("_") and inspect.isfunction(value) and not inspect.getdoc(value)]
        assert [m for m in methods if m not in OBVIOUS] == []


OBVIOUS = {"Extractor.load", "Feature.keys", "StoredUtterance.from_json"}  # said by the class, or by the name


def test_nothing_unpickles_evaluates_or_calls_a_shell():
    forbidden = {"pickle.load", "pickle.loads", "eval", "exec", "os.system", "yaml.load", "torch.hub.load"}
    wrong = [f"{_name(path)}: {name}" for path in SOURCES for name, _ in _calls(path) if name in forbidden]
    keywords = {("allow_pickle", True), ("weights_only", False), ("shell", True)}
    wrong += [f"{_name(path)}: {word.arg}" for path in SOURCES for _, call in _calls(path) for word in call.keywords
              if isinstance(word.value, ast.Constant) and (word.arg, word.value.value) in keywords]
    assert wrong == []


def test_user_input_is_never_asserted():
    wrong = [f"{_name(path)}:{node.lineno}" for path in SOURCES for node in ast.walk(ast.parse(path.read_text()))
             if isinstance(node, ast.Assert)]
    assert wrong == []


def test_no_error_is_swallowed():
    broad = [f"{_name(path)}:{node.lineno}" for path in SOURCES for node in ast.walk(ast.parse(path.read_text()))
             if isinstance(node, ast.ExceptHandler) and all(isinstance(line, ast.Pass) for line in node.body)
             and (node.type is None or ast.unparse(node.type) in ("Exception", "BaseException"))]
    assert broad == []


def test_wheel_holds_all_five_packages(tmp_path):
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)], cwd=ROOT,
                   check=True, capture_output=True)
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    expected = {str(path.relative_to(folder.parent)) for folder in PACKAGES.values()
                for path in folder.rglob("*") if path.suffix == ".py" or path.name == "py.typed"}
    assert expected - names == set()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == set(PACKAGES)
