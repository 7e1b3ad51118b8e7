"""Heavy modules, imported at first use rather than at import time.

`loraq --help`, `list` and `check` read every strategy's options and so import every strategy's file, yet none of them
touches a tensor. torch alone takes over a second to import. So files that are read for their options write

    if TYPE_CHECKING:
        import torch
    else:
        from loraq.lazy import torch

and get a stand-in that imports the real module when its first attribute is asked for. (PEP 810 gives Python 3.15
`lazy import torch`; then this file can go.)
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any


class LazyModule(ModuleType):
    """A module's stand-in: the first attribute that is asked for imports the module."""

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__") and attribute.endswith("__"):  # introspection must not import torch
            raise AttributeError(attribute)
        found = getattr(importlib.import_module(self.__name__), attribute)
        self.__dict__[attribute] = found  # so that a loop of small operations does not pay for the import each time
        return found


torch = LazyModule("torch")
