"""Training runs: everything that does not depend on the kind of data. Needs the extra `train`.

Each kind of data (`image`, `text`, `counts`) has a package of its own, which imports from here and never the reverse.
"""
