"""What makes two cached calls the same call, and what must keep them apart."""

from __future__ import annotations

import functools
import itertools
import json
import logging
import math
import os
import subprocess
import sys
import tempfile
import textwrap
import threading
import types
import warnings
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from hornbeam_ml import identity, register_fingerprint, register_model
from hornbeam_ml.bytecode import is_library_file
from hornbeam_ml.keys import call_key
from hornbeam_ml.process_identity import ProcessIdentities
from hornbeam_state import CodecError

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


@pytest.fixture(autouse=True)
def _warn_anew(monkeypatch):
    """Each test sees the warning that a process sees once."""
    monkeypatch.setattr(identity, "_process_identities", ProcessIdentities())


def key(fn, value=1, **options):
    return call_key(fn, value, prefix="ml", **options)


def double(x):
    return x * 2


def make(source, name="f", **variables):
    """Compile a function from source into a module of its own."""
    namespace = {"__name__": "tests_made", **variables}
    sys.modules.setdefault("tests_made", types.ModuleType("tests_made"))
    exec(textwrap.dedent(source), namespace)
    return namespace[name]


LOOKALIKES = [
    1, "1", b"1", [1], (1,), 1.0, True, {1}, frozenset({1}), {1: 1}, None, "None", np.int64(1),
    np.int32(1), np.float32(1), np.array(1), np.array([1]), np.array([1], "f4"), np.array([[1]]),
    -1, 0, -0.0, 0.0, "", b"", [], (), {}, ["ab", "c"], ["a", "bc"], ["abc"], [["a"], "b"], "a\0b",
    ["a\0b"], ["a", "b"], {"a": ["b"]}, {"a": "b"}, math.nan, 10**30, "1" * 31,
]  # fmt: skip


def test_lookalike_inputs_have_different_keys():
    """Values that only look alike are different calls."""
    keys = [key(double, value) for value in LOOKALIKES]
    assert len(set(keys)) == len(LOOKALIKES)


def test_long_arrays_that_differ_in_one_element_have_different_keys():
    """Arrays whose printed form is the same (it is abbreviated) are different calls."""
    one = np.zeros(2000)
    other = one.copy()
    other[1000] = 1e-12
    assert repr(one) == repr(other)
    assert key(double, one) != key(double, other)
    assert key(double, one) == key(double, one.copy())


def test_equal_inputs_have_equal_keys():
    """Insertion order and memory layout make no difference."""
    assert key(double, {"a": 1, "b": 2}) == key(double, {"b": 2, "a": 1})
    array = np.arange(12.0).reshape(3, 4)
    assert key(double, array) == key(double, np.asfortranarray(array))


def test_an_input_without_canonical_bytes_is_an_error():
    """An input of an unknown type is refused, never keyed by its repr."""
    with pytest.raises(CodecError):
        key(double, object())


def test_the_prefix_the_version_and_the_cache_key_count():
    """Prefix, version and cache_key keep calls apart; a cache_key alone decides."""
    assert call_key(double, 1, prefix="a") != call_key(double, 1, prefix="b")
    assert key(double) != key(double, version=1) != key(double, version="1")
    assert key(double, cache_key="k") == key(print, 2, cache_key="k")
    assert key(double, cache_key="k") != key(double, cache_key="j")


@pytest.mark.parametrize("prefix", ["", "a\x1fb", "x" * 257, None, 3])
def test_a_prefix_that_makes_no_sense_is_refused(prefix):
    """The separator cannot be smuggled into a prefix."""
    with pytest.raises((ValueError, TypeError)):
        call_key(double, 1, prefix=prefix)


def test_functions_of_one_name_and_other_code_differ():
    """The name is not enough."""
    assert key(make("def f(x): return x + 1")) != key(make("def f(x): return x + 2"))
    assert key(make("f = lambda x: x + 1")) != key(make("f = lambda x: x - 1"))
    assert key(make("def f(x): return x + 1")) == key(make("\n\n\ndef f(x): return x + 1"))


def test_nested_code_counts():
    """A change in a comprehension or an inner function is a change."""
    one = make("def f(x):\n def g(y): return y + 1\n return g(x)")
    assert key(one) != key(make("def f(x):\n def g(y): return y + 2\n return g(x)"))


def test_defaults_and_partial_arguments_count():
    """Bound arguments are part of what a function is."""
    assert key(make("def f(x, k=1): return x * k")) != key(make("def f(x, k=2): return x * k"))
    assert key(make("def f(x, *, k=1): return k")) != key(make("def f(x, *, k=2): return k"))
    assert key(functools.partial(pow, 2)) != key(functools.partial(pow, 3))
    assert key(functools.partial(double)) != key(double)
    assert key(functools.partial(pow, mod=3)) == key(functools.partial(pow, mod=3))


def test_captured_values_count_as_they_are_at_the_call():
    """A global or an enclosing variable that changes makes another call."""
    f = make("def f(x): return x * scale", scale=2)
    before = key(f)
    f.__globals__["scale"] = 3
    assert key(f) != before
    f.__globals__["scale"] = 2
    assert key(f) == before

    def closure(factor):
        return lambda x: x * factor

    assert key(closure(2)) != key(closure(3))
    assert key(closure(2)) == key(closure(2))


def test_captured_containers_count_by_content():
    """A captured list or dict is read anew at each call."""
    weights = [1.0, 2.0]
    f = make("def f(x): return [w * x for w in weights]", weights=weights)
    before = key(f)
    weights[1] = 3.0
    assert key(f) != before


def test_what_the_function_itself_changes_is_left_out():
    """Counting one's own calls does not make each of them another call."""
    for source in (
        "def f(x):\n global n\n n += 1\n return x",
        "def f(x):\n calls.append(x)\n return x",
        "def f(x):\n seen['n'] += 1\n return x",
        "def f(x):\n seen[x] = 1\n return x",
        "def f(x):\n def inner(): calls.append(x)\n inner()\n return x",
    ):
        f = make(source, n=0, calls=[], seen={"n": 0})
        before = key(f)
        f(1)
        assert key(f) == before, source

    count = 0

    def counting(x):
        nonlocal count
        count += 1
        return x

    before = key(counting)
    counting(1)
    assert key(counting) == before


def test_a_called_function_counts():
    """A change in a helper is a change in whoever calls it."""
    helper = make("def f(x): return x + 1")
    other = make("def f(x): return x + 2")
    caller = make("def f(x): return helper(x)", helper=helper)
    before = key(caller)
    caller.__globals__["helper"] = other
    assert key(caller) != before


def test_a_helper_in_a_module_of_the_app_counts():
    """What is reached through a module of the app counts, other attributes of it do not."""
    module = types.ModuleType("settings_of_app")
    module.__file__ = "/srv/app/settings_of_app.py"
    module.SCALE, module.unused = 2, 1
    f = make("def f(x): return settings.SCALE * x", settings=module)
    before = key(f)
    module.unused = 2
    assert key(f) == before
    module.SCALE = 3
    assert key(f) != before


def test_recursive_functions_have_a_key():
    """Functions that call each other or themselves are no endless walk."""
    f = make("def f(x): return g(x)\ndef g(x): return f(x)")
    assert key(f) == key(f)


def test_many_functions_that_call_each_other_are_walked_once():
    """Shared helpers are described once, not once for every path to them."""
    source = "".join(
        f"def f{n}(x): return f{n + 1}(x) + f{n + 2}(x) + f{n + 3}(x)\n" for n in range(60)
    )
    f = make(source + "def f60(x): return x\nf61 = f62 = f60", name="f0")
    assert key(f) == key(f)


class Scaler:
    def __init__(self, factor):
        self.factor = factor
        self.calls = 0
        self.log = []

    def predict(self, x):
        self.calls += 1
        self.log.append(x)
        return self._scaled(x)

    def _scaled(self, x):
        return x * self.factor

    def __call__(self, x):
        return self.predict(x)


def test_objects_are_identified_by_class_and_state():
    """Two models of one class differ by what they hold."""
    assert key(Scaler(2).predict) != key(Scaler(3).predict)
    assert key(Scaler(2).predict) == key(Scaler(2).predict)
    assert key(Scaler(2)) != key(Scaler(3))
    assert key(Scaler(2)) == key(Scaler(2))
    scaler = Scaler(2)
    before = key(scaler.predict)
    scaler.predict(1)
    assert key(scaler.predict) == before
    scaler.factor = 5
    assert key(scaler.predict) != before


def test_objects_inside_objects_count():
    """A change deep inside a captured object is a change; its own bookkeeping is not."""
    service = types.SimpleNamespace(model=Scaler(2))
    f = make("def f(x): return service.model.predict(x)", service=service)
    before = key(f)
    f(1)
    assert key(f) == before
    service.model.factor = 3
    assert key(f) != before


def test_the_code_of_a_class_counts():
    """A class of the same name with another method is another class."""
    source = "class C:\n k = 1\n def predict(self, x): return self.helper(x)\n def helper(self, x): return x + {}"
    one, other = make(source.format(1), name="C"), make(source.format(2), name="C")
    assert key(one().predict) != key(other().predict)
    assert key(one().predict) == key(make(source.format(1), name="C")().predict)


def test_the_methods_of_a_dataclass_count():
    """A class that the codec could store is more than its fields."""
    source = """
        from dataclasses import dataclass
        @dataclass
        class C:
            k: int = 1
            def predict(self, x): return self.helper(x)
            def helper(self, x): return x + {}
    """
    one, other = make(source.format(1), name="C"), make(source.format(2), name="C")
    assert key(one().predict) != key(other().predict)
    assert key(one(k=1).predict) != key(one(k=2).predict)
    assert key(one(k=1).predict) == key(one(k=1).predict)


def test_class_attributes_count():
    """A value kept on the class is part of what its objects compute."""
    source = "class C:\n k = {}\n def predict(self, x): return self.k * x"
    assert key(make(source.format(1), name="C")().predict) != key(
        make(source.format(2), name="C")().predict
    )


def test_slots_and_properties_count():
    """State in slots is state."""
    source = "class C:\n __slots__ = ('k',)\n def __init__(self, k): self.k = k\n def predict(self, x): return self.k * x"
    c = make(source, name="C")
    assert key(c(1).predict) != key(c(2).predict)
    assert key(c(1).predict) == key(c(1).predict)


def test_what_only_serves_the_running_is_left_out():
    """Loggers and locks do not make a function a matter of one process."""
    f = make(
        "def f(x):\n with lock:\n  logger.info('x')\n  return math.sqrt(x) + np.sqrt(x) + np.dot(x, x)",
        lock=threading.Lock(), logger=logging.getLogger("x"), math=math, np=np,
    )  # fmt: skip
    assert key(f) == key(f)


def test_an_object_of_a_library_that_cannot_be_read_is_one_thing_whatever_it_does():
    """Such an object is the same in this process however it changes, and no other is it."""
    with tempfile.SpooledTemporaryFile() as one, tempfile.SpooledTemporaryFile() as other:
        f = make("def f(x): return file.read(x)", file=one)
        with pytest.warns(RuntimeWarning, match="SpooledTemporaryFile"):
            before = key(f)
        one.position = 5
        assert key(f) == before
        assert key(make("def f(x): return file.read(x)", file=other)) != before


def test_an_apps_object_that_holds_something_opaque_is_still_read():
    """The opaque attribute stays in this process, the others count by content."""
    source = "class C:\n k = 1\n def predict(self, x): return self.k"
    model = make(source, name="C")()
    model.session = (n for n in ())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = key(model.predict)
    model.k = 2
    assert key(model.predict) != before


def test_a_mock_is_one_function_however_often_it_was_called():
    """Tests of apps use mocks for models."""
    model = Mock(return_value=1)
    before = key(model)
    model(1)
    assert key(model) == before != key(Mock(return_value=1))
    assert key(model.encode) == key(model.encode)


def test_library_functions_are_known_by_name():
    """Functions of C and numpy have keys that hold in every process."""
    keys = {key(f) for f in (math.sqrt, np.dot, np.sqrt, np.linalg.norm, len, str.upper, "a".upper)}
    assert len(keys) == 7


def test_what_cannot_be_read_is_never_confused_and_warned_about_once():
    """An opaque object's results stay in this process."""
    source = "def f(x): return thing"
    opaque = make(source, thing=(n for n in ()))
    with pytest.warns(RuntimeWarning, match="register_fingerprint"):
        first = key(opaque)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert key(opaque) == first
        assert key(make(source, thing=(n for n in ()))) != first


def test_a_large_web_of_objects_is_not_read_at_each_call():
    """An object of too many parts gets an identity of this process."""
    nodes = [Scaler(n) for n in range(2000)]
    for one, other in itertools.pairwise(nodes):
        one.next = other
    f = make("def f(x): return web.n", web=nodes[0])
    with pytest.warns(RuntimeWarning):
        first = key(f)
    assert key(f) == first


def test_a_registered_fingerprint_decides():
    """A user's fingerprint stands for the objects of a type and its subclasses."""

    class Model(list):  # not readable by content
        def predict(self, x):
            return x

    register_fingerprint(Model, lambda model: model.digest)
    one, other, again = Model(), Model(), Model()
    one.digest, other.digest, again.digest = "a", "b", "a"
    assert key(one.predict) != key(other.predict)
    assert key(one.predict) == key(again.predict)


def test_models_behind_get_model_count():
    """A function that asks the registry for its model changes with that model."""
    f = make("from hornbeam_ml import get_model\ndef f(x): return get_model('scaler').predict(x)")
    register_model("scaler", lambda: Scaler(2))
    f(1)
    before = key(f)
    register_model("scaler", lambda: Scaler(3))
    f(1)
    assert key(f) != before
    register_model("scaler", lambda: Scaler(2))
    f(1)
    assert key(f) == before


def test_something_that_is_not_callable_is_refused():
    """A model is no function."""
    with pytest.raises(TypeError, match="callable"):
        key("double")


KEYS_OF_A_PROGRAM = """
import math, sys, threading
import numpy as np
from hornbeam_ml.bytecode import is_library_file
from hornbeam_ml.keys import call_key

WORDS = {"alpha", "beta", "gamma"}
models = {"a": 1, "b": (2, 3)}
lock = threading.Lock()

class Model:
    def __init__(self): self.weights, self.names = np.arange(5.0), {"x", "y", "z"}
    def predict(self, text):
        return [w for w in text if w in {"one", "two", "three"}] + [np.dot(self.weights, 2)]

def f(x, words=frozenset(WORDS)):
    with lock:
        return models["a"] if x in {"q", "r", "s", "t"} else x in WORDS

for value in ("text", {"a": {1, 2, "x"}}, np.ones(3), {"p", "q", "r"}):
    print(call_key(f, value, prefix="p"), call_key(Model().predict, value, prefix="p"))
"""


def test_keys_agree_between_processes_whatever_the_hash_seed(tmp_path):
    """A restart, or another worker, finds what was stored."""
    script = tmp_path / "program.py"
    script.write_text(KEYS_OF_A_PROGRAM)
    seen = {
        subprocess.run(
            [sys.executable, "-W", "error", str(script)],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path.cwd())},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for seed in ("0", "1", "12345", "random")
    }
    assert len(seen) == 1


def test_libraries_are_known_wherever_they_are_installed():
    """Also those of the system, the user or another environment on the path."""
    for file in (
        "/usr/lib/python3/dist-packages/x.py",
        "/home/a/.local/lib/python3.11/site-packages/x/y.py",
        math.__spec__.origin if math.__spec__.origin != "built-in" else "<frozen x>",
        json.__file__,
        identity.__file__,
    ):
        assert is_library_file(file)
    assert not is_library_file("/srv/app/models.py")
    assert not is_library_file(__file__)


def test_a_model_that_is_loaded_at_the_first_call_counts():
    """Assigning a global is no counting: what is assigned is read."""
    source = "def f(x):\n global model\n if model is None: model = load()\n return model.factor"
    f = make(source, model=None, load=lambda: Scaler(2))
    f(1)
    before = key(f)
    f.__globals__["model"] = Scaler(3)
    assert key(f) != before


def test_names_that_only_look_alike_do_not_hide_each_other():
    """An attribute that is set, or another object's method, hides no global and no attribute."""
    f = make(
        "def f(x):\n r = type('R', (), {})()\n r.scale = 0\n r.scale += scale\n return r.scale",
        scale=2,
    )
    before = key(f)
    f.__globals__["scale"] = 3
    assert key(f) != before

    source = """
        class Pipe:
            def __init__(self, steps): self.steps = list(steps)
            def add(self, step): self.steps.append(step)
            def __call__(self, x):
                seen = set()
                seen.add(1)
                return self.steps
    """
    pipe = make(source, name="Pipe")
    assert key(pipe([1])) != key(pipe([2]))


def test_what_is_set_from_outside_counts():
    """Methods that change an object hide nothing when the call does not run them."""
    source = """
        class M:
            def __init__(self): self.w = {"q": 1}
            def __setitem__(self, k, v): self.w[k] = v
            def predict(self, x): return self.w[x]
    """
    model = make(source, name="M")()
    before = key(model.predict)
    model["q"] = 2
    assert key(model.predict) != before


def test_what_a_function_imports_counts(tmp_path, monkeypatch):
    """An import inside of it is followed like one outside."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "helper_of_app.py").write_text("SCALE = 2\ndef answer(t): return 'old'")
    import helper_of_app

    one = make("def f(x):\n from helper_of_app import answer\n return answer(x)")
    other = make("def f(x):\n import helper_of_app\n return helper_of_app.SCALE")
    before = key(one), key(other)
    helper_of_app.SCALE = 3
    assert key(one) == before[0]
    assert key(other) != before[1]
    helper_of_app.answer = make("def answer(t): return 'new'", name="answer")
    assert key(one) != before[0]


def test_a_registered_model_that_is_not_loaded_yet_is_loaded_for_its_key():
    """A function is the same before and after its model is loaded, and another with another."""
    f = make("from hornbeam_ml import get_model\ndef f(x): return get_model('late').factor")
    register_model("late", lambda: Scaler(2))
    before = key(f)
    f(1)
    assert key(f) == before
    register_model("late", lambda: Scaler(3))
    assert key(f) != before


def test_attributes_of_functions_and_context_variables_count():
    """What a function keeps on itself, or finds in a context, is no mere bookkeeping."""
    f = make("def f(x): return f.scale * x")
    f.scale = 2
    before = key(f)
    f.scale = 3
    assert key(f) != before
