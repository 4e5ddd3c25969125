"""Checks that a recent Triton is installed, and whether it runs as an interpreter."""

OLDEST = (3, 6)  # the version that comes with torch 2.11 and that the tests use
MEND = 'pip install -U "triton>=3.6"'

try:
    import triton
except ImportError as error:
    raise ImportError(f"Triton is not installed ({error}); install it with: {MEND}", name="triton") from error

if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST:
    raise ImportError(f"Triton {triton.__version__} is too old; get a newer one with: {MEND}", name="triton")

# Triton parses the environment variable itself; it accepts "1", "true", "on" and the like.
INTERPRETED: bool = triton.knobs.runtime.interpret
