"""The LightningModule that is trained: an encoder, a decoder and a `fastvae.ELBO`."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

import fastvae
from fastvae import functional, regularizers
from fastvae.priors import Prior, VampPrior

from . import schedules, seeding

__all__ = ["ACTIVE", "VAE"]

ACTIVE = (
    0.01  # Burda et al. 2016, section 5.2: a unit is active if its posterior mean varies by more than this
)


# The metric of each term that compares the aggregate posterior of a batch.
_AGGREGATE_METRICS = {"beta-tc": "train_total_correlation", "info": "train_mmd"}


class VAE(LightningModule):
    """A VAE for Lightning's Trainer.

    The ELBO is a submodule, so that a learned scale is trained and synchronised between processes like other weights.

    Args:
        encoder: maps a batch to (B, 2L), the posterior's mean and its scale in the form of `posterior`.
        decoder: maps z (B, L) to the parameters of the likelihood.
        elbo: an ELBO or IWAE with reduction "mean". Its `capacity`, or its `beta` if it has none, is the final value of
            a warm-up.
        latents: L, the number of latent dimensions.
        posterior: the form of the posterior's scale; see `fastvae.posteriors`.
        lr, adam_eps: the learning rate and the epsilon of Adam.
        weight_decay: the decoupled weight decay of the networks (Loshchilov and Hutter 2019).
        lr_schedule: the schedule of the learning rate; see `fastvae.train.schedules`.
        seed: the seed of the noise. The noise of a step depends only on the seed and the number of the step, and not
            on interruptions of the run or on the number of processes.
        schedule, schedule_epochs, cycles: the warm-up of beta; see `fastvae.train.schedules`.
        aggregate: a term of the training loss that compares the posteriors of a batch with each other. `"beta-tc"` adds
            (aggregate_weight - 1) times the total correlation, which is also a part of the KL (Chen et al. 2018); a
            warm-up applies to both. `"info"` adds aggregate_weight times the squared MMD of z from N(0, I) (Zhao et al.
            2019). Each process estimates the term from its own rows. `dataset_size` must be set to the number of
            training data.
        aggregate_weight: the weight of that term.

    The following metrics are logged after each epoch, in nats per example. For the training data: train_loss (with
    beta), train_nll and train_kl, and train_total_correlation or train_mmd with `aggregate`. For the validation data,
    without beta: val_neg_elbo, val_nll and val_kl. Also beta, active_units and skipped_steps, and capacity if there is
    one. With an IWAE, the KL is estimated from its draws, and val_neg_bound is the negative bound. `kl_per_dimension`
    (L,) holds the validation KL of each latent dimension from N(0, 1), whatever the prior.

    Class attributes of a subclass describe its data and its further metrics: `unit` is the name of one example,
    `split_metrics` are the metrics that `terms` adds for both splits, `extra_metrics` are those that are logged once,
    and `table_columns` are the last columns of the progress table: a heading, the metric and its decimals.

    A step whose loss or gradient is not finite leaves the weights unchanged; `first_skipped` describes the first one.
    """

    unit = "datum"
    split_metrics: tuple[str, ...] = ()
    extra_metrics: tuple[str, ...] = ()
    table_columns: tuple[tuple[str, str, int], ...] = ()

    has_dropout = False
    """If set, each step seeds torch's generator for dropout, because its state is lost when a run is resumed."""

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        elbo: fastvae.ELBO,
        *,
        latents: int,
        posterior: str = "logvar",
        lr: float = 1e-3,
        adam_eps: float = 1e-8,
        weight_decay: float = 0.0,
        lr_schedule: str = "constant",
        seed: int = 0,
        schedule: str = "none",
        schedule_epochs: float = 1.0,
        cycles: int = 1,
        aggregate: str | None = None,
        aggregate_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.elbo = elbo
        self.latents = latents
        self.posterior = posterior
        self.lr, self.adam_eps, self.weight_decay, self.lr_schedule = lr, adam_eps, weight_decay, lr_schedule
        self.seed = seed
        self.schedule, self.schedule_epochs, self.cycles = schedule, schedule_epochs, cycles
        self.beta = float(elbo.beta)
        self.capacity = None if elbo.capacity is None else float(elbo.capacity)
        self.kl_per_dimension = torch.zeros(latents)
        self.first_skipped: str | None = None
        self.aggregate, self.aggregate_weight = aggregate, aggregate_weight
        self.dataset_size = 0
        self.steps = StepLog()
        if aggregate is not None:
            self.extra_metrics = (*self.extra_metrics, _AGGREGATE_METRICS[aggregate])
        if isinstance(elbo, fastvae.IWAE):
            self.table_columns = (("-bound", "val_neg_bound", 2), *self.table_columns)

    def encode(self, x: Any) -> tuple[Tensor, Tensor]:
        """Return mu and logvar of the posterior, (B, L) each."""
        return self.posterior_of(self.encoder(x))

    def posterior_of(self, head: Tensor) -> tuple[Tensor, Tensor]:
        """Return mu and logvar for the output of the encoder."""
        if self.posterior != "logvar":
            posterior = fastvae.posteriors.DiagonalGaussian(head, self.posterior)
            return posterior.mean, posterior.logvar
        mu, logvar = head.chunk(2, dim=1)
        return mu, logvar

    def decode(self, z: Tensor) -> Tensor:
        """Return the parameters of the likelihood."""
        return self.decoder(z)

    @property
    def prior(self) -> Prior | None:
        """The prior of z, or None for N(0, I)."""
        return self.elbo.prior

    def set_vamp_prior(
        self,
        components: int,
        input_shape: int | Sequence[int],
        encode: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
        *,
        bounds: tuple[float, float] | None,
    ) -> None:
        """Replace the prior by a VampPrior. `encode` maps its pseudo-inputs to mu and logvar; by default that is the
        method of this model."""
        self.elbo.prior = VampPrior(
            components,
            self.encode if encode is None else encode,
            self.latents,
            input_shape,
            bounds=bounds,
            form="logvar",
        )

    def sample_prior(self, n: int, generator: torch.Generator, temperature: float = 1.0) -> Tensor:
        """Draw z from the prior, (n, L), on the CPU, with a generator of the CPU. `temperature` multiplies the standard
        deviation."""
        if self.prior is None:
            return temperature * torch.randn(n, self.latents, generator=generator)
        # A copy, because a prior of the user's own may be its own frozen prior.
        prior = copy.deepcopy(self.prior.frozen()).to("cpu", torch.float32)
        return prior.sample(n, generator=generator, temperature=temperature)

    @property
    def steps_done(self) -> int:
        """The number of batches that the run has been trained on."""
        return self.global_step

    @property
    def likelihood(self) -> Any:
        """The likelihood of the data given the output of `decode`."""
        return self.elbo.likelihood

    @property
    def draws(self) -> int:
        """The number of draws of z for each row of a batch in training."""
        return self.elbo.samples or 1

    def params(self, z: Tensor, x: Any) -> Any:
        """Return the parameters of the likelihood for z (K * B, L), whose first B rows are the first of K draws.

        What else the decoder takes from the batch x, which has B rows, is repeated for each draw.
        """
        return self.decode(z)

    def target(self, x: Any) -> Any:
        """Return what the likelihood models of the batch x."""
        return x

    def nll(self, z: Tensor, x: Any) -> Tensor:
        """Return -log p(x | z) for every row, (B,)."""
        return self.likelihood.nll(self.params(z, x), self.target(x))

    def forward(
        self, x: Any, seed: Tensor, row_offset: int
    ) -> tuple[fastvae.ELBOOutput | fastvae.IWAEOutput, Tensor, Tensor]:
        """Return the loss of a batch, and mu and logvar of its posterior."""
        mu, logvar = self.encode(x)
        elbo = self.elbo
        if isinstance(elbo, fastvae.IWAE):
            draws = elbo.sample(mu, logvar, seed=seed, row_offset=row_offset)
            return elbo(lambda z: self.params(z, x), self.target(x), draws=draws), mu, logvar
        if self.aggregate is not None and self.training:
            return self._compare_aggregate(x, mu, logvar, seed, row_offset), mu, logvar
        z, kl = elbo.reparameterize(mu, logvar, seed=seed, row_offset=row_offset)
        params = self.params(z if elbo.samples is None else z.flatten(0, 1), x)
        return elbo(params, self.target(x), kl=kl), mu, logvar

    def _compare_aggregate(
        self, x: Any, mu: Tensor, logvar: Tensor, seed: Tensor, row_offset: int
    ) -> fastvae.ELBOOutput:
        """Return the loss of a training batch with the term `aggregate`."""
        # The distance of z from mu must not be lost in the rounding of half precision.
        dtype, exact = mu.dtype, torch.promote_types(mu.dtype, torch.float32)
        mu, logvar = mu.to(exact), logvar.to(exact)
        z, kl = self.elbo.reparameterize(mu, logvar, seed=seed, row_offset=row_offset)
        out: fastvae.ELBOOutput = self.elbo(self.params(z.to(dtype), x), self.target(x), kl=kl)
        if len(mu) < 2:  # the last batch of an epoch, which has no pairs
            return out
        if self.aggregate == "beta-tc":
            term = regularizers.total_correlation(z, mu, logvar, self.dataset_size)
            weighted = self.elbo.beta * (self.aggregate_weight - 1) * term
        else:
            term = regularizers.mmd(z)
            weighted = self.aggregate_weight * term
        self.steps.aggregate.append(term.detach())
        return out._replace(loss=out.loss + weighted)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        prior = [] if self.prior is None else list(self.prior.parameters())
        scale = self.scale_parameters()
        rest = [*self.encoder.parameters(), *self.decoder.parameters()]
        # Adam moves each parameter by about the learning rate per step, and a log-variance has a long way to go.
        groups = [self.param_group(rest)]
        if prior:
            groups.append(self.param_group(prior, weight_decay=0.0))
        if scale:
            groups.append(self.param_group(scale, times=10, weight_decay=0.0))
        # The fused optimiser is needed to skip steps. A gradient scaler skips steps itself, and Lightning cannot clip
        # with a fused optimiser then, because it would have to unscale the gradients first.
        fused = self._scaler is None or not self.trainer.gradient_clip_val
        return self.adam(groups, fused=fused)

    def scale_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the likelihood, which get ten times the learning rate."""
        return [p for name, p in self.elbo.named_parameters() if not name.startswith("prior.")]

    def param_group(
        self, parameters: Iterable[nn.Parameter], times: float = 1, **options: float
    ) -> dict[str, Any]:
        """Return a parameter group for an optimiser, with `times` the learning rate."""
        return {"params": list(parameters), "lr": times * self.lr, **options}

    def adam(self, groups: list[dict[str, Any]], **options: Any) -> torch.optim.Adam:
        """Return an optimiser with the settings of this run."""
        return torch.optim.Adam(
            groups,
            lr=self.lr,
            eps=self.adam_eps,
            weight_decay=self.weight_decay,
            decoupled_weight_decay=True,
            **options,
        )

    @property
    def _scaler(self) -> Any:
        return getattr(self.trainer.precision_plugin, "scaler", None)

    # -----------------------------------------------------------------------------------------------------------------
    # Training
    # -----------------------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        names = ("lr", "eps", "weight_decay", "decoupled_weight_decay")
        self._options = [
            [{name: group[name] for name in names} for group in optimizer.param_groups]
            for optimizer in self.trainer.optimizers
        ]

    def on_train_start(self) -> None:
        # A checkpoint restores its own options of the optimisers, but the current settings take precedence.
        for group, options in self._groups():
            group.update(options)

    def _groups(self) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Yield each parameter group with its options according to the settings."""
        for optimizer, options in zip(self.trainer.optimizers, self._options, strict=True):
            yield from zip(optimizer.param_groups, options, strict=True)

    def on_train_epoch_start(self) -> None:
        self.steps = StepLog()
        # Derived from the number of steps, so that a resumed run continues with the same noise. Draw k of a step uses
        # the noise of the offset plus 4 k.
        offset = 4 * self.draws
        self.noise = torch.tensor([self.seed, offset * self.steps_done], device=self.device)
        self.noise_step = torch.tensor([0, offset], device=self.device)

    def training_step(self, batch: tuple[Any, int], batch_idx: int) -> Tensor:
        if self.has_dropout:
            torch.manual_seed(seeding.seeded_generator(self.seed, 4, self.global_step).initial_seed())
        x, first_row = batch
        self.set_schedules(batch_idx)
        out, _, _ = self(x, self.noise, first_row)
        self.noise = self.noise + self.noise_step  # not in place: the backward pass generates the noise again
        self.steps.add(out)
        return out.loss

    def set_schedules(self, batch_idx: int) -> None:
        """Set the weight of the KL, or its capacity, and the learning rate for this step."""
        if self.schedule == "none" and self.lr_schedule == "constant":
            return
        passed = self.current_epoch + batch_idx / self.trainer.num_training_batches
        if self.schedule != "none":
            factor = schedules.kl_weight(self.schedule, passed, self.schedule_epochs, self.cycles)
            # ELBO copies the value into its buffer in place.
            if self.capacity is not None:
                self.elbo.capacity = self.capacity * factor  # type: ignore[assignment]
            else:
                self.elbo.beta = self.beta * factor  # type: ignore[assignment]
        if self.lr_schedule != "constant":
            factor = schedules.learning_rate_factor(self.lr_schedule, passed, self.trainer.max_epochs or 1)
            for group, options in self._groups():
                group["lr"] = options["lr"] * factor

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        finite = torch.isfinite(self.steps.losses[-1])
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        if (
            not scaled
        ):  # a scaler checks for itself, and lowers its scale when that alone made a gradient overflow
            weights = [p for group in optimizer.param_groups for p in group["params"]]
            gradients = [p.grad for p in weights if p.grad is not None]
            finite = finite & torch.isfinite(torch.nn.utils.get_total_norm(gradients))
        skip = (~finite).float()
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(skip, torch.distributed.ReduceOp.MAX)
        self.steps.skipped.append(skip)
        if self._scaler is None:
            # A fused optimiser does nothing if this is 1, as with a GradScaler. The host does not have to wait for it.
            optimizer.found_inf = skip  # type: ignore[attr-defined]

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        if gradient_clip_val and self.trainer.precision == "bf16-mixed":
            # Lightning refuses to clip for fused optimisers under mixed precision because of scalers; bf16 has none.
            torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_train_epoch_end(self) -> None:
        steps = self.steps
        skipped = torch.stack(steps.skipped).cpu() > 0
        rows = torch.tensor([len(nll) for nll in steps.nll])
        is_used = (~skipped).repeat_interleave(rows)
        total = torch.stack(
            [
                is_used.sum().double(),
                (torch.stack(steps.losses).cpu().double() * rows)[~skipped].sum(),
                torch.cat(steps.nll).cpu().double()[is_used].sum(),
                torch.cat(steps.kl).cpu().double()[is_used].sum(),
            ]
        )
        count, *sums = self._sum_over_processes(total).tolist()
        loss, nll, kl = (s / count if count else math.nan for s in sums)
        metrics = {"train_loss": loss, **self.terms("train", nll, kl)}
        beta = float(self.elbo.beta)
        if self.aggregate == "beta-tc":
            beta *= self.aggregate_weight
        metrics |= {"beta": beta, "skipped_steps": float(skipped.sum())}
        if self.aggregate is not None:
            of_steps = torch.stack(steps.aggregate).cpu().double() if steps.aggregate else torch.empty(0)
            of_steps = of_steps[of_steps.isfinite()]
            number, value = self._sum_over_processes(
                torch.tensor([len(of_steps), of_steps.sum()], dtype=torch.float64)
            ).tolist()
            metrics[_AGGREGATE_METRICS[self.aggregate]] = value / number if number else math.nan
        if self.elbo.capacity is not None:
            metrics["capacity"] = float(self.elbo.capacity)
        self.log_dict(metrics)
        self.first_skipped = None
        if skipped.any():
            step = int(skipped.int().argmax())
            # Report the KL if both terms are bad: NaN in mu or logvar reaches the reconstruction as well.
            terms = {"the KL": steps.kl, "the NLL": steps.nll, "the loss": steps.losses}
            bad = torch.stack([(~values[step].isfinite()).sum() for values in terms.values()]).cpu()
            names = [name for name, count in zip(terms, self._sum_over_processes(bad), strict=True) if count]
            self.first_skipped = f"{[*names, 'the gradient'][0]} of step {step + 1}"

    # -----------------------------------------------------------------------------------------------------------------
    # Validation
    # -----------------------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self._val_steps = StepLog()
        self._bounds: list[Tensor] = []
        self._mu: list[Tensor] = []
        self._kl_sums: list[Tensor] = []

    def validation_step(self, batch: tuple[Any, int], batch_idx: int) -> None:
        x, first_row = batch
        # The same noise in every epoch, different from the noise of training.
        seed = torch.tensor([self.seed + 1, 4 * self.draws * batch_idx], device=self.device)
        out, mu, logvar = self(x, seed, first_row)
        self._val_steps.add(out)
        if isinstance(out, fastvae.IWAEOutput):
            # Without beta, which the bound of the output includes.
            self._bounds.append(torch.logsumexp(-out.nll - out.kl, 0) - math.log(self.draws))
        self.collect_posterior(mu, logvar)

    def collect_posterior(self, mu: Tensor, logvar: Tensor) -> None:
        """Keep the posterior of a validation batch until the end of the epoch."""
        self._mu.append(mu)
        self._kl_sums.append(functional.gaussian_kl(mu, logvar, reduction="none").sum(0))

    def on_validation_epoch_end(self) -> None:
        mu = torch.cat(self._mu).cpu().double()
        total = torch.cat(
            [
                torch.tensor([len(mu)]).double(),
                torch.cat(self._val_steps.nll).cpu().double().sum()[None],
                torch.cat(self._val_steps.kl).cpu().double().sum()[None],
                torch.stack(self._kl_sums).cpu().double().sum(0),
                mu.sum(0),
                mu.square().sum(0),
            ]
        )
        total = self._sum_over_processes(total)
        nll, kl, *_ = (total[1:3] / total[0]).tolist()
        self.kl_per_dimension, mean, square = (total[3:] / total[0]).view(3, -1)
        active = (square - mean.square() > ACTIVE).sum()
        metrics = {
            "val_neg_elbo": nll + kl,
            **self.terms("val", nll, kl),
            "active_units": float(active),
        }
        if self._bounds:
            bound = self._sum_over_processes(torch.cat(self._bounds).cpu().double().sum())
            metrics["val_neg_bound"] = -(bound / total[0]).item()
        self.log_dict(metrics)

    def terms(self, part: str, nll: float, kl: float) -> dict[str, float]:
        """Return the metrics of a split by name: nll, kl and the `split_metrics`."""
        return {f"{part}_nll": nll, f"{part}_kl": kl}

    def _sum_over_processes(self, total: Tensor) -> Tensor:
        if self.trainer.world_size == 1:
            return total
        total = total.to(self.device)
        torch.distributed.all_reduce(total)
        return total.cpu()


class StepLog:
    """Records the results of each step of an epoch. They are read at its end, so that no step waits for the device."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []  # () each
        self.nll: list[Tensor] = []  # (B,)
        self.kl: list[Tensor] = []  # (B,)
        self.skipped: list[Tensor] = []  # () each: 1 or 0
        self.aggregate: list[Tensor] = []  # () each: the total correlation or the MMD

    def add(self, out: fastvae.ELBOOutput | fastvae.IWAEOutput) -> None:
        nll, kl = out.nll.detach(), out.kl.detach()
        self.losses.append(out.loss.detach())
        self.nll.append(nll if nll.dim() == 1 else nll.mean(0))  # an IWAE gives (K, B)
        self.kl.append(kl if kl.dim() == 1 else kl.mean(0))
