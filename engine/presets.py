"""Presets: data that says which model, which files, which defaults, and what fits.

In:  presets/<name>.json of the repository and of the creator's own models.
Out: a frozen `Preset`, and where its parts lie. `engine.resolve` fills jobs in from it.
Knows nothing of torch; a preset is data, never code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from engine import paths
from engine.document import Document, explain_validation_error
from engine.hub.cache import Hub
from engine.job import Sampling, rename_sampling_words
from engine.messages import StudioError

OPTIONAL = ("faces", "detector", "detector_tokenizer", "segmenter", "embedder")  # a clip is made without them, too
PRESETS = paths.ROOT / "presets"


class Size(Document):
    """One size the model was trained at."""

    width: int = Field(ge=16, le=4096)
    """Pixels across."""
    height: int = Field(ge=16, le=4096)
    """Pixels down."""


class HubFiles(Document):
    """A part as it lies on the Hub: one file of a repository, or one of its folders."""

    repo: str
    """owner/name"""
    path: str = ""
    """The file, or the folder inside the repository; empty for all of it. Of a `.pth` safetensors are made."""
    revision: str = "main"
    """Branch, tag or commit."""
    num_bytes: int = Field(ge=0)
    """What has to be fetched, as its page says; the Hub's own figure replaces it before anything is fetched."""
    licence: str = ""
    """Licence of these files; empty where nobody has named one."""
    xet: bool = False
    """These bytes are kept in the Hub's Xet store alone, which only the library speaks to."""
    alternatives: tuple[HubFiles, ...] = ()
    """Other files that serve as well: the first of them that is here is used where these are not; none is fetched."""

    @property
    def link(self) -> str:
        """Where a person can read about them."""
        return f"https://huggingface.co/{self.repo}"


Place = str | HubFiles | tuple[HubFiles, ...]


class Components(Document):
    """The model's parts: folders in diffusers' and transformers' layout, relative to the repository or to the folder
    of models, or files on the Hub. A transformer and a text encoder may also be one file, in Wan's own layout or GGUF.
    A part whose files lie in several repositories is gathered in one folder of the models."""

    transformer: Place
    """WanTransformer3DModel, with identity blocks where the preset has them."""
    distill: Place = ""
    """A LoRA of few steps, merged into the transformer before it is quantized: what makes a preset quick."""
    vae: Place
    """AutoencoderKLWan."""
    text_encoder: Place
    """UMT5EncoderModel, in one of the layouts of `engine.models.umt5`."""
    tokenizer: Place
    """Tokenizer of the text encoder."""
    vlm: Place = ""
    """Qwen2_5_VLForConditionalGeneration, or empty when the preset has none."""
    vlm_tokenizer: Place = ""
    """Tokenizer of the VLM."""
    judges: Place = ""
    """Judges of drawings for the identity report (`engine.identity.toybox`); empty for pictures of the real world."""
    faces: Place = ""
    """YuNet's and SFace's ONNX files: people are judged by their faces where this folder is there."""
    detector: Place = ""
    """GroundingDinoForObjectDetection; whoever is not known by a face is found by their noun, cut out and compared."""
    detector_tokenizer: Place = ""
    """Its tokenizer; as published it lies in the same folder."""
    segmenter: Place = ""
    """Sam2Model, which cuts out what was found."""
    embedder: Place = ""
    """Dinov2Model, which compares cut-outs with pictures."""


class Shape(Document):
    """Sizes of the transformer and of the latents it sees, so that a plan of memory needs no files."""

    dim: int = Field(ge=1)
    """Width."""
    num_layers: int = Field(ge=1)
    """Blocks."""
    ffn_dim: int = Field(ge=1)
    """Width inside a block's feed-forward part."""
    num_heads: int = Field(ge=1)
    """Attention heads."""
    text_dim: int = Field(ge=1)
    """Width of the text encoder's states."""
    freq_dim: int = Field(ge=1)
    """Numbers that tell the time."""
    in_channels: int = Field(ge=1)
    """Latent channels it reads."""
    out_channels: int = Field(ge=1)
    """Latent channels it predicts."""
    patch: tuple[int, int, int]
    """Latent frames, rows and columns that make one token."""
    vace_layers: int = Field(default=0, ge=0)
    """Blocks of VACE's side branch."""
    identity_layers: int = Field(default=0, ge=0)
    """Blocks that carry identity attention."""
    vlm_dim: int = Field(default=0, ge=0)
    """Width of the VLM's states that identity blocks read; 0 without."""
    vae_spatial: int = Field(default=8, ge=1)
    """Pixels across and down that make one latent pixel."""
    z_dim: int = Field(default=16, ge=1)
    """Channels of the VAE's latents."""


class Cost(Document):
    """What one clip costs on one machine; corrected by this machine's own runs."""

    on: str = "two CPU cores"
    """Which machine the seconds are of."""

    step_s: float = Field(gt=0)
    """One denoising step at the preset's own size and guidance."""
    start_s: float = Field(ge=0)
    """Loading and encoding, cold."""
    decode_s: float = Field(ge=0)
    """Decoding and saving at the preset's own size."""


class StepCacheMode(Document):
    """How one word of `Sampling.step_cache` leaves out steps, and what that was measured to do."""

    tolerance: float = Field(gt=0, le=10)
    """Relative error that a row of left-out steps may gather, by the model's own latest answer."""
    share: float = Field(gt=0, le=1)
    """Share of the preset's own steps that are still computed."""
    costs: str
    """What is lost, in a few words for the page."""


class StepCacheModes(Document):
    """The two ways of leaving out steps."""

    careful: StepCacheMode = StepCacheMode(tolerance=0.06, share=0.55, costs="not measured on this model")
    """Few enough that a clip keeps its look."""
    fast: StepCacheMode = StepCacheMode(tolerance=0.3, share=0.4, costs="not measured on this model")
    """As many as a clip bears."""


class Preset(Document):
    """A model a creator can pick."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")
    """Its file's name, and what a job writes."""
    title: str
    """What the page shows."""
    about: str
    """One honest sentence on what it is and what to expect."""
    licence: str
    """Licence of the weights."""
    source: str
    """Where the weights come from."""
    components: Components
    """The parts."""
    conditioning: Literal["identity", "identity+frames", "frames", "sources", "side", "none"] = "identity"
    """How subjects enter: by identity blocks, as frames behind the clip (Phantom, RefAlign), by both, as sources beside
    it (Bernini), by VACE's side branch."""
    mention: Literal["slot", "noun", "image"] = "slot"
    """How @fox is written for the model: "subject 2, a fox", the noun phrase itself, or "the fox from image1"."""
    max_subjects: int = Field(ge=0, le=8)
    """Most subjects at once."""
    reference_size: int = Field(ge=16, le=2048)
    """Longest side of a prepared reference picture, in pixels; pictures become squares."""
    sizes: tuple[Size, ...] = Field(min_length=1)
    """Sizes it was trained at, its own default first."""
    size_multiple: int = Field(ge=1)
    """Width and height are multiples of this."""
    frames_per_latent: int = Field(default=4, ge=1)
    """How many frames the VAE puts into one latent frame after the first; 4 for Wan's."""
    num_frames: int = Field(ge=1)
    """Default length."""
    max_frames: int = Field(ge=1)
    """Longest clip that is sensible."""
    fps: int = Field(ge=1, le=120)
    """Frames a second."""
    display_scale: int = Field(default=1, ge=1, le=16)
    """Each pixel is written this many times across and down; metrics use native frames."""
    shared_noise: float = Field(default=0.0, ge=0, le=1)
    """Share of the starting noise that all frames have in common, as the model was trained; 0 for Wan."""
    negative_prompt: str = ""
    """What a clip should not show."""
    sampling: Sampling
    """Its own defaults, every field that its guidance needs filled in."""
    step_cache: StepCacheModes = StepCacheModes()
    """What `Sampling.step_cache` means here."""
    draft_steps: int = Field(ge=1, le=100)
    """Steps of a quick draft; "finish this one" takes the full number with the same seed."""
    cost: Cost
    """What a clip costs."""
    shape: Shape | None = None
    """Sizes of the model; None where nobody has written them down."""

    def has(self, part: str) -> bool:
        """Whether one of the `components` is named and there."""
        named: Place = getattr(self.components, part)
        if isinstance(named, str) and part in OPTIONAL:
            return bool(named) and self.place(part).exists()  # put there by a person: who is damaged shall say so
        return bool(named) and is_whole(self.place(part), weights=not part.endswith("tokenizer"))

    def place(self, part: str) -> Path:
        """Where one of the `components` lies, or would lie: in the repository, in the creator's own folder of models,
        or in the Hub's cache. A folder, or a single file."""
        named = self._named(part)
        if isinstance(named, HubFiles):
            return _cache_path(named)
        if isinstance(named, tuple):
            return paths.models_dir() / "gathered" / part
        found = (root / named for root in (paths.ROOT, paths.models_dir()) if (root / named).exists())
        return next(found, paths.ROOT / named)

    def downloads(self, *, optional: bool = True, every: bool = False) -> dict[str, tuple[HubFiles, ...]]:
        """What of this preset lies on the Hub, by the name of the part.

        Args:
            optional: also the parts that a clip is made without, too.
            every: also what serves as well as that, whether it is here or not.
        """
        parts: dict[str, tuple[HubFiles, ...]] = {}
        for part in Components.model_fields:
            named = self._named(part)
            if every:
                named = getattr(self.components, part)
            if isinstance(named, str) or (part in OPTIONAL and not optional):
                continue
            if isinstance(named, tuple):
                parts[part] = named
            elif every:
                parts[part] = (named, *named.alternatives)
            else:
                parts[part] = (named,)
        return parts

    def _named(self, part: str) -> Place:
        """One of the `components`: of its alternatives the one that is here."""
        named: Place = getattr(self.components, part)
        if not isinstance(named, HubFiles) or not named.alternatives:
            return named
        weights = not part.endswith("tokenizer")
        here = (each for each in (named, *named.alternatives) if is_whole(_cache_path(each), weights=weights))
        return next(here, named)


def _cache_path(files: HubFiles) -> Path:
    """Where such files lie in the Hub's cache, or would lie."""
    return Hub().place(files.repo, files.path, files.revision)


def own_presets_dir() -> Path:
    """Where presets lie that a creator has added."""
    return paths.models_dir() / "presets"


def names() -> list[str]:
    """Every preset there is: toybox first, then the repository's, then the creator's own."""
    shipped = sorted((path.stem for path in PRESETS.glob("*.json")), key=lambda name: (name != "toybox", name))
    return shipped + sorted(path.stem for path in own_presets_dir().glob("*.json") if path.stem not in shipped)


def load(name: str) -> Preset:
    """The preset of that name.

    Raises:
        StudioError: no such preset, or its file does not hold together.
    """
    path = next((p for folder in (PRESETS, own_presets_dir()) if (p := folder / f"{name}.json").is_file()), None)
    if name not in names() or path is None:
        raise StudioError(
            what=f"There is no preset called {name!r}.",
            why=f"This studio has {', '.join(names())}.",
            next_step="Choose one of those.",
            field="preset",
        )
    try:
        preset = parse_preset(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        reason = explain_validation_error(error)
        raise StudioError(
            what=f"The preset {name} cannot be read.",
            why=f"{reason.what} {reason.why}",
            next_step=f"Mend {path.parent.name}/{name}.json.",
            field="preset",
        ) from None
    if preset.name != name:
        raise StudioError(
            what=f"The preset {name} cannot be read.",
            why=f"Its file calls it {preset.name}.",
            next_step=f"Mend {path.parent.name}/{name}.json.",
            field="preset",
        )
    return preset


def parse_preset(text: str) -> Preset:
    """A preset from its file's text. A creator's own preset may have been written before version 4 of documents.

    Raises:
        ValidationError: the text is not JSON, or not a preset.
    """
    try:
        values = json.loads(text)
    except ValueError:
        return Preset.model_validate_json(text)  # raises, and says where the text stops being JSON
    if not isinstance(values, dict):
        return Preset.model_validate(values)
    if "caching" in values:
        values["step_cache"] = values.pop("caching")
    sampling = values.get("sampling")
    if isinstance(sampling, dict):
        values["sampling"] = rename_sampling_words(sampling)
    return Preset.model_validate(values)


def find(name: str) -> Preset | None:
    """The preset of that name; None where there is none, or its file does not hold together, as `load` would say."""
    try:
        return load(name)
    except StudioError:
        return None


def list_readable() -> list[Preset]:
    """Every preset whose file holds together: one that does not must not take the others along."""
    return [preset for name in names() if (preset := find(name)) is not None]


def check_files(preset: Preset) -> None:
    """Refuse a preset whose files are not there.

    Raises:
        StudioError: naming the first part that is missing.
    """
    for part in Components.model_fields:
        named: Place = getattr(preset.components, part)
        if not named or part in OPTIONAL or preset.has(part):
            continue
        if not isinstance(named, str):
            first = named if isinstance(named, HubFiles) else named[0]
            raise StudioError(
                what=f"The files of {preset.title} are not all here: {first.repo}/{first.path} is missing.",
                why=f"Its {part.replace('_', ' ')} has not been fetched yet.",
                next_step=f"Fetch them under Models, or with `python launch.py models pull {preset.name}`.",
                field="preset",
            )
        raise StudioError(
            what=f"The preset {preset.name} names {named}, which is not there.",
            why=f"Its {part.replace('_', ' ')} has not been put into place.",
            next_step=f"Choose another preset, or put a checkpoint of yours into {paths.models_dir() / named}.",
            field="preset",
        )


def is_whole(place: Path, *, weights: bool = True) -> bool:
    """Whether a part is there: a file, or a folder with all the shards that its index names. Opens no weights.

    Args:
        weights: a folder without any is not whole; other programs fetch a model's config alone.
    """
    if place.is_file():
        return True
    try:
        shards: set[str] = set()
        for index in place.glob("*.safetensors.index.json"):
            listing = json.loads(index.read_text(encoding="utf-8"))
            shards.update(listing["weight_map"].values())
    except (ValueError, KeyError, AttributeError):  # not a valid index
        return False
    suffixes = (".safetensors", ".gguf", ".onnx")
    if not weights:
        suffixes = (".json", ".model", ".txt")
    found = any(path.suffix in suffixes for path in place.glob("*"))
    return found and all((place / str(shard)).is_file() for shard in shards)
