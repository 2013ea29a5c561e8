"""The ways subjects enter the model: one small face for the loop, one class per way.

In:  a transformer and what was encoded: text states, reference latents, VLM states.
Out: `predict(latents, sigma, branch)`, a velocity under one of the branches that guidance names.
Knows nothing of schedules, of guidance weights or of files.

Shapes: B clips (1 here), C latent channels, F latent frames, H x W latent pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan_vace import WanVACETransformer3DModel
from torch import Tensor

from engine.diffusion.guidance import Branch
from engine.messages import StudioError
from engine.models.identity_wan import IdentityWanTransformer3DModel, unpatched
from engine.models.subject_tower import IdentityCache, References

WITH_SUBJECTS: tuple[Branch, ...] = ("subjects", "full")
"""The branches of guidance in which the model reads the subjects."""


@dataclass(frozen=True)
class Encoded:
    """A job in the model's terms; everything with a batch of one.

    Args:
        prompt_embeds, negative_prompt_embeds: UMT5 states (1, tokens, text_dim).
        references: the subjects, with the VLM's reading of prompt and pictures; None without subjects.
        frames: the subjects' pictures at the clip's own size, each a latent frame, (1, C, N, H, W); None without any.
        side: what VACE's side branch reads, (1, channels, N + F, H, W); the N frames of the pictures come first.
        sources: the subjects' pictures at their own sizes, each (1, C, 1, h, w), in the order of their numbers.
    """

    prompt_embeds: Tensor
    negative_prompt_embeds: Tensor
    references: References | None = None
    frames: Tensor | None = None
    side: Tensor | None = None
    sources: tuple[Tensor, ...] = ()


class Conditioning(Protocol):
    """What the denoise loop sees of a model."""

    lead: int
    """Latent frames in front of the clip that are drawn with it and then dropped."""

    def predict(self, latents_BCFHW: Tensor, sigma: float, branch: Branch) -> Tensor:
        """Velocity of the latents' shape at noise level `sigma` in [0, 1]."""
        ...


class IdentityBlocks:
    """ID-Crafter: subjects enter through the identity cache, read once per clip for all branches and steps.

    With `Encoded.frames` the same pictures also stand behind the clip, as Phantom has them: so its weights can be what
    identity blocks are trained upon, and untrained ones leave it as it is.

    Args:
        transformer: with identity blocks.
        encoded: the job.
        keep: hold the cache (fast). False reads the subjects again in every forward (`IdentityCache.num_bytes` less
            memory), with the same result.
    """

    lead = 0

    def __init__(self, transformer: IdentityWanTransformer3DModel, encoded: Encoded, *, keep: bool = True) -> None:
        self._transformer = transformer
        self._text = _texts(encoded, transformer.dtype)
        self._frames = encoded.frames
        subjects_alone = _without_vlm(encoded.references)
        references = {"full": encoded.references, "subjects": subjects_alone}
        self._references: dict[str, References | None] = {}
        self._caches: dict[str, IdentityCache | None] = {}
        if not keep:
            self._references = references
            return
        with torch.no_grad():
            full = _read_subjects(transformer, encoded.references)
        if full is not None:
            self._caches = {"full": full, "subjects": full.without_vlm()}

    @property
    def num_bytes(self) -> int:
        """Memory of the cache, in bytes; the branch "subjects" looks at a part of it."""
        full = self._caches.get("full")
        if full is None:
            return 0
        return full.num_bytes()

    def predict(self, latents_BCFHW: Tensor, sigma: float, branch: Branch) -> Tensor:
        """See `Conditioning`. In the branches "none" and "text" stage 3 is left out altogether: exactly plain Wan."""
        return _velocity(
            self._transformer,
            _with_frames(latents_BCFHW, self._frames, branch),
            sigma,
            self._text[branch],
            identity=self._caches.get(branch),
            references=self._references.get(branch),
        )[:, :, : latents_BCFHW.shape[2]]


class PlainText:
    """A Wan model without subjects: prompt and negative prompt are all there is."""

    lead = 0

    def __init__(self, transformer: WanTransformer3DModel, encoded: Encoded) -> None:
        self._transformer = transformer
        self._text = _texts(encoded, transformer.dtype)

    def predict(self, latents_BCFHW: Tensor, sigma: float, branch: Branch) -> Tensor:
        """See `Conditioning`."""
        return _velocity(self._transformer, latents_BCFHW, sigma, self._text[branch])


class ReferenceFrames:
    """Phantom and RefAlign: plain Wan, the pictures as clean frames behind the clip, put there anew in every step.

    RoPE gives them the moments after the clip's end. In the branches without subjects they are zeros, as both were
    trained. What the model predicts for them is dropped, so that no picture leaks into the clip.

    Source: Phantom's sampler, `phantom_wan/subject2video.py`; RefAlign's negative branch is the same.
    """

    lead = 0

    def __init__(self, transformer: WanTransformer3DModel, encoded: Encoded) -> None:
        self._transformer = transformer
        self._text = _texts(encoded, transformer.dtype)
        self._frames = encoded.frames

    def predict(self, latents_BCFHW: Tensor, sigma: float, branch: Branch) -> Tensor:
        """See `Conditioning`."""
        whole = _with_frames(latents_BCFHW, self._frames, branch)
        return _velocity(self._transformer, whole, sigma, self._text[branch])[:, :, : latents_BCFHW.shape[2]]


class SourceTokens:
    """Bernini-R: plain Wan, the pictures' tokens beside the clip's, told apart by a number that turns their positions.

    The clip is 0, the pictures are 1 to K, and each has positions that begin where the clip's do. All tokens read one
    another, the prompt and the clip's noise level, clean as the pictures are. In the branches without subjects the
    clip is alone: exactly plain Wan.

    Source: `GEN_Wanx22.sample` and `WanRotaryPosEmbed` of bernini/models/, bytedance/Bernini 8c805a5.
    """

    lead = 0
    TRAINED = 5  # largest number of training; more pictures share the numbers from 1 to it in even steps

    def __init__(self, transformer: WanTransformer3DModel, encoded: Encoded) -> None:
        self._transformer = transformer
        self._text = _texts(encoded, transformer.dtype)
        count = len(encoded.sources)
        numbers = torch.linspace(1, min(self.TRAINED, count), count, dtype=torch.float64).tolist()
        self._sources = [self._patched(*each) for each in zip(encoded.sources, numbers, strict=True)]

    @torch.no_grad()
    def predict(self, latents_BCFHW: Tensor, sigma: float, branch: Branch) -> Tensor:
        """See `Conditioning`. Wan's own forward, over the clip's tokens and the sources' behind them."""
        model, sources = self._transformer, []
        if branch in WITH_SUBJECTS:
            sources = self._sources
        grid = [size // patch for size, patch in zip(latents_BCFHW.shape[2:], model.config["patch_size"], strict=True)]
        parts = zip(self._patched(latents_BCFHW, 0), *sources, strict=True)
        tokens, cosines, sines = (torch.cat(part, dim=1) for part in parts)
        temb, modulation, text, _ = model.condition_embedder(_time(latents_BCFHW, sigma), self._text[branch], None)
        modulation = modulation.unflatten(1, (6, -1))
        for block in model.blocks:
            tokens = block(tokens, text, modulation, (cosines, sines))
        return unpatched(model, tokens, temb, grid)

    @torch.no_grad()
    def _patched(self, latents: Tensor, number: float) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (1, Q, D) of the clip or of a picture, and the cosines and sines of their turned positions."""
        model = self._transformer
        latents = latents.to(model.patch_embedding.weight)
        cosines, sines = model.rope(latents)
        half = cosines.shape[-1] // 2
        angles = number * 10_000 ** (-torch.arange(half, dtype=torch.float64) / half).repeat_interleave(2)
        cosine, sine = angles.cos().to(cosines), angles.sin().to(sines)
        tokens = model.patch_embedding(latents).flatten(2).transpose(1, 2)
        return tokens, cosines * cosine - sines * sine, sines * cosine + cosines * sine


class SideBranch:
    """VACE: a side branch reads pictures, video and mask and adds to Wan's blocks.

    The pictures' frames come first and are drawn together with the clip. Without subjects the side branch's say is
    scaled to zero.

    Source: diffusers' `WanVACEPipeline`, whose guidance is "dual" with a subject scale of 1.
    """

    def __init__(self, transformer: WanVACETransformer3DModel, encoded: Encoded) -> None:
        assert encoded.side is not None, "a clip always has a side branch, if only an empty one"
        self._transformer = transformer
        self._text = _texts(encoded, transformer.dtype)
        self._side = encoded.side.to(transformer.dtype)
        self.lead = 0
        if encoded.frames is not None:
            self.lead = encoded.frames.shape[2]

    def predict(self, latents_BCFHW: Tensor, sigma: float, branch: Branch) -> Tensor:
        """See `Conditioning`."""
        layers: Any = self._transformer.config
        scale = self._side.new_full((len(layers.vace_layers),), float(branch in WITH_SUBJECTS))
        side = {"control_hidden_states": self._side, "control_hidden_states_scale": scale}
        return _velocity(self._transformer, latents_BCFHW, sigma, self._text[branch], **side)


def prepare(kind: str, transformer: Any, encoded: Encoded) -> Conditioning:
    """The conditioning that a preset names: "identity", "identity+frames", "frames", "sources", "side" or "none".

    Raises:
        StudioError: the transformer is of another kind. Identity blocks, say, could be added untrained, and then every
            subject would be ignored.
    """
    if isinstance(transformer, WanVACETransformer3DModel) != (kind == "side"):
        raise StudioError(
            what=f"This model does not take subjects by {kind!r}.",
            why=f"Its transformer is a {type(transformer).__name__}.",
            next_step="Mend the preset's `conditioning`, or fetch its own files.",
            field="preset",
        )
    if kind == "side":
        return SideBranch(transformer, encoded)
    if kind == "frames":
        return ReferenceFrames(transformer, encoded)
    if kind == "sources":
        return SourceTokens(transformer, encoded)
    if kind == "none":
        return PlainText(transformer, encoded)
    if not isinstance(transformer, IdentityWanTransformer3DModel):
        raise StudioError(
            what="This model cannot take subjects.",
            why="Its transformer is plain Wan, without trained identity blocks.",
            next_step="Choose a preset whose model was trained for subjects.",
            field="preset",
        )
    return IdentityBlocks(transformer, encoded)


def _texts(encoded: Encoded, dtype: torch.dtype) -> dict[str, Tensor]:
    prompt, negative = encoded.prompt_embeds.to(dtype), encoded.negative_prompt_embeds.to(dtype)
    return {"none": negative, "subjects": negative, "text": prompt, "full": prompt}


def _with_frames(latents_BCFHW: Tensor, frames_1CNHW: Tensor | None, branch: Branch) -> Tensor:
    """The clip with the pictures behind it, (B, C, F + N, H, W); zeros where the branch knows of no subjects."""
    if frames_1CNHW is None:
        return latents_BCFHW
    frames = frames_1CNHW
    if branch not in WITH_SUBJECTS:
        frames = torch.zeros_like(frames_1CNHW)
    return torch.cat([latents_BCFHW, frames.to(latents_BCFHW).expand(len(latents_BCFHW), -1, -1, -1, -1)], 2)


def _read_subjects(transformer: IdentityWanTransformer3DModel, references: References | None) -> IdentityCache | None:
    if references is None:
        return None
    return transformer.encode_identity(references)


def _without_vlm(references: References | None) -> References | None:
    if references is None or references.latents is None:
        return None
    return References(references.latents, references.mask, references.weights, references.slots)


@torch.no_grad()
def _velocity(transformer: Any, latents_BCFHW: Tensor, sigma: float, text: Tensor, **subjects: object) -> Tensor:
    """One forward."""
    timestep = _time(latents_BCFHW, sigma)
    subjects = {name: value for name, value in subjects.items() if value is not None}
    return transformer(latents_BCFHW.to(transformer.dtype), timestep, text, return_dict=False, **subjects)[0]


def _time(latents_BCFHW: Tensor, sigma: float) -> Tensor:
    """(B,); Wan counts time in thousandths."""
    return torch.full((latents_BCFHW.shape[0],), sigma * 1000, device=latents_BCFHW.device)
