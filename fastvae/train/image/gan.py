"""The LightningModule of a VAE-GAN: a VAE whose decoder is the generator of a GAN (Larsen et al. 2016)."""

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

_ADVERSARIAL_WARMUP = 500  # number of steps until the discriminator's gradient has its full length
_R1_INTERVAL = (
    16  # a penalty every 16 steps, 16 times as strong, works as well (Karras et al. 2020, section 3.1)
)


class AdversarialVAE(ImageVAE):
    """An encoder, a decoder and a discriminator, each with its own optimiser.

    This is algorithm 1 of Larsen et al. 2016: a reconstruction is compared with its image in the features of the
    discriminator and not in pixels. The losses of the three networks are:

        encoder         KL + nll of the discriminator's features
        decoder         nll of the features - the discriminator's score of decoded z ~ q(z|x) and z ~ p(z)
        discriminator   log-loss of real images against both, with a penalty on its gradient at real images

    Args:
        encoder, decoder: as for `ImageVAE`; the decoder outputs the means of the pixels, (B, C, H, W).
        elbo: the ELBO of the features; its likelihood takes the dicts that the discriminator returns.
        discriminator: maps images (B, C, H, W) to a dict of features (B, ...) and a score (B,), high for real images.
        penalty: weight of that squared gradient (Mescheder et al. 2018, equation 9, R1), applied every 16 steps.
        adversarial: length of the score's gradient in the decoder's weights, relative to that of the nll. With this
            balance (after Esser et al. 2021, equation 7) neither dominates, whatever the scale of the features.
        clip: clip the gradient of encoder and decoder to this norm; 0 turns clipping off.
        options: those of `ImageVAE`.

    `likelihood` is a Gaussian of the pixels. Its variance is fitted, but it does not train the networks: it measures
    the model in nats of the data, like other VAEs, for the logged reconstruction and the validation ELBO. The metrics
    train_features, the nll of the features, and train_real and train_fake, the mean scores, are logged as well.
    """

    extra_metrics = ("train_features", "train_real", "train_fake")
    table_columns = (("bits/dim", "val_bits_per_dim", 3), ("features", "train_features", 0),
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
        return self.global_step // 3  # Lightning counts the steps of all three optimisers

    @torch.no_grad()
    def init_from_images(self, images: Tensor) -> None:
        features, _ = self.discriminator(images[:64])
        for name, likelihood in self.elbo.likelihood.parts.items():  # type: ignore[union-attr, operator]
            logvar = features[name].float().var(0, correction=0).mean().log()
            likelihood.logvar.copy_(unbounded_logvar(logvar, likelihood.logvar_bounds))

    @torch.no_grad()
    def realism(self, images: Tensor) -> Tensor:
        """Return the discriminator's score (B,) of images (B, C, H, W) in [0, 1]; realistic images score higher."""
        _, score = self.discriminator(images)
        return score

    def forward(self, x: Tensor, seed: Tensor, row_offset: int) -> tuple[fastvae.ELBOOutput, Tensor, Tensor]:
        """Return the loss of a batch in pixels, and mu and logvar of its posterior."""
        mu, logvar = self.encode(x)
        z, kl = functional.reparameterize_kl(mu, logvar, seed=seed, row_offset=row_offset)
        nll = self.nll(z, x)
        return fastvae.ELBOOutput((nll + kl).mean(), nll, kl), mu, logvar

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:  # type: ignore[override]
        scales = [*self.elbo.parameters(), *self.pixels.parameters()]
        groups = (
            [self.param_group(self.encoder.parameters())],
            [
                self.param_group(self.decoder.parameters()),
                self.param_group(scales, times=10, weight_decay=0.0),
            ],
            # The discriminator has to learn faster (Heusel et al. 2017).
            [self.param_group(self.discriminator.parameters(), times=2)],
        )
        # The discriminator changes the loss at every step, so a long memory is of little use.
        return [self.adam(group, betas=(0.5, 0.99), fused=True) for group in groups]

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        # The offset from the seed of z ~ q to that of z ~ p; validation uses the seed in between.
        self._prior_seed_offset = torch.tensor([2, 0], device=self.device)
        self._scores: list[Tensor] = []

    def training_step(self, batch: tuple[Any, int], batch_idx: int) -> None:  # type: ignore[override]
        x, first_row = batch
        self.set_schedules(batch_idx)
        noise, self.noise = self.noise, self.noise + self.noise_step
        mu, logvar = self.encode(x)
        z, kl = self.elbo.reparameterize(mu, logvar, seed=noise, row_offset=first_row)
        prior, _ = functional.reparameterize_kl(
            torch.zeros_like(mu),
            torch.zeros_like(mu),
            seed=noise + self._prior_seed_offset,
            row_offset=first_row,
        )
        reconstruction, sample = self.decode(z), self.decode(prior)

        encoder, decoder, discriminator = self.optimizers()  # type: ignore[attr-defined]
        real_score, fake_score = self._update_discriminator(
            discriminator, x, reconstruction.detach(), sample.detach(), batch_idx % _R1_INTERVAL == 0
        )

        with torch.no_grad():
            features, _ = self.discriminator(x)
        reconstruction_features, score = self.discriminator(reconstruction)
        _, sample_score = self.discriminator(sample)
        out = self.elbo(reconstruction_features, features, kl=kl)
        # Each backward pass lists the weights that it reaches; none of them belong to the discriminator.
        networks = [*self.encoder.parameters(), *self.decoder.parameters()]
        self.manual_backward(out.loss, inputs=[*networks, *self.elbo.parameters()], retain_graph=True)
        # An untrained discriminator gives no useful gradient, so its share grows slowly.
        share = self.adversarial * min(1.0, self.steps_done / _ADVERSARIAL_WARMUP)
        self._add_adversarial(F.softplus(-torch.cat((score, sample_score)).float()).mean(), share)
        nll = self.pixels.nll(reconstruction.detach(), x)
        self.manual_backward(nll.mean(), inputs=list(self.pixels.parameters()))
        if self.clip:
            torch.nn.utils.clip_grad_norm_(networks, self.clip)
        self._update(encoder, out.loss)
        self._update(decoder, out.loss)

        self.steps.add(fastvae.ELBOOutput(out.loss, nll, out.kl))
        self.steps.skipped.append(torch.stack(self._skipped).amax())
        self._scores.append(torch.stack((out.nll.mean(), real_score, fake_score)).detach())

    def _update_discriminator(
        self,
        optimizer: LightningOptimizer,
        x: Tensor,
        reconstruction: Tensor,
        sample: Tensor,
        with_penalty: bool,
    ) -> tuple[Tensor, Tensor]:
        """Update the discriminator with detached images, and return the mean scores from before the update."""
        self._skipped: list[Tensor] = []
        real, fake_scores = (
            self.discriminator(images)[1].float() for images in (x, torch.cat((reconstruction, sample)))
        )
        loss = F.softplus(-real).mean() + F.softplus(fake_scores).mean()
        if with_penalty:
            loss = loss + _R1_INTERVAL * self.penalty / 2 * self._r1_penalty(x)
        self.manual_backward(loss, inputs=list(self.discriminator.parameters()))
        self._update(optimizer, loss)
        return real.mean(), fake_scores.mean()

    def _r1_penalty(self, x: Tensor) -> Tensor:
        """Return R1, the mean squared length of the gradient of the score with respect to the image."""
        x = x.detach().requires_grad_()
        with torch.autocast(x.device.type, enabled=False):
            (gradient,) = torch.autograd.grad(self.discriminator(x)[1].sum(), x, create_graph=True)
        return gradient.square().flatten(1).sum(1).mean()

    def _add_adversarial(self, loss: Tensor, share: float) -> None:
        """Add the gradient of `loss` to that of the decoder only, scaled to `share` of its length."""
        weights = list(self.decoder.parameters())
        gradients = torch.autograd.grad(loss, weights)
        own_length = torch.nn.utils.get_total_norm([w.grad for w in weights])  # type: ignore[misc]
        scale = share * own_length / torch.nn.utils.get_total_norm(gradients).clamp(min=1e-12)
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad.add_(scale * gradient)  # type: ignore[union-attr]

    def _update(self, optimizer: LightningOptimizer, loss: Tensor) -> None:
        """Make a step unless the loss or a gradient is not finite, and reset the gradients."""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        finite = torch.isfinite(loss.detach()) & torch.isfinite(torch.nn.utils.get_total_norm(gradients))
        self._skipped.append((~finite).float())
        optimizer.optimizer.found_inf = self._skipped[-1]  # type: ignore[attr-defined]
        optimizer.step()
        optimizer.zero_grad()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        pass  # `_update` checks the gradients instead

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        means = torch.stack(self._scores).float().nanmean(0).tolist()
        self.log_dict(dict(zip(self.extra_metrics, means, strict=True)))
