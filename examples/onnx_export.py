"""Export the encoder and the decoder of a trained VAE as ONNX files, for batches of any size.

pip install onnx onnxscript
python examples/onnx_export.py            # with another number of training steps: python examples/onnx_export.py 2

The loss is not exported: ONNX has no counterpart of fastvae's ops, and running a trained model does not need them.
"""

import sys

import numpy as np
import torch
from onnx.reference import ReferenceEvaluator
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fastvae

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 500
LATENT = 8


class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 2 * LATENT))
        self.decoder = nn.Sequential(nn.Linear(LATENT, 128), nn.ReLU(), nn.Linear(128, 64))
        self.elbo = fastvae.ELBO("bernoulli")

    def forward(self, x: Tensor) -> Tensor:
        mu, logvar = self.encoder(x).chunk(2, 1)
        z, kl = self.elbo.reparameterize(mu, logvar)
        return self.elbo(self.decoder(z), x, kl=kl).loss


torch.manual_seed(0)
x = torch.from_numpy(load_digits().data).float() / 16
model = VAE()
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for _ in range(STEPS):
    optimizer.zero_grad()
    loss = model(x[torch.randint(len(x), (128,))])
    loss.backward()
    optimizer.step()
print(f"loss {loss.item():.1f} nats after {STEPS} steps")

model.eval()
# The example batch has two rows, because torch.export would take a size of 0 or 1 for a constant.
batch = {0: torch.export.Dim("batch")}
for name, module, example in (
    ("encoder", model.encoder, x[:2]),
    ("decoder", model.decoder, torch.zeros(2, LATENT)),
):
    torch.onnx.export(
        module, (example,), f"{name}.onnx", dynamic_shapes=(batch,), external_data=False, verbose=False
    )
    print(f"wrote {name}.onnx")

# A runtime must compute the same from the files as PyTorch does.
(moments,) = ReferenceEvaluator("encoder.onnx").run(None, {"input": x[:5].numpy()})
mu = moments[:, :LATENT]
(logits,) = ReferenceEvaluator("decoder.onnx").run(None, {"input": mu})
with torch.no_grad():
    expected = model.decoder(model.encoder(x[:5])[:, :LATENT]).numpy()
print(f"largest difference from PyTorch: {np.abs(logits - expected).max():.0e}")
