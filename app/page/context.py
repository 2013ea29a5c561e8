"""What the tabs of one page share: the queue, the clips, the saved subjects, and the folders they live in.

In:  `Settings`.
Out: a `Studio`, made once per server.
Knows nothing of Gradio and of torch.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from app.library.downloads import Pulls
from app.library.subjects import Subjects
from app.page.generate_form import Cast, Form, Slot
from app.queue import Queue
from app.settings import Settings
from engine import lora_files, presets
from engine.document import cached
from engine.job import GenerateJob, Picture
from engine.media import pictures
from engine.messages import StudioError
from engine.paths import ROOT

ASSETS = ROOT / "assets"
SAMPLES = ASSETS / "samples"
SANITY_JOB = ASSETS / "sanity.json"  # a fixed job; the clip it should give lies beside it
FIRST = ("fox", "kite")  # who a newcomer meets
SHOWN = 256  # pixels of a prepared picture as the page shows it


@dataclass(frozen=True)
class Studio:
    """One studio: its settings and the stores that every tab reads and writes."""

    settings: Settings
    queue: Queue
    subjects: Subjects = field(init=False)
    pulls: Pulls = field(default_factory=Pulls)

    def __post_init__(self) -> None:
        object.__setattr__(self, "subjects", Subjects(self.settings.data / "subjects"))

    @classmethod
    def of(cls, settings: Settings) -> Studio:
        """The studio of these settings; its folders are made when they are first needed."""
        return cls(settings, Queue(settings.data / "queue.db"))

    def keep_upload(self, path: Path) -> Picture:
        """Copy an uploaded picture to where it stays, named by its content.

        Raises:
            StudioError: it is no picture that can be read, or the folder cannot be written; field "subjects".
        """
        pictures.read(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        kept = self.settings.data / "uploads" / f"{digest[:24]}{path.suffix.lower()}"
        if not kept.exists():
            try:
                kept.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, kept)
            except OSError as error:
                raise StudioError(
                    "The picture could not be kept.",
                    f"Its folder cannot be written ({error.strerror}).",
                    "Free some disk, or choose another folder with --outputs.",
                    field="subjects",
                ) from error
        return Picture(path=str(kept), sha256=digest)

    def own(self, job: GenerateJob) -> GenerateJob:
        """The job with only pictures from this studio's own folders, the rest by the pixels that ride along, and LoRAs
        by their names.

        For documents from elsewhere (a dropped clip, another machine's caller): their paths are strangers' words.

        Raises:
            StudioError: a picture lies elsewhere and brought no pixels; field "subjects".
        """
        return lora_files.drop_foreign_paths(
            pictures.drop_foreign_paths(job, [self.settings.data, self.settings.outputs, SAMPLES])
        )


def prepared(picture: Picture, *, role: str = "object", cut_out: bool = True) -> np.ndarray:
    """The picture as the model will see it, only larger: uint8 (256, 256, 3), on white.

    Raises:
        StudioError: the picture cannot be read.
    """
    return _prepared(picture, role == "background", cut_out)


@cached(maxsize=64)  # cutting out takes a good part of a second, and the page repaints often
def _prepared(picture: Picture, background: bool, cut_out: bool) -> np.ndarray:
    return pictures.prepare(picture, size=SHOWN, cut_out=cut_out and not background, background=background)


def samples() -> list[Path]:
    """The sample pictures that ship, by name."""
    return sorted(SAMPLES.glob("*.png"))


def sample_slot(path: Path) -> Slot:
    """A slot with a sample's picture, named after its file."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Slot(name=path.stem, pictures=(Picture(path=str(path), sha256=digest),), noun=path.stem.replace("_", " "))


def first_example() -> tuple[Form, Cast]:
    """What a newcomer meets: two samples and a prompt that mentions both, ready to press the button."""
    form = Form.fresh(presets.load(presets.names()[0]))
    cast = Cast()
    known = sorted(samples(), key=lambda path: path.stem not in FIRST)
    for path in known[:2]:
        cast = cast.add(sample_slot(path), most=2)
    names = cast.names()
    prompt = f"@{names[0]} chases @{names[1]} on a beach" if len(names) == 2 else ""
    return replace(form, prompt=prompt), cast.choose(-1)
