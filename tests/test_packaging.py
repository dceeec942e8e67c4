"""What is in the distributions, and the start-up hook in installed ones.

Everything is built from the tree and installed for real, without a network: a virtual environment
of its own gets the wheel (or an editable install), and the dependencies of the environment that
runs the tests through a path file, whose target's own .pth files Python does not run.
"""

import subprocess
import sys
import sysconfig
import tarfile
import textwrap
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("hornbeam_ml", "hornbeam_state")
HOOK = "hatch_autorun_hornbeam.pth"
WORKER = "hornbeam_ml.worker.HornbeamWorker"


def run(*command, cwd=ROOT, check=True):
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False
    )
    if check and done.returncode:
        pytest.fail(f"{command} exited with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done


@dataclass(frozen=True)
class Environment:
    """A virtual environment, without pip and activation."""

    path: Path

    @classmethod
    def create(cls, path, *, dependencies=True):
        run(sys.executable, "-m", "venv", "--without-pip", path)
        environment = cls(path)
        if dependencies:
            paths = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
            (environment.site / "dependencies.pth").write_text("\n".join(paths))
        return environment

    @property
    def python(self):
        return self.path / "bin" / "python"

    @property
    def site(self):
        return next((self.path / "lib").glob("python3*")) / "site-packages"

    def install(self, *arguments):
        pip = (sys.executable, "-m", "pip", "--python", self.python, "install", "--quiet")
        run(*pip, "--disable-pip-version-check", "--no-deps", "--no-index", *arguments)

    def run(self, code, cwd, **options):
        """Run a program with nothing of the tree on its path but what is installed."""
        return run(self.python, "-P", "-c", textwrap.dedent(code), cwd=cwd, **options)

    def value(self, code, cwd):
        return self.run(code, cwd).stdout.strip()


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    path = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-d", path)
    return path


@pytest.fixture(scope="module")
def wheel(dist):
    (path,) = dist.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """An environment with the wheel in it."""
    environment = Environment.create(tmp_path_factory.mktemp("wheel") / "venv")
    environment.install(wheel)
    return environment


@pytest.fixture(scope="module")
def editable(tmp_path_factory):
    """An environment with the tree installed in it as `pip install -e` does."""
    environment = Environment.create(tmp_path_factory.mktemp("editable") / "venv")
    environment.install("--no-build-isolation", "--editable", ROOT)
    return environment


def sources():
    """Every file of the two packages that belongs into a distribution."""
    return {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }


# The distributions


def test_the_wheel_holds_the_packages_and_the_hook_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    info = wheel.name.removesuffix("-py3-none-any.whl") + ".dist-info/"
    assert {name for name in names if not name.startswith(info)} == sources() | {HOOK}


def test_both_packages_are_marked_as_typed(wheel):
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(zipfile.ZipFile(wheel).namelist())


def test_the_sdist_builds_the_same_wheel(dist, wheel, tmp_path):
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        # Python 3.11.4 brought the filter, 3.12 warns where none is named.
        archive.extractall(
            tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {})
        )
    (unpacked,) = tmp_path.iterdir()
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path, cwd=unpacked)
    assert (tmp_path / wheel.name).read_bytes() == wheel.read_bytes()


def test_the_sdist_holds_what_make_needs(dist):
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "Makefile",
        "README.md",
        "constraints.txt",
        "docs/architecture.md",
        "startup_hook.py",
        "tests/test_packaging.py",
    } <= names
    assert not [name for name in names if ".hornbeam/" in name or name.endswith(".pyc")]


def test_the_hook_is_one_line_that_python_runs(wheel):
    """A .pth is read in the locale's encoding, and only its lines that begin with `import` run."""
    text = zipfile.ZipFile(wheel).read(HOOK).decode("ascii")
    assert text.startswith("import ")
    assert len(text.splitlines()) == 1


# The bare name: each way to start gunicorn, on each kind of installation


@pytest.fixture(params=["installed", "editable"])
def environment(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def project(tmp_path):
    """A directory with an app, and a config file that says which class gunicorn resolved."""
    (tmp_path / "app.py").write_text("def app(environ, start_response): ...\n")
    (tmp_path / "report.py").write_text(
        textwrap.dedent("""\
            import sys

            def on_starting(server):
                print(server.worker_class.__module__ + "." + server.worker_class.__name__)
                sys.exit()
            """)
    )
    return tmp_path


def test_the_gunicorn_script_knows_the_name(environment, project):
    script = Path(sysconfig.get_path("scripts")) / "gunicorn"
    done = run(
        environment.python, script, "-k", "hornbeam", "-c", "report.py", "app:app", cwd=project
    )
    assert done.stdout.strip() == WORKER


def test_python_m_gunicorn_knows_the_name(environment, project):
    command = (environment.python, "-m", "gunicorn", "-k", "hornbeam", "-c", "report.py", "app:app")
    assert run(*command, cwd=project).stdout.strip() == WORKER


def test_a_config_file_may_use_the_name(environment, project):
    with (project / "report.py").open("a") as config:
        config.write('\nworker_class = "hornbeam"\n')
    command = (environment.python, "-m", "gunicorn", "-c", "report.py", "app:app")
    assert run(*command, cwd=project).stdout.strip() == WORKER


def test_an_application_of_ones_own_may_use_the_name(environment, project):
    value = environment.value(
        """
        from gunicorn.app.base import BaseApplication

        class Application(BaseApplication):
            def load_config(self):
                self.cfg.set("worker_class", "hornbeam")

            def load(self):
                raise NotImplementedError

        worker = Application().cfg.worker_class
        print(worker.__module__ + "." + worker.__name__)
        """,
        project,
    )
    assert value == WORKER


def test_the_hook_is_what_makes_the_name_known(installed, project):
    """Without it gunicorn refuses the name, so the tests above test the hook."""
    command = (installed.python, "-S", "-c")
    code = f"""
        import sys
        sys.path[:0] = [{str(installed.site)!r}, {sysconfig.get_path("purelib")!r}]
        from gunicorn.workers import SUPPORTED_WORKERS
        print("hornbeam" in SUPPORTED_WORKERS)
        """
    assert run(*command, textwrap.dedent(code), cwd=project).stdout.strip() == "False"


# What the hook leaves alone


def test_starting_python_imports_nothing_more(installed, tmp_path):
    bare = Environment.create(tmp_path / "venv")
    modules = "import sys; print(sorted(sys.modules))"
    assert installed.value(modules, tmp_path) == bare.value(modules, tmp_path)


def test_importing_gunicorn_imports_nothing_of_ours(installed, tmp_path):
    code = """
        import sys
        import gunicorn.workers
        print([name for name in sys.modules if name.startswith("hornbeam")])
        """
    assert installed.value(code, tmp_path) == "[]"


def test_without_gunicorn_its_import_fails_as_always(installed, tmp_path):
    bare = Environment.create(tmp_path / "venv", dependencies=False)
    (bare.site / HOOK).write_bytes((installed.site / HOOK).read_bytes())
    done = bare.run("import gunicorn.workers", tmp_path, check=False)
    assert done.stderr.endswith("ModuleNotFoundError: No module named 'gunicorn'\n")


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        pytest.param(
            "import importlib; importlib.reload(workers); print('hornbeam' in table())",
            "True",
            id="a reload keeps the name",
        ),
        pytest.param(
            "del sys.modules['gunicorn.workers']; from gunicorn import workers;"
            "import gunicorn.workers as workers; print('hornbeam' in table())",
            "True",
            id="a second import keeps the name",
        ),
        pytest.param(
            "import inspect; print('SUPPORTED_WORKERS =' in inspect.getsource(workers))",
            "True",
            id="the source can be shown",
        ),
        pytest.param(
            "print(type(workers.__loader__).__name__, workers.__spec__.loader is workers.__loader__)",
            "SourceFileLoader True",
            id="the loader is the real one",
        ),
        pytest.param(
            "import gunicorn; print(type(gunicorn.__loader__) is type(workers.__loader__))",
            "True",
            id="like that of any other module",
        ),
        pytest.param(
            "import importlib.util; print(importlib.util.find_spec('gunicorn.workers').origin"
            " == workers.__file__)",
            "True",
            id="its spec can be looked up afterwards",
        ),
    ],
)
def test_the_module_is_like_any_other(installed, tmp_path, code, expected):
    lines = (
        "import sys",
        "import gunicorn.workers as workers",
        "def table(): return sys.modules['gunicorn.workers'].SUPPORTED_WORKERS",
        code,
    )
    assert installed.value("\n".join(lines), tmp_path) == expected


def test_looking_the_module_up_does_not_import_it(installed, tmp_path):
    code = """
        import importlib.resources, importlib.util, sys
        spec = importlib.util.find_spec("gunicorn.workers")
        source = spec.loader.get_source(spec.name)
        assert "gunicorn.workers" not in sys.modules and "SUPPORTED_WORKERS" in source

        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        print(module.SUPPORTED_WORKERS["hornbeam"])
        """
    assert installed.value(code, tmp_path) == WORKER


def fake_gunicorn(path, table):
    (path / "gunicorn" / "workers").mkdir(parents=True)
    (path / "gunicorn" / "__init__.py").touch()
    (path / "gunicorn" / "workers" / "__init__.py").write_text(table)
    return path


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        pytest.param(
            "SUPPORTED_WORKERS = {'hornbeam': 'theirs'}", "{'hornbeam': 'theirs'}", id="taken"
        ),
        pytest.param("SUPPORTED_WORKERS = None", "None", id="no table"),
        pytest.param("SUPPORTED_WORKERS = {}", f"{{'hornbeam': '{WORKER}'}}", id="free"),
    ],
)
def test_a_name_that_gunicorn_knows_stays_its_own(installed, tmp_path, source, expected):
    path = fake_gunicorn(tmp_path, source)
    code = f"""
        import sys
        sys.path.insert(0, {str(path)!r})
        import gunicorn.workers
        print(gunicorn.workers.SUPPORTED_WORKERS)
        """
    assert installed.value(code, tmp_path) == expected


def test_an_error_of_gunicorns_own_import_is_passed_on(installed, tmp_path):
    path = fake_gunicorn(tmp_path, "raise ValueError('theirs')")
    code = f"""
        import sys
        sys.path.insert(0, {str(path)!r})
        import gunicorn.workers
        """
    done = installed.run(code, tmp_path, check=False)
    assert done.stderr.endswith("ValueError: theirs\n")


def test_gunicorn_in_a_zip_file_works(installed, tmp_path):
    path = tmp_path / "gunicorn.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("gunicorn/__init__.py", "")
        archive.writestr("gunicorn/workers/__init__.py", "SUPPORTED_WORKERS = {}")
    code = f"""
        import inspect, sys
        sys.path.insert(0, {str(path)!r})
        import gunicorn.workers
        assert inspect.getsource(gunicorn.workers).startswith("SUPPORTED_WORKERS = ")
        print(type(gunicorn.workers.__loader__).__name__, gunicorn.workers.SUPPORTED_WORKERS)
        """
    assert installed.value(code, tmp_path) == f"zipimporter {{'hornbeam': '{WORKER}'}}"


@pytest.mark.parametrize(
    "finder",
    [
        pytest.param("class Finder: pass", id="of no use"),
        pytest.param(
            "class Finder:\n def find_spec(*args): raise RuntimeError", id="raising, then gone"
        ),
    ],
)
def test_a_broken_finder_beside_it_is_not_its_affair(installed, tmp_path, finder):
    """The import meets such a finder with or without the hook, and with the same result."""
    code = (
        "import sys, warnings",
        "warnings.simplefilter('ignore')",
        finder,
        "hooks = [f for f in sys.meta_path if type(f).__name__ == 'HornbeamFinder']",
        "specs = [f.find_spec('gunicorn.workers', ['nowhere']) for f in hooks]",
        "sys.meta_path.insert(len(hooks), Finder())",
        "broken = [f.find_spec('gunicorn.workers', ['nowhere']) for f in hooks]",
        "del sys.meta_path[len(hooks)]",
        "import gunicorn.workers",
        "print(set(specs + broken), 'hornbeam' in gunicorn.workers.SUPPORTED_WORKERS)",
    )
    assert installed.value("\n".join(code), tmp_path) == "{None} True"


def test_running_the_hook_twice_does_no_harm(installed, tmp_path):
    """Python runs the .pth files of a virtual environment twice."""
    code = f"""
        import site
        site.addsitedir({str(installed.site)!r})
        import gunicorn.workers
        print(type(gunicorn.workers.__loader__).__name__, gunicorn.workers.SUPPORTED_WORKERS["hornbeam"])
        """
    assert installed.value(code, tmp_path) == f"SourceFileLoader {WORKER}"
