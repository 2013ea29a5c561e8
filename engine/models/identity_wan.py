"""Wan's video transformer with hierarchical identity-preserving blocks (ID-Crafter, arXiv 2511.00511, S.9-S.11).

In:  noisy video latents, a time, UMT5 text states, and the subjects: VAE latents of their pictures and VLM states.
Out: a velocity of the latents' shape. Knows nothing of prompts, pictures, schedules or guidance.

The subjects run through a tower of their own, one `SubjectBlock` beside each of the first K Wan blocks:

    f'  = f  + SelfAttn(norm f)                                       within one subject            stage 1, S.9
    f'' = f' + sigmoid(W_g norm f') * CrossAttn(norm f', others' f')  between subjects, gated       stage 2, S.10
    Z'  = Z  + CrossAttn(norm Z, [norm f'' of all; VLM])              subjects and VLM into video   stage 3, S.11

Nothing in the tower sees the video or the time, so a clip needs it once: what stage 3 reads, the keys and values of
every layer, is the `IdentityCache`. Block l hands f'' to block l + 1. Only the output projection of stage 3 starts at
zero: an untrained model is Wan, bit for bit, and yet every stage has a gradient as soon as that projection moves.

Stages 1 and 2 are in engine/models/subject_tower.py, stage 3 in engine/models/identity_block.py; here is the whole.

Shapes: B clips, N subjects, V pictures of a subject, C latent channels, Q video tokens, D model width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, cast

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.utils.peft_utils import apply_lora_scale
from torch import Tensor, nn

from engine.models.identity_block import IdentityAttention, IdentityWanTransformerBlock, VideoPositions
from engine.models.subject_tower import (
    IdentityCache,
    LayerIdentity,
    References,
    SubjectBlock,
    Tower,
    VLMProjector,
    build_tower,
    picture_positions,
    slots_of,
)

SLOT_KEY = 0.5  # size of what a key wears of its slot, before any training; keys themselves have about 2
MATCH = 22.0  # score of stage 3, before any training, where a video token equals a subject token

# --- the whole model ------------------------------------------------------------------------------------------------


def _check_identity_sizes(
    patch_size: tuple[int, int, int], num_layers: int, identity_layers: int, subject_zoom: int
) -> None:
    if patch_size[0] != 1 or not 0 < identity_layers <= num_layers:
        raise ValueError(
            f"identity_layers={identity_layers} has to lie between 1 and num_layers={num_layers}, "
            f"and patch_size={patch_size} has to leave time alone."
        )
    if subject_zoom < 1 or any(side * (subject_zoom - 1) % 2 for side in patch_size[1:]):
        raise ValueError(f"subject_zoom={subject_zoom} cannot be centred on patches of {patch_size[1:]}.")


def _new_subject_patch_embedding(
    in_channels: int, dim: int, patch_size: tuple[int, int, int], subject_zoom: int
) -> nn.Conv3d:
    """A patch embedding of its own, started as a copy of Wan's.

    A still picture of a subject on white is not a noisy frame, and the two have to be free to part in training while
    the base may stay frozen.
    """
    _, down, across = patch_size
    wider = subject_zoom - 1
    return nn.Conv3d(
        in_channels,
        dim,
        kernel_size=(1, down * subject_zoom, across * subject_zoom),
        stride=patch_size,
        padding=(0, down * wider // 2, across * wider // 2),
        padding_mode="replicate",
    )


def _new_video_positions(dim: int, patch_size: tuple[int, int, int], wanted: bool) -> VideoPositions | None:
    if not wanted:
        return None
    return VideoPositions(dim, patch_size)


def _new_vlm_projector(vlm_dim: int, dim: int, eps: float) -> VLMProjector | None:
    if not vlm_dim:
        return None
    return VLMProjector(vlm_dim, dim, eps)


class IdentityWanTransformer3DModel(WanTransformer3DModel):
    """Wan with identity-preserving blocks in its first `identity_layers` layers.

    Args (beyond Wan's own):
        identity_layers: how many of the first blocks carry identity blocks; 20 at 1.3B and 14B (paper, A.1).
        max_subjects: how many slot embeddings there are.
        vlm_dim: width of the VLM's hidden states, 3,584 for Qwen2.5-VL-7B; 0 = "w/o VLM encoder", UMT5 alone.
        identity_intra, identity_inter: stages 1 and 2 on or off.
        identity_cross: stage 3 on or off. Off, the subjects (and VLM tokens) of each layer join UMT5's tokens in
            Wan's own cross-attention; such a model is NOT plain Wan at the start. With all three off that is the
            paper's "w/o hierarchical attention", plain concatenation; with stage 3 alone, "stage 3 only".
        subject_positions: each subject token is also told where in its picture it lies, by fixed sines. The paper has
            no such thing; stage 3 has no RoPE, so a key's place is otherwise known only through what stage 1 saw.
        subject_zoom: how much larger pictures show a subject than clips do. A subject token then covers so many times
            a video token's side, at the same stride, so that neighbours overlap; there are as many tokens as before.
            1, each token apart, is the paper's.
        video_positions: each video token is also told where in the frame and when in the clip it is. The paper has no
            such thing, and Wan's RoPE is relative: in pure noise nothing says which moment a frame is.
        slot_keys: the keys of stage 3 wear their subject's slot in every layer. What D4 adds to a subject's tokens once
            has become quiet by then, and near pure noise the words' "subject 2" is all that says who belongs where.
    """

    _gradient_checkpointing_func: Callable[..., Any]  # set by diffusers' `enable_gradient_checkpointing`
    _no_split_modules: ClassVar[list[str]] = ["WanTransformerBlock", "IdentityWanTransformerBlock", "SubjectBlock"]
    _repeated_blocks: ClassVar[list[str]] = ["WanTransformerBlock", "IdentityWanTransformerBlock"]

    @register_to_config
    def __init__(
        self,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        num_attention_heads: int = 40,
        attention_head_dim: int = 128,
        in_channels: int = 16,
        out_channels: int = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 13824,
        num_layers: int = 40,
        cross_attn_norm: bool = True,
        qk_norm: str | None = "rms_norm_across_heads",
        eps: float = 1e-6,
        image_dim: int | None = None,
        added_kv_proj_dim: int | None = None,
        rope_max_seq_len: int = 1024,
        pos_embed_seq_len: int | None = None,
        identity_layers: int = 20,
        max_subjects: int = 4,
        vlm_dim: int = 3584,
        identity_intra: bool = True,
        identity_inter: bool = True,
        identity_cross: bool = True,
        subject_positions: bool = False,
        subject_zoom: int = 1,
        video_positions: bool = False,
        slot_keys: bool = False,
    ) -> None:
        _check_identity_sizes(patch_size, num_layers, identity_layers, subject_zoom)
        super().__init__(
            patch_size=patch_size,
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            in_channels=in_channels,
            out_channels=out_channels,
            text_dim=text_dim,
            freq_dim=freq_dim,
            ffn_dim=ffn_dim,
            num_layers=num_layers - identity_layers,
            cross_attn_norm=cross_attn_norm,
            qk_norm=qk_norm,
            eps=eps,
            image_dim=image_dim,
            added_kv_proj_dim=added_kv_proj_dim,
            rope_max_seq_len=rope_max_seq_len,
            pos_embed_seq_len=pos_embed_seq_len,
        )
        self.register_to_config(num_layers=num_layers)  # Wan registered the number of plain blocks just now
        dim = num_attention_heads * attention_head_dim
        block = (dim, ffn_dim, num_attention_heads, str(qk_norm), cross_attn_norm, eps, added_kv_proj_dim)
        carriers = [IdentityWanTransformerBlock(*block, cross=identity_cross) for _ in range(identity_layers)]
        self.blocks = nn.ModuleList([*carriers, *self.blocks])
        self.subject_patch_embedding = _new_subject_patch_embedding(in_channels, dim, patch_size, subject_zoom)
        self.slot_embedding = nn.Embedding(max_subjects, dim)
        self.video_position_embedding = _new_video_positions(dim, patch_size, video_positions)
        self.vlm_projector = _new_vlm_projector(vlm_dim, dim, eps)
        self.subject_blocks = nn.ModuleList(self._new_subject_blocks())
        self.init_identity()

    def _new_subject_blocks(self) -> list[SubjectBlock]:
        """The tower, one block for each block of the video that carries stage 3."""
        config: Any = self.config
        heads = config.num_attention_heads
        stages = {"intra": config.identity_intra, "inter": config.identity_inter, "cross": config.identity_cross}
        slot_keys = 0
        if config.slot_keys:
            slot_keys = config.max_subjects
        blocks = []
        for _ in range(config.identity_layers):
            blocks.append(
                SubjectBlock(heads * config.attention_head_dim, heads, config.eps, **stages, slot_keys=slot_keys)
            )
        return blocks

    def init_identity(self, wanted: Callable[[str], bool] = lambda name: True) -> None:
        """Start (or start again) everything that plain Wan does not have; Wan's own weights stay as they are.

        Args:
            wanted: asked for a module's name with a dot behind it, to start some of them now and others later.
        """

        def asked(name: str) -> bool:
            return is_identity_key(name + ".") and wanted(name + ".")

        for name, module in self.named_modules():
            if not asked(name):
                continue
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
                module.reset_parameters()
        if self.video_position_embedding is not None and asked("video_position_embedding"):
            nn.init.zeros_(self.video_position_embedding.proj.weight)
        if asked("slot_embedding"):
            # About a sixth of a patch token's size: seen from the first step, and the picture stays the louder.
            nn.init.normal_(self.slot_embedding.weight, std=0.1)
        if asked("subject_patch_embedding"):
            _start_as_copy(self.subject_patch_embedding, self.patch_embedding, self.config["subject_zoom"])
        tower = cast(list[SubjectBlock], list(self.subject_blocks))
        mine = [number for number in range(len(tower)) if asked(f"subject_blocks.{number}")]
        for number in mine:
            block = self.blocks[number]
            if isinstance(block, IdentityWanTransformerBlock) and block.identity is not None:
                _start_as_matched_filter(block.identity, tower[number])
        for number in mine:
            worn = tower[number].slot_key
            if worn is not None:
                nn.init.normal_(worn.weight, std=SLOT_KEY)
        # Stages 1 and 2 start quiet, though not silent: at full size what they add, an average over many tokens and so
        # nearly the same for each, halves within four layers what tells one token from another.
        for number in mine:
            for attention in (tower[number].attn1, tower[number].attn2):
                if attention is not None:
                    nn.init.xavier_uniform_(cast(nn.Linear, attention.to_out[0]).weight, gain=0.1)

    @classmethod
    def from_plain_wan(cls, plain: WanTransformer3DModel, **identity_config: Any) -> IdentityWanTransformer3DModel:
        """Carry plain Wan's weights over (shared, not copied) and start the identity blocks.

        Args:
            plain: a loaded `WanTransformer3DModel`; its tensors move into the new model.
            identity_config: `identity_layers`, `max_subjects`, `vlm_dim`, `identity_intra`, ...

        Raises:
            ValueError: the keys do not fit, which would leave a part of Wan unset.
        """
        config = {key: value for key, value in plain.config.items() if not key.startswith("_")}
        with torch.device("meta"):
            model = cls(**{**config, **identity_config})
        missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False, assign=True)
        strangers = [key for key in missing if not is_identity_key(key)] + list(unexpected)
        if strangers:
            raise ValueError(f"{len(strangers)} keys do not fit plain Wan, the first is {strangers[0]!r}.")
        model.rope = plain.rope  # its tables are buffers that no checkpoint holds
        weight = plain.patch_embedding.weight
        for name, parameter in list(model.named_parameters()):
            if is_identity_key(name):
                owner, _, leaf = name.rpartition(".")
                empty = torch.empty(parameter.shape, dtype=weight.dtype, device=weight.device)
                setattr(model.get_submodule(owner), leaf, nn.Parameter(empty))
        model.init_identity()
        return model

    # --- the subjects ---

    @property
    def has_vlm(self) -> bool:
        """Whether stage 3 reads the VLM."""
        return self.vlm_projector is not None

    def encode_identity(self, references: References) -> IdentityCache | None:
        """Run the subject tower once; the result serves every step and every guidance branch of the clip.

        Returns:
            The cache, or None when there is neither a subject nor a VLM token.

        Raises:
            ValueError: more subjects than slots, or shapes that do not belong together.
        """
        tower = self._tower(references)
        if tower is None:
            return None
        return IdentityCache(tuple(self._run_tower(tower)), tower.num_subject_keys)

    def _tower(self, references: References) -> Tower | None:
        """The subject tower before its first layer; None when there is nothing in it."""
        tokens, rotary_emb = self._subject_tokens(references)
        vlm = None
        if references.vlm_states is not None and self.vlm_projector is not None:
            vlm = self.vlm_projector(references.vlm_states)
        return build_tower(references, tokens, rotary_emb, vlm)

    def _run_tower(self, tower: Tower) -> Iterator[LayerIdentity]:
        """One layer after the other, so that a caller which does not keep them holds one at a time."""
        tokens = tower.tokens
        for block in self.subject_blocks:
            arguments = (tokens, tower.vlm, tower.weights, tower.slots, tower.rotary_emb, tower.masks)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                tokens, key, value = self._gradient_checkpointing_func(block, *arguments)
            else:
                tokens, key, value = block(*arguments)
            if tower.kept_keys is not None:
                key = key[:, tower.kept_keys]
                if value is not None:
                    value = value[:, tower.kept_keys]
            yield LayerIdentity(key, value, tower.mask, tower.present)

    def _subject_tokens(self, references: References) -> tuple[Tensor | None, tuple[Tensor, Tensor] | None]:
        """Patch, join the pictures of each subject, add its slot: (B, N, L, D), and the RoPE of stage 1.

        Wan's RoPE with pictures in the place of frames: height and width inside a picture, and on the time axis the
        picture's number, so that two pictures of one subject do not lie on top of each other. The first one is at 0.
        """
        latents = references.latents
        if latents is None or latents.shape[1] == 0:
            return None, None
        N, max_subjects = latents.shape[1], self.config["max_subjects"]
        if max_subjects < N and references.slots is None:
            raise ValueError(f"{N} subjects, but the model has {max_subjects} slots. Give {max_subjects} or fewer.")
        pictures = latents.flatten(0, 1).transpose(1, 2)  # (B * N, C, V, H, W)
        rotary_emb = self.rope(pictures)
        tokens = self.subject_patch_embedding(pictures.to(self.subject_patch_embedding.weight.dtype))
        tokens = tokens.flatten(2).transpose(1, 2).unflatten(0, (-1, N))  # (B, N, V * h * w, D)
        tokens = tokens + self.slot_embedding(slots_of(references, N, tokens.device)).unsqueeze(2)
        if self.config["subject_positions"]:
            _, down, across = self.config["patch_size"]
            grid = picture_positions(latents.shape[-2] // down, latents.shape[-1] // across, tokens.shape[-1])
            tokens = tokens + grid.repeat(latents.shape[2], 1).to(tokens)
        return tokens, rotary_emb

    # --- one prediction ---

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        identity: IdentityCache | None = None,
        references: References | None = None,
        frame_indices: Sequence[int] | None = None,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """The velocity at one noise level.

        Args:
            hidden_states: noisy latents (B, C, F, H, W).
            timestep: (B,), 0 clean to 1000 noise; (B, tokens) for models with a time per token.
            encoder_hidden_states: UMT5 states (B, 512, text_dim).
            identity: the subjects, read before by `encode_identity`. With neither this nor `references`: plain Wan.
            references: the subjects, read now, one layer at a time; slower, without the cache's memory. For training.
            frame_indices: which latent frames of a clip these F are, rising; the last one is the clip's last. None: a
                whole clip.

        Source: diffusers' `WanTransformer3DModel.forward`, the same operations in the same order, which is what keeps
        an untrained model equal to Wan bit for bit.
        """
        if identity is not None and references is not None:
            raise ValueError("Give either `identity` (read before) or `references` (to read now), not both.")
        grid = [size // patch for size, patch in zip(hidden_states.shape[2:], self.config["patch_size"], strict=True)]
        rotary_emb = _at_frames(self.rope, hidden_states, frame_indices)
        positions = None
        if self.video_position_embedding is not None:
            positions = _at_frames(self.video_position_embedding, hidden_states, frame_indices)
        hidden_states = self.patch_embedding(hidden_states).flatten(2).transpose(1, 2).contiguous()
        if positions is not None:
            hidden_states = hidden_states + positions

        per_token, time_axis = None, 1
        if timestep.ndim == 2:
            per_token, time_axis = timestep.shape[1], 2
        temb, modulation, text, image = self.condition_embedder(
            timestep.flatten(), encoder_hidden_states, encoder_hidden_states_image, timestep_seq_len=per_token
        )
        modulation = modulation.unflatten(time_axis, (6, -1))
        context = text
        if image is not None:
            context = torch.concat([image, text], dim=1)

        layers = self._identity_layers(identity, references)
        for index, block in enumerate(self.blocks):
            arguments = (hidden_states, context, modulation, rotary_emb)
            if index < self.config["identity_layers"]:
                arguments = (*arguments, next(layers, None))
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, *arguments)
            else:
                hidden_states = block(*arguments)

        output = unpatched(self, hidden_states, temb, grid)
        if not return_dict:
            return (output,)
        return Transformer2DModelOutput(sample=output)

    def _identity_layers(
        self, identity: IdentityCache | None, references: References | None
    ) -> Iterator[LayerIdentity]:
        """What the blocks read about the subjects, kept or read now; nothing where there are none."""
        if identity is not None:
            return iter(identity.layers)
        if references is None:
            return iter(())
        tower = self._tower(references)
        if tower is None:
            return iter(())
        return self._run_tower(tower)


def _at_frames(table: nn.Module, latents: Tensor, frame_indices: Sequence[int] | None) -> Any:
    """What a table of positions says of latents (B, C, F, H, W): of a whole clip, or of these frames of a longer one.

    A table gives a tensor, or several, with all tokens along its second dimension.
    """
    if frame_indices is None:
        return table(latents)
    frames = frame_indices[-1] + 1
    whole = table(latents[:, :, :1].expand(-1, -1, frames, -1, -1))
    chosen = torch.tensor(frame_indices, device=latents.device)

    def choose(positions: Tensor) -> Tensor:
        return positions.unflatten(1, (frames, -1))[:, chosen].flatten(1, 2)

    if isinstance(whole, tuple):
        return tuple(choose(each) for each in whole)
    return choose(whole)


def unpatched(transformer: WanTransformer3DModel, hidden_states: Tensor, temb: Tensor, grid: Sequence[int]) -> Tensor:
    """Wan's last norm and projection, and the first tokens, those of the clip, back to latents (B, C, F, H, W).

    Args:
        hidden_states: (B, tokens, D); what lies behind the clip's tokens is dropped.
        temb: the time's embedding, (B, D), or (B, tokens, D) for a time per token.
        grid: patches of the clip along frames, height and width.
    """
    if temb.ndim == 3:
        table = transformer.scale_shift_table.unsqueeze(0).to(temb.device)
        shift, scale = (part.squeeze(2) for part in (table + temb.unsqueeze(2)).chunk(2, dim=2))
    else:
        shift, scale = (transformer.scale_shift_table.to(temb.device) + temb.unsqueeze(1)).chunk(2, dim=1)
    shift, scale = shift.to(hidden_states.device), scale.to(hidden_states.device)
    hidden_states = (transformer.norm_out(hidden_states.float()) * (1 + scale) + shift).type_as(hidden_states)
    # Dropped behind the projection: there the cards that share a clip have put their parts together.
    patches = transformer.proj_out(hidden_states)[:, : math.prod(grid)]
    patches = patches.unflatten(2, (*transformer.config["patch_size"], -1)).unflatten(1, grid)
    return patches.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)


@torch.no_grad()
def _start_as_copy(subjects: nn.Conv3d, video: nn.Conv3d, zoom: int) -> None:
    """A picture's patch embedding that sees what Wan's would see in the picture made `zoom` times smaller."""
    weight = video.weight.repeat_interleave(zoom, -1).repeat_interleave(zoom, -2) / zoom**2
    subjects.weight.copy_(weight)
    assert subjects.bias is not None and video.bias is not None
    subjects.bias.copy_(video.bias)


def _start_as_matched_filter(video: IdentityAttention, subjects: SubjectBlock) -> None:
    """Stage 3 of a layer that adds nothing yet, and already looks where a picture resembles the video.

    Query and key are one projection and both patch embeddings are alike, so a token's score is its likeness to each
    subject token. From projections of their own, attention within a subject was still even after 700 updates.
    """
    assert subjects.to_k is not None and subjects.norm_k is not None
    nn.init.zeros_(video.to_out.weight)
    nn.init.orthogonal_(subjects.to_k.weight)
    video.to_q.load_state_dict(subjects.to_k.state_dict())
    for norm in (video.norm_q, subjects.norm_k):  # a token that meets itself scores MATCH in every head
        nn.init.constant_(norm.weight, (MATCH / (norm.weight.numel() // video.heads) ** 0.5) ** 0.5)


# --- which parameters are whose --------------------------------------------------------------------------------------


def is_identity_key(name: str) -> bool:
    """Whether a parameter or module of that name belongs to the identity blocks, not to plain Wan."""
    own = (
        "subject_blocks.",
        "subject_patch_embedding.",
        "slot_embedding.",
        "vlm_projector.",
        "video_position_embedding.",
    )
    return name.startswith(own) or ".identity." in name


def parameter_counts(model: WanTransformer3DModel) -> dict[str, int]:
    """How many parameters belong to what: base, attention (with gates), norms, patches, slots, vlm."""
    counts: dict[str, int] = dict.fromkeys(("base", "attention", "norms", "patches", "slots", "vlm"), 0)
    groups = {"subject_patch_embedding": "patches", "slot_embedding": "slots", "vlm_projector": "vlm"}
    groups["video_position_embedding"] = "patches"
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if not is_identity_key(name):
            group = "base"
        elif ".slot_key." in name:
            group = "slots"
        elif parts[0] in groups:
            group = groups[parts[0]]
        elif "norm" in parts[-2]:
            group = "norms"
        else:
            group = "attention"
        counts[group] += parameter.numel()
    return counts
