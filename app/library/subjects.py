"""Saved subjects: a creator's own cast, by name, shared by every tab.

In:  a subject with its pictures.
Out: the same subject, later, on any tab.
Knows nothing of Gradio or of torch.

One folder per subject: `<data>/subjects/<name>/{subject.json, 1.png, ...}`. A saved subject stands on its own, so the
files it came from may go.
"""

from __future__ import annotations

import base64
import hashlib
import io
import shutil
from pathlib import Path

from pydantic import ValidationError

from engine.document import explain_validation_error
from engine.job import NAME, Picture, Subject
from engine.media import pictures
from engine.messages import StudioError

LONGEST = 1536  # pixels of a kept picture: four times what the largest preset reads, and a few hundred kB


class Subjects:
    """The saved subjects in one folder. Cheap to construct; nothing is written before the first save."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def names(self) -> list[str]:
        """Every saved subject, by alphabet."""
        return sorted(path.parent.name for path in self.folder.glob("*/subject.json"))

    def save(self, subject: Subject) -> None:
        """Keep a subject under its name; one of the same name is replaced.

        Raises:
            StudioError: a picture cannot be read, or the folder cannot be written.
        """
        read = [_pixels(picture) for picture in subject.pictures]
        home = self.folder / subject.name
        try:
            home.mkdir(parents=True, exist_ok=True)
            kept = []
            for number, data in enumerate(read, start=1):
                (home / f"{number}.png").write_bytes(data)
                kept.append(Picture(path=f"{number}.png", sha256=hashlib.sha256(data).hexdigest()))
            text = subject.model_copy(update={"pictures": tuple(kept)}).model_dump_json(indent=2)
            (home / "subject.json").write_text(text, encoding="utf-8")
        except OSError as error:
            raise StudioError(
                f"@{subject.name} could not be saved.",
                f"Its folder cannot be written ({error.strerror}).",
                "Free some disk, or choose another folder with --outputs.",
                field="subjects",
            ) from error

    def load(self, name: str) -> Subject:
        """A saved subject, its pictures as files on this machine.

        Raises:
            StudioError: there is none of that name, or its file does not hold together.
        """
        home = self._home(name)
        try:
            subject = Subject.model_validate_json((home / "subject.json").read_text(encoding="utf-8"))
        except ValidationError as error:
            reason = explain_validation_error(error)
            raise StudioError(
                f"The saved subject @{name} cannot be read.",
                f"{reason.what} {reason.why}",
                "Delete it and save it again.",
                field="subjects",
            ) from None
        except OSError:
            raise StudioError(
                f"There is no saved subject called @{name}.",
                "It may have been deleted in another window.",
                "Choose one of the others.",
                field="subjects",
            ) from None
        # Only the file's name counts: a subject.json from elsewhere cannot point outside its own folder.
        found = [
            picture.model_copy(update={"path": str(home / Path(picture.path).name)}) for picture in subject.pictures
        ]
        return subject.model_copy(update={"pictures": tuple(found)})

    def delete(self, name: str) -> None:
        """Forget a saved subject; jobs that were made with it keep their own pictures."""
        home = self._home(name)
        if home.is_dir():
            shutil.rmtree(home)

    def _home(self, name: str) -> Path:
        if not NAME.fullmatch(name):
            raise StudioError(
                f"{name[:40]!r} is no subject's name.", "It cannot be mentioned.", "Choose one of the list."
            )
        return self.folder / name


def _pixels(picture: Picture) -> bytes:
    """The picture as PNG bytes: upright, at most `LONGEST` pixels across or down."""
    if picture.png and not Path(picture.path or "-").is_file():
        return base64.b64decode(picture.png)
    image = pictures.read(Path(picture.path))
    image.thumbnail((LONGEST, LONGEST))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
