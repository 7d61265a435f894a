"""Stand-in for torchvision, whose CPU build the environment does not have.

SGLang's and transformers' modules for images import names from it when they are loaded; text models never use them. Every
submodule can be imported and every name in it is an empty class.
"""

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import MutableSequence, Sequence
from typing import Any

__version__ = "0.0.0"


class _Anything(type):
    """Classes whose every attribute exists, as ``InterpolationMode.BICUBIC`` must; numbers, since some are used as keys."""

    def __getattr__(cls, name: str) -> int:
        if name.startswith("_"):
            raise AttributeError(name)
        return hash(name)


class _Module(types.ModuleType):
    __path__: MutableSequence[str] = []  # noqa: RUF012 (a module attribute, as importlib sets it)

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


class _Submodules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True) if fullname.startswith("torchvision.") else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> Any:
        """Run nothing: the module is empty."""


sys.meta_path.append(_Submodules())
