"""Functions that a caller hands over as objects, of a notebook, a script or a REPL: what identifies their code.

Such a function has a digest of its own source, and one of each value that it uses: other functions, numbers, arrays. Of
what has no digest, such as a data loader, nobody can say whether it changed between two runs.
"""

from __future__ import annotations

import ast
import dataclasses
import dis
import functools
import hashlib
import inspect
import platform
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lcsc_opt.base.code import CodeFile, is_local, local_sources, module_file

LIVE = "<python>:"
"""Begins the name of such a function in settings, where ``module:function`` would be one that can be imported."""

_MOST_BYTES = 2**30  # of an array; larger ones are not hashed
_CONSTANTS = (type(None), bool, int, float, complex, str, bytes, range, type(Ellipsis), Path)
_SCRIPT = "__main__"  # the module of scripts, notebooks and the REPL


@dataclasses.dataclass(frozen=True, eq=False)
class LiveFunctions:
    """Functions that settings name ``<python>:NAME``.

    Attributes:
        functions: name, with its beginning :data:`LIVE` → function.
        code: name of a function, or of a value that it uses → its digest.
        unchecked: names of used values that have no digest, with their types.
    """

    functions: Mapping[str, Callable[..., Any]] = dataclasses.field(default_factory=dict)
    code: Mapping[str, CodeFile] = dataclasses.field(default_factory=dict)
    unchecked: tuple[str, ...] = ()


class GivenNetwork:
    """What makes the network of a study where the caller gave a network: this one, whose weights are loaded anew.

    Args:
        network: a ``torch.nn.Module``. The structure that its text shows counts as its code, and the classes of all its
            modules do.
    """

    def __init__(self, network: Any) -> None:
        self._network = network
        text = re.sub(r" at 0x[0-9a-f]+", "", repr(network))  # an address is another one in each process
        kinds = dict.fromkeys(type(part) for part in network.modules())
        self.structure = (text, tuple(kinds))

    def __call__(self) -> Any:
        """The same network each time."""
        return self._network


def importable_name(function: Callable[..., Any]) -> str | None:
    """``module:function`` for what any process can import under this name; ``None`` for anything else."""
    module_name = getattr(function, "__module__", None)
    name = getattr(function, "__qualname__", "")
    if not module_name or module_name == _SCRIPT or "." in name:
        return None
    module = sys.modules.get(module_name)
    imported_object = getattr(module, name, None)  # another object once an edited module was imported again
    if module_file(module_name) is None or getattr(imported_object, "__qualname__", None) != name:
        return None
    if getattr(imported_object, "__module__", None) != module_name:
        return None
    return f"{module_name}:{name}"


class LiveCode:
    """The digests of a function and of what it uses.

    Args:
        name: of the function; the values that it uses are called ``NAME.value``.
        function: any callable.

    Attributes:
        digests: name → SHA-256 in hex.
        modules: name → file of the local modules that it uses.
        unchecked: names of values without a digest, with their types.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.digests: dict[str, str] = {}
        self.modules: dict[str, Path] = {}
        self.unchecked: list[str] = []
        self._visited: set[int] = set()
        self._visit(name, name, function)

    @property
    def code(self) -> dict[str, CodeFile]:
        """The digests in the form of files, with the local modules' own."""
        files = {name: CodeFile(Path(name), digest, frozenset()) for name, digest in self.digests.items()}
        return files | local_sources(self.modules)

    def _visit(self, root: str, name: str, value: Any) -> None:
        """Digest one value, called ``name``; what it uses is called after ``root``."""
        if isinstance(value, types.ModuleType):
            self._visit_module(value)
            return
        if id(value) in self._visited:
            return
        if isinstance(value, functools.partial):
            self._visit(root, name, value.func)
            self._visit(root, f"{name}.arguments", (value.args, tuple(sorted(value.keywords.items()))))
        elif isinstance(value, types.MethodType):
            self._visit(root, name, value.__func__)
            self._visit(root, f"{name}.self", value.__self__)
        elif isinstance(value, GivenNetwork):
            described, kinds = value.structure
            self._add(name, _sha256(described))
            for kind in kinds:
                self._visit(root, f"{name}.{kind.__name__}", kind)
        elif isinstance(value, (types.FunctionType, type)):
            self._visited.add(id(value))
            self._visit_code(root, name, value)
        elif isinstance(value, (types.BuiltinFunctionType, types.MethodWrapperType)):
            self._add(name, _sha256(value.__qualname__))
        else:
            digest = _digest_of_data(value)
            if digest is not None:
                self._add(name, digest)
                return
            self._visited.add(id(value))
            self.unchecked.append(f"{name.removeprefix(LIVE)} ({type(value).__name__})")
            if type(value).__module__ == _SCRIPT:
                self._visit(root, f"{root}.{type(value).__name__}", type(value))

    def _visit_module(self, module: types.ModuleType) -> None:
        file = module_file(module.__name__)
        if file is not None and is_local(file) and module.__name__ != _SCRIPT:
            self.modules[module.__name__] = file

    def _add(self, name: str, digest: str) -> None:
        """Note a digest. Where another value has this name, as a variable of another closure, it gets a number."""
        number = 1
        unique_name = name
        while self.digests.get(unique_name, digest) != digest:
            number += 1
            unique_name = f"{name} ({number})"
        self.digests[unique_name] = digest

    def _visit_code(self, root: str, name: str, value: Any) -> None:
        """Digest a function or a class. Of an imported one, the file of its module counts, and what it closes over."""
        module_name = str(value.__module__)
        if name != root and module_name != _SCRIPT:
            self._visit_imported(root, name, value)
            return
        if isinstance(value, type):
            self._visit_class(root, name, value)
            return
        self._add(name, _sha256(_source_of(value.__code__)))
        for defaults in (value.__defaults__, tuple(sorted((value.__kwdefaults__ or {}).items()))):
            if defaults:
                self._visit(root, f"{name}.defaults", defaults)
        for used, used_value in _used_values(value):
            self._visit(root, f"{root}.{used}", used_value)

    def _visit_imported(self, root: str, name: str, value: Any) -> None:
        """Digest what a module made: by its file, and for the function of a factory or a decorator by its variables.

        Of installed packages, variables without a digest are theirs: they are not listed as unchecked.
        """
        module_name = str(value.__module__)
        file = module_file(module_name)
        is_of_user = file is not None and is_local(file)
        if file is not None and is_of_user:
            self.modules[module_name] = file
        described = f"{module_name}:{value.__qualname__}"
        if not isinstance(value, types.FunctionType):
            self._add(name, _sha256(described))
            return
        if "<" in described:  # <lambda> or <locals>: several functions of the module may have this name
            described += _source_of(value.__code__)
        self._add(name, _sha256(described))
        for variable, variable_value in inspect.getclosurevars(value).nonlocals.items():
            has_digest = isinstance(variable_value, types.FunctionType) or _digest_of_data(variable_value) is not None
            if is_of_user or has_digest:
                self._visit(root, f"{name}.{variable}", variable_value)

    def _visit_class(self, root: str, name: str, value: type) -> None:
        """Digest a class: that of each of its functions and plain attributes, and of its bases."""
        if value.__module__ != _SCRIPT:
            self._visit_module(sys.modules[value.__module__])
        self._add(name, _sha256(value.__qualname__))
        for attribute, member in vars(value).items():
            functions = _functions_of(member)
            for function in functions:
                self._visited.add(id(function))
                self._add(f"{name}.{attribute}", _sha256(_source_of(function.__code__)))
                for used, used_value in _used_values(function):
                    self._visit(root, f"{root}.{used}", used_value)
            is_pythons = attribute.startswith(("__", "_abc_")) or hasattr(member, "__get__")
            if not functions and (isinstance(member, type) or not is_pythons):
                self._visit(root, f"{name}.{attribute}", member)
        for base in value.__bases__:
            if base is not object:
                self._visit(root, f"{root}.{base.__name__}", base)


def _functions_of(member: Any) -> list[types.FunctionType]:
    """The functions of an attribute of a class: a method, also a static or cached one, or all parts of a property."""
    parts = [member, *(getattr(member, part, None) for part in ("__func__", "func", "fget", "fset", "fdel"))]
    return [part for part in parts if isinstance(part, types.FunctionType)]


def _used_values(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Name and value of what a function uses from around it: enclosing functions, and the module."""
    closure = inspect.getclosurevars(function).nonlocals
    yield from closure.items()
    names = dict.fromkeys(name for code in _nested(function.__code__) for name in _global_names(code))
    for name in names:
        if name in function.__globals__ and name not in closure:
            yield name, function.__globals__[name]


def _nested(code: types.CodeType) -> Iterator[types.CodeType]:
    """A code object and those inside of it: comprehensions, inner functions."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _nested(constant)


def _global_names(code: types.CodeType) -> Iterator[str]:
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield instruction.argval


def _source_of(code: types.CodeType) -> str:
    """The source without comments and layout; where it is not known, the bytecode of this version of Python."""
    try:
        lines, _ = inspect.findsource(code)
        functions = _functions_in("".join(lines))
    except (OSError, TypeError, SyntaxError, ValueError):
        return _bytecode_of(code)
    sources = [ast.unparse(node) for node in functions if _is_of(node, code)]
    if len(set(sources)) == 1:
        return sources[0]
    return _bytecode_of(code)  # the file was edited since, or only this tells several lambdas of one line apart


@functools.lru_cache(maxsize=8)
def _functions_in(source: str) -> list[ast.AST]:
    """The functions and lambdas of a file, which is parsed once for all of them."""
    kinds = (ast.Lambda, ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]


def _is_of(node: ast.AST, code: types.CodeType) -> bool:
    """Whether a code object was made of this part of a source."""
    if isinstance(node, ast.Lambda):
        return code.co_name == "<lambda>" and node.lineno == code.co_firstlineno
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        first_line = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        return node.name == code.co_name and first_line == code.co_firstlineno
    return False


def _bytecode_of(code: types.CodeType) -> str:
    constants = []
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            constants.append(_bytecode_of(constant))
        else:
            constants.append(repr(constant))
    parts = [platform.python_version(), code.co_code.hex(), *constants, *code.co_names, *code.co_varnames]
    return "\n".join(parts)


def _digest_of_data(value: Any) -> str | None:
    """The digest of a constant, a tensor, an array, or a collection of them; ``None`` for anything else."""
    if isinstance(value, _CONSTANTS):
        return _sha256(repr(value))
    if isinstance(value, (tuple, list, frozenset, set)):
        entries = sorted(value, key=repr) if isinstance(value, (frozenset, set)) else value
        return _digest_of_entries(type(value).__name__, entries)
    if isinstance(value, slice):
        return _digest_of_entries("slice", (value.start, value.stop, value.step))
    if isinstance(value, Mapping):
        return _digest_of_entries("mapping", [entry for pair in value.items() for entry in pair])
    if hasattr(value, "detach") and hasattr(value, "numel"):  # a tensor
        return _digest_of_tensor(value)
    if hasattr(value, "tobytes") and hasattr(value, "dtype"):  # an array
        if value.dtype.hasobject or value.nbytes > _MOST_BYTES:
            return None
        return _sha256(f"{value.dtype} {value.shape}", value.tobytes())
    if type(value).__module__ == "torch" and type(value).__name__ in ("dtype", "device"):
        return _sha256(repr(value))
    return None


def _digest_of_entries(kind: str, entries: Any) -> str | None:
    digests = []
    for entry in entries:
        digest = _digest_of_data(entry)
        if digest is None:
            return None
        digests.append(digest)
    return _sha256(" ".join([kind, *digests]))


def _digest_of_tensor(tensor: Any) -> str | None:
    import torch

    if isinstance(tensor, torch.nn.Parameter) or tensor.is_sparse or tensor.numel() * tensor.itemsize > _MOST_BYTES:
        return None
    values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return _sha256(f"{tensor.dtype} {list(tensor.shape)}", values.numpy().tobytes())


def _sha256(text: str, content: bytes = b"") -> str:
    return hashlib.sha256(text.encode() + b"\0" + content).hexdigest()
