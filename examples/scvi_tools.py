"""scvi-tools trains scVI with fastvae's loss in it: the three lines are marked.

pip install "fastvae-elbo[scvi]"
python examples/scvi_tools.py            # or with a number of steps: python examples/scvi_tools.py 2
"""

import sys

import anndata
import numpy as np
import scvi

from fastvae.integrations.scvi import accelerate, status  # 1

CELLS, GENES, KINDS, BATCH = 1024, 2000, 4, 128
STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 10 * CELLS // BATCH

# Counts as a cell has them: most genes hardly expressed, a few a lot, each kind of cell in its own way.
rng = np.random.default_rng(0)
kind = rng.integers(KINDS, size=CELLS)
expression = rng.gamma(0.2, 2.0, (KINDS, GENES))
depth = rng.gamma(5.0, 0.2, (CELLS, 1))
counts = rng.poisson(expression[kind] * depth).astype(np.float32)
data = anndata.AnnData(counts, obs={"kind": kind.astype(str)})

scvi.settings.seed = 0
scvi.model.SCVI.setup_anndata(data)
model = scvi.model.SCVI(data, gene_likelihood="zinb")

with accelerate(fused_adam=True):  # 2
    model.train(max_steps=STEPS, max_epochs=-(-STEPS * BATCH // CELLS), batch_size=BATCH, train_size=1.0)

print(status())  # 3: what was served, and what was not, and why
print(f"negative ELBO of a cell: {float(model.history['elbo_train'].iloc[-1].item()):.1f} nats")

# Nothing of fastvae is in the model: it saves, loads and goes on as any other.
latent = model.get_latent_representation()
print(f"{latent.shape[0]} cells in {latent.shape[1]} dimensions")
