"""The code against the tables in docs/architecture.md, and what holds for both packages.

Every import of ours counts: at the top of a file, inside a function, under `if TYPE_CHECKING:`,
and `import_module` of a literal name. A file is named by its path without suffix, such as
`hornbeam_state/backends/base`.
"""

import ast
import importlib
import re
import subprocess
import sys
import textwrap
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STATE, ML = PACKAGES = ("hornbeam_state", "hornbeam_ml")


class Tree:
    """The code and the tables below a directory."""

    def __init__(self, root):
        self.files = {
            path.relative_to(root).with_suffix("").as_posix(): path
            for package in PACKAGES
            for path in sorted((root / package).rglob("*.py"))
        }
        document = (root / "docs" / "architecture.md").read_text()
        self.rows, self.folders = {}, {}
        for package in PACKAGES:
            for folder, file, may_import in table(document, package):
                self.rows[f"{folder}/{file}"] = may_import
                self.folders[f"{folder}/{file}"] = folder

    def files_of(self, name):
        """Return the files that a name in a table stands for: a file, or all of a folder."""
        name = name.rstrip("/")
        return {file for file in self.files if file == name or file.startswith(f"{name}/")}

    def row_of(self, file):
        rows = [row for row in self.rows if file in self.files_of(row)]
        return max(rows, key=len, default=None)

    def names(self, row):
        """Return the names in the column "may import" of a row: neighbours come first."""
        names = [name.strip() for name in self.rows[row].removeprefix("everything but ").split(",")]
        return [self.full_name(row, name) for name in names if name != "-"]

    def full_name(self, row, name):
        neighbour = f"{self.folders[row]}/{name}"
        return neighbour if self.files_of(neighbour) else f"{package_of(row)}/{name}"

    def allowed(self, row):
        """Return the files that the files of a row may import."""
        package = package_of(row)
        named = {file for name in self.names(row) for file in self.files_of(name)}
        if self.rows[row].startswith("everything but "):
            named = self.files_of(package) - named
        of_state = self.files_of(STATE) if package == ML else set()
        return named | self.files_of(row) | {f"{package}/errors"} | of_state

    def imports(self, file):
        """Yield line and file of each import of ours, and whether there is such a file."""
        for line, module, attribute in imports_in(self.files[file], package=file.split("/")[:-1]):
            if module.partition(".")[0] in PACKAGES:
                names = [f"{module}.{attribute}", module] if attribute else [module]
                paths = [name.replace(".", "/") for name in names]
                candidates = [path + end for path in paths for end in ("", "/__init__")]
                target = next((path for path in candidates if path in self.files), None)
                yield line, target or paths[0], target is not None

    def faults(self):
        """Yield everything in which the code and the tables differ."""
        yield from self.faults_of_tables()
        for file in self.files:
            yield from self.faults_of_imports(file)
        yield from self.cycles()

    def faults_of_tables(self):
        for row in self.rows:
            if not self.files_of(row):
                yield f"{row} has a row, but there is no such file"
            for name in self.names(row):
                if not any(other == name or other.startswith(f"{name}/") for other in self.rows):
                    yield f"{row} may import {name}, but that has no row"
        for file, path in self.files.items():
            if self.row_of(file) is None and not is_plain_folder(file, path):
                yield f"{file} has no row"

    def faults_of_imports(self, file):
        row = self.row_of(file)
        for line, target, exists in dict.fromkeys(self.imports(file)):
            where = f"{file}.py:{line} imports {target}"
            if not exists:
                yield f"{where}, but there is no such file"
            elif package_of(file) == STATE and package_of(target) == ML:
                yield f"{where}, but {STATE} never imports {ML}"
            elif row is not None and target not in self.allowed(row):
                yield f"{where}, but the row of {row} allows: {self.rows[row]}"

    def cycles(self):
        graph = {file: [target for _, target, _ in self.imports(file)] for file in self.files}
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            yield f"each of these is imported by the next: {', '.join(error.args[1])}"


def table(document, package):
    """Yield the folder and the first two columns of the tables below the heading of a package."""
    section = re.search(rf"(?ms)^## {package}$(.*?)(^## |\Z)", document)[1]
    for part in re.split(r"(?m)^### ", f"{package}\n{section}"):
        folder, _, text = part.partition("\n")
        lines = [line for line in text.splitlines() if line.startswith("|")]
        for line in lines[2:]:
            file, may_import, _ = (cell.strip() for cell in line.strip("|").split("|", 2))
            yield folder.strip(), file.replace("\\_", "_").removesuffix(".py"), may_import


def package_of(file):
    return file.partition("/")[0]


def is_plain_folder(file, path):
    """Whether this is the __init__.py of a folder, with no more in it than a docstring."""
    return (
        file.count("/") > 1
        and file.endswith("/__init__")
        and all(isinstance(node, ast.Expr) for node in ast.parse(path.read_text()).body)
    )


def imports_in(path, package):
    """Yield line, module and, for each x of `from module import x`, x."""
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, name.name, None) for name in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                above = package[: len(package) - level + 1] if level else []
                module = ".".join([*above, module] if module else above)
                yield from ((node.lineno, module, name.name) for name in names)
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__")
                | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(module)), *_],
            ):
                yield node.lineno, module, None


def report(faults):
    """Fail with one line for each fault."""
    if lines := list(faults):
        pytest.fail("\n".join(lines), pytrace=False)


def test_the_code_agrees_with_the_tables():
    report(Tree(ROOT).faults())


# The check itself, on small trees

DOCUMENT = textwrap.dedent("""\
    # Architecture

    ## hornbeam_state

    | file | may import | what it is |
    |---|---|---|
    | errors.py | - | |
    | backends/base.py | - | |
    | backends/one.py | backends/base | |
    | store.py | backends | a \\| b |
    | testing.py | store | |
    | \\_\\_init\\_\\_.py | everything but testing | |

    ## hornbeam_ml

    | file | may import | what it is |
    |---|---|---|
    | errors.py | - | |
    | web/ | cache | |
    | cache.py | - | |
    """)
FILES = {
    "hornbeam_state/errors.py": "",
    "hornbeam_state/backends/__init__.py": '"""No row is needed."""',
    "hornbeam_state/backends/base.py": "from hornbeam_state.errors import E",
    "hornbeam_state/backends/one.py": "from . import base\nfrom ..errors import E",
    "hornbeam_state/store.py": "import os, hornbeam_state.backends.one as one",
    "hornbeam_state/testing.py": "from hornbeam_state import store",
    "hornbeam_state/__init__.py": "from hornbeam_state.store import get",
    "hornbeam_ml/errors.py": "from hornbeam_state.errors import E",
    "hornbeam_ml/cache.py": "from hornbeam_state.store import get",
    "hornbeam_ml/web/app.py": "from hornbeam_ml.web.page import p\nfrom hornbeam_ml import cache",
    "hornbeam_ml/web/page.py": "",
}


@pytest.mark.parametrize(
    ("file", "code", "faults"),
    [
        pytest.param("hornbeam_state/errors.py", "", [], id="none"),
        pytest.param(
            "hornbeam_ml/cache.py",
            "def f():\n    from hornbeam_ml.web import app, page",
            [
                "hornbeam_ml/cache.py:2 imports hornbeam_ml/web/app, but the row of hornbeam_ml/cache allows: -",
                "hornbeam_ml/cache.py:2 imports hornbeam_ml/web/page, but the row of hornbeam_ml/cache allows: -",
                "each of these is imported by the next: hornbeam_ml/cache, hornbeam_ml/web/app, hornbeam_ml/cache",
            ],
            id="not in the table, and a cycle",
        ),
        pytest.param(
            "hornbeam_state/store.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from hornbeam_ml.errors import E, F",
            [
                "hornbeam_state/store.py:3 imports hornbeam_ml/errors, but hornbeam_state never imports hornbeam_ml"
            ],
            id="the wrong direction",
        ),
        pytest.param(
            "hornbeam_state/__init__.py",
            "import importlib\nimportlib.import_module('hornbeam_state.testing')",
            [
                "hornbeam_state/__init__.py:2 imports hornbeam_state/testing, but the row of hornbeam_state/__init__ allows: everything but testing"
            ],
            id="a literal name, and all but that",
        ),
        pytest.param(
            "hornbeam_state/store.py",
            "import hornbeam_state.codec",
            ["hornbeam_state/store.py:1 imports hornbeam_state/codec, but there is no such file"],
            id="no such file",
        ),
        pytest.param(
            "hornbeam_state/backends/__init__.py",
            "from hornbeam_state.backends.base import B",
            ["hornbeam_state/backends/__init__ has no row"],
            id="a folder's own code",
        ),
        pytest.param("hornbeam_ml/new.py", "", ["hornbeam_ml/new has no row"], id="no row"),
        pytest.param(
            "hornbeam_ml/cache.py",
            None,
            [
                "hornbeam_ml/cache has a row, but there is no such file",
                "hornbeam_ml/web/app.py:2 imports hornbeam_ml/cache, but there is no such file",
            ],
            id="a row too many",
        ),
        pytest.param(
            "docs/architecture.md",
            DOCUMENT.replace("| web/ | cache |", "| web/ | cahce, cache |"),
            ["hornbeam_ml/web/ may import hornbeam_ml/cahce, but that has no row"],
            id="a misspelt name",
        ),
    ],
)
def test_the_check_reports(tmp_path, file, code, faults):
    for name, text in {"docs/architecture.md": DOCUMENT, **FILES, file: code}.items():
        if text is not None:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    assert list(Tree(tmp_path).faults()) == faults


# What holds for both packages


@pytest.mark.parametrize("package", PACKAGES)
def test_the_public_names_are_sorted_and_there(package):
    module = importlib.import_module(package)
    assert list(module.__all__) == sorted(set(module.__all__))
    assert [name for name in module.__all__ if not hasattr(module, name)] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_file_has_the_name_of_a_public_name(package):
    """The first import of such a file would put the module in the place of the function."""
    files = {path.stem for path in (ROOT / package).iterdir()}
    assert files & set(importlib.import_module(package).__all__) == set()


FORBIDDEN = {"pickle", "_pickle", "marshal", "shelve", "cloudpickle", "dill", "joblib"}


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_reads_or_writes_pickles(package):
    found = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in (ROOT / package).rglob("*.py")
        for line, module, _ in imports_in(path, package=[])
        if module.partition(".")[0] in FORBIDDEN
    ]
    report(found)


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_is_validated_by_assert(package):
    """`python -O` drops assertions. (A testing.py, or a contract, makes them for its users' tests.)"""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in (ROOT / package).rglob("*.py")
        if path.name != "testing.py" and path.parent.name != "contract"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Assert)
    ]
    report(found)


def fresh(code, cwd):
    """Run a program in a new interpreter and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-B", "-c", textwrap.dedent(code)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("package", "unwanted"),
    [
        (STATE, [ML, "torch", "sentence_transformers", "transformers", "openai", "gunicorn"]),
        (ML, ["torch", "sentence_transformers", "transformers", "openai", "gunicorn"]),
    ],
)
def test_a_plain_import_brings_in_no_model_library(package, unwanted, tmp_path):
    code = f"import sys, {package}; print([name for name in {unwanted} if name in sys.modules])"
    assert fresh(code, tmp_path) == "[]"


@pytest.mark.parametrize("package", PACKAGES)
def test_a_plain_import_has_no_side_effects(package, tmp_path):
    """It starts no Python thread or process, connects nowhere, writes and keeps open no file."""
    code = f"""
        import os, sys, threading

        def note(event, arguments):
            if event == "open":
                path, _, flags = arguments
                if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                    seen.append((event, path))
            elif event in unwanted:
                seen.append((event, arguments))

        unwanted = {{
            "_thread.start_new_thread", "_thread.start_joinable_thread", "os.fork", "os.mkdir",
            "os.posix_spawn", "socket.bind", "socket.connect", "subprocess.Popen",
        }}
        seen, before = [], os.listdir("/proc/self/fd")
        sys.addaudithook(note)
        import {package}
        print(seen, set(os.listdir("/proc/self/fd")) - set(before), threading.enumerate()[1:])
        """
    assert fresh(code, tmp_path) == "[] set() []"
    assert list(tmp_path.iterdir()) == []
