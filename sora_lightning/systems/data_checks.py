"""Checks that data fit the system that trains on them, made before the first step."""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_warn

from sora_lightning.conditioning import KnownFrameConditioning
from sora_lightning.data import Packing
from sora_lightning.data.batching.native_sizes import check_geometry
from sora_lightning.data.spec import DataSpec
from sora_lightning.denoisers import Denoiser
from sora_lightning.tokenizers import CausalTokenizer, VideoTokenizer


def check_diffusion_data(
    spec: DataSpec,
    tokenizer: VideoTokenizer,
    denoiser: Denoiser,
    known_frames: KnownFrameConditioning,
) -> None:
    """Raise ``ValueError`` for sources, packs or cached latents that do not fit the parts."""
    if known_frames.needs_source and not spec.sources:
        raise ValueError(
            "model.init_args.known_frames has VideoEditing and data.reading.sources is not "
            "set: give data.reading.sources = true, and manifests whose column source names "
            "what each clip is an edit of"
        )
    if spec.packing is not None:
        packing = spec.packing
        check_geometry(packing.compression, packing.patch, tokenizer.compression, denoiser.patch)
        if not known_frames.supports_packing:
            raise ValueError(
                f"model.init_args.known_frames is a {type(known_frames).__name__} and "
                "data.packing is set: channels beside the latents are for batches of one size: "
                "leave one of them out"
            )
        if packing.dropping is not None and not denoiser.drops_tokens:
            raise ValueError(
                f"data.packing.dropping is set: a {type(denoiser).__name__} cannot do "
                "without some of a clip's tokens: leave the key out"
            )
    made_by = spec.tokenizer_fingerprint
    if made_by is not None and made_by != (own := tokenizer.fingerprint()):
        raise ValueError(
            f"data.latents = {spec.latents} were made by the tokenizer {made_by[:12]}, and "
            f"this system's is {own[:12]}: encode the clips again with `sora-lightning predict`"
        )


def warn_of_later_frames(known_frames: KnownFrameConditioning, tokenizer: VideoTokenizer) -> None:
    """Warn where known frames are trained with latents that have seen later frames."""
    if known_frames.masks and not isinstance(tokenizer, CausalTokenizer):
        rank_zero_warn(
            f"known_frames has masks, and a {type(tokenizer).__name__} lets a latent "
            "frame see later ones: known frames then contain something of unknown ones in "
            "training, and nothing in sampling, where they are encoded by themselves"
        )


def check_packable(tokenizer: VideoTokenizer, packing: Packing, adversarial: bool) -> None:
    """Raise ``ValueError`` unless the tokenizer trains on packs of this kind."""
    if not tokenizer.supports_packing:
        raise ValueError(
            f"data.packing is set: a {type(tokenizer).__name__} trains on batches of one size; "
            "give data.batching.sizes, or take a ViViTTokenizer"
        )
    if packing.dropping is not None:
        raise ValueError(
            "data.packing.dropping is set: a tokenizer gives back every token of a clip: leave the "
            "key out"
        )
    if adversarial:
        raise ValueError(
            "model.init_args.adversarial and data.packing are both set: a discriminator takes "
            "batches of one size; give data.batching.sizes, or leave adversarial out"
        )
