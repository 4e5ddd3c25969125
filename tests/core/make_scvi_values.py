"""Makes tests/core/scvi_values.json: scvi-tools' log_nb_positive and log_zinb_positive on random inputs, in float64.

Run `python make_scvi_values.py` where scvi-tools is installed, or `python make_scvi_values.py FILE.whl` with its wheel
(pip download --no-deps scvi-tools), because these two functions need only torch.

Both are evaluated with their default eps of 1e-8, which changes the result, and with one that does not.
"""

import importlib
import json
import sys
import types
from pathlib import Path

import torch

EPS = {"default": 1e-8, "none": 1e-30}


def functions(wheel: str | None) -> types.ModuleType:
    if wheel is not None:
        for name in ("scvi", "scvi.utils", "scvi.distributions"):
            module = types.ModuleType(name)
            module.__path__ = [f"{wheel}/{name.replace('.', '/')}"] if name == "scvi.distributions" else []
            sys.modules[name] = module
        sys.modules["scvi"].settings = None  # type: ignore[attr-defined]
        sys.modules["scvi.utils"].is_package_installed = lambda name: False  # type: ignore[attr-defined]
    return importlib.import_module("scvi.distributions._negative_binomial")


def main() -> None:
    wheel = sys.argv[1] if len(sys.argv) > 1 else None
    scvi = functions(wheel)
    torch.manual_seed(20181130)
    size = 60
    mu = torch.exp(2 * torch.randn(size, dtype=torch.float64))
    theta = torch.exp(1.5 * torch.randn(size, dtype=torch.float64))
    zi_logits = 2 * torch.randn(size, dtype=torch.float64)
    x = torch.poisson(torch.distributions.Gamma(theta, theta / mu).sample())
    x = x * torch.bernoulli(torch.sigmoid(-zi_logits))
    values = {"x": x, "mu": mu, "theta": theta, "zi_logits": zi_logits}
    for name, eps in EPS.items():
        values[f"log_nb_positive, eps {name}"] = scvi.log_nb_positive(x, mu, theta, eps=eps)
        values[f"log_zinb_positive, eps {name}"] = scvi.log_zinb_positive(x, mu, theta, zi_logits, eps=eps)[0]
    source = (
        f"scvi-tools {Path(wheel).name.split('-')[1]}"
        if wheel
        else f"scvi-tools {sys.modules['scvi'].__version__}"
    )
    record = {"source": source} | {name: value.tolist() for name, value in values.items()}
    Path(__file__).with_name("scvi_values.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
