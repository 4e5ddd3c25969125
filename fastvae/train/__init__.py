"""What every training run has, whatever it is trained on. Needs the extra `train`.

A kind of data (`image`, `text`, `counts`) has a package of its own, which imports from here, never the reverse.
"""
