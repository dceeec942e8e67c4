"""What is noticed before a fork and refused after it, on stand-ins for the libraries."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from hornbeam_ml.forks import native_threads
from hornbeam_ml.forks.after_import import AfterImport

FAKES = {
    "torch.py": """
        class cuda:
            _is_in_bad_fork = staticmethod(lambda: False)
        class nn:
            class modules:
                class module:
                    hooks = []
                    @classmethod
                    def register_module_forward_pre_hook(cls, hook):
                        cls.hooks.append(hook)
                        return type("Handle", (), {"remove": cls.hooks.clear})
        def set_num_threads(count):
            global threads
            threads = count
        """,
    "onnxruntime.py": """
        class InferenceSession:
            def __init__(self, path): self.path = path
        """,
    "openvino.py": """
        class Core:
            def compile_model(self, model, device="CPU"): return model, device
            def import_model(self, stream): return stream
        """,
}
PROGRAM = """
import os
from hornbeam_ml.forks import fork_hazards as hazards
from hornbeam_ml.errors import ModelError
BEFORE
hazards.watch()
hazards.watch()
IN_PARENT
child = os.fork()
if child:
    assert os.waitpid(child, 0)[1] == 0
    os._exit(0)
try:
    hazards.check()
except ModelError as error:
    print(error)
hazards.restore_torch_threads(7)
IN_CHILD
"""


@pytest.fixture
def outcome(tmp_path):
    """Run code in a watched process and in its child; return what the child prints."""
    for name, text in FAKES.items():
        (tmp_path / name).write_text(textwrap.dedent(text))

    def run(parent, child="", before=""):
        program = PROGRAM.replace("IN_PARENT", parent).replace("IN_CHILD", child)
        (tmp_path / "program.py").write_text(program.replace("BEFORE", before))
        ran = subprocess.run(
            [sys.executable, "program.py"],
            cwd=tmp_path,
            env={"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr
        return ran.stdout.strip()

    return run


@pytest.mark.parametrize(
    ("code", "what"),
    [
        pytest.param(
            "import onnxruntime\nonnxruntime.InferenceSession('a')",
            "a session was made before the fork (onnxruntime.InferenceSession, in {} line 9):",
            id="onnxruntime",
        ),
        pytest.param(
            "import openvino\nopenvino.Core().compile_model('m', device='CPU')",
            "a model was compiled before the fork (openvino.Core.compile_model, in {} line 9):",
            id="openvino compiles",
        ),
        pytest.param(
            "from openvino import Core\nCore().import_model('m')",
            "a model was compiled before the fork (openvino.Core.import_model, in {} line 9):",
            id="openvino imports",
        ),
        pytest.param(
            "import torch\ntorch.nn.modules.module.hooks[0](torch, ())\nhazards.note('a', 'second')",
            "a model ran before the fork (builtins.module.forward, in {} line 9):",
            id="the first of two",
        ),
        pytest.param(
            "import torch\ntorch.cuda._is_in_bad_fork = lambda: True",
            "torch used CUDA before the fork: use the GPU in",
            id="torch with CUDA",
        ),
        pytest.param("import torch, onnxruntime, openvino", "", id="imports only"),
    ],
)
def test_what_is_refused(outcome, tmp_path, code, what):
    said = outcome(code)
    assert said.startswith(what.format(tmp_path / "program.py")), said
    assert bool(said) == bool(what)


def test_libraries_that_were_there_before_are_watched_too(outcome):
    said = outcome("onnxruntime.InferenceSession('a')", before="import onnxruntime")
    assert said.startswith("a session was made before the fork")


def test_the_child_has_everything_as_it_was(outcome):
    """Nothing is noted there, not in a grandchild either, and watching it again is refused."""
    before = (
        "import onnxruntime, openvino, sys, torch\n"
        "kinds = [onnxruntime.InferenceSession.__init__, openvino.Core.compile_model, "
        "openvino.Core.import_model, torch.set_num_threads]\nfinders = list(sys.meta_path)"
    )
    child = (
        "hazards.watch()\nonnxruntime.InferenceSession('a')\nopenvino.Core().compile_model('m')\n"
        "hazards.check()\n"
        "print(kinds == [onnxruntime.InferenceSession.__init__, openvino.Core.compile_model, "
        "openvino.Core.import_model, torch.set_num_threads], finders == sys.meta_path, "
        "torch.nn.modules.module.hooks)"
    )
    assert outcome("", child, before) == "True True []"


@pytest.mark.parametrize(
    ("parent", "threads"),
    [
        pytest.param("import torch\nprint(torch.threads, flush=True)", "1\n7", id="the budget"),
        pytest.param(
            "import torch\ntorch.set_num_threads(3)\nprint(torch.threads, flush=True)",
            "1\n3",
            id="what the app asked for",
        ),
    ],
)
def test_torch_computes_with_one_thread_before_the_fork(outcome, parent, threads):
    assert outcome(parent, "print(torch.threads)") == threads


def test_a_process_that_nobody_watches_refuses_nothing(outcome):
    assert outcome("hazards._watch = None\nimport openvino\nopenvino.Core().compile_model(1)") == ""


# Acting on imports


@pytest.fixture
def acted(tmp_path, monkeypatch):
    """The modules that an `AfterImport` was called with."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "hb_good.py").write_text("LOADER = __spec__.loader")
    (tmp_path / "hb_bad.py").write_text("1 / 0")
    seen = []
    imports = AfterImport(dict.fromkeys(("hb_good", "hb_bad", "hb_missing"), seen.append))
    imports.start()
    yield seen
    imports.stop()
    imports.stop()
    assert imports not in sys.meta_path
    for name in ("hb_good", "hb_bad"):
        sys.modules.pop(name, None)


def test_an_import_is_acted_on_once_with_its_own_loader(acted):
    import hb_good
    import hb_good as again

    assert acted == [hb_good]
    assert again.LOADER is hb_good.__loader__ is hb_good.__spec__.loader
    assert type(hb_good.LOADER).__name__ == "SourceFileLoader"


def test_imports_that_fail_do_so_as_ever(acted):
    with pytest.raises(ZeroDivisionError):
        import hb_bad  # noqa: F401
    with pytest.raises(ModuleNotFoundError, match="No module named 'hb_missing'"):
        import hb_missing  # noqa: F401
    assert acted == []


# Native threads


def test_threads_of_python_and_of_openblas_are_explained(monkeypatch, tmp_path):
    """What is left over are the others; where there is no /proc, nothing is known."""
    import numpy as np

    assert np.ones(3).sum() == 3  # OpenBLAS is loaded
    before = native_threads.unexplained_threads()
    go_on = threading.Event()
    thread = threading.Thread(target=go_on.wait, args=(10,))
    thread.start()
    # Fewer: one of a test before this one has ended only now.
    assert native_threads.unexplained_threads() <= before
    go_on.set()
    thread.join()
    monkeypatch.setattr(native_threads, "_TASKS", tmp_path / "nowhere")
    assert native_threads.unexplained_threads() == 0
