"""A public model's adapters train on clips: saved alone, resumed exactly, sampled, written for
diffusers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sora_lightning.__main__ import main
from sora_lightning.checkpoints import averaged_state_dict, read_checkpoint
from sora_lightning.systems import DiffusionSystem
from sora_lightning.types import Condition
from tests.denoisers.pipelines import network, pipeline_folder

pytest.importorskip("peft")

TARGETS = ["to_q", "to_v"]
DORA = {
    **{"use_dora": True, "rank_pattern": {"attn2.to_q": 1}},
    "alpha_pattern": {"attn2.to_q": 4},
}
# Of plain adapters A and B of two layers of two attentions of two blocks; DoRA has magnitudes too.
KINDS: dict[str, tuple[dict[str, Any], int]] = {"lora": ({}, 2 * 8), "dora": (DORA, 3 * 8)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wan")
    pipeline_folder("Wan", folder)
    return folder


def _part(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": f"sora_lightning.{name}", "init_args": arguments}


def _model(folder: Path, **pipeline: Any) -> dict[str, Any]:
    init_args = {
        "pipeline": {"folder": str(folder), **pipeline},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
        "warmup_steps": 2,
    }
    return {"model": _part("systems.PretrainedSystem", **init_args)}


def _lora(**arguments: Any) -> dict[str, Any]:
    init_args = {"r": 2, "target_modules": TARGETS, **arguments}
    return {"lora": {"class_path": "peft.LoraConfig", "init_args": init_args}}


@pytest.fixture(scope="module", params=["lora", pytest.param("dora", marks=pytest.mark.slow)])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def adapted(fit: Any, folder: Path, kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("adapted") / "run"
    return fit(_model(folder, **_lora(**KINDS[kind][0])), run_dir, "--trainer.max_steps", "4")


def test_the_checkpoint_holds_adapters_alone_and_their_average(adapted: Path, kind: str) -> None:
    checkpoint = read_checkpoint(adapted)
    digests = {f"{part}.digest" for part in ("tokenizer", "conditioner", "denoiser")}
    assert digests < checkpoint["state_dict"].keys()
    adapters = {k.removeprefix("denoiser.") for k in checkpoint["state_dict"].keys() - digests}
    assert all(".lora_" in name for name in adapters)
    assert len(adapters) == KINDS[kind][1]
    averages = checkpoint["callbacks"]["ema"]["weights"]
    assert {name.removeprefix("denoiser.") for name in averages} == adapters
    assert len(checkpoint["optimizer_states"][0]["state"]) == len(adapters)
    ends = [k for k in checkpoint["state_dict"] if k.endswith("lora_B.default.weight")]
    assert all(checkpoint["state_dict"][name].abs().max() > 0 for name in ends)
    averaged = averaged_state_dict(checkpoint)
    assert any(not torch.equal(averaged[k], checkpoint["state_dict"][k]) for k in ends)


@pytest.mark.slow
def test_a_resumed_training_ends_with_the_same_adapters(
    fit: Any, adapted: Path, folder: Path, kind: str, tmp_path: Path
) -> None:
    model = _model(folder, **_lora(**KINDS[kind][0]))
    fit(model, tmp_path, "--trainer.max_steps", "2")
    again = fit(model, tmp_path, "--trainer.max_steps", "4", "--ckpt_path", "last")
    first, second = map(read_checkpoint, (adapted, again))
    averages = [content["callbacks"]["ema"]["weights"] for content in (first, second)]
    for one, other in ((first["state_dict"], second["state_dict"]), averages):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_adapters_are_sampled_and_written_for_the_pipeline(
    adapted: Path, folder: Path, tmp_path: Path
) -> None:
    """diffusers' pipeline with the written adapters samples what the system does."""
    import diffusers

    arguments = ["--source", "sora-lightning", "--target", "diffusers", "--input", str(adapted)]
    assert main(["convert", *arguments, "--output", str(tmp_path / "lora")]) == 0
    system = DiffusionSystem.from_checkpoint(adapted)
    pipeline = diffusers.WanPipeline.from_pretrained(folder)
    x, tokens = torch.randn(1, 4, 2, 4, 4), torch.randn(1, 512, 16)
    t = torch.tensor([0.5])
    mask = torch.ones(1, 512).bool()
    with torch.no_grad():
        ours = system.denoiser(x, t, Condition(tokens, mask, tokens[:, 0]))
        without = pipeline.transformer(x, 1000 * t, tokens).sample
        pipeline.load_lora_weights(tmp_path / "lora")
        loaded = pipeline.transformer(x, 1000 * t, tokens).sample
        pipeline.fuse_lora()
        merged = pipeline.transformer(x, 1000 * t, tokens).sample
    assert (without - ours).abs().max() > 1e-4
    torch.testing.assert_close(loaded, ours, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(merged, ours, atol=1e-5, rtol=1e-5)


def test_what_does_not_fit_is_refused_before_weights_are_read(
    fit: Any, folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "network"
    network("Wan", in_channels=8, out_channels=8).save_config(other)

    def refuses(config: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=f"model.init_args: .*{message}"):
            fit(config, tmp_path / "run", "--trainer.max_steps", "1")

    config = _model(folder)
    config["model"]["init_args"]["denoiser"] = _part(
        "denoisers.pretrained_denoiser", folder=str(other)
    )
    refuses(config, "tokenizer has 4 latent channels, and this WanTransformer3DModel takes 8")
    query = {"class_path": "peft.LoraConfig", "init_args": {"target_modules": ["query"]}}
    refuses(_model(folder, lora=query), "no layer ends with 'query'")
    refuses(_model(other), "network': holds no model_index.json of a diffusers pipeline")
    (other / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    refuses(_model(other), "network': holds a FluxPipeline; a pipeline is one of WanPipeline")


def test_the_pipelines_other_weights_are_refused(
    adapted: Path, folder: Path, tmp_path: Path
) -> None:
    content = torch.load(adapted, weights_only=True)
    for part, message in (("tokenizer", "another autoencoder than that of"), ("denoiser", "other")):
        content["state_dict"][f"{part}.digest"][0] += 1
        torch.save(content, tmp_path / "changed.ckpt")
        with pytest.raises(ValueError, match=f"trained with {message}|trained on {message} wei"):
            DiffusionSystem.from_checkpoint(tmp_path / "changed.ckpt")
        content["state_dict"][f"{part}.digest"][0] -= 1


@pytest.mark.slow
def test_predict_encodes_clips_and_captions_once(fit: Any, folder: Path, tmp_path: Path) -> None:
    """The training that follows does not run the autoencoder, nor load the text encoder."""
    config = _model(folder, **_lora(), embeddings=str(tmp_path / "embeddings"))
    fit(config, tmp_path / "run", command="predict")
    embeddings = list((tmp_path / "embeddings").rglob("*.safetensors"))
    assert len(embeddings) > 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sora_lightning.tokenizers.pretrained.WanTokenizer.posterior_step", None)
        patch.setattr("transformers.UMT5EncoderModel.from_pretrained", None)  # its weights
        config["data"] = {"latents": str(tmp_path / "run/latents")}
        checkpoint = fit(config, tmp_path / "run", "--trainer.max_steps", "1")
        system = DiffusionSystem.from_checkpoint(checkpoint)
        system.conditioner.null(1)
        with pytest.raises(TypeError, match="'NoneType' object is not callable"):
            system.conditioner(["what no clip says"])
    assert list((tmp_path / "embeddings").rglob("*.safetensors")) == embeddings
    assert system.conditioner(["what no clip says"]).tokens.shape[0] == 1


@pytest.mark.slow
def test_a_network_that_trained_as_a_whole_is_written_with_its_pipeline(
    fit: Any, folder: Path, tmp_path: Path
) -> None:
    import diffusers

    checkpoint = fit(_model(folder), tmp_path / "run", "--trainer.max_steps", "1")
    written = tmp_path / "pipeline"
    arguments = ["--source", "sora-lightning", "--target", "diffusers", "--input", str(checkpoint)]
    assert main(["convert", *arguments, "--output", str(written)]) == 0
    pipeline = diffusers.WanPipeline.from_pretrained(written)
    system = DiffusionSystem.from_checkpoint(checkpoint)
    state = system.denoiser.network.state_dict()
    before = diffusers.WanTransformer3DModel.from_pretrained(folder / "transformer").state_dict()
    after = pipeline.transformer.state_dict()
    assert all(torch.equal(after[name], state[name]) for name in state)
    assert any(not torch.equal(after[name], before[name]) for name in state)


def test_what_cannot_be_written_for_diffusers_is_refused(
    adapted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--source", "sora-lightning", "--target", "diffusers", "--input", str(adapted)]
    assert main(["convert", *arguments, "--output", str(tmp_path)]) == 2
    assert f"--output {tmp_path}: exists; name a folder to be made" in capsys.readouterr().err
