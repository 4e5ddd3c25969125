"""A VAE learns the same with the fused loss as with the hand-written one, from the same noise."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastvae
from fastvae import reference

STEPS, BATCH, PIXELS, LATENTS = 300, 32, 64, 8


class VAE(nn.Module):
    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(PIXELS, 48), nn.Tanh(), nn.Linear(48, 2 * LATENTS))
        self.decoder = nn.Sequential(nn.Linear(LATENTS, 48), nn.Tanh(), nn.Linear(48, outputs))


def by_hand(likelihood: str, recon: Tensor, x: Tensor) -> Tensor:
    """The loss summed over the batch, as in tutorials, including its constant."""
    if likelihood == "bernoulli":
        return F.binary_cross_entropy_with_logits(recon, x, reduction="sum")
    mean, logvar = recon.chunk(2, dim=1)
    return F.gaussian_nll_loss(mean, x, logvar.exp(), full=True, eps=1e-12, reduction="sum")


def train(likelihood: str, data: Tensor, *, fused: bool) -> Tensor:
    torch.manual_seed(1)
    model = VAE(PIXELS if likelihood == "bernoulli" else 2 * PIXELS).to(data.dtype)
    elbo = fastvae.ELBO(
        likelihood if likelihood == "bernoulli" else fastvae.likelihoods.Gaussian(scale="per_element")
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    losses = []
    for step in range(STEPS):
        rows = torch.randperm(len(data))[:BATCH]
        x, seed = data[rows], torch.tensor([step, 0])
        mu, logvar = model.encoder(x).chunk(2, dim=1)
        if fused:
            z, kl = elbo.reparameterize(mu, logvar, seed=seed)
            loss = elbo(model.decoder(z), x, kl=kl).loss
        else:
            eps = reference.normal_noise(seed, 0, BATCH, LATENTS, dtype=data.dtype)[0]
            z = mu + torch.exp(0.5 * logvar) * eps
            kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
            loss = (by_hand(likelihood, model.decoder(z), x) + kl) / BATCH
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).double()


# Both compute the same function and differ only by rounding, which 300 steps amplify: to 4e-6 in float32 and 1e-14 in
# float64, as measured. The tolerance allows five times that for another processor's rounding, or a hundred times in
# float64; a wrong term of any size is much larger.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}


@pytest.mark.parametrize(
    "dtype", [torch.float64, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=["float64", "float32"]
)
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_training_gives_the_same_losses_on_every_backend(
    backend: str, threads: None, likelihood: str, dtype: torch.dtype
) -> None:
    torch.set_num_threads(1)  # because there is so little work
    generator = torch.Generator().manual_seed(2)
    # Images of two factors: blobs on an 8 x 8 grid. The noise keeps the variances that a Gaussian learns away from
    # zero, where rounding is amplified without limit.
    places = 8 * torch.rand(256, 2, 1, 1, generator=generator, dtype=torch.float64)
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    blobs = torch.exp(-((y - places[:, 0]) ** 2 + (x - places[:, 1]) ** 2) / 4).flatten(1)
    grain = 0.2 * torch.rand(blobs.shape, generator=generator, dtype=torch.float64)
    data = (0.8 * blobs + grain).to(dtype)

    fused, hand = (train(likelihood, data, fused=fused) for fused in (True, False))
    relative = (fused - hand).abs() / hand.abs().clamp(min=1)
    assert relative.max() < TOLERANCE[dtype], f"largest difference {relative.max():.3g}"
    assert fused[-20:].mean() < fused[:20].mean() - 5, "it learns nothing, and shows nothing"
