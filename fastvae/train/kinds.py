"""All kinds of data. Importing this module registers them, so that runs of every recipe can be trained and read.

Other modules in `fastvae.train` do not name any kind. A new kind is added here.
"""

from importlib import import_module

from . import registry
from .registry import read_run, recipes

__all__ = ["KINDS", "read_run", "recipes"]

KINDS = ("image", "text", "counts")
"""The packages of the kinds, in the order in which the command line lists their recipes."""

for _kind in KINDS:
    import_module(f"fastvae.train.{_kind}")
registry.set_order(KINDS)
