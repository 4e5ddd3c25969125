"""The noise: Philox4x32-10, the same integers on every backend, and normal samples with the right distribution."""

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import fastvae
from fastvae import functional, reference

# ---------------------------------------------------------------------------------------------------------------------
# The integers
# ---------------------------------------------------------------------------------------------------------------------

WORD = 0xFFFFFFFF


def philox4x32(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Salmon et al. 2011 in Python integers: slow, and checked against their published vectors below."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & WORD, (p0 >> 32) ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def word(seed: int, offset: int, draw: int, row: int, element: int, dims: int) -> int:
    """The random integer of one element, as documented in `reference.philox`."""
    low, high = offset // 4 + draw, row * -(-dims // 4) + element // 4
    counter = (low & WORD, low >> 32 & WORD, high & WORD, high >> 32 & WORD)
    return philox4x32(counter, (seed & WORD, seed >> 32))[element % 4]


def normal(words: tuple[int, int], which: int) -> float:
    u0, u1 = ((2 * (x >> 9) + 1) * 2.0**-24 for x in words)
    return math.sqrt(-2 * math.log(u0)) * (math.cos, math.sin)[which](2 * math.pi * u1)


# kat_vectors of the authors' Random123 library: counter, key, output.
KNOWN = [
    ("0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN, ids=["zeros", "ones", "pi"])
def test_philox_gives_the_known_answers(counter: str, key: str, output: str) -> None:
    counter_words, key_words, want = (
        tuple(int(w, 16) for w in text.split()) for text in (counter, key, output)
    )
    assert philox4x32(counter_words, key_words) == want


def test_reference_philox_gives_the_known_answer() -> None:
    """The only one of them that a (seed, offset) below 2^63 can produce."""
    words = reference.philox(torch.zeros(2, dtype=torch.int64), 0, 1, 4).flatten().tolist()
    assert [f"{w:08x}" for w in words] == KNOWN[0][2].split()


# (seed, offset, row_offset, rows, dims, draws)
PLACES = [
    (0, 0, 0, 2, 5, 2),
    (1234567890123, 987654321, 7, 3, 10, 3),
    (2**63 - 1, 2**63 - 1, 0, 2, 4, 2),  # the largest
    (0x299F31D0A4093822, 3, 0x0370734413198A2E, 1, 4, 1),
    (42, 4 * 2**32 - 4, 0, 2, 6, 4),  # offset // 4 + draw exceeds 2^32
    (42, 4 * 2**32 - 8, 0, 1, 300, 3),
    (42, 0, 2**32 // 5 - 2, 5, 20, 1),  # the block exceeds 2^32 between rows
    (42, 0, 2**32 // 65 - 1, 3, 257, 2),  # and within a row
    (42, 0, 2**40 // 256 - 1, 2, 1023, 1),
    (42, 0, 2**32 - 1, 2, 3, 1),
    (42, 17, 2**55, 2, 9, 2),
]


@pytest.mark.parametrize("place", PLACES)
def test_integers_equal_the_reference(place: tuple[int, ...]) -> None:
    seed, offset, row_offset, rows, dims, draws = place
    words = reference.philox(torch.tensor([seed, offset]), row_offset, rows, dims, draws)
    assert words.shape == (draws, rows, dims)
    want = [
        [[word(seed, offset, k, row_offset + r, d, dims) for d in range(dims)] for r in range(rows)]
        for k in range(draws)
    ]
    assert words.tolist() == want


def test_negative_seeds_equal_their_masked_values(backend: str) -> None:
    """Any int64 is valid as a seed, modulo 2^63."""
    mu = torch.zeros(3, 20)
    negative = functional.reparameterize_kl(mu, mu, seed=torch.tensor([-5, -2]))[0]
    masked = functional.reparameterize_kl(mu, mu, seed=torch.tensor([2**63 - 5, 2**63 - 2]))[0]
    assert torch.equal(negative, masked)


# ---------------------------------------------------------------------------------------------------------------------
# The normals
# ---------------------------------------------------------------------------------------------------------------------

# 23 bits of each integer are used. The neighbouring value of either uniform changes the normal by about 1e-7, so
# agreement to 1e-13 in float64 shows that the integers are the same. In float32, only its own rounding is added: the
# radius is at most 5.8, for which two units in the last place are 1e-6.
NOISE_TOLERANCE = {torch.float32: 1.5e-6, torch.float64: 1e-13}


def noise(
    shape: tuple[int, ...],
    seed: list[int],
    dtype: torch.dtype = torch.float32,
    row_offset: int = 0,
    draws: int | None = None,
) -> Tensor:
    """eps itself, as z for mu 0 and sigma 1."""
    zeros = torch.zeros(shape, dtype=dtype)
    return functional.reparameterize_kl(
        zeros, zeros, seed=torch.tensor(seed), row_offset=row_offset, samples=draws
    )[0]


def by_hand(place: tuple[int, ...]) -> Tensor:
    seed, offset, row_offset, rows, dims, draws = place

    def one(k: int, r: int, d: int) -> float:
        first = d - d % 2
        pair = [word(seed, offset, k, row_offset + r, e, 4 * -(-dims // 4)) for e in (first, first + 1)]
        return normal((pair[0], pair[1]), d % 2)

    values = [[[one(k, r, d) for d in range(dims)] for r in range(rows)] for k in range(draws)]
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("dtype", NOISE_TOLERANCE, ids=["float32", "float64"])
@pytest.mark.parametrize("place", PLACES)
def test_noise_equals_box_muller_by_hand(backend: str, place: tuple[int, ...], dtype: torch.dtype) -> None:
    seed, offset, row_offset, rows, dims, draws = place
    got = noise((rows, dims), [seed, offset], dtype, row_offset, draws)
    tolerance = NOISE_TOLERANCE[dtype] * (
        3 if backend == "reference" else 1
    )  # the angle is rounded before its cosine
    assert (got.double() - by_hand(place)).abs().max() <= tolerance


NATIVE = """
import json, sys, torch, fastvae
from fastvae import functional, reference
fastvae.set_backend("native")
worst = {}
for dims in (*range(1, 10), 20, 255, 256, 1023, 1025, 4099):
    for rows in (1, 18):
        for draws in (None, 2) if rows == 1 else (2,):
            for dtype in (torch.float32, torch.float64):
                seed, row_offset = torch.tensor([2**62 + dims, 2**35 + rows]), 2**32 // -(-dims // 4) - 1
                zeros = torch.zeros(rows, dims, dtype=dtype)
                z = functional.reparameterize_kl(zeros, zeros, samples=draws, seed=seed, row_offset=row_offset)[0]
                want = reference.normal_noise(seed, row_offset, rows, dims, draws or 1, torch.float64)
                error = (z.double().view(want.shape) - want).abs().max().item()
                worst[str(dtype)] = max(worst.get(str(dtype), 0), error)
print(json.dumps(worst))
"""


def test_native_noise_equals_the_reference(on_capability: Callable[[str], str]) -> None:
    """Every row length, on every instruction set, including a carry into the counter's last word."""
    worst = json.loads(on_capability(NATIVE))
    assert worst["torch.float64"] <= NOISE_TOLERANCE[torch.float64]
    assert worst["torch.float32"] <= NOISE_TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(8, 5), (6, 300), (7, 2, 3), (4, 1025)])
def test_row_offset_gives_the_rows_of_the_whole_batch(
    backend: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """A part of a batch has exactly the noise of its rows, in z and in the gradient, which generates the noise
    again."""
    mu, logvar = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)

    def draw(rows: slice) -> tuple[Tensor, Tensor]:
        leaf = logvar[rows].clone().requires_grad_()
        z, _ = functional.reparameterize_kl(
            mu[rows], leaf, samples=2, seed=torch.tensor([9, 100]), row_offset=10 + (rows.start or 0)
        )
        return z.detach(), torch.autograd.grad(z.sum(), leaf)[0]

    whole_z, whole_gradient = draw(slice(None))
    for start, stop in ((0, 1), (1, 4), (4, shape[0])):
        z, gradient = draw(slice(start, stop))
        assert torch.equal(z, whole_z[:, start:stop])
        assert torch.equal(gradient, whole_gradient[start:stop])


def test_draws_of_samples_equal_draws_at_offsets(backend: str) -> None:
    """Draw k at an offset equals draw 0 at that offset + 4 k, so K samples can be drawn one by one."""
    together = noise((3, 11), [5, 40], draws=4)
    for k in range(4):
        assert torch.equal(together[k], noise((3, 11), [5, 40 + 4 * k]))


def test_noise_does_not_depend_on_shape_and_layout(backend: str) -> None:
    """The noise depends on the logical element, and not on rank or strides."""
    flat = noise((3, 60), [1, 2])
    assert torch.equal(flat, noise((3, 4, 3, 5), [1, 2]).flatten(1))
    zeros = torch.zeros(3, 4, 3, 5).contiguous(memory_format=torch.channels_last)
    z, _ = functional.reparameterize_kl(zeros, zeros, seed=torch.tensor([1, 2]))
    assert torch.equal(z.flatten(1), flat)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_noise_equals_rounded_float32(backend: str, dtype: torch.dtype) -> None:
    assert torch.equal(noise((5, 33), [1, 2], dtype), noise((5, 33), [1, 2]).to(dtype))


# ---------------------------------------------------------------------------------------------------------------------
# The backward pass generates the same noise again
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["seed", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(4, 1), (3, 6), (2, 1025), (70, 20), (2, 3, 5)])
def test_backward_generates_the_same_noise(
    backend: str, shape: tuple[int, ...], dtype: torch.dtype, source: str
) -> None:
    """With sigma 1, dz/dlogvar = eps / 2, and halving is exact, so the results are equal."""
    mu = torch.zeros(shape, dtype=dtype)
    logvar = torch.zeros(shape, dtype=dtype, requires_grad=True)
    seed = torch.tensor([77, 2**34]) if source == "seed" else None
    z, _ = functional.reparameterize_kl(mu, logvar, samples=3, seed=seed)
    torch.randn(5)  # the generator advances between forward and backward
    for k in range(3):
        (gradient,) = torch.autograd.grad(z[k].sum(), logvar, retain_graph=True)
        assert torch.equal(gradient * 2, z[k].detach())


# ---------------------------------------------------------------------------------------------------------------------
# The source of the seed
# ---------------------------------------------------------------------------------------------------------------------


def draw(generator: torch.Generator | None = None) -> Tensor:
    zeros = torch.zeros(4, 9)
    return functional.reparameterize_kl(zeros, zeros, generator=generator)[0]


def test_manual_seed_repeats_the_noise(backend: str) -> None:
    torch.manual_seed(5)
    first, second = draw(), draw()
    torch.manual_seed(5)
    assert torch.equal(draw(), first)
    assert torch.equal(draw(), second)
    assert not torch.equal(first, second)
    torch.manual_seed(6)
    assert not torch.equal(draw(), first)


def test_manual_seed_gives_every_backend_the_same_noise(native: None) -> None:
    def noise_of_manual_seed(seed: int, backend: str) -> Tensor:
        torch.manual_seed(seed)
        with fastvae.use_backend(backend):
            return draw()

    for seed in range(40):  # more than half of which draw a number whose highest bit is set
        torch.testing.assert_close(
            noise_of_manual_seed(seed, "native"), noise_of_manual_seed(seed, "reference"), rtol=0, atol=1e-5
        )


def test_generator_determines_the_noise(backend: str) -> None:
    """Only the passed `generator` is used and advances."""
    state = torch.get_rng_state()
    first, second = (draw(g) for g in [torch.Generator().manual_seed(5)] * 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first, second)
    again = torch.Generator().manual_seed(5)
    assert torch.equal(draw(again), first)
    torch.manual_seed(1)
    assert torch.equal(draw(again), second)
    torch.manual_seed(5)
    assert torch.equal(draw(), first), "the default generator is a generator like any other"


@pytest.mark.parametrize("own", [False, True], ids=["default", "generator"])
def test_restored_state_repeats_the_noise(backend: str, own: bool) -> None:
    generator = torch.Generator().manual_seed(3) if own else torch.default_generator
    passed = generator if own else None
    draw(passed)
    state = generator.get_state()
    first, second = draw(passed), draw(passed)
    generator.set_state(state)
    assert torch.equal(draw(passed), first)
    assert torch.equal(draw(passed), second)


@pytest.mark.parametrize("how", ["seed", "eps"])
def test_eps_does_not_advance_the_generator(backend: str, how: str) -> None:
    zeros = torch.zeros(2, 3)
    state = torch.get_rng_state()
    functional.reparameterize_kl(zeros, zeros, **{how: torch.tensor([1, 2]) if how == "seed" else zeros})
    assert torch.equal(torch.get_rng_state(), state)


def test_many_calls_draw_different_noise(backend: str) -> None:
    """Many calls draw many seeds: no two draws are equal, and together they are a long stream of normals."""
    draws = torch.stack([draw() for _ in range(300)])
    assert draws.flatten().unique().numel() > 0.999 * draws.numel()
    assert abs(draws.mean().item()) < 5 / math.sqrt(draws.numel())


# ---------------------------------------------------------------------------------------------------------------------
# Ten million samples
# ---------------------------------------------------------------------------------------------------------------------

COUNT = 10_000_000
SIGMAS = 5.0


@pytest.fixture(scope="module")
def ten_million() -> np.ndarray:
    """(2, 5000, 1000): draws, rows and elements of the compiled kernel, in float64 from its float32."""
    with fastvae.use_backend("native"):
        return noise((5000, 1000), [31415926535, 8979], draws=2).double().numpy()


def test_noise_has_the_moments_of_a_normal(ten_million: np.ndarray) -> None:
    """Mean, variance, skewness and kurtosis are each within five standard errors."""
    x = ten_million.ravel()
    square = x * x
    error = SIGMAS / math.sqrt(COUNT)
    assert abs(x.mean()) < error
    assert abs(square.mean() - 1) < error * math.sqrt(2)
    assert abs((square * x).mean()) < error * math.sqrt(15)
    assert abs((square * square).mean() - 3) < error * math.sqrt(96)


def test_noise_passes_the_kolmogorov_smirnov_test(ten_million: np.ndarray) -> None:
    """The largest distance between the empirical and the normal distribution function; p = 0.001 at 1.95 / sqrt(n)."""
    x = np.sort(ten_million.ravel())
    cdf = torch.special.ndtr(torch.from_numpy(x)).numpy()
    steps = np.arange(COUNT + 1) / COUNT
    distance = max((steps[1:] - cdf).max(), (cdf - steps[:-1]).max())
    assert distance < 1.95 / math.sqrt(COUNT)
    # The tails, to which that statistic is insensitive: counts beyond 4 sigma, which are Poisson.
    for tail in ((x < -4).sum(), (x > 4).sum()):
        expected = COUNT * 0.5 * math.erfc(4 / math.sqrt(2))
        assert abs(tail - expected) < SIGMAS * math.sqrt(expected)


PAIRS = {
    "neighbouring elements": lambda x: (x[:, :, :-1], x[:, :, 1:]),
    "elements of one Philox call": lambda x: (x[:, :, 0::4], x[:, :, 2::4]),
    "one pair of Box and Muller": lambda x: (x[:, :, 0::2], x[:, :, 1::2]),
    "neighbouring blocks": lambda x: (x[:, :, :-4], x[:, :, 4:]),
    "neighbouring rows": lambda x: (x[:, :-1], x[:, 1:]),
    "rows far apart": lambda x: (x[:, :2500], x[:, 2500:]),
    "draws": lambda x: (x[0], x[1]),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_neighbouring_noise_is_uncorrelated(ten_million: np.ndarray, pair: str) -> None:
    """No correlation of the values or of their squares, which would show a common radius."""
    a, b = PAIRS[pair](ten_million)
    root = math.sqrt(a.size)
    assert abs((a * b).mean()) * root < SIGMAS
    assert abs(((a * a - 1) * (b * b - 1)).mean()) * root < SIGMAS * 2
    assert abs((a * (b * b - 1)).mean()) * root < SIGMAS * math.sqrt(2)


def test_noise_of_neighbouring_seeds_is_uncorrelated(native: None) -> None:
    """Seeds and offsets that differ by one bit or by one step."""
    a = noise((1000, 100), [1000, 1000])
    for seed in ([1001, 1000], [1000, 1004], [1000 + 2**32, 1000], [1000, 1000 + 2**34]):
        b = noise((1000, 100), seed)
        assert abs((a * b).mean().item()) * math.sqrt(a.numel()) < SIGMAS
