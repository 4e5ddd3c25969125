"""`--init-from`: which weights of another run are copied."""

import pytest
import torch
from run_files import error_line, train_images, weights

from fastvae import cli
from fastvae.train.image import init_weights, load

pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")


NO_TRAINING = ("--epochs", "1", "--lr", "1e-12", "--ema", "0")


def test_init_from_run_copies_its_best_weights(colours, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    assert train_images("resnet", first, colours, "--epochs", "2") == 0
    assert train_images("resnet", second, colours, "--init-from", str(first), *NO_TRAINING) == 0
    source, copied = weights(first, "best"), weights(second)
    assert f"init: copied 100% of the weights from {first}" in capsys.readouterr().out
    for name, weight in copied.items():
        torch.testing.assert_close(weight, source[name], rtol=0, atol=1e-6, msg=name)
    # A run that has started no longer needs those weights.
    (first / "checkpoints" / "best.ckpt").unlink()
    (first / "checkpoints" / "last.ckpt").unlink()
    assert cli.main(["resume", str(second), "--epochs", "2"]) == 0
    assert train_images("resnet", tmp_path / "third", colours, "--init-from", str(first)) == 2
    assert f"--init-from {first}: {first}" in error_line(capsys)
    # A run without checkpoints needs them, and the error names the line in config.toml.
    for name in ("best", "last"):
        (second / "checkpoints" / f"{name}.ckpt").unlink()
    assert cli.main(["resume", str(second)]) == 2
    assert f"{second / 'config.toml'}: init_from {first}: {first}" in error_line(capsys)


@pytest.mark.parametrize(
    "options",
    [("--likelihood", "discretized-logistic"), ("--variance", "per-element"), ("--logvar-max", "0")],
)
def test_init_from_run_with_other_likelihood_skips_last_layer(colours, tmp_path, options):
    first, second = tmp_path / "first", tmp_path / "second"
    assert train_images("resnet", first, colours, "--epochs", "2") == 0
    assert train_images("resnet", second, colours, "--init-from", str(first), *options, *NO_TRAINING) == 0
    source, copied = weights(first, "best"), weights(second)
    last = init_weights.last_layer(load(second).model)[0]
    for name, weight in copied.items():
        if name.startswith((f"{last}.", "elbo.likelihood")):
            assert weight.shape != source[name].shape or not torch.allclose(weight, source[name], atol=1e-6)
        else:
            torch.testing.assert_close(weight, source[name], rtol=0, atol=1e-6, msg=name)


def test_init_from_replaced_run_fails(colours, tmp_path, capsys):
    out = tmp_path / "run"
    assert train_images("resnet", out, colours, "--epochs", "1") == 0
    assert train_images("resnet", out, colours, "--overwrite", "--init-from", str(out)) == 2
    assert "this path is inside the run that would be replaced; choose another --out" in error_line(capsys)
    assert (out / "checkpoints" / "best.ckpt").exists()


def test_init_from_photos_copies_all_vae_gan_networks_but_the_discriminator(colours, tmp_path, capsys):
    assert train_images("photos", tmp_path / "photos", colours, "--epochs", "1", "--ema", "0") == 0
    assert (
        train_images(
            "vae-gan", tmp_path / "gan", colours, "--init-from", str(tmp_path / "photos"), *NO_TRAINING
        )
        == 0
    )
    source, copied = weights(tmp_path / "photos"), weights(tmp_path / "gan")
    networks = [name for name in copied if name.startswith(("encoder.", "decoder."))]
    assert len(networks) > 20
    for name in networks:
        torch.testing.assert_close(copied[name], source[name], rtol=0, atol=1e-6, msg=name)


def test_init_from_checkpoint_without_matching_weights_fails(colours, tmp_path, capsys):
    assert train_images("resnet", tmp_path / "run", colours, "--epochs", "1") == 0
    capsys.readouterr()
    file = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert train_images("conv-lstm", tmp_path / "other", colours, "--init-from", str(file)) == 2
    assert f"--init-from {file}: none of its weights has a name and shape" in error_line(capsys)
    torch.save({"state_dict": {"encoder.0.weight": 3}, "epoch": 0, "loops": 0, "optimizer_states": 0}, file)
    assert train_images("resnet", tmp_path / "other", colours, "--init-from", str(file)) == 2
    assert "not a fastvae checkpoint, or damaged" in error_line(capsys)
    file.write_bytes(b"nothing")
    assert train_images("resnet", tmp_path / "other", colours, "--init-from", str(file)) == 2
    assert "not a fastvae checkpoint, or damaged" in error_line(capsys)
