import json

from sora_lightning.captioner import PretrainedCaptioner
from tests.captioner.networks import llava_folder


def test_predict_writes_its_captions_without_a_checkpoint(fit, clips, tmp_path):
    llava = llava_folder(tmp_path / "llava")
    output = clips["train"].with_name("described.jsonl")
    model = {
        "class_path": "sora_lightning.systems.RecaptioningSystem",
        "init_args": {
            "captioner": {
                "class_path": "sora_lightning.captioner.PretrainedCaptioner",
                "init_args": {"folder": str(llava), "num_frames": 2},
            },
            "decoding": {
                "class_path": "sora_lightning.captioner.decoding.Greedy",
                "init_args": {"max_tokens": 4},
            },
        },
    }
    config = {"model": model, "data": {"manifest": str(clips["train"]), "val_manifest": None}}
    flags = ["--captions.output", str(output), "--latents.root", "null"]
    fit(config, tmp_path, *flags, command="predict")
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    digest = PretrainedCaptioner(llava, num_frames=2).fingerprint()
    rows = [row for row in rows if "caption_synthetic" in row]  # random weights may say nothing
    assert len(rows) > 6
    assert {row["caption_synthetic_model"] for row in rows} == {digest}
    (how,) = {row["caption_synthetic_decoding"] for row in rows}
    assert how.startswith("Greedy(max_tokens=4), seed=0, captions_per_clip=1, fps=")
