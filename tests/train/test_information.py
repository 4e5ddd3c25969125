"""The parts of the KL, the mutual information gap, and files of known factors."""

import json
import math

import numpy as np
import pytest
import torch
from run_files import command_error, run_command, train
from scipy import integrate, stats
from torch import Tensor

from fastvae.train import factors, image, information, run_folder
from fastvae.train.errors import InputError
from fastvae.train.text.recipe import Text

pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")


def normal_points(size: int, columns: int) -> Tensor:
    """Return quasi-random points of N(0, I), whose means err less than those of random ones."""
    uniform = torch.quasirandom.SobolEngine(columns, scramble=True, seed=1).draw(size, dtype=torch.float64)
    return math.sqrt(2) * torch.erfinv(2 * uniform.clamp(1e-9, 1 - 1e-9) - 1)


def test_parts_of_gaussians_have_their_closed_forms():
    """The aggregate posterior is N(m, S) with variances 2 and 1 and correlation 0.6; the posteriors are diagonal."""
    std, rho, variance = 0.4, 0.6, torch.tensor([2.0, 1.0]).double()
    covariance = torch.diag(variance)
    covariance[0, 1] = covariance[1, 0] = rho * math.sqrt(2)
    points = normal_points(2048, 4)
    root = torch.linalg.cholesky(covariance - std**2 * torch.eye(2))
    mu = points[:, :2] @ root.T + torch.tensor([1.0, 0.0])
    z = mu + std * points[:, 2:]
    parts = information.decompose(mu, torch.full_like(mu, 2 * math.log(std)), z)
    aggregate_entropy = 0.5 * torch.logdet(2 * math.pi * math.e * covariance).item()
    posterior_entropy = math.log(2 * math.pi * math.e * std**2)
    assert parts.mutual_information == pytest.approx(aggregate_entropy - posterior_entropy, abs=0.02)
    assert parts.total_correlation == pytest.approx(-0.5 * math.log(1 - rho**2), abs=0.02)
    kl = 0.5 * (variance + torch.tensor([1.0, 0.0]) - 1 - variance.log()).sum().item()
    assert parts.dimension_wise_kl == pytest.approx(kl, abs=0.02)


def spread(means: Tensor, std: Tensor, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return (mu, logvar, z) of posteriors with these means (N, L) and standard deviations (L,)."""
    logvar = 2 * std.log().expand_as(means)
    noise = torch.randn(means.shape, generator=torch.Generator().manual_seed(seed))
    return means, logvar, means + std * noise


def test_gap_of_a_code_with_known_information():
    """z_0 holds the factor v = 0, ..., 3, z_1 its parity, and z_2 nothing: I = log 4, log 2 and 0."""
    v = torch.arange(400) % 4
    means = torch.stack([20.0 * v, 20.0 * (v % 2), torch.zeros(400)], 1)
    gap = information.mutual_information_gap(*spread(means, torch.ones(3)), v)
    assert gap.dimension == 0
    assert gap.entropy == pytest.approx(math.log(4))
    assert gap.information == pytest.approx(math.log(4), abs=1e-6)
    assert gap.gap == pytest.approx(0.5, abs=1e-6)
    # In another order, and for a factor whose values are not equally frequent.
    v = torch.tensor([0] * 300 + [1] * 100)
    means = torch.stack([torch.zeros(400), 20.0 * v], 1)
    gap = information.mutual_information_gap(*spread(means, torch.ones(2)), v)
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert (gap.dimension, gap.entropy) == (1, pytest.approx(entropy))
    assert gap.gap == pytest.approx(1, abs=1e-6)


def test_information_of_overlapping_values_is_that_of_the_integral():
    """Given v, z_0 is N(0, 1) or N(1.5, 1), each for half of the data."""
    v = torch.arange(20_000) % 2
    means = torch.stack([1.5 * v, torch.zeros(20_000)], 1)
    mu, logvar, z = spread(means, torch.ones(2))
    # All data with one value have the same posterior, so that few of them stand for all.
    gap = information.mutual_information_gap(mu[:2000], logvar[:2000], z[:2000], v[:2000])

    def integrand(x: float) -> float:
        p = (stats.norm.pdf(x) + stats.norm.pdf(x, 1.5)) / 2
        return -p * math.log(p)

    entropy, _ = integrate.quad(integrand, -10, 12)
    expected = entropy - stats.norm.entropy()
    assert gap.information == pytest.approx(expected, abs=0.03)
    assert gap.gap == pytest.approx(expected / math.log(2), abs=0.04)


def test_single_dimension_has_no_second_best():
    v = torch.arange(40) % 2
    gap = information.mutual_information_gap(*spread(20.0 * v.unsqueeze(1), torch.ones(1)), v)
    assert gap.gap == pytest.approx(1, abs=1e-6)


def shapes() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Draw bars in 12 x 12 pixels, of 3 lengths, at 4 angles, and at 4 x 4 places: all combinations, with the factors
    of each image."""
    grids = np.meshgrid(range(3), range(4), range(4), range(4), indexing="ij")
    scale, angle, x, y = (grid.ravel() for grid in grids)
    rows, columns = np.mgrid[:12, :12]
    across, along = columns - (2 + 2.5 * x)[:, None, None], rows - (2 + 2.5 * y)[:, None, None]
    theta = (angle * np.pi / 4)[:, None, None]
    length, width = (
        across * np.cos(theta) + along * np.sin(theta),
        along * np.cos(theta) - across * np.sin(theta),
    )
    inside = (abs(length) <= (2 + scale)[:, None, None]) & (abs(width) <= 1.6)
    return (255 * inside).astype(np.uint8), {"scale": scale, "angle": angle, "x": x, "y": y}


@pytest.fixture(scope="module")
def shapes_run(tmp_path_factory, one_thread):
    """A run that was trained on the shapes, with all of them for validation as well, in another order."""
    folder = tmp_path_factory.mktemp("shapes")
    x, known = shapes()
    order = np.random.default_rng(0).permutation(len(x))
    np.savez(folder / "shapes.npz", x_train=x, x_test=x[order])
    known = {name: column[order] for name, column in known.items()}
    np.savez(folder / "factors.npz", **known)
    np.save(folder / "factors.npy", np.stack(list(known.values()), 1))
    lines = [",".join(known), *(",".join(map(str, row)) for row in zip(*known.values(), strict=True))]
    (folder / "factors.csv").write_text("\n".join(lines) + "\n")
    options = ("--data", str(folder / "shapes.npz"), "--lr", "0.01", "--batch-size", "32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastvae.train.callbacks.should_save_examples", lambda trainer: False)
        assert train(folder / "run", *options, "--epochs", "15") == 0
    return folder / "run"


def test_evaluate_prints_the_parts_of_the_kl_and_the_gap(shapes_run, capsys):
    found = {}
    for ending in ("csv", "npy", "npz"):
        file = shapes_run.parent / f"factors.{ending}"
        text = run_command(capsys, "evaluate", shapes_run, "--samples", 2, "--factors", file)
        found[ending] = results = json.loads((shapes_run / "evaluation.json").read_text())
        for words, key in (
            ("mutual information of x and z", "mutual_information"),
            ("total correlation of z", "total_correlation"),
            ("dimension-wise KL", "dimension_wise_kl"),
            (r"mutual information gap \(MIG\)", "mig"),
        ):
            (line,) = (line for line in text.splitlines() if line.strip().startswith(words.replace("\\", "")))
            assert f"{results[key]:.3f}" in line
    assert found["csv"] == found["npz"]
    assert list(found["npy"]["mig_of_factors"].values()) == list(found["npz"]["mig_of_factors"].values())

    results = found["npz"]
    gaps = results["mig_of_factors"]
    assert list(gaps) == ["scale", "angle", "x", "y"]
    assert gaps["scale"]["entropy"] == pytest.approx(math.log(3))
    assert gaps["x"]["entropy"] == pytest.approx(math.log(4))
    assert results["mig"] == pytest.approx(sum(gap["gap"] for gap in gaps.values()) / 4)
    # By the definition, in float64 with whole tables of densities.
    opened = image.load(shapes_run)
    with torch.no_grad():
        x = (opened.images.val >= 128).float().permute(0, 3, 1, 2)
        mu, logvar = opened.model.encode(x)
        z, _ = opened.model.elbo.reparameterize(mu, logvar, seed=torch.tensor([0, 0]))
    log_q = torch.distributions.Normal(mu.double(), torch.exp(logvar.double() / 2)).log_prob(z.unsqueeze(1))
    log_p = torch.distributions.Normal(0.0, 1.0).log_prob(z.double()).sum(1)
    kl = (log_q.diagonal().sum(0) - log_p).mean().item()
    joint = (log_q.sum(2).logsumexp(1) - math.log(len(z))).mean().item()
    assert results["mutual_information"] == pytest.approx(
        log_q.diagonal().sum(0).mean().item() - joint, abs=1e-6
    )
    parts = [results[key] for key in ("mutual_information", "total_correlation", "dimension_wise_kl")]
    assert sum(parts) == pytest.approx(kl, abs=1e-6)
    known = np.load(shapes_run.parent / "factors.npz")
    for name in gaps:
        same = torch.from_numpy(known[name][:, None] == known[name][None, :])
        given = (
            log_q.masked_fill(~same.unsqueeze(2), -math.inf).logsumexp(1) - same.sum(1, keepdim=True).log()
        )
        i = (given - (log_q.logsumexp(1) - math.log(len(z)))).mean(0).sort(descending=True).values
        assert gaps[name]["information"] == pytest.approx(i[0].item(), abs=1e-6)
        assert gaps[name]["gap"] == pytest.approx(((i[0] - i[1]) / gaps[name]["entropy"]).item(), abs=1e-6)
    # A trained code knows where the bar is, and factors in a wrong order are unknown to it.
    assert gaps["x"]["information"] > 0.3
    assert gaps["y"]["information"] > 0.3
    shuffled = shapes_run.parent / "shuffled.npy"
    np.save(shuffled, np.roll(known["x"], 7))
    run_command(capsys, "evaluate", shapes_run, "--samples", 2, "--factors", shuffled)
    wrong = json.loads((shapes_run / "evaluation.json").read_text())["mig_of_factors"]["factor"]
    assert wrong["information"] < gaps["x"]["information"] / 3


def test_limit_takes_the_first_rows_of_the_factors(shapes_run, capsys):
    file = shapes_run.parent / "factors.npz"
    run_command(capsys, "evaluate", shapes_run, "--samples", 2, "--factors", file, "--limit", 100)
    limited = json.loads((shapes_run / "evaluation.json").read_text())
    counts = np.bincount(np.load(file)["scale"][:100]) / 100
    assert limited["images"] == 100
    assert limited["mig_of_factors"]["scale"]["entropy"] == pytest.approx(-(counts * np.log(counts)).sum())


def test_factors_of_a_file_that_is_split_are_those_of_all_its_images(tmp_path, capsys):
    """Without `x_test`, validation images are drawn from the file, and so are their factors."""
    x, known = shapes()
    np.savez(tmp_path / "x.npz", x_train=x)
    np.save(tmp_path / "f.npy", known["scale"])
    assert train(tmp_path / "run", "--data", str(tmp_path / "x.npz"), "--epochs", "1") == 0
    opened = image.load(tmp_path / "run")
    of_image = {image.tobytes(): scale for image, scale in zip(x, known["scale"], strict=True)}
    counts = np.bincount([of_image[val.numpy().tobytes()] for val in opened.images.val]) / 32
    assert len(opened.images.val) == 32
    assert not np.allclose(counts, counts[0])
    run_command(capsys, "evaluate", tmp_path / "run", "--samples", 2, "--factors", tmp_path / "f.npy")
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())["mig_of_factors"]
    assert found["factor"]["entropy"] == pytest.approx(-(counts * np.log(counts)).sum())


def write(path, content) -> str:
    if isinstance(content, str):
        path.write_text(content)
    elif path.suffix == ".npz":
        np.savez(path, **content)
    else:
        np.save(path, content)
    return str(path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("f.npy", np.arange(9) % 3, "expected 10 rows, one for each image, got 9 for `factor`"),
        ("f.npz", {"a": np.arange(10) % 2, "b": np.arange(12) % 2}, "expected 10 rows, one for each image, got 12 for"),
        ("f.npz", {}, "expected at least one factor, found none"),
        ("f.npy", np.zeros(10), "`factor` must have at least two values, got only 0.0"),
        ("f.npy", np.arange(10.0), "`factor` must be discrete, so that many data share each value, got 10 values in"),
        ("f.npy", np.array([0.0, np.nan] * 5), "`factor` contains NaN or infinity"),
        ("f.npy", np.zeros((10, 2, 2)), "`factor` must be numbers or strings of shape (N,) or (N, K), got float64 of"),
        ("f.csv", "a,b\n1,2\n3\n", "line 3 must have 2 values, one for each of a, b, got 1"),
        ("f.csv", "", "the file is empty"),
        ("f.txt", "a\n1\n", "the file must end in .csv, .npy or .npz, got .txt"),
        ("f.npy", "no array", "not an .npy file that numpy can read"),
        ("f.csv", None, "cannot be read: no such file or directory"),
    ],
)  # fmt: skip
def test_bad_file_of_factors_is_refused_in_one_line(tmp_path, name, content, words):
    path = tmp_path / name
    if content is not None:
        write(path, content)
    with pytest.raises(InputError) as error:
        factors.read(path, 10, "image")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_factors_and_test_are_refused_where_they_do_not_apply(tmp_path, shapes_run, capsys):
    run = tmp_path / "run"
    run.mkdir()
    run_folder.write_config(run, Text(data="x.txt"))
    known = write(tmp_path / "f.npy", np.arange(7) % 2)
    for option in (("--factors", known), ("--test",)):
        error = command_error(capsys, "evaluate", run, *option)
        assert f"{option[0]} does not apply to {run}: this is a run of text" in error
    error = command_error(capsys, "evaluate", shapes_run, "--factors", known)
    assert "expected 192 rows, one for each image, got 7 for `factor`" in error
    error = command_error(capsys, "evaluate", shapes_run, "--test")
    assert "--test needs a run that was trained with --val" in error


def test_val_holds_out_training_images_and_leaves_a_test(tmp_path, capsys):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (40, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", x_train=x[:30], x_test=x[30:])
    run = tmp_path / "run"
    assert train(run, "--data", str(tmp_path / "x.npz"), "--val", "12", "--epochs", "1") == 0
    assert "18 training images, 12 validation images, 10 test images" in capsys.readouterr().out
    images = image.load(run).images
    for part, expected in ((images.train, x[:18]), (images.val, x[18:30]), (images.test, x[30:])):
        np.testing.assert_array_equal(part[..., 0], expected)
    text = run_command(capsys, "evaluate", run, "--samples", 2)
    assert "12 validation images of x.npz" in text
    by_val = json.loads((run / "evaluation.json").read_text())
    text = run_command(capsys, "evaluate", run, "--samples", 2, "--test")
    assert "10 test images of x.npz" in text
    results = json.loads((run / "evaluation.json").read_text())
    assert (by_val["split"], by_val["images"], results["split"], results["images"]) == ("val", 12, "test", 10)
    # With a file of other data, the same images are its validation part.
    np.savez(tmp_path / "y.npz", x_train=x[:5], x_test=x[30:])
    run_command(capsys, "evaluate", run, "--samples", 2, "--data", tmp_path / "y.npz")
    other = json.loads((run / "evaluation.json").read_text())
    assert other["iw_nll"] == results["iw_nll"]
    error = command_error(
        capsys, "train", "mlp", "--data", tmp_path / "x.npz", "--val", "30", "--out", tmp_path / "other"
    )
    assert "--val must be less than the 30 training images" in error
