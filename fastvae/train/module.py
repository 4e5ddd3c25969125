"""The model that is trained: an encoder, a decoder and a `fastvae.ELBO` as a LightningModule."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

import fastvae
from fastvae import functional

from . import draws, warmup

__all__ = ["ACTIVE", "VAE"]

ACTIVE = (
    0.01  # Burda et al. 2016, section 5.2: a unit is active if its posterior mean varies by more than this
)


class VAE(LightningModule):
    """A VAE for Lightning's Trainer.

    The ELBO is a part of it, so that a learned scale is trained, and kept equal over processes, with the rest.

    Args:
        encoder: a batch -> (B, 2L), the posterior's mu and logvar.
        decoder: z (B, L) -> the likelihood's parameters.
        elbo: with reduction "mean". Its `beta` is where a warm-up ends.
        latents: L.
        lr: the learning rate of Adam.
        seed: of the noise. Step t of a run draws the same noise however often the run was stopped, and over however
            many processes its batches are spread.
        schedule, schedule_epochs, cycles: how beta rises; see `fastvae.train.warmup`.

    Logged at the end of each epoch, in nats per datum: train_loss (with beta), train_nll, train_kl; the same of the
    held-out data, without beta: held_out_nelbo, held_out_nll, held_out_kl; beta, active_units and skipped_steps.
    `kl_per_dimension` has the held-out KL of each latent dimension, (L,).

    A subclass says what it is of, and what else it logs: `unit` is what a datum is called, `measures` what `terms` has
    besides for both parts of the data, `others` what it logs once, and `shown` what a line of progress ends with: a
    heading, the metric and its decimals.

    A step whose loss or gradient is not finite leaves the weights as they are; `first_skip` then says where it was.
    """

    unit = "datum"
    measures: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    shown: tuple[tuple[str, str, int], ...] = ()

    has_dropout = False
    """Then a step seeds torch's generator, which dropout draws from: a resumed run does not have its state."""

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        elbo: fastvae.ELBO,
        *,
        latents: int,
        lr: float = 1e-3,
        seed: int = 0,
        schedule: str = "none",
        schedule_epochs: float = 1.0,
        cycles: int = 1,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.elbo = elbo
        self.latents = latents
        self.lr = lr
        self.seed = seed
        self.schedule, self.schedule_epochs, self.cycles = schedule, schedule_epochs, cycles
        self.beta = float(elbo.beta)
        self.kl_per_dimension = torch.zeros(latents)
        self.first_skip: str | None = None

    def encode(self, x: Any) -> tuple[Tensor, Tensor]:
        """mu, logvar: (B, L) each."""
        mu, logvar = self.encoder(x).chunk(2, dim=1)
        return mu, logvar

    def decode(self, z: Tensor) -> Tensor:
        """The parameters of the likelihood."""
        return self.decoder(z)

    @property
    def steps_done(self) -> int:
        """How many batches the run has been trained on."""
        return self.global_step

    @property
    def likelihood(self) -> Any:
        """That of the data, given what `decode` returns."""
        return self.elbo.likelihood

    def nll(self, z: Tensor, x: Any) -> Tensor:
        """-log p(x | z) of every row, (B,)."""
        return self.likelihood.nll(self.decode(z), x)

    def forward(self, x: Any, seed: Tensor, row_offset: int) -> tuple[fastvae.ELBOOutput, Tensor, Tensor]:
        """The loss of a batch, and its posterior."""
        mu, logvar = self.encode(x)
        z, kl = self.elbo.reparameterize(mu, logvar, seed=seed, row_offset=row_offset)
        return self.elbo(self.decode(z), x, kl=kl), mu, logvar

    def configure_optimizers(self) -> torch.optim.Optimizer:
        scale = list(self.elbo.parameters())
        rest = [*self.encoder.parameters(), *self.decoder.parameters()]
        # Adam moves a parameter by about its rate in a step, and a log-variance has further to go than any weight.
        groups = [self.group(rest)]
        if scale:
            groups.append(self.group(scale, times=10))
        # The fused kernel also serves to skip steps. With a scaler, which skips them itself, Lightning cannot clip for
        # it: it would have to unscale the gradients before.
        fused = self._scaler is None or not self.trainer.gradient_clip_val
        return torch.optim.Adam(groups, lr=self.lr, fused=fused)

    def group(self, parameters: Iterable[nn.Parameter], times: float = 1) -> dict[str, Any]:
        """Of parameters, for an optimiser, with so many times the learning rate."""
        return {"params": list(parameters), "lr": times * self.lr}

    @property
    def _scaler(self) -> Any:
        return getattr(self.trainer.precision_plugin, "scaler", None)

    # -----------------------------------------------------------------------------------------------------------------
    # Training
    # -----------------------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        self._rates = [[group["lr"] for group in o.param_groups] for o in self.trainer.optimizers]

    def on_train_start(self) -> None:
        # A checkpoint brings its own; what counts is what the run's settings say now.
        for optimizer, rates in zip(self.trainer.optimizers, self._rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate

    def on_train_epoch_start(self) -> None:
        self.steps = Steps()
        # Made again from the count of steps, and so the same in a run that was resumed.
        self.noise = torch.tensor([self.seed, 4 * self.steps_done], device=self.device)
        self.noise_step = torch.tensor([0, 4], device=self.device)

    def training_step(self, batch: tuple[Any, int], batch_idx: int) -> Tensor:
        if self.has_dropout:
            torch.manual_seed(draws.generator(self.seed, 4, self.global_step).initial_seed())
        x, first_row = batch
        self.warm_up(batch_idx)
        out, _, _ = self(x, self.noise, first_row)
        self.noise = self.noise + self.noise_step  # not in place: the backward pass draws the noise again
        self.steps.add(out)
        return out.loss

    def warm_up(self, batch_idx: int) -> None:
        """Set the weight of the KL for a step."""
        if self.schedule != "none":
            passed = self.current_epoch + batch_idx / self.trainer.num_training_batches
            # In place, as ELBO sees to.
            self.elbo.beta = self.beta * warmup.weight(  # type: ignore[assignment]
                self.schedule, passed, self.schedule_epochs, self.cycles
            )

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        finite = torch.isfinite(self.steps.losses[-1])
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        if (
            not scaled
        ):  # a scaler looks itself, and comes down where a gradient has overflown by its scale alone
            gradients = [p.grad for p in self.parameters() if p.grad is not None]
            finite = finite & torch.isfinite(torch.nn.utils.get_total_norm(gradients))
        skip = (~finite).float()
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(skip, torch.distributed.ReduceOp.MAX)
        self.steps.skipped.append(skip)
        if self._scaler is None:
            # What a GradScaler tells a fused optimizer: with a 1 here the step does nothing. The host need not know.
            optimizer.found_inf = skip  # type: ignore[attr-defined]

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        if gradient_clip_val and self.trainer.precision == "bf16-mixed":
            # Lightning refuses to clip for a fused optimizer under mixed precision, because of a scaler; here is none.
            torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_train_epoch_end(self) -> None:
        steps = self.steps
        skipped = torch.stack(steps.skipped).cpu() > 0
        rows = torch.tensor([len(nll) for nll in steps.nll])
        kept = (~skipped).repeat_interleave(rows)
        total = torch.stack(
            [
                kept.sum().double(),
                (torch.stack(steps.losses).cpu().double() * rows)[~skipped].sum(),
                torch.cat(steps.nll).cpu().double()[kept].sum(),
                torch.cat(steps.kl).cpu().double()[kept].sum(),
            ]
        )
        count, *sums = self._over_processes(total).tolist()
        loss, nll, kl = (s / count if count else math.nan for s in sums)
        metrics = {"train_loss": loss, **self.terms("train", nll, kl)}
        self.log_dict(metrics | {"beta": float(self.elbo.beta), "skipped_steps": float(skipped.sum())})
        self.first_skip = None
        if skipped.any():
            step = int(skipped.int().argmax())
            # Of two the KL: it comes first, and NaN in mu or logvar reaches the reconstruction too.
            terms = {"kl": steps.kl, "nll": steps.nll, "the loss": steps.losses}
            bad = torch.stack([(~values[step].isfinite()).sum() for values in terms.values()]).cpu()
            names = [name for name, count in zip(terms, self._over_processes(bad), strict=True) if count]
            self.first_skip = f"{[*names, 'the gradient'][0]} of step {step + 1}"

    # -----------------------------------------------------------------------------------------------------------------
    # Held-out data
    # -----------------------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self._held_out = Steps()
        self._mu: list[Tensor] = []
        self._kl_sums: list[Tensor] = []

    def validation_step(self, batch: tuple[Any, int], batch_idx: int) -> None:
        x, first_row = batch
        # The same noise every time, and not that of the training.
        seed = torch.tensor([self.seed + 1, 4 * batch_idx], device=self.device)
        out, mu, logvar = self(x, seed, first_row)
        self._held_out.add(out)
        self.keep_posterior(mu, logvar)

    def keep_posterior(self, mu: Tensor, logvar: Tensor) -> None:
        """Of held-out data, for the end of the epoch."""
        self._mu.append(mu)
        self._kl_sums.append(functional.gaussian_kl(mu, logvar, reduction="none").sum(0))

    def on_validation_epoch_end(self) -> None:
        mu = torch.cat(self._mu).cpu().double()
        total = torch.cat(
            [
                torch.tensor([len(mu)]).double(),
                torch.cat(self._held_out.nll).cpu().double().sum()[None],
                torch.cat(self._held_out.kl).cpu().double().sum()[None],
                torch.stack(self._kl_sums).cpu().double().sum(0),
                mu.sum(0),
                mu.square().sum(0),
            ]
        )
        total = self._over_processes(total)
        nll, kl, *_ = (total[1:3] / total[0]).tolist()
        self.kl_per_dimension, mean, square = (total[3:] / total[0]).view(3, -1)
        active = (square - mean.square() > ACTIVE).sum()
        metrics = {
            "held_out_nelbo": nll + kl,
            **self.terms("held_out", nll, kl),
            "active_units": float(active),
        }
        self.log_dict(metrics)

    def terms(self, part: str, nll: float, kl: float) -> dict[str, float]:
        """What is logged of the training or the held-out data, by name: nll, kl and the `measures`."""
        return {f"{part}_nll": nll, f"{part}_kl": kl}

    def _over_processes(self, total: Tensor) -> Tensor:
        if self.trainer.world_size == 1:
            return total
        total = total.to(self.device)
        torch.distributed.all_reduce(total)
        return total.cpu()


class Steps:
    """What the steps of an epoch gave. Read when it is over: until then nothing waits for the device."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []  # () each
        self.nll: list[Tensor] = []  # (B,)
        self.kl: list[Tensor] = []  # (B,)
        self.skipped: list[Tensor] = []  # (): 1 or 0

    def add(self, out: fastvae.ELBOOutput) -> None:
        self.losses.append(out.loss.detach())
        self.nll.append(out.nll.detach())
        self.kl.append(out.kl.detach())
