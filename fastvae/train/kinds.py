"""All kinds of data: whoever imports this can train and read runs of every recipe.

Nothing else in `fastvae.train` names a kind; a new one is added here.
"""

from importlib import import_module

from . import registry
from .registry import read_run, recipes

__all__ = ["KINDS", "read_run", "recipes"]

KINDS = ("image", "text", "counts")
"""Their packages, in the order in which the command line lists their recipes."""

for _kind in KINDS:
    import_module(f"fastvae.train.{_kind}")
registry.arrange(KINDS)
