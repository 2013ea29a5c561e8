"""The cast of the Generate tab: subjects as named tiles, a picker for new ones, an editor for the chosen one.

In:  the studio's samples and saved subjects, pictures that a creator brings.
Out: a `Cast` in `panel.cast`, which Generate turns into the subjects of a job.
Knows nothing of the prompt's wording, of sampling, or of the queue.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from app.page import markup
from app.page.context import Studio, prepared, sample_slot, samples
from app.page.generate_form import MAX_PICTURES, Cast, Slot, renamed
from app.page.tabs.wiring import CLICKS, Updates, Values, quiet
from engine import presets
from engine.job import NAME, Subject
from engine.messages import StudioError

ROLES = [("Thing", "object"), ("Person", "person"), ("Background", "background")]
GLYPHS = {"person": "person", "object": "thing", "background": "background"}


@dataclass(frozen=True)
class CastPanel:
    """The components of the cast; `cast` holds the truth, the rest shows it."""

    cast: gr.State
    strip: gr.HTML
    refused: gr.HTML
    picker: gr.Column
    choices: gr.HTML
    upload: gr.File
    editor: gr.Column
    preview: gr.HTML
    name: gr.Textbox
    noun: gr.Textbox
    role: gr.Radio
    weight: gr.Slider
    cut_out: gr.Checkbox
    more: gr.UploadButton
    save: gr.Button
    remove: gr.Button
    done: gr.Button
    chips: gr.HTML

    @property
    def fields(self) -> set[Any]:
        """What `edited` reads."""
        return {self.cast, self.name, self.noun, self.role, self.weight, self.cut_out}

    @property
    def shown(self) -> list[Any]:
        """What `paint` changes."""
        above = [self.strip, self.chips, self.refused, self.picker, self.choices]
        return [*above, self.editor, self.preview, *self.fields, self.more]


# --- layout ----------------------------------------------------------------------------------------------------------


def layout() -> CastPanel:
    """Tiles on top; picker and editor open below them, one at a time."""
    cast = gr.State(Cast())
    strip = gr.HTML(tiles(Cast(), 1), js_on_load=CLICKS, elem_id="cast", apply_default_css=False)
    refused = gr.HTML("", elem_classes="beside", apply_default_css=False)
    with gr.Column(visible=False, elem_id="picker", elem_classes="drawer") as picker:
        choices = gr.HTML("", js_on_load=CLICKS, elem_id="choices", apply_default_css=False)
        upload = gr.File(
            label="Drop one to three pictures of a new subject here",
            file_count="multiple",
            file_types=["image"],
            height=96,
            elem_id="new-pictures",
        )
    with gr.Column(visible=False, elem_id="editor", elem_classes="drawer") as editor:
        with gr.Row(equal_height=False):
            with gr.Column(scale=0, min_width=176):
                preview = gr.HTML("", js_on_load=CLICKS, elem_id="cutout", apply_default_css=False)
                more = gr.UploadButton("Add a picture", file_types=["image"], size="sm", elem_id="more-pictures")
            with gr.Column(scale=1, min_width=200):
                with gr.Row():
                    name = gr.Textbox(label="Name", max_lines=1, min_width=90, elem_id="subject-name")
                    noun = gr.Textbox(label="What it is", max_lines=1, min_width=90, placeholder="red fox")
                role = gr.Radio(ROLES, value="object", label="Role", elem_id="role")
                weight = gr.Slider(0, 2, value=1, step=0.05, label="Weight", buttons=[])
                cut_out = gr.Checkbox(label="Cut out of its picture", value=True)
        with gr.Row(elem_classes="tools"):
            save = gr.Button("Save subject", size="sm", min_width=80)
            remove = gr.Button("Remove", size="sm", min_width=80, elem_id="remove-subject")
            done = gr.Button("Done", size="sm", min_width=80, elem_id="editor-done")
    chips = gr.HTML("", elem_id="chips", apply_default_css=False)
    return CastPanel(
        cast, strip, refused, picker, choices, upload, editor, preview, name, noun, role, weight, cut_out,
        more, save, remove, done, chips,
    )  # fmt: skip


# --- what it shows ---------------------------------------------------------------------------------------------------


def tiles(cast: Cast, most: int) -> str:
    """One tile per subject, and a last one to add another while there is room."""
    shown = [_tile(place, slot, chosen=place == cast.chosen) for place, slot in enumerate(cast.slots)]
    if len(cast.slots) < most:
        hint = "Add a subject" if cast.slots else "Choose who is in it"
        shown.append(f'<button type="button" class="tile new" data-act="add"><i>+</i><span>{hint}</span></button>')
    return f'<div class="tiles">{"".join(shown)}</div>'


def _tile(place: int, slot: Slot, *, chosen: bool) -> str:
    picture = _shown(slot, 0, side=128)
    image = f'<img alt="" src="{picture}">' if picture else "<i>?</i>"
    return (
        f'<button type="button" class="tile{" chosen" if chosen else ""}"{markup.colour(place)} data-act="choose" '
        f'data-place="{place}" aria-pressed="{str(chosen).lower()}" aria-label="Edit @{escape(slot.name)}">'
        f"{image}<span>@{escape(slot.name)}</span></button>"
    )


def _shown(slot: Slot, place: int, *, side: int) -> str:
    """A slot's picture as the model sees it, or nothing when it cannot be read."""
    if place >= len(slot.pictures):
        return ""
    try:
        pixels = prepared(slot.pictures[place], role=slot.role, cut_out=slot.cut_out)
    except StudioError:
        return ""
    return markup.data_url(pixels, side=side)


def chips(cast: Cast) -> str:
    """Buttons that put each @name into the prompt; studio.js marks the ones that are there."""
    shown = "".join(
        f'<button type="button" class="chip"{markup.colour(place)} data-mention="{escape(slot.name)}">'
        f"@{escape(slot.name)}</button>"
        for place, slot in enumerate(cast.slots)
    )
    return f'<div class="chips">{shown}</div>' if shown else ""


def _preview(cast: Cast) -> str:
    """The chosen subject's pictures large on white, each with a way to drop it."""
    slot = cast.open
    if slot is None:
        return ""
    figures = []
    for place in range(len(slot.pictures)):
        url = _shown(slot, place, side=256)
        image = f'<img alt="@{escape(slot.name)} as the model sees it" src="{url}">' if url else "<i>not readable</i>"
        drop = markup.button("&times;", "drop", kind="tiny", title=f"Remove picture {place + 1}", place=place)
        figures.append(f"<figure>{image}{drop if len(slot.pictures) > 1 else ''}</figure>")
    return f'<div class="pictures p{len(figures)}">{"".join(figures)}</div>'


def _choices(studio: Studio) -> str:
    """Samples that ship, and what this creator saved."""
    parts = []
    saved = [(name, studio.subjects.load(name)) for name in studio.subjects.names()]
    if saved:
        shown = "".join(_saved_choice(name, subject) for name, subject in saved)
        parts.append(f'<h3>Saved</h3><div class="grid">{shown}</div>')
    if samples():
        shown = "".join(_sample_choice(path) for path in samples())
        parts.append(f'<h3>Samples</h3><div class="grid">{shown}</div>')
    return "".join(parts)


def _sample_choice(path: Path) -> str:
    image = f'<img alt="" loading="lazy" src="{markup.file_url(path)}">'
    return markup.button(f"{image}<span>{escape(path.stem)}</span>", "sample", kind="pick", name=path.stem)


def _saved_choice(name: str, subject: Subject) -> str:
    picture = _shown(Slot.of(subject), 0, side=128)
    image = f'<img alt="" src="{picture}">' if picture else "<i>?</i>"
    take = markup.button(f"{image}<span>@{escape(name)}</span>", "saved", kind="pick", name=name)
    drop = markup.button("&times;", "forget", kind="tiny", title=f"Forget the saved subject @{name}", name=name)
    return f'<div class="keep">{take}{drop}</div>'


def paint(
    panel: CastPanel,
    studio: Studio,
    cast: Cast,
    preset: str,
    *,
    picking: bool = False,
    error: StudioError | None = None,
    said: str = "",
) -> Updates:
    """Everything the panel shows for this cast."""
    slot = cast.open or Slot()
    full = len(slot.pictures) >= MAX_PICTURES
    shown: Updates = {
        panel.cast: cast,
        panel.strip: tiles(cast, presets.load(preset).max_subjects),
        panel.chips: chips(cast),
        panel.refused: markup.refusal(error) or markup.note(said),
        panel.picker: gr.Column(visible=picking),
        panel.editor: gr.Column(visible=cast.open is not None and not picking),
        panel.preview: _preview(cast),
        panel.name: slot.name,
        panel.noun: slot.noun,
        panel.role: slot.role,
        panel.weight: slot.weight,
        panel.cut_out: gr.Checkbox(value=slot.cut_out, interactive=slot.role != "background"),
        panel.more: gr.UploadButton(interactive=not full),
    }
    if picking:
        shown[panel.choices] = _choices(studio)
    return shown


# --- handlers --------------------------------------------------------------------------------------------------------


def edited(panel: CastPanel, values: Values) -> Cast:
    """The cast with what the editor's fields hold right now; a field that lost no focus yet counts all the same."""
    cast: Cast = values[panel.cast]
    if cast.open is None:
        return cast
    pictures, role, cut_out = cast.open.pictures, values[panel.role], values[panel.cut_out]
    if (role, cut_out) != (cast.open.role, cast.open.cut_out):
        # Pixels that came with a finished clip show the old cut; where the file is at hand, cut it anew.
        pictures = tuple(picture.model_copy(update={"png": ""}) if picture.path else picture for picture in pictures)
    plain = str(values[panel.name]).strip().removeprefix("@").lower()
    noun, weight = str(values[panel.noun]), values[panel.weight]
    return cast.change(name=plain, noun=noun, role=role, weight=weight, cut_out=cut_out, pictures=pictures)


def checked(cast: Cast) -> Cast:
    """The cast when its open slot has a name that a prompt can say.

    Raises:
        StudioError: it has not, or another subject has the same; field "subjects".
    """
    slot = cast.open
    if slot is not None and not NAME.fullmatch(slot.name):
        raise StudioError(
            f"{slot.name[:40]!r} cannot be a subject's name.",
            "A name starts with a letter and holds up to 24 letters, digits and underscores.",
            "Write a shorter or plainer name.",
            field="subjects",
        )
    if slot is not None and cast.names().count(slot.name) > 1:
        raise StudioError(
            f"Two subjects are called @{slot.name}.",
            "The prompt could not say which of them it means.",
            "Give this one another name.",
            field="subjects",
        )
    return cast


def with_pictures(studio: Studio, cast: Cast, paths: Sequence[str], preset: str) -> Cast:
    """A new subject from uploaded pictures, named after the first file.

    Raises:
        StudioError: too many, or one cannot be read.
    """
    kept = tuple(studio.keep_upload(Path(path)) for path in paths)
    if len(kept) > MAX_PICTURES:
        raise StudioError(
            f"{len(kept)} pictures are too many for one subject.",
            f"A subject has one to {MAX_PICTURES}.",
            "Choose the clearest ones, or add one subject at a time.",
            field="subjects",
        )
    return cast.add(Slot(name=Path(paths[0]).stem, pictures=kept), most=presets.load(preset).max_subjects)


def picked(studio: Studio, cast: Cast, act: str, name: str, preset: str) -> Cast:
    """A new subject from the picker: a sample, or a saved one."""
    most = presets.load(preset).max_subjects
    if act == "saved":
        return cast.add(Slot.of(studio.subjects.load(name)), most=most)
    found = next((path for path in samples() if path.stem == name), None)
    if found is None:
        raise StudioError(
            f"There is no sample {name[:40]!r}.", "It may have been moved.", "Choose another.", field="subjects"
        )
    return cast.add(sample_slot(found), most=most)


# --- wiring ----------------------------------------------------------------------------------------------------------


def wire(panel: CastPanel, studio: Studio, *, preset: gr.Dropdown, prompt: gr.Textbox) -> None:
    """Connect tiles, picker and editor."""
    _wire_strip(panel, studio, preset)
    _wire_picker(panel, studio, preset)
    _wire_fields(panel, studio, preset, prompt)
    _wire_tools(panel, studio, preset)


def _wire_strip(panel: CastPanel, studio: Studio, preset: gr.Dropdown) -> None:
    def pressed(cast: Cast, model: str, evt: gr.EventData) -> Updates:
        if evt.act == "add":
            return paint(panel, studio, cast.choose(-1), model, picking=True)
        place = int(evt.place)
        if place == cast.chosen:
            place = -1
        return paint(panel, studio, cast.choose(place), model)

    panel.strip.click(pressed, [panel.cast, preset], panel.shown, **quiet())


def _wire_picker(panel: CastPanel, studio: Studio, preset: gr.Dropdown) -> None:
    def pick(cast: Cast, model: str, evt: gr.EventData) -> Updates:
        try:
            if evt.act == "forget":
                studio.subjects.delete(evt.name)
                return paint(panel, studio, cast, model, picking=True)
            return paint(panel, studio, picked(studio, cast, evt.act, evt.name, model).choose(-1), model)
        except StudioError as error:
            return paint(panel, studio, cast, model, picking=True, error=error)

    def dropped(cast: Cast, paths: list[str] | None, model: str) -> Updates:
        if not paths:
            return {}
        try:
            shown = paint(panel, studio, with_pictures(studio, cast, paths, model), model)
        except StudioError as error:
            shown = paint(panel, studio, cast, model, picking=True, error=error)
        return {**shown, panel.upload: None}

    panel.choices.click(pick, [panel.cast, preset], panel.shown, **quiet())
    panel.upload.upload(dropped, [panel.cast, panel.upload, preset], [*panel.shown, panel.upload], **quiet())


def _wire_fields(panel: CastPanel, studio: Studio, preset: gr.Dropdown, prompt: gr.Textbox) -> None:
    def changed(values: Values) -> Updates:
        cast, model = values[panel.cast], values[preset]
        if cast.open is None:
            return {}
        new = edited(panel, values)
        try:
            checked(new)
        except StudioError as error:
            return paint(panel, studio, replace(new, chosen=cast.chosen), model, error=error)
        shown = paint(panel, studio, new, model)
        if not values[panel.refused]:
            del shown[panel.refused]  # this answer may come after that of the button which was pressed meanwhile
        if new.open is not None and new.open.name != cast.open.name:
            shown[prompt] = renamed(values[prompt], cast.open.name, new.open.name)
        return shown

    inputs, outputs = {preset, prompt, panel.refused, *panel.fields}, [*panel.shown, prompt]
    for listen in (
        panel.name.blur,
        panel.name.submit,
        panel.noun.blur,
        panel.role.input,
        panel.weight.release,
        panel.cut_out.input,
    ):
        listen(changed, inputs, outputs, **quiet())


def _wire_tools(panel: CastPanel, studio: Studio, preset: gr.Dropdown) -> None:
    def act_on_picture(cast: Cast, model: str, evt: gr.EventData) -> Updates:
        if evt.act != "drop" or cast.open is None:
            return paint(panel, studio, cast, model)
        kept = tuple(picture for place, picture in enumerate(cast.open.pictures) if place != int(evt.place))
        return paint(panel, studio, cast.change(pictures=kept), model)

    def add_picture(cast: Cast, path: str | None, model: str) -> Updates:
        if cast.open is None or not path:
            return paint(panel, studio, cast, model)
        try:
            kept = (*cast.open.pictures, studio.keep_upload(Path(path)))
            return paint(panel, studio, cast.change(pictures=kept[:MAX_PICTURES]), model)
        except StudioError as error:
            return paint(panel, studio, cast, model, error=error)

    def save(values: Values) -> Updates:
        cast, model, said = values[panel.cast], values[preset], ""
        try:
            cast = checked(edited(panel, values))
            if cast.open is not None:
                studio.subjects.save(cast.open.subject())
                said = f"@{cast.open.name} is saved, on every tab."
        except StudioError as error:
            return paint(panel, studio, cast, model, error=error)
        return paint(panel, studio, cast, model, said=said)

    def remove(cast: Cast, model: str) -> Updates:
        return paint(panel, studio, cast.remove(cast.chosen), model)

    def close(cast: Cast, model: str) -> Updates:
        return paint(panel, studio, cast.choose(-1), model)

    base = [panel.cast, preset]
    panel.preview.click(act_on_picture, base, panel.shown, **quiet())
    panel.more.upload(add_picture, [panel.cast, panel.more, preset], panel.shown, **quiet())
    panel.save.click(save, {preset, *panel.fields}, panel.shown, **quiet())
    panel.remove.click(remove, base, panel.shown, **quiet())
    panel.done.click(close, base, panel.shown, **quiet())
