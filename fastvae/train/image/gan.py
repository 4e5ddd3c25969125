"""A VAE-GAN as a LightningModule: a VAE whose decoder is the generator of a GAN (Larsen et al. 2016)."""

from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn

import fastvae
from fastvae import functional
from fastvae.likelihoods import Gaussian, Likelihood

from .module import ImageVAE, unbounded_logvar

__all__ = ["AdversarialVAE"]

_ADVERSARIAL_WARMUP = 500  # steps over which the discriminator's gradient comes to its full length
_R1_INTERVAL = 16  # a lazy penalty does as well, sixteen times as strong (Karras et al. 2020, section 3.1)


class AdversarialVAE(ImageVAE):
    """An encoder, a decoder and a discriminator, each with an optimiser of its own.

    Larsen et al. 2016, algorithm 1, in which a datum is reconstructed not in its pixels but in what the discriminator
    sees in it, and the losses reach:

        encoder         KL + nll of the discriminator's features
        decoder         nll of the features - the discriminator's score of what it makes, of z ~ q(z|x) and of z ~ p(z)
        discriminator   log-loss of real images against both, with a penalty on its gradient at real ones

    Args:
        encoder, decoder: as of `ImageVAE`; the decoder gives the means of the pixels, (B, C, H, W).
        elbo: of the features: its likelihood takes dicts as the discriminator gives them.
        discriminator: images (B, C, H, W) -> (features, a dict of (B, ...) each; score (B,), high for real images).
        penalty: weight of that gradient's squared length (Mescheder et al. 2018, equation 9, R1), every 16th step.
        adversarial: length of the score's gradient by the decoder's weights, that of the nll being 1. So balanced
            (after Esser et al. 2021, equation 7), neither drowns the other, whatever scale the features have.
        clip: the largest norm of the gradient of encoder and decoder; 0: not clipped.
        options: those of `ImageVAE`.

    `likelihood`, a Gaussian of the pixels with a variance that is fitted and reaches no network, measures the model in
    nats of the data, as other VAEs are: that is the reconstruction that is logged, and the held-out negative ELBO.
    Logged besides: train_features, the nll of the features; train_real and train_fake, the mean scores.
    """

    others = ("train_features", "train_real", "train_fake")
    shown = (("bits/dim", "held_out_bits_per_dim", 3), ("features", "train_features", 0),
             ("D(real)", "train_real", 2), ("D(fake)", "train_fake", 2))  # fmt: skip

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        elbo: fastvae.ELBO,
        *,
        discriminator: nn.Module,
        likelihood: Gaussian,
        penalty: float = 0.05,
        adversarial: float = 0.5,
        clip: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(encoder, decoder, elbo, **options)
        self.automatic_optimization = False
        self.discriminator = discriminator
        self.pixels = likelihood
        self.penalty = penalty
        self.adversarial = adversarial
        self.clip = clip

    @property
    def likelihood(self) -> Likelihood:
        return self.pixels

    @property
    def steps_done(self) -> int:
        return self.global_step // 3  # Lightning counts those of each optimiser

    @torch.no_grad()
    def start(self, images: Tensor) -> None:
        features, _ = self.discriminator(images[:64])
        for name, likelihood in self.elbo.likelihood.parts.items():  # type: ignore[union-attr, operator]
            logvar = features[name].float().var(0, correction=0).mean().log()
            likelihood.logvar.copy_(unbounded_logvar(logvar, likelihood.logvar_bounds))

    @torch.no_grad()
    def realism(self, images: Tensor) -> Tensor:
        """The discriminator's score (B,) of images (B, C, H, W) in [0, 1]: the higher, the more like real ones."""
        _, score = self.discriminator(images)
        return score

    def forward(self, x: Tensor, seed: Tensor, row_offset: int) -> tuple[fastvae.ELBOOutput, Tensor, Tensor]:
        """Of pixels: the loss of a batch, and its posterior."""
        mu, logvar = self.encode(x)
        z, kl = functional.reparameterize_kl(mu, logvar, seed=seed, row_offset=row_offset)
        nll = self.nll(z, x)
        return fastvae.ELBOOutput((nll + kl).mean(), nll, kl), mu, logvar

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:  # type: ignore[override]
        scales = [*self.elbo.parameters(), *self.pixels.parameters()]
        groups = (
            [self.group(self.encoder.parameters())],
            [self.group(self.decoder.parameters()), self.group(scales, times=10)],
            [self.group(self.discriminator.parameters(), times=2)],  # it has to be ahead (Heusel et al. 2017)
        )
        # An adversary changes the loss with every step: little use is in a long memory of it.
        return [torch.optim.Adam(group, lr=self.lr, betas=(0.5, 0.99), fused=True) for group in groups]

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        # Between the seeds of z ~ q and of z ~ p; held-out images have the one between.
        self._apart = torch.tensor([2, 0], device=self.device)
        self._scores: list[Tensor] = []

    def training_step(self, batch: tuple[Any, int], batch_idx: int) -> None:  # type: ignore[override]
        x, first_row = batch
        self.warm_up(batch_idx)
        noise, self.noise = self.noise, self.noise + self.noise_step
        mu, logvar = self.encode(x)
        z, kl = self.elbo.reparameterize(mu, logvar, seed=noise, row_offset=first_row)
        prior, _ = functional.reparameterize_kl(
            torch.zeros_like(mu), torch.zeros_like(mu), seed=noise + self._apart, row_offset=first_row
        )
        made, drawn = self.decode(z), self.decode(prior)

        encoder, decoder, discriminator = self.optimizers()  # type: ignore[attr-defined]
        real_score, made_score = self._update_discriminator(
            discriminator, x, made.detach(), drawn.detach(), batch_idx % _R1_INTERVAL == 0
        )

        with torch.no_grad():
            features, _ = self.discriminator(x)
        made_features, score = self.discriminator(made)
        _, drawn_score = self.discriminator(drawn)
        out = self.elbo(made_features, features, kl=kl)
        # Each backward pass names what it reaches: of the discriminator, nothing.
        networks = [*self.encoder.parameters(), *self.decoder.parameters()]
        self.manual_backward(out.loss, inputs=[*networks, *self.elbo.parameters()], retain_graph=True)
        # A discriminator that knows nothing yet has nothing to say.
        share = self.adversarial * min(1.0, self.steps_done / _ADVERSARIAL_WARMUP)
        self._add_adversarial(F.softplus(-torch.cat((score, drawn_score)).float()).mean(), share)
        nll = self.pixels.nll(made.detach(), x)
        self.manual_backward(nll.mean(), inputs=list(self.pixels.parameters()))
        if self.clip:
            torch.nn.utils.clip_grad_norm_(networks, self.clip)
        self._update(encoder, out.loss)
        self._update(decoder, out.loss)

        self.steps.add(fastvae.ELBOOutput(out.loss, nll, out.kl))
        self.steps.skipped.append(torch.stack(self._skipped).amax())
        self._scores.append(torch.stack((out.nll.mean(), real_score, made_score)).detach())

    def _update_discriminator(
        self, optimizer: LightningOptimizer, x: Tensor, made: Tensor, drawn: Tensor, penalised: bool
    ) -> tuple[Tensor, Tensor]:
        """A step of it, from images that remember nothing of the decoder; and the mean scores before."""
        self._skipped: list[Tensor] = []
        real, false = (self.discriminator(images)[1].float() for images in (x, torch.cat((made, drawn))))
        loss = F.softplus(-real).mean() + F.softplus(false).mean()
        if penalised:
            loss = loss + _R1_INTERVAL * self.penalty / 2 * self._r1_penalty(x)
        self.manual_backward(loss, inputs=list(self.discriminator.parameters()))
        self._update(optimizer, loss)
        return real.mean(), false.mean()

    def _r1_penalty(self, x: Tensor) -> Tensor:
        """R1: the mean squared length of the score's gradient by the image."""
        x = x.detach().requires_grad_()
        with torch.autocast(x.device.type, enabled=False):
            (gradient,) = torch.autograd.grad(self.discriminator(x)[1].sum(), x, create_graph=True)
        return gradient.square().flatten(1).sum(1).mean()

    def _add_adversarial(self, loss: Tensor, share: float) -> None:
        """To the decoder's gradients, and to no others', at `share` of their length."""
        weights = list(self.decoder.parameters())
        gradients = torch.autograd.grad(loss, weights)
        own = torch.nn.utils.get_total_norm([w.grad for w in weights])  # type: ignore[misc]
        scale = share * own / torch.nn.utils.get_total_norm(gradients).clamp(min=1e-12)
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad.add_(scale * gradient)  # type: ignore[union-attr]

    def _update(self, optimizer: LightningOptimizer, loss: Tensor) -> None:
        """A step, unless the loss or a gradient is not finite; then there are no gradients any more."""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        finite = torch.isfinite(loss.detach()) & torch.isfinite(torch.nn.utils.get_total_norm(gradients))
        self._skipped.append((~finite).float())
        optimizer.optimizer.found_inf = self._skipped[-1]  # type: ignore[attr-defined]
        optimizer.step()
        optimizer.zero_grad()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        pass  # `_update` has looked

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        means = torch.stack(self._scores).float().nanmean(0).tolist()
        self.log_dict(dict(zip(self.others, means, strict=True)))
