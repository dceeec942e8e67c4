"""OpenVINO is imported without its telemetry, which starts a thread and a process."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from hornbeam_ml.telemetry import without_telemetry

REPORTER = "openvino_telemetry"


def run(code):
    """Run a program in a new interpreter, as one that nobody asked for consent; return its output."""
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.split()


def test_openvino_reports_nothing():
    """No thread, no process, no file; and the user's own import of the reporter still works."""
    pytest.importorskip(REPORTER)
    said = run("""
        import os, sys, threading
        seen = []
        unwanted = ("_thread.start_new_thread", "os.fork", "subprocess.Popen", "os.posix_spawn",
                    "socket.connect", "socket.getaddrinfo")
        sys.addaudithook(lambda event, _: event in unwanted and seen.append(event))
        from hornbeam_ml.telemetry import without_telemetry
        with without_telemetry():
            import openvino
        from openvino.tools import ovc
        print(ovc.telemetry.__class__.__module__, len(seen), len(threading.enumerate()))
        import openvino_telemetry
        print(openvino_telemetry.Telemetry.__module__)
    """)
    assert said == ["openvino.tools.ovc.telemetry_stub", "0", "1", "openvino_telemetry.main"]


@pytest.mark.parametrize("code", ["conversion.to_openvino(None, None, None)", "engine()"])
def test_whatever_imports_openvino_here_keeps_it_quiet(code):
    pytest.importorskip("openvino")
    said = run(f"""
        import contextlib, sys, threading
        from hornbeam_ml.embedder import conversion
        from hornbeam_ml.embedder.engines.openvino import OpenVinoEngine
        def engine():
            OpenVinoEngine("/nowhere", "fp32", None, type("S", (), {{"packs": True}})())
        with contextlib.suppress(Exception):
            {code}
        print("openvino" in sys.modules, "{REPORTER}" in sys.modules, threading.active_count())
    """)
    assert said == ["True", "False", "1"]


def test_a_reporter_that_was_imported_before_stays(monkeypatch):
    theirs = object()
    monkeypatch.setitem(sys.modules, REPORTER, theirs)
    with without_telemetry(), pytest.raises(ImportError):
        import openvino_telemetry  # noqa: F401
    assert sys.modules[REPORTER] is theirs


def test_a_failing_import_leaves_nothing_behind(monkeypatch):
    monkeypatch.delitem(sys.modules, REPORTER, raising=False)
    with pytest.raises(ZeroDivisionError), without_telemetry():
        raise ZeroDivisionError
    assert REPORTER not in sys.modules
