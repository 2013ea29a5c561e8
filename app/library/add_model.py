"""A repository of the creator's own on the Hub, made a preset: diffusers layout, safetensors only.

In:  a repository's id, and what its own configs say.
Out: a preset file among the creator's models, which `engine.presets` then reads like any other.
Knows nothing of the page, of the command line, or of torch; nothing of the repository is run.
"""

from __future__ import annotations

import json
import re
from typing import Any

from app.library.models import NO_LICENCE, no_licence
from engine import presets
from engine.hub.cache import FileRequest, Hub
from engine.messages import StudioError
from engine.presets import Components, HubFiles, Preset, Shape

# How subjects enter, by the class that a transformer's config names.
KINDS = {
    "IdentityWanTransformer3DModel": "identity",
    "WanTransformer3DModel": "none",
    "WanVACETransformer3DModel": "side",
}
LIKE = {"identity": "id-crafter-1.3b", "none": "wan-1.3b", "side": "vace-1.3b", "frames": "phantom-1.3b"}
PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "vlm", "vlm_tokenizer")


def add(repo: str, hub: Hub, *, like: str = "", accept_no_licence: bool = False) -> Preset:
    """Write a preset for a repository, pinned to the commit it is at.

    Args:
        repo: owner/name.
        like: whose defaults and missing parts it takes; left out, the preset whose model has the same sizes. A plain
            Wan that was tuned like Phantom cannot be told from its files: name "phantom-1.3b".

    Raises:
        StudioError: no such repository, no licence, not in diffusers' layout, or no safetensors.
    """
    licence, commit = hub.licence(repo)
    if not licence and not accept_no_licence:
        raise no_licence(repo)
    held = hub.expand(repo, "", commit)
    parts = {}
    for part in PARTS:
        if _files_of(held, part):
            parts[part] = HubFiles(
                repo=repo,
                path=part,
                revision=commit,
                num_bytes=_size(hub, held, part),
                licence=licence or NO_LICENCE,
            )
    config = _config(hub, FileRequest(repo, "transformer/config.json", commit), held)
    if not any(each.path.startswith("transformer/") and each.path.endswith(".safetensors") for each in held):
        raise _unfit(repo, "Its transformer is in no safetensors file.")
    kind = KINDS.get(str(config.get("_class_name")))
    if kind is None:
        raise _unfit(repo, f"Its transformer is a {config.get('_class_name')}, not one of {', '.join(KINDS)}.")
    base = presets.load(like) if like else _nearest(kind, _shape(config, repo, None))
    components = base.components.model_copy(update=parts)
    preset = base.model_copy(
        update={
            "name": _name(repo),
            "title": repo.rpartition("/")[2],
            "about": f"{repo}, added by you; its defaults are those of {base.title}.",
            "licence": licence or NO_LICENCE,
            "source": f"https://huggingface.co/{repo}",
            "components": Components.model_validate(components.model_dump()),
            "conditioning": base.conditioning if like else kind,
            "shape": _shape(config, repo, base.shape),
        }
    )
    _write(Preset.model_validate(preset.model_dump()), repo)
    return presets.load(preset.name)


def _files_of(held: tuple[FileRequest, ...], part: str) -> list[FileRequest]:
    return [each for each in held if each.path.startswith(part + "/")]


def _size(hub: Hub, held: tuple[FileRequest, ...], part: str) -> int:
    planned = hub.plan(_files_of(held, part))
    return sum(found.size for found in planned.files)


def _config(hub: Hub, wanted: FileRequest, held: tuple[FileRequest, ...]) -> dict[str, Any]:
    if wanted not in held:
        raise _unfit(wanted.repo, "It has no transformer/config.json.")
    try:
        config = json.loads(hub.read(wanted))
    except ValueError:
        raise _unfit(wanted.repo, "Its transformer/config.json cannot be read.") from None
    if not isinstance(config, dict):
        raise _unfit(wanted.repo, "Its transformer/config.json holds no settings.")
    return config


def _shape(config: dict[str, Any], repo: str, base: Shape | None) -> Shape:
    """The sizes that a transformer's config tells; the VAE's are those of the preset it is like."""
    try:
        return Shape(
            dim=config["num_attention_heads"] * config["attention_head_dim"],
            num_layers=config["num_layers"],
            ffn_dim=config["ffn_dim"],
            num_heads=config["num_attention_heads"],
            text_dim=config["text_dim"],
            freq_dim=config["freq_dim"],
            in_channels=config["in_channels"],
            out_channels=config["out_channels"],
            patch=tuple(config["patch_size"]),
            vace_layers=len(config.get("vace_layers") or ()),
            identity_layers=config.get("identity_layers") or 0,
            vlm_dim=(config.get("vlm_dim") or 0) if config.get("identity_layers") else 0,
            vae_spatial=base.vae_spatial if base else 8,
            z_dim=base.z_dim if base else config["in_channels"],
        )
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else "a value is not as it should be"
        raise _unfit(repo, f"Its transformer/config.json does not fit a Wan model: {reason}.") from None


def _nearest(kind: str, shape: Shape) -> Preset:
    """The preset whose model has these sizes and takes subjects in this way, or the small one of its kind."""
    alike = [
        preset
        for preset in presets.list_readable()
        if preset.shape and preset.conditioning == kind and (preset.shape.dim, preset.shape.num_layers) ==
        (shape.dim, shape.num_layers)
    ]  # fmt: skip
    return alike[0] if alike else presets.load(LIKE[kind])


def _name(repo: str) -> str:
    """A preset's name from a repository's id."""
    return re.sub(r"[^a-z0-9._-]+", "-", repo.lower().replace("/", "-")).strip("-._")[:64]


def _write(preset: Preset, repo: str) -> None:
    taken = presets.load(preset.name) if preset.name in presets.names() else None
    if taken is not None and taken.source != preset.source:
        raise StudioError(
            f"There already is a preset called {preset.name}.",
            f"It is {taken.title}, from {taken.source}.",
            f"Rename {repo} on the Hub, or take that preset away first.",
            field="repository",
        )
    folder = presets.own_presets_dir()
    folder.mkdir(parents=True, exist_ok=True)
    fresh = folder / f"{preset.name}.new"
    fresh.write_text(preset.model_dump_json(indent=2) + "\n", encoding="utf-8")
    fresh.replace(folder / f"{preset.name}.json")


def _unfit(repo: str, reason: str) -> StudioError:
    return StudioError(
        f"{repo} cannot be added.",
        reason,
        "A repository in diffusers' layout has transformer/config.json and safetensors beside it.",
        field="repository",
    )
