"""What the API shows of a docstring and of a class: an extension of the reader of docstrings.

Names of Sphinx roles (``:meth:`gate```) become code. Fields of a dataclass stand under its parameters already, and what
Python calls by itself (``__post_init__``) is for nobody to call: neither is listed again.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Class, Extension, Module, Object

ROLE = re.compile(r":(?:class|meth|func|attr|mod|data|exc):`~?([^`]+)`")
KEPT = {"__init__", "__call__"}  # the signature of a class, and the one special method that a user writes


class Readable(Extension):
    """Makes docstrings and members of classes readable as a page."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Rewrite the roles of a docstring."""
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(r"`\1`", obj.docstring.value)

    def on_package(self, *, pkg: Module, **kwargs: Any) -> None:
        """Take away what is no name of its own, once the signatures of dataclasses are made of their fields."""
        _shorten(pkg)


def _shorten(holder: Module | Class) -> None:
    for name, member in list(holder.members.items()):
        if member.is_alias:
            continue
        if isinstance(holder, Class):
            special = name.startswith("__") and name not in KEPT
            bare = member.is_attribute and member.docstring is None and "property" not in member.labels
            if special or bare:
                holder.del_member(name)
                continue
        if isinstance(member, Module | Class):
            _shorten(member)
