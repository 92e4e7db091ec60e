import json
import subprocess
import sys

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sora_lightning.checkpoints import read_checkpoint
from sora_lightning.systems import CaptionerSystem
from tests.systems.conftest import EMA, MUON

CAPTIONER = {
    "class_path": "sora_lightning.captioner.CoCa",
    "init_args": {
        "encoder": {
            "class_path": "sora_lightning.captioner.VideoEncoder",
            "init_args": {"size": {"depth": 1, "width": 16, "num_heads": 2}, "tubelet": [2, 8, 8]},
        },
        "text": {"depth": 1, "width": 16, "num_heads": 2},
        "num_queries": 2,
        "vocab_size": 280,
        "context": 128,
        "embedding_width": 8,
    },
}
MODEL = {
    "class_path": "sora_lightning.systems.CaptionerSystem",
    "init_args": {"captioner": CAPTIONER, "optimizer": MUON, "warmup_steps": 2},
}
PACKING = {
    "batching": {"sizes": None, "pixels_per_batch": None},
    "packing": {
        "tokens": 96,
        "compression": "2x8x8",
        "patch": [1, 1, 1],
        "max_frames": 5,
        "max_pixels": 512,
    },
}


@pytest.fixture(scope="session")
def captioner_checkpoint(fit, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("captioner") / "run"
    return fit({"model": MODEL}, run_dir, "--trainer.max_steps", "6")


def scores_of(folder):
    lines = (folder / "version_0" / "metrics.csv").read_text().splitlines()
    names, found = lines[0].split(","), {}
    for line in lines[1:]:
        found |= {k: float(v) for k, v in zip(names, line.split(","), strict=True) if v}
    return found


def test_a_checkpoint_captions_by_itself(captioner_checkpoint):
    system = CaptionerSystem.from_checkpoint(captioner_checkpoint)
    content = read_checkpoint(captioner_checkpoint)
    assert json.loads(content["state_dict"]["captioner.bpe._extra_state"])["model"]["type"] == "BPE"
    captions = system.captioner.captions(torch.zeros(2, 3, 5, 16, 16), system.decoding, [])
    assert len(captions) == 2
    assert all(isinstance(caption, str) for (caption,) in captions)
    again = CaptionerSystem.from_checkpoint(captioner_checkpoint).captioner
    assert again.fingerprint() == system.captioner.fingerprint()
    again.bpe.train_on(["another vocabulary"])
    assert again.fingerprint() != system.captioner.fingerprint()


@pytest.mark.parametrize("data", [{}, PACKING], ids=["dense", "packed"])
def test_training_learns_the_captions_of_its_clips(fit, clips, tmp_path, data):
    config = {"model": MODEL, "data": {**data, "val_manifest": str(clips["train"])}}
    logger = ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", str(tmp_path)]
    rate = ["--model.init_args.optimizer.init_args.lr", "0.03"]
    logger += ["--trainer.logger.name", "", "--trainer.check_val_every_n_epoch", "10"]
    fit(config, tmp_path / "run", "--trainer.max_steps", "30", *logger, *rate)
    scores = scores_of(tmp_path)
    assert scores["val/captioning"] < 4.6  # 5.6 = log 280 before training
    assert scores["val/token_accuracy"] > 0.1
    for name in ("video_to_text", "text_to_video"):
        assert 0 < scores[f"val/retrieval/{name}_at_1"] <= scores[f"val/retrieval/{name}_at_5"] <= 1


def test_a_second_stage_keeps_the_vocabulary(fit, captioner_checkpoint, clips, tmp_path):
    rows = [json.loads(line) for line in clips["train"].read_text().splitlines()]
    other = clips["train"].with_name("other.jsonl")
    other.write_text(
        "".join(json.dumps({**r, "caption": "Quite another text"}) + "\n" for r in rows)
    )
    start = ["--checkpoint.start_from", str(captioner_checkpoint), "--trainer.max_steps", "1"]
    last = fit({"model": MODEL, "data": {"manifest": str(other)}}, tmp_path / "run", *start)
    first, second = (read_checkpoint(path)["state_dict"] for path in (captioner_checkpoint, last))
    assert first["captioner.bpe._extra_state"] == second["captioner.bpe._extra_state"]


def predict(fit, clips, checkpoint, run_dir, output, *arguments):
    config = {"model": MODEL, "data": {"manifest": str(clips["train"]), "val_manifest": None}}
    flags = ["--ckpt_path", str(checkpoint), "--captions.output", str(output)]
    fit(config, run_dir, *flags, "--latents.root", "null", *arguments, command="predict")
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_predict_adds_captions_to_a_copy_of_the_manifest(
    fit, clips, captioner_checkpoint, tmp_path, monkeypatch
):
    output = clips["train"].with_name("captioned.jsonl")
    captioned = predict(fit, clips, captioner_checkpoint, tmp_path, output)
    system = CaptionerSystem.from_checkpoint(captioner_checkpoint)  # with averaged weights
    before = [json.loads(line) for line in clips["train"].read_text().splitlines()]
    for row, old in zip(captioned, before, strict=True):
        assert row.items() >= old.items()
        assert row["caption_synthetic_model"] == system.captioner.fingerprint()
        how = "Greedy(max_tokens=64), seed=0, captions_per_clip=1, fps=8, sizes=5x16x16,5x24x16"
        assert row["caption_synthetic_decoding"] == how
    monkeypatch.setattr(CaptionerSystem, "__init__", None)  # nothing is built
    for wrong, message in ((clips["train"], "is the manifest itself"), ("null", "is missing")):
        with pytest.raises(ValueError, match=f"captions.output.* {message}"):
            predict(fit, clips, captioner_checkpoint, tmp_path, wrong)


@pytest.mark.slow
def test_two_ranks_caption_as_one(fit, clips, captioner_checkpoint, tmp_path):
    output = clips["train"].with_name("captioned.jsonl")
    output.unlink(missing_ok=True)
    one = predict(fit, clips, captioner_checkpoint, tmp_path, output)
    output.unlink()
    config = yaml.safe_dump(
        {
            "run_dir": str(tmp_path),
            "ckpt_path": str(captioner_checkpoint),
            "captions": {"output": str(output)},
            "model": MODEL,
            "data": {
                "manifest": str(clips["train"]),
                "batching": {"sizes": ["5x16x16", "5x24x16"], "pixels_per_batch": 5120},
            },
            "trainer": {"accelerator": "cpu", "devices": 2, "callbacks": [EMA]},
        }
    )
    (tmp_path / "two.yaml").write_text(config)
    command = [sys.executable, "-m", "sora_lightning", "predict", "--config"]
    done = subprocess.run(
        [*command, str(tmp_path / "two.yaml")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "MEMBER: 2/2" in done.stderr
    assert [json.loads(line) for line in output.read_text().splitlines()] == one


def test_a_captioner_of_another_vocabulary_is_refused(fit, captioner_checkpoint, tmp_path):
    start = ["--checkpoint.start_from", str(captioner_checkpoint), "--trainer.max_steps", "1"]
    other = ["--model.init_args.captioner.init_args.vocab_size", "300"]
    with pytest.raises(ValueError, match=r"start_from = .*embedding.weight is \(280, 16\), and"):
        fit({"model": MODEL}, tmp_path / "run", *start, *other)


def test_validate_shows_captions_as_text_and_names_a_file_beyond_the_context(
    fit, clips, captioner_checkpoint, tmp_path
):
    flags = ["--ckpt_path", str(captioner_checkpoint), "--trainer.logger", "true"]
    fit({"model": MODEL}, tmp_path, *flags, command="validate")
    (events,) = tmp_path.rglob("events.out.*")
    shown = EventAccumulator(str(events.parent)).Reload().Tensors("val/captions/text_summary")
    table = shown[0].tensor_proto.string_val[0].decode()
    rows = clips["val"].read_text().splitlines()
    right = [row.split(" | ")[1].removesuffix(" |") for row in table.splitlines()[2:]]
    assert right  # those of the first batch
    assert set(right) <= {json.loads(row)["caption"][0] for row in rows}
    rows[2] = json.dumps({**json.loads(rows[2]), "caption": "word " * 200})
    long = clips["val"].with_name("long.jsonl")
    long.write_text("\n".join(rows))
    data = {"val_manifest": str(long)}
    with pytest.raises(ValueError, match=r"long.jsonl: the caption of 00002.mp4, 'word .* has \d+"):
        fit({"model": MODEL, "data": data}, tmp_path / "long", *flags, command="validate")


def test_an_empty_caption_is_refused_with_its_line(fit, clips, tmp_path):
    rows = clips["train"].read_text().splitlines()
    rows[1] = json.dumps({**json.loads(rows[1]), "caption": " "})
    empty = clips["train"].with_name("empty.jsonl")
    empty.write_text("\n".join(rows))
    with pytest.raises(ValueError, match=r"empty.jsonl:2: caption = ' ': ' ' is not a caption"):
        fit({"model": MODEL, "data": {"manifest": str(empty)}}, tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": 4}, r"train.jsonl: the caption of 000.*context = 4 holds 1 to 2"),
        ({"vocab_size": 9}, "vocab_size = 9: must be at least 260"),
        ({"encoder.init_args.tubelet": "[2, 8, 7]"}, "data.batching.sizes: .* is not a multiple"),
        ({"encoder.init_args.tubelet": "[3, 8, 8]"}, "data.batching.sizes: 5x16x16: 5 frames"),
    ],
)
def test_what_cannot_work_is_refused_before_training(fit, tmp_path, changes, message):
    prefix = "--model.init_args.captioner.init_args."
    flags = [part for key, value in changes.items() for part in (prefix + key, str(value))]
    with pytest.raises(ValueError, match=message):
        fit({"model": MODEL}, tmp_path / "run", *flags, "--trainer.max_steps", "1")
    assert not (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()
