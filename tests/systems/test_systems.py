"""Both systems through the command line, on real files: training, resuming, loading, refusing."""

import shutil
import warnings

import pytest
import torch

from sora_lightning.callbacks import EMA
from sora_lightning.checkpoints import load_tokenizer
from sora_lightning.cli.training import TrainingCLI, run_training
from sora_lightning.conditioning import Unconditional
from sora_lightning.data import VideoDataModule
from sora_lightning.data.settings import Batching
from sora_lightning.denoisers import DiT, DiTParts
from sora_lightning.denoisers.conditions import NoCondition
from sora_lightning.generation import SamplingConfig
from sora_lightning.layers.transformer import TransformerSize
from sora_lightning.systems import DiffusionSystem, TokenizerSystem
from sora_lightning.systems.draws import GroupDraws
from sora_lightning.systems.tokenizer import latent_moments
from sora_lightning.tokenizers import ConvTokenizer
from sora_lightning.tokenizers.posterior import DiagonalGaussian
from sora_lightning.types import VideoBatch, VideoSize


def weights(path):
    content = torch.load(path, weights_only=True)
    return {
        **content["state_dict"],
        **{f"ema.{k}": v for k, v in content["callbacks"]["ema"]["weights"].items()},
    }


def assert_same_weights(first, second):
    first, second = weights(first), weights(second)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("system", ["tokenizer", "diffusion"])
def test_a_resumed_training_is_the_uninterrupted_one_to_the_bit(system, fit, tmp_path, request):
    # Another rate than the default of the system, which takes it from the data.
    model = {"model": request.getfixturevalue(f"{system}_model"), "data": {"fps": 6}}
    # The schedule depends on the last step: the first part is of the whole, not planned shorter.
    steps = ("--trainer.max_steps", "8")
    whole = fit(model, tmp_path / "whole", *steps, "--checkpoint.keep_every_n_steps", "4")
    middle = whole.parent / "step-00000004.ckpt"
    resumed = fit(model, tmp_path / "resumed", *steps, "--ckpt_path", str(middle))
    assert_same_weights(whole, resumed)
    assert torch.load(resumed, weights_only=True)["global_step"] == 8


def test_a_diffusion_checkpoint_needs_no_other_file(
    fit, diffusion_model, tmp_path, tokenizer_checkpoint
):
    moved = tmp_path / "tokenizer.ckpt"
    shutil.copy(tokenizer_checkpoint, moved)
    model = {**diffusion_model, "init_args": {**diffusion_model["init_args"]}}
    model["init_args"]["tokenizer"] = {
        "class_path": "sora_lightning.checkpoints.load_tokenizer",
        "init_args": {"checkpoint": str(moved)},
    }
    path = fit({"model": model}, tmp_path / "run", "--trainer.max_steps", "3")
    expected = load_tokenizer(moved).fingerprint()
    moved.unlink()

    system = DiffusionSystem.from_checkpoint(path)
    assert not system.training
    assert system.fps == 8
    assert system.tokenizer.fingerprint() == expected
    assert load_tokenizer(path).fingerprint() == expected
    video = system.generate(["a red circle"], "5x16x24", [0], SamplingConfig(num_steps=2))
    assert video.shape == (1, 3, 5, 16, 24)

    averaged = dict(system.named_parameters())
    raw = dict(DiffusionSystem.from_checkpoint(path, use_ema=False).named_parameters())
    content = torch.load(path, weights_only=True)
    for name, average in content["callbacks"]["ema"]["weights"].items():
        torch.testing.assert_close(averaged[name], average, rtol=0, atol=0)
        torch.testing.assert_close(raw[name], content["state_dict"][name], rtol=0, atol=0)
    assert any(not torch.equal(averaged[name], raw[name]) for name in averaged)


def test_the_tokenizer_keeps_the_latent_statistics_of_its_validation(
    fit, tokenizer_model, tmp_path
):
    arguments = {k: v for k, v in tokenizer_model["init_args"].items() if k != "optimizer"}
    model = {**tokenizer_model, "init_args": arguments}  # defaults must load again too
    path = fit({"model": model}, tmp_path / "run", "--trainer.max_steps", "3")
    tokenizer = TokenizerSystem.from_checkpoint(path).tokenizer
    assert (tokenizer.latent_std != 1).all()
    assert (tokenizer.latent_mean != 0).all()


@pytest.mark.parametrize(
    "schedule",
    [
        ("--trainer.max_steps", "5", "--trainer.check_val_every_n_epoch", "100"),
        (
            *("--trainer.max_steps", "5", "--trainer.val_check_interval", "2"),
            *("--trainer.check_val_every_n_epoch", "null"),
        ),
        ("--trainer.max_epochs", "2", "--trainer.check_val_every_n_epoch", "3"),
    ],
    ids=["epochs", "interval", "max_epochs"],
)
def test_the_statistics_are_those_of_the_weights_that_are_saved(
    schedule, fit, clips, tokenizer_model, tmp_path
):
    """Wherever the last planned validation was: measured again over the training clips, at the
    lengths that predict encodes, they are the same.
    """
    sizes = ["9x16x16", "9x24x16"]
    lengths = ("--data.batching.predict_sizes", f"[{','.join(sizes)}]")
    fit_sizes = ("--data.batching.pixels_per_batch", "10000")
    path = fit({"model": tokenizer_model}, tmp_path / "run", *schedule, *lengths, *fit_sizes)
    tokenizer = load_tokenizer(path)
    batching = Batching(sizes=sizes, pixels_per_batch=10000)
    data = VideoDataModule(clips["train"], batching=batching)
    data.setup("predict")
    with torch.no_grad():
        posteriors = [tokenizer.posterior(batch.pixels) for batch in data.predict_dataloader()]
    assert sum(len(posterior.mean) for posterior in posteriors) == 12
    moments = sum(latent_moments(posterior) for posterior in posteriors)
    mean = moments[0, 1:] / moments[0, 0]
    variance = moments[1:, 1:].diagonal() / moments[0, 0] - mean.square()
    torch.testing.assert_close(tokenizer.latent_mean, mean.float(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(tokenizer.latent_std, variance.sqrt().float(), atol=1e-4, rtol=1e-4)


def test_a_tokenizer_that_does_not_validate_is_refused(fit, tokenizer_model, tmp_path):
    with pytest.raises(ValueError, match=r"trainer\.limit_val_batches = 0"):
        fit({"model": tokenizer_model}, tmp_path / "run", "--trainer.limit_val_batches", "0")


def test_predict_warns_of_statistics_that_do_not_fit(fit, tokenizer_model, tmp_path):
    arguments = ("--trainer.max_steps", "3")
    path = fit({"model": tokenizer_model}, tmp_path / "run", *arguments)
    model = {"model": tokenizer_model}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the encoded latents")
        fit(model, tmp_path / "fits", "--ckpt_path", str(path), command="predict")
    content = torch.load(path, weights_only=True)
    content["state_dict"]["tokenizer.latent_std"][:] *= 2
    torch.save(content, tmp_path / "stale.ckpt")
    with pytest.warns(UserWarning, match=r"standard deviations from 0\.\d+ to 0\.\d+, not 0 and 1"):
        fit(
            model,
            tmp_path / "stale",
            "--ckpt_path",
            str(tmp_path / "stale.ckpt"),
            command="predict",
        )


def test_latent_statistics_are_those_of_what_the_posterior_draws():
    torch.manual_seed(0)
    mean = torch.randn(2, 3, 2, 4, 4)
    posterior = DiagonalGaussian(
        mean, torch.tensor([-4.0, 0.0, 1.0]).view(3, 1, 1, 1).expand_as(mean)
    )
    draws = [posterior.sample(torch.randn_like(mean)) for _ in range(2000)]
    x = torch.stack(draws).movedim(2, 0).flatten(1)
    moments = latent_moments(posterior) / 64
    torch.testing.assert_close(moments[0, 1:].float(), x.mean(1), rtol=0, atol=0.02)
    torch.testing.assert_close(moments[1:, 1:].float(), x @ x.mT / x.shape[1], rtol=0, atol=0.05)


def test_a_tokenizer_without_validation_clips_is_refused(fit, tokenizer_model, tmp_path):
    with pytest.raises(ValueError, match=r"data\.val_manifest is not set"):
        fit({"model": tokenizer_model, "data": {"val_manifest": None}}, tmp_path / "run")


def test_cached_latents_train_the_diffusion_and_those_of_another_tokenizer_are_refused(
    fit, tokenizer_model, diffusion_model, tokenizer_checkpoint, tmp_path
):
    run_dir = tokenizer_checkpoint.parent.parent
    fit(
        {"model": tokenizer_model},
        run_dir,
        "--ckpt_path",
        str(tokenizer_checkpoint),
        command="predict",
    )
    data = {"latents": str(run_dir / "latents")}
    path = fit(
        {"model": diffusion_model, "data": data}, tmp_path / "cached", "--trainer.max_steps", "3"
    )
    assert torch.load(path, weights_only=True)["global_step"] == 3

    other = fit({"model": tokenizer_model}, tmp_path / "other", "--trainer.max_steps", "1")
    model = {**diffusion_model, "init_args": {**diffusion_model["init_args"]}}
    model["init_args"]["tokenizer"] = {
        "class_path": "sora_lightning.checkpoints.load_tokenizer",
        "init_args": {"checkpoint": str(other)},
    }
    with pytest.raises(ValueError, match="encode the clips again"):
        fit({"model": model, "data": data}, tmp_path / "refused", "--trainer.max_steps", "1")

    content = torch.load(path, weights_only=True)  # of a training on latents that were since redone
    name = next(n for n in content["state_dict"] if n.startswith("tokenizer.encoder"))
    content["state_dict"][name] += 1
    torch.save(content, path)
    with pytest.raises(ValueError, match="encode the clips again"):
        fit(
            {"model": diffusion_model, "data": data},
            tmp_path / "cached",
            *("--trainer.max_steps", "4", "--ckpt_path", "last"),
        )


def test_one_class_trains_unconditionally_too(fit, diffusion_model, tmp_path):
    model = {**diffusion_model, "init_args": {**diffusion_model["init_args"]}}
    model["init_args"]["conditioner"] = {
        "class_path": "sora_lightning.conditioning.Unconditional",
        "init_args": {"width": 16},
    }
    path = fit({"model": model}, tmp_path / "run", "--trainer.max_steps", "2")
    video = DiffusionSystem.from_checkpoint(path).generate(
        ["", ""], VideoSize(3, 16, 16), [0, 1], SamplingConfig(num_steps=1)
    )
    assert video.shape == (2, 3, 3, 16, 16)


def test_wrong_files_are_refused_by_name(tmp_path, tokenizer_checkpoint):
    with pytest.raises(ValueError, match=r"nowhere\.ckpt does not exist"):
        DiffusionSystem.from_checkpoint(tmp_path / "nowhere.ckpt")
    (tmp_path / "text.ckpt").write_text("not a checkpoint")
    with pytest.raises(ValueError, match=r"text\.ckpt cannot be read"):
        load_tokenizer(tmp_path / "text.ckpt")
    torch.save({"weights": 1}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"other\.ckpt is no Lightning checkpoint"):
        load_tokenizer(tmp_path / "other.ckpt")
    torch.save({"state_dict": {}, "hyper_parameters": {"lr": 0.1}}, tmp_path / "foreign.ckpt")
    with pytest.raises(ValueError, match=r"foreign\.ckpt does not name the system that it holds"):
        DiffusionSystem.from_checkpoint(tmp_path / "foreign.ckpt")
    with pytest.raises(ValueError, match="holds a TokenizerSystem, not a DiffusionSystem"):
        DiffusionSystem.from_checkpoint(tokenizer_checkpoint)


def test_the_average_follows_its_formula_and_swaps_in_and_out():
    import lightning as L

    class One(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
            self.frozen = torch.nn.Parameter(torch.tensor([5.0]), requires_grad=False)

    class Steps:
        global_step = 0

    module, ema, trainer = One(), EMA(decay=0.5), Steps()
    trainer.optimizers = [torch.optim.SGD([module.weight])]
    module.weight.grad = torch.zeros(2)
    ema.on_fit_start(trainer, module)
    average = module.weight.detach().clone()
    for step in range(1, 6):
        trainer.global_step = step
        module.weight.data += step
        ema.on_train_batch_end(trainer, module)
        ema.on_train_batch_end(trainer, module)  # accumulation: the same step counts once
        decay = min(0.5, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * module.weight.detach()
    torch.testing.assert_close(ema.weights["weight"], average)
    assert "frozen" not in ema.weights

    raw = module.weight.detach().clone()
    ema.on_validation_start(trainer, module)
    torch.testing.assert_close(module.weight.detach(), average)
    ema.on_validation_end(trainer, module)
    torch.testing.assert_close(module.weight.detach(), raw)

    restored = EMA(decay=0.5)
    restored.load_state_dict(ema.state_dict())
    restored.on_fit_start(trainer, module)
    torch.testing.assert_close(restored.weights["weight"], average)
    with pytest.raises(ValueError, match=r"decay = 1\.0"):
        EMA(decay=1.0)


@pytest.mark.parametrize(("asked_for", "seen"), [(None, [3, "fit", 4]), ("4", ["fit", 4])])
def test_workers_have_cores_of_their_own_where_none_are_asked_for(
    asked_for, seen, experiment, tokenizer_model, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if asked_for is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", asked_for)
    events: list[int | str] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", events.append)
    # In place of the training, whose worker and decoders would compete with other tests for cores.
    monkeypatch.setattr(TrainingCLI, "_run_subcommand", lambda _, command: events.append(command))
    config = {"model": tokenizer_model, "data": {"reading": {"num_workers": 1}}}
    run_training(["fit", "--config", str(experiment(config, tmp_path / "run"))])
    assert events == seen  # the last: what they were before


@pytest.mark.parametrize(
    "precision", [pytest.param("bf16-true", marks=pytest.mark.slow), "64-true", "bf16-mixed"]
)
def test_a_system_trains_and_validates_in_every_precision(
    precision, fit, diffusion_model, tmp_path
):
    path = fit(
        {"model": diffusion_model},
        tmp_path / "run",
        *("--trainer.max_steps", "2", "--trainer.precision", precision),
        *("--trainer.val_check_interval", "1", "--trainer.check_val_every_n_epoch", "null"),
    )
    weight = torch.load(path, weights_only=True)["state_dict"]["denoiser.x_in.weight"]
    kinds = {"bf16-true": torch.bfloat16, "64-true": torch.float64}
    assert weight.dtype == kinds.get(precision, torch.float32)
    assert torch.isfinite(weight).all()


def test_what_no_network_reads_does_not_train():
    """Several ranks ask for a gradient of every parameter that trains."""
    tokenizer = ConvTokenizer(4, [8, 16], [True], [True], patch=4, blocks_per_level=1)
    parts = DiTParts(condition=NoCondition)
    system = DiffusionSystem(
        tokenizer,
        Unconditional(16),
        lambda channels, width: DiT(
            channels, width, TransformerSize(1, 24, 2), patch=(1, 1, 1), parts=parts
        ),
    )
    batch = VideoBatch([""] * 2, 8.0, ["a", "b"], latents=torch.randn(2, 4, 3, 2, 2))
    system.losses(batch, GroupDraws([torch.Generator()], 2)).mean().backward()
    trained = [p for p in system.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)
    assert not system.conditioner.vector.requires_grad
