"""Vision-language models of transformers from a folder, which caption clips from their frames."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from sora_lightning.captioner.base import Captioner
from sora_lightning.captioner.decoding import Beam, Decoding, Nucleus
from sora_lightning.captioner.video_encoder import Videos
from sora_lightning.checks import require_at_least
from sora_lightning.layers.fingerprint import fingerprint
from sora_lightning.transformers_folders import model_type, read_network, read_tokenizer

PROMPT = "These are frames of one video, in order. Describe the video in one sentence."


class PretrainedCaptioner(Captioner):
    """Captions frames of a clip with a vision-language model, such as LLaVA, Qwen2-VL or SmolVLM.

    Supports any model of ``AutoModelForImageTextToText`` whose processor has a chat template.

    Args:
        folder: Configuration, weights and processor, as transformers' ``save_pretrained`` writes
            them.
        prompt: What the model is asked, after the frames.
        num_frames: Frames that it sees, evenly spaced from the first to the last.

    Raises ``ValueError`` for a folder without such a model, its weights or its chat template.
    """

    def __init__(self, folder: Path, prompt: str = PROMPT, num_frames: int = 4):
        super().__init__()
        require_at_least(1, num_frames=num_frames)
        self.prompt, self.num_frames = prompt, num_frames
        self.model, self.processor = load_pretrained(
            Path(folder), "AutoModelForImageTextToText", "AutoProcessor", "vision-language model"
        )
        if not self.processor.chat_template:
            raise ValueError(f"{folder}: its processor has no chat template to ask a question by")

    @torch.no_grad()
    def captions(
        self,
        videos: Videos,
        decoding: Decoding,
        rngs: Sequence[torch.Generator],
        num_captions: int = 1,
    ) -> list[list[str]]:
        """See ``Captioner``. Clips of a batch are asked about together, unless their captions are
        drawn.
        """
        clips = [self._images(video) for video in videos]
        if not isinstance(decoding, Nucleus):
            return [[answer] * num_captions for answer in self._answers(clips, decoding)]
        captions = []
        for clip, rng in zip(clips, rngs, strict=True):
            # generate draws from the global state of random numbers.
            with torch.random.fork_rng(devices=[rng.device] if rng.device.type == "cuda" else []):
                torch.manual_seed(rng.initial_seed())
                captions.append(self._answers([clip] * num_captions, decoding))
        return captions

    def fingerprint(self) -> str:
        """See ``Captioner``."""
        settings = [self.prompt, self.num_frames, self.processor.tokenizer.get_vocab()]
        # Sorted: the order of a vocabulary differs from one loading of it to the next.
        return fingerprint(self.model, json.dumps(settings, sort_keys=True))

    def _images(self, video: Float[Tensor, "3 F H W"]) -> list[Any]:
        from PIL import Image

        places = torch.linspace(0, video.shape[1] - 1, min(self.num_frames, video.shape[1]))
        frames = rearrange(video[:, places.round().long()], "c F H W -> F H W c")
        pixels = (frames.float() * 127.5 + 127.5).round().clamp(0, 255).byte().cpu().numpy()
        return [Image.fromarray(frame) for frame in pixels]

    def _answers(self, clips: Sequence[Sequence[Any]], decoding: Decoding) -> list[str]:
        content = [*({"type": "image"} for _ in clips[0]), {"type": "text", "text": self.prompt}]
        message = [{"role": "user", "content": content}]
        text = self.processor.apply_chat_template(message, add_generation_prompt=True)
        # Clips of one size have as many tokens each, so that none is padded.
        asked = self.processor(text=[text] * len(clips), images=clips, return_tensors="pt")
        asked = asked.to(self.model.device, dtype=self.model.dtype)
        answers = self.model.generate(**asked, **_options(decoding))
        new = answers[:, asked["input_ids"].shape[1] :]
        texts = self.processor.tokenizer.batch_decode(new, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]


def _options(decoding: Decoding) -> dict[str, Any]:
    """Return the arguments of transformers' ``generate`` that decode in this way."""
    options: dict[str, Any] = {"max_new_tokens": decoding.max_tokens, "do_sample": False}
    if isinstance(decoding, Beam):
        options |= {"num_beams": decoding.num_beams, "length_penalty": decoding.length_penalty}
    if isinstance(decoding, Nucleus):
        options |= {"do_sample": True, "top_k": 0}
        options |= {"top_p": decoding.top_p, "temperature": decoding.temperature}
    return options


def load_pretrained(folder: Path, model: str, processor: str, kind: str) -> tuple[Any, Any]:
    """Return a model of transformers in evaluation mode, and its processor or tokenizer.

    ``model`` and ``processor`` are names of transformers' classes. Raises ``ValueError`` naming the
    folder for one that holds no such model, or lacks weights or the tokenizer.
    """
    model_type(folder, kind)
    processing = read_tokenizer(folder, processor)
    with torch.device("cpu"):  # also where a configuration is checked on the meta device
        network = read_network(folder, model, kind, dtype="auto")
    return network.eval(), processing
