"""What a torch module is: a digest of its weights and structure, and the settings it has now.

Never its name: models are retrained in place under one name. The weights in memory are read, once
per module and again after it was changed, as far as that can be seen. torch is not imported here;
whoever holds a module has done so.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import threading
import weakref
from dataclasses import dataclass
from typing import Any, Final

from hornbeam_ml.bytecode import is_library_file, library_version, read_code

_SETTINGS: Final = ("max_seq_length", "prompts", "default_prompt_name", "truncate_dim")
_PLAIN: Final = (bool, int, float, str, tuple, type(None))
_HOOKS: Final = ("_forward_hooks", "_forward_pre_hooks")
_WINDOW: Final = 64
_ADDRESS: Final = re.compile(r" at 0x[0-9a-f]+")


class UnreadableModule(Exception):
    """The weights are in a form that cannot be read (packed, quantised, on the meta device)."""


def is_torch_module(value: Any) -> bool:
    """Return whether the value is a `torch.nn.Module`."""
    module = getattr(sys.modules.get("torch.nn"), "Module", None)
    return module is not None and isinstance(value, module)


@dataclass(frozen=True, slots=True)
class _Known:
    stamp: list[Any]
    digest: bytes
    numeric_class: tuple[str, ...]
    samples: list[memoryview]
    sampled: list[bytes]
    own_parts: list[weakref.ref[Any]]

    def is_current(self, stamp: list[Any]) -> bool:
        """Return whether nothing has changed since the weights were read, as far as is seen."""
        return stamp == self.stamp and self.sampled == [bytes(one) for one in self.samples]


class TorchModules:
    """Remembers the digest of each living module. Safe to use from any thread."""

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[Any, _Known] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    def describe(self, module: Any) -> tuple[tuple[Any, ...], list[Any]]:
        """Describe a module by its class, weights, settings and numeric class.

        Returns:
            The description, and the submodules (itself included) whose class is the app's own:
            what these keep beside their tensors is not in the description.

        Raises:
            UnreadableModule: its weights cannot be read.
        """
        known = self._lookup(module)
        settings = [repr(getattr(module, name, None)) for name in _SETTINGS]
        class_ = type(module)
        # Encoding puts a SentenceTransformer into evaluation mode by itself.
        trains = module.training and not class_.__module__.startswith("sentence_transformers.")
        name = f"{class_.__module__}.{class_.__qualname__}"
        own_parts = [part for ref in known.own_parts if (part := ref()) is not None]
        return (name, known.digest, settings, trains, known.numeric_class), own_parts

    def _lookup(self, module: Any) -> _Known:
        known = self._known.get(module)
        if known is None or not known.is_current(_stamp(module)):
            with self._lock:  # one thread reads the weights, the others wait for its result
                known = self._known.get(module)
                if known is None or not known.is_current(_stamp(module)):
                    known = self._known[module] = _read(module)
        return known


def own_attributes(part: Any) -> dict[str, Any]:
    """Return what a submodule keeps beside torch's own bookkeeping."""
    bookkeeping = vars(sys.modules["torch.nn"].Module()).keys()
    return {name: value for name, value in vars(part).items() if name not in bookkeeping}


def _read(module: Any) -> _Known:
    stamp = _stamp(module)  # before reading: a change meanwhile is seen the next time
    digest = hashlib.blake2b(digest_size=32)
    for name, value in sorted(module.state_dict(keep_vars=True).items()):
        digest.update(name.encode() + b"\0")
        _update_with_tensor(digest, value)
    digest.update(json.dumps(_structure(module), sort_keys=True, default=str).encode())
    digest.update(_tokenizer(module))
    own = [weakref.ref(part) for part in module.modules() if _is_own(type(part))]
    tensors = [*module.parameters(), *module.buffers()]
    samples = [_window(one) for one in tensors if one.device.type == "cpu" and one.numel()]
    sampled = [bytes(one) for one in samples]
    numeric_class = _numeric_class(module, tensors)
    return _Known(stamp, digest.digest(), numeric_class, samples, sampled, own)


def _stamp(module: Any) -> list[Any]:
    """Return what changes when a module is changed: its parts, their settings, their tensors.

    A tensor has a version, which torch counts up at every write that it knows of, and an address.
    Writing through ``.data`` or numpy is no such write: for that a few bytes of each tensor are
    compared besides, which shows an update of all weights, and not one of a single element.
    """
    stamp: list[Any] = []
    waiting = [module]
    while waiting:
        part = waiting.pop()
        state = part.__dict__
        stamp += (id(part), id(state.get("forward")))
        stamp.append([one for one in state.items() if type(one[1]) in _PLAIN])
        stamp.append([len(state[name]) for name in _HOOKS if state.get(name)])
        for tensor in (*state["_parameters"].values(), *state["_buffers"].values()):
            if tensor is not None:
                stamp += (id(tensor), _version(tensor), tensor.data_ptr())
        waiting.extend(one for one in state["_modules"].values() if one is not None)
    return stamp


def _version(tensor: Any) -> int:
    try:
        return int(tensor._version)  # noqa: SLF001 - torch offers no other name
    except RuntimeError:  # tensors made in inference mode count no versions
        return -1


def _window(tensor: Any) -> memoryview:
    """Return a view of some bytes in the middle of a tensor's memory."""
    torch = sys.modules["torch"]
    flat = tensor.detach()
    flat = flat.reshape(-1) if flat.is_contiguous() else flat.contiguous().reshape(-1)
    data = memoryview(flat.view(torch.uint8).numpy())
    middle = len(data) // 2
    return data[middle : middle + _WINDOW] if len(data) > _WINDOW else data


def _update_with_tensor(digest: Any, value: Any) -> None:
    torch = sys.modules["torch"]
    plain = isinstance(value, torch.Tensor) and value.layout is torch.strided
    if not plain or value.is_quantized or value.is_meta:
        raise UnreadableModule
    data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
    digest.update(memoryview(data.numpy()))


def _structure(module: Any) -> list[Any]:
    parts = []
    for name, part in module.named_modules():
        config = getattr(part, "config", None)
        to_dict = getattr(config, "to_dict", None)
        settings = to_dict() if callable(to_dict) else None
        if isinstance(settings, dict):
            settings.pop("_name_or_path", None)
        extra = _ADDRESS.sub("", part.extra_repr())
        plain = sorted((key, repr(one)) for key, one in vars(part).items() if type(one) in _PLAIN)
        plain = [one for one in plain if one[0] != "training"]
        hooks = [_hook_name(one) for kind in _HOOKS for one in vars(part).get(kind, {}).values()]
        if "forward" in vars(part):
            hooks.append(_hook_name(vars(part)["forward"]))
        class_name = f"{type(part).__module__}.{type(part).__qualname__}"
        parts.append([name, class_name, extra, plain, hooks, settings])
    return parts


def _hook_name(hook: Any) -> str:
    """Describe a function that was put into a module, by its code."""
    code = getattr(hook, "__code__", None)
    return read_code(code).digest.hex() if code is not None else f"{type(hook)} {id(hook)}"


def _tokenizer(module: Any) -> bytes:
    """Return the tokeniser's rules, less the truncation and padding that each call sets anew."""
    backend = getattr(getattr(module, "tokenizer", None), "backend_tokenizer", None)
    if backend is None:
        return b""
    rules = json.loads(backend.to_str())
    rules.pop("truncation", None)
    rules.pop("padding", None)
    return json.dumps(rules, sort_keys=True).encode()


def _numeric_class(module: Any, tensors: list[Any]) -> tuple[str, ...]:
    """Return precision and backend: the same weights give other bits on another device."""
    kinds = sorted({f"{one.dtype}/{one.device.type}" for one in tensors if one.is_floating_point()})
    packages = ("torch", "transformers", type(module).__module__)
    return (*kinds, *(library_version(name) for name in packages if name in sys.modules))


def _is_own(class_: type) -> bool:
    source = getattr(sys.modules.get(class_.__module__), "__file__", None)
    return source is None or not is_library_file(source)
