"""A model's folder holds what its checkpoint holds of the model, and says where it comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sora_lightning.__main__ import main
from sora_lightning.checkpoints import averaged_state_dict, load_tokenizer, read_checkpoint
from sora_lightning.files import file_sha256
from sora_lightning.systems import DiffusionSystem


def _convert(checkpoint: Path, output: Path, *more: str) -> int:
    files = (f"--input={checkpoint}", f"--output={output}")
    return main(["convert", "--source=sora-lightning", "--target=model", *files, *more])


def test_the_folder_takes_the_checkpoints_place(
    fit: Any, diffusion_model: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = fit({"model": diffusion_model}, tmp_path / "run", "--trainer.max_steps", "2")
    folder = tmp_path / "mine"
    assert _convert(checkpoint, folder) == 0
    content = read_checkpoint(checkpoint)
    averaged = averaged_state_dict(content)
    assert any(not torch.equal(averaged[k], content["state_dict"][k]) for k in averaged)
    system = DiffusionSystem.from_checkpoint(folder)
    torch.testing.assert_close(system.state_dict(), averaged, rtol=0, atol=0)
    assert system.training_sizes == DiffusionSystem.from_checkpoint(checkpoint).training_sizes
    capsys.readouterr()
    assert _convert(checkpoint, folder) == 2
    assert "exists; name a folder to be made" in capsys.readouterr().err
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=f"{folder} cannot be read as a model's folder"):
        read_checkpoint(folder)


def _report(file: Path, sha256: str) -> None:
    score = {"value": 12.345, "low": 11.0, "high": 13.5, "n": 64}
    alone = {"value": 0.5, "low": None, "high": None, "n": 64}
    report = {
        "protocol": "tiny",
        "fingerprint": "abcdef",
        "details": {"fvd": score, "clip": alone},
        "checkpoint": {"path": "last.ckpt", "sha256": sha256, "step": 1},
    }
    file.write_text(json.dumps(report))


def test_the_card_names_data_commit_and_scores_and_is_pushed(
    tokenizer_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[str, Any]] = []

    class Hub:
        def create_repo(self, repo_id: str, **arguments: Any) -> None:
            calls.append((repo_id, arguments))

        def upload_folder(self, repo_id: str, folder_path: Path) -> None:
            calls.append((repo_id, {one.name for one in folder_path.iterdir()}))

    monkeypatch.setattr(pytest.importorskip("huggingface_hub"), "HfApi", Hub)
    folder, report = tmp_path / "mine", tmp_path / "report.json"
    _report(report, file_sha256(tokenizer_checkpoint))
    more = (f"--report={report}", "--push-to-hub=me/mine")
    assert _convert(tokenizer_checkpoint, folder, *more) == 0
    capsys.readouterr()
    assert main(["inspect", str(tokenizer_checkpoint), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    card, data = (folder / "README.md").read_text(), facts["data"]["fingerprint"]
    assert f"| Fingerprint of the training's clips and their order | {data} |" in card
    assert f"| Commit | {facts['commit']} |" in card
    assert f"| Steps | {facts['step']} |" in card
    assert "| fvd | 12.35 | 11 | 13.5 | 64 |" in card
    assert "| clip | 0.5 |  |  | 64 |" in card
    written, trained = load_tokenizer(folder), load_tokenizer(tokenizer_checkpoint)
    assert written.fingerprint() == trained.fingerprint()
    files = {"README.md", "config.json", "model.safetensors"}
    assert calls == [("me/mine", {"exist_ok": True}), ("me/mine", files)]
    _report(report, "0" * 64)
    assert _convert(tokenizer_checkpoint, tmp_path / "other", f"--report={report}") == 2
    assert "is of last.ckpt, not of" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_conversion_that_is_cut_off_leaves_no_folder(
    tokenizer_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(*arguments: Any) -> str:
        raise KeyboardInterrupt

    folder = tmp_path / "mine"
    with monkeypatch.context() as patch:
        patch.setattr("sora_lightning.cli.model_folder._card", cut_off)
        assert _convert(tokenizer_checkpoint, folder) == 130
    assert not folder.exists()
    assert _convert(tokenizer_checkpoint, folder) == 0
    assert [one.name for one in tmp_path.iterdir()] == ["mine"]
    assert len(list(folder.iterdir())) == 3
