"""What encoder and decoder get besides counts and z: the batch of a cell and its covariates, as further columns."""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Conditions"]


@dataclass(frozen=True)
class Conditions:
    """The columns of batch and covariates: one for each category, which is 1 in its cells, or one with the value."""

    batches: int
    categories: tuple[int, ...] = ()
    """The number of categories of each covariate, and 0 for a continuous one."""

    @property
    def width(self) -> int:
        """The number of columns. A single batch carries no information, and has none."""
        return (self.batches if self.batches > 1 else 0) + sum(max(1, count) for count in self.categories)

    def append(self, x: Tensor, batch: Tensor, covariates: Tensor | None = None) -> Tensor:
        """Append the columns to x (B, G), dense or torch.sparse_csr.

        `batch` (B,) is the number of the batch, and `covariates` (B, K) has the number of the category, or the value.
        """
        if not self.width:
            return x
        columns, values = self._entries(batch, covariates, x)
        if x.layout == torch.sparse_csr:
            return _append_sparse(x, columns, values, self.width)
        return torch.cat((x, x.new_zeros(len(x), self.width).scatter_(1, columns, values)), 1)

    def _entries(self, batch: Tensor, covariates: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the columns, in ascending order, and the values of what is not 0 in each row, (B, E) each."""
        columns, values, start = [], [], 0
        one = torch.ones(batch.shape, dtype=x.dtype, device=x.device)
        if self.batches > 1:
            columns, values, start = [batch], [one], self.batches
        for i, count in enumerate(self.categories):
            assert covariates is not None
            given = covariates[:, i]
            columns.append(start + given.long() if count else torch.full_like(batch, start))
            values.append(one if count else given.to(x.dtype))
            start += max(1, count)
        return torch.stack(columns, 1), torch.stack(values, 1)


def _append_sparse(x: Tensor, columns: Tensor, values: Tensor, width: int) -> Tensor:
    starts, old_columns, old_values = x.crow_indices(), x.col_indices(), x.values()
    (cells, genes), added = x.shape, columns.shape[1]
    row = torch.arange(cells + 1, device=x.device)
    # Each value moves up by the entries of all rows before its own, whose new entries come last.
    place = torch.arange(len(old_values), device=x.device)
    place += added * torch.repeat_interleave(row[:-1], starts.diff(), output_size=len(old_values))
    last = (starts[1:] + added * row[:-1]).unsqueeze(1) + torch.arange(added, device=x.device)
    size = len(old_values) + added * cells
    new_columns, new_values = old_columns.new_empty(size), old_values.new_empty(size)
    new_columns[place], new_columns[last] = old_columns, (genes + columns).to(old_columns.dtype)
    new_values[place], new_values[last] = old_values, values
    return torch.sparse_csr_tensor(
        starts + added * row, new_columns, new_values, (cells, genes + width), check_invariants=False
    )
