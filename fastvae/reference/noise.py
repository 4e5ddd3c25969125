"""The noise of every backend: random integers computed from a counter, and normals made from them."""

import math

import torch
from torch import Tensor

__all__ = ["box_muller", "draw_seed", "normal_noise", "philox", "uniform"]

_WORD = 0xFFFFFFFF  # the low 32 bits


def draw_seed(device: torch.device | str = "cpu", generator: torch.Generator | None = None) -> Tensor:
    """A new (seed, offset), int64 (2,), from torch's generator, so that `torch.manual_seed` works as for `torch.randn`.

    On the CPU, the native kernels draw the same seed. On a GPU, drawing it takes a launch of its own, so the native
    kernels use the generator's own seed and offset instead; after the same `torch.manual_seed`, their noise therefore
    differs from the noise of a seed drawn here.
    """
    return torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64, device=device, generator=generator)


def philox(seed: Tensor, row_offset: int, rows: int, dims: int, draws: int = 1) -> Tensor:
    """The random integers for every (draw, row, element), from Philox4x32-10 ([S]).

    Philox is a counter-based generator: each output is a pure function of its coordinates, so that any thread of any
    device can compute any part of the noise, and the backward pass can compute it again.

    `seed`, int64 (2,), contains the key and an offset into the counter; both are used modulo 2^63. One call of Philox
    turns a counter of four 32-bit words into four random words, which four adjacent elements of a row use:

        words 0, 1 of the counter are the low and high half of  offset // 4 + draw
        words 2, 3 of the counter are the low and high half of  (row_offset + row) * ceil(dims / 4) + element // 4
        an element uses the output word  element % 4

    Returns int64 (draws, rows, dims) with values in [0, 2^32).
    """
    blocks = -(-dims // 4)
    key, offset = (seed & 0x7FFFFFFFFFFFFFFF).unbind()
    draw = (offset >> 2) + torch.arange(draws, device=seed.device)
    block = row_offset * blocks + torch.arange(rows * blocks, device=seed.device)

    draw = draw.view(draws, 1)
    block = block.view(1, rows * blocks)
    # Words are stored as int64 in [0, 2^32). A product of two of them wraps modulo 2^64, so its sign is meaningless,
    # and masking after the shift removes the copies of the sign bit.
    k0, k1 = key & _WORD, key >> 32
    c0, c1, c2, c3 = draw & _WORD, (draw >> 32) & _WORD, block & _WORD, (block >> 32) & _WORD
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _WORD) ^ c1 ^ k0,
            p1 & _WORD,
            ((p0 >> 32) & _WORD) ^ c3 ^ k1,
            p0 & _WORD,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    words = torch.stack((c0, c1, c2, c3), dim=-1)
    return words.view(draws, rows, 4 * blocks)[..., :dims]


def uniform(integers: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Maps 32-bit integers to the open interval (0, 1), to the midpoints of 2^23 equal cells.

    Every value is an odd multiple of 2^-24, which float32 represents exactly, so that all types start from the same
    number. Neither 0 nor 1 can occur.
    """
    return (2 * (integers >> 9) + 1).to(dtype) * 2.0**-24


def box_muller(u0: Tensor, u1: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent standard normals from two uniforms in (0, 1) ([BM], equation 1)."""
    radius, angle = torch.sqrt(-2 * torch.log(u0)), 2 * math.pi * u1
    return radius * torch.cos(angle), radius * torch.sin(angle)


def normal_noise(
    seed: Tensor, row_offset: int, rows: int, dims: int, draws: int = 1, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Standard normals (draws, rows, dims), the noise of every backend.

    Output words 0 and 1 of a Philox call give the normals of elements 0 and 1 of its four, words 2 and 3 those of
    elements 2 and 3. If `dtype` is float64, they are computed in float64 from the same integers; for any other type,
    they are computed and returned in float32.
    """
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    padded = -(-dims // 4) * 4  # Box-Muller needs whole pairs
    u = uniform(philox(seed, row_offset, rows, padded, draws), dtype).view(draws, rows, padded // 4, 4)
    n0, n1 = box_muller(u[..., 0], u[..., 1])
    n2, n3 = box_muller(u[..., 2], u[..., 3])
    return torch.stack((n0, n1, n2, n3), dim=-1).view(draws, rows, padded)[..., :dims]
