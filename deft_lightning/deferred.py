"""Imports without what a run does not use: a third of their processor time.

Lightning imports all of torchmetrics, whose plots import matplotlib and whose audio metrics import scipy. transformers
imports scipy for losses of object detection, reasoning_gym matplotlib for a game. Modules that are imported within
:func:`deferred` get a stand-in for each, which imports the package where it is first used. A stand-in that is asked for
a name it does not know imports the package at once.
"""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from importlib.abc import Loader
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec, spec_from_loader
from types import ModuleType, SimpleNamespace
from typing import Any


@contextmanager
def no_collection() -> Iterator[None]:
    """Collect no garbage meanwhile, and leave what was made out of later collections: modules are never garbage.

    They are collected again at the end of the process, where libraries in C++ complain of what is left.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)
        gc.enable()


@contextmanager
def deferred() -> Iterator[None]:
    """Let what is imported meanwhile see stand-ins for matplotlib and scipy, unless they are imported already."""
    packages = {name.partition(".")[0] for name in NAMES}
    specs = {name: find_spec(name) for name in packages if name not in sys.modules}
    if find_spec("gammatone") is not None:  # it needs a name that torchmetrics adds to scipy.signal
        specs.pop("scipy", None)
    finder = _Finder({name: _stand_ins(name, spec) for name, spec in specs.items() if spec is not None})
    for made in finder.made.values():
        sys.modules.update(made)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for package in finder.made:
            _remove(package)


class StandIn(ModuleType):
    """A module that is imported when a name is asked of it that it does not have."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__version__":  # asked by whoever looks through all modules
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(imported(self.__name__), name)


def _stand_ins(package: str, spec: ModuleSpec) -> dict[str, StandIn]:
    """Return the modules that stand for a package and for its submodules in the table below."""
    made: dict[str, StandIn] = {}
    for name, known in NAMES.items():
        if name.partition(".")[0] != package:
            continue
        module = made[name] = StandIn(name)
        module.__dict__.update(known)
        # Found without importing the parent.
        module.__spec__ = spec if name == package else PathFinder.find_spec(name, spec.submodule_search_locations)
        module.__file__ = getattr(module.__spec__, "origin", None)
        module.__path__ = list(getattr(module.__spec__, "submodule_search_locations", None) or ())
        if name != package:
            setattr(made[package], name.rpartition(".")[2], module)
    return made


class _Finder:
    """Import a package after all, where a module of it is imported that has no stand-in."""

    def __init__(self, made: dict[str, dict[str, StandIn]]) -> None:
        self.made = made

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        package = name.partition(".")[0]
        if isinstance(sys.modules.get(package), StandIn):
            imported(package)
            imported(name.rpartition(".")[0])
            if name in sys.modules:  # the package has imported it
                return spec_from_loader(name, _Found(sys.modules[name]))
        return None


class _Found(Loader):
    """The loader of a module that was loaded meanwhile."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        pass


def imported(name: str) -> ModuleType:
    """Return a module itself, where a stand-in may be in its place."""
    _remove(name.partition(".")[0])
    return import_module(name)


def _remove(package: str) -> None:
    """Remove the stand-ins of a package; who has one keeps it."""
    for name in NAMES:
        if name.partition(".")[0] == package and isinstance(sys.modules.get(name), StandIn):
            del sys.modules[name]


class _Class(type):
    """A class that stands for another one: ``isinstance`` asks that one."""

    home: str

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, getattr(imported(cls.home), cls.__name__))


def _class(home: str, name: str) -> type:
    return _Class(name, (), {"home": home})


def _function(home: str, name: str) -> Callable[..., Any]:
    def later(*args: Any, **kwargs: Any) -> Any:
        return getattr(imported(home), name)(*args, **kwargs)

    return later


def _style(*args: Any, **kwargs: Any) -> AbstractContextManager[None]:
    """Return ``pyplot.style.context``, of which torchmetrics makes decorators while it is imported."""

    @contextmanager
    def context() -> Iterator[None]:
        with imported("matplotlib.pyplot").style.context(*args, **kwargs):
            yield

    return context()


# What torchmetrics, transformers and reasoning_gym ask of each while they are imported.
NAMES: dict[str, dict[str, Any]] = {
    "matplotlib": {},
    "matplotlib.animation": {},
    "matplotlib.axes": {"Axes": _class("matplotlib.axes", "Axes")},
    "matplotlib.collections": {},
    "matplotlib.colors": {"Colormap": _class("matplotlib.colors", "Colormap")},
    "matplotlib.pyplot": {
        "Figure": _class("matplotlib.figure", "Figure"), "style": SimpleNamespace(context=_style),
    },
    "mpl_toolkits": {},
    "mpl_toolkits.mplot3d": {"Axes3D": _class("mpl_toolkits.mplot3d", "Axes3D")},
    "scipy": {},
    "scipy.optimize": {"linear_sum_assignment": _function("scipy.optimize", "linear_sum_assignment")},
    "scipy.signal": {"hamming": None},  # added where it is missing, for gammatone alone
}  # fmt: skip
