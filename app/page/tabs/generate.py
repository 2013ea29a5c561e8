"""The Generate tab: who is in the clip, what happens, how it is drawn, and the clip itself.

In:  a creator's words, pictures and numbers; a `Ticket` from another tab.
Out: `GenerateJob`s in the queue. What is shown of them is read back from the queue, so a reload shows the same.
Knows nothing of torch, of workers, or of how a clip is made.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

import gradio as gr

from app import estimate, wording
from app.page import clip_view, markup
from app.page.context import SANITY_JOB, Studio, first_example
from app.page.generate_form import PRECISIONS, SEEDS, Cast, Form, Slot
from app.page.tabs import cast as cast_panel
from app.page.tabs import loras as lora_panel
from app.page.tabs import models as models_tab
from app.page.tabs.cast import CastPanel
from app.page.tabs.loras import LoraPanel
from app.page.tabs.wiring import CLICKS, Ticket, Updates, Values, quiet, select, sending
from app.queue import Row
from engine import presets
from engine.job import read_job
from engine.messages import StudioError, duration
from engine.presets import Preset

GUIDANCE = [("None", "none"), ("CFG", "cfg"), ("Dual", "dual"), ("APG", "apg"), ("Chained", "chained")]
PRECISION = "Fewer bits take less memory and change the clip a little; a finished clip says what it was made with."
# Which error stands beside which field of the form; everything else stands above the button.
BESIDE = {
    "prompt": "prompt",
    "subjects": "subjects",
    "preset": "preset",
    "num_frames": "size",
    "width": "size",
    "height": "size",
    "seed": "seed",
    "sampling": "advanced",
    "negative_prompt": "advanced",
    "until": "advanced",
    "loras": "advanced",
}


@dataclass(frozen=True)
class GenerateTab:
    """The tab's components; `form` by the names of `Form`'s fields, `refused` by the places that `BESIDE` names."""

    panel: CastPanel
    loras: LoraPanel
    advanced: gr.Accordion
    form: dict[str, Any]
    quality: gr.Radio
    lack: gr.HTML
    about: gr.HTML
    length: gr.HTML
    refused: dict[str, gr.HTML]
    cost: gr.HTML
    go: gr.Button
    stop_editing: gr.Button
    sanity: gr.Button
    clip_view: gr.HTML
    editing: gr.State

    @property
    def fields(self) -> set[Any]:
        """What a form and its cast are read from."""
        return {*self.form.values(), *self.panel.fields, *self.loras.fields}

    @property
    def filled(self) -> list[Any]:
        """What `fill` changes."""
        shown = {*self.panel.shown, *self.loras.shown, *self.form.values()}  # both have the state of the LoRAs
        return [*shown, self.advanced, self.quality, self.lack, self.about, self.length]

    @property
    def buttons(self) -> list[Any]:
        """What changes when a waiting job is edited."""
        return [self.editing, self.go, self.stop_editing]

    def after(self, *more: Any) -> list[Any]:
        """Where errors stand, and more outputs, each once."""
        return list(dict.fromkeys([*self.refused.values(), *more]))

    def form_of(self, values: Values) -> Form:
        """The form as these values have it; its LoRAs as its document had them."""
        return Form(**{name: values[part] for name, part in self.form.items()})


# --- layout ----------------------------------------------------------------------------------------------------------


def layout(studio: Studio) -> GenerateTab:
    """The form on the left, the stage on the right."""
    preset = presets.load(presets.names()[0])
    start = Form.fresh(preset)
    refused: dict[str, gr.HTML] = {}
    editing = gr.State(0)
    with gr.Row(elem_id="generate", equal_height=False):
        with gr.Column(elem_id="form", min_width=320):
            gr.HTML("<h2>Cast</h2>", apply_default_css=False)
            panel = cast_panel.layout()
            refused["subjects"] = panel.refused
            form: dict[str, Any] = {"prompt": _prompt()}
            refused["prompt"] = _beside()
            quality, lack = _model(form, preset, refused)
            length = _size(form, start, refused)
            advanced, loras = _advanced(form, start, preset, refused)
            about = gr.HTML(_about(preset), apply_default_css=False)
            cost, go, stop_editing, sanity = _go(form, refused)
        with gr.Column(elem_id="stage-column", min_width=320):
            shown = gr.HTML(clip_view.render([]), js_on_load=CLICKS, elem_id="stage", apply_default_css=False)
    return GenerateTab(
        panel=panel,
        loras=loras,
        advanced=advanced,
        form=form,
        quality=quality,
        lack=lack,
        about=about,
        length=length,
        refused=refused,
        cost=cost,
        go=go,
        stop_editing=stop_editing,
        sanity=sanity,
        clip_view=shown,
        editing=editing,
    )


def _beside() -> gr.HTML:
    """Where a field's error appears; takes no room while there is none."""
    return gr.HTML("", elem_classes="beside", apply_default_css=False)


def _prompt() -> gr.Textbox:
    return gr.Textbox(
        label="What happens",
        placeholder="@fox chases @kite on a beach",
        lines=2,
        max_lines=8,
        elem_id="prompt",
    )


def _model(form: dict[str, Any], preset: Preset, refused: dict[str, gr.HTML]) -> tuple[gr.Radio, gr.HTML]:
    titles = [(each.title, each.name) for each in presets.list_readable()]
    form["preset"] = gr.Dropdown(titles, value=preset.name, label="Model", elem_id="preset")
    quality = gr.Radio(_qualities(preset), value="standard", label="Quality", elem_id="quality")
    refused["preset"] = _beside()
    lack = gr.HTML("", js_on_load=CLICKS, elem_id="lack", elem_classes="beside", apply_default_css=False)
    return quality, lack


def _size(form: dict[str, Any], start: Form, refused: dict[str, gr.HTML]) -> gr.HTML:
    with gr.Row(elem_classes="numbers"):
        form["num_frames"] = gr.Number(start.num_frames, label="Frames", precision=0, step=4, min_width=70)
        form["width"] = gr.Number(start.width, label="Width", precision=0, step=8, min_width=70)
        form["height"] = gr.Number(start.height, label="Height", precision=0, step=8, min_width=70)
        form["seed"] = gr.Textbox("0", label="Seed", max_lines=1, min_width=90, elem_id="seed")
    refused["size"] = _beside()
    refused["seed"] = _beside()
    with gr.Row(elem_classes="pair"):
        length = gr.HTML("", apply_default_css=False)
        form["fresh_seed"] = gr.Checkbox(True, label="New seed each time", elem_id="fresh-seed", min_width=150)
    return length


def _advanced(
    form: dict[str, Any], start: Form, preset: Preset, refused: dict[str, gr.HTML]
) -> tuple[gr.Accordion, LoraPanel]:
    with gr.Accordion("Advanced", open=False, elem_id="advanced") as advanced:
        with gr.Row(elem_classes="numbers"):
            form["num_inference_steps"] = gr.Number(start.num_inference_steps, label="Steps", precision=0, min_width=70)
            form["scheduler"] = gr.Dropdown(
                [("Euler", "euler"), ("UniPC", "unipc"), ("UniPC, Wan", "wan_unipc")],
                value=start.scheduler,
                label="Solver",
                min_width=90,
            )
            form["shift"] = gr.Number(start.shift, label="Shift", step=0.1, min_width=70)
            form["final_sigma"] = gr.Number(start.final_sigma or 0, label="Last noise", step=0.05, min_width=70)
        form["step_cache"] = gr.Dropdown(
            [("Off", "off"), ("Careful", "careful"), ("Fast", "fast")],
            value=start.step_cache or "off",
            label="Step cache",
            info=_left_out(preset),
            elem_id="leave-out",
        )
        form["precision"] = gr.Dropdown(
            PRECISIONS, value=start.precision, label="Precision", info=PRECISION, elem_id="precision"
        )
        form["guidance"] = gr.Radio(GUIDANCE, value=start.guidance, label="Guidance", elem_id="guidance")
        with gr.Row(elem_classes="numbers"):
            shown = _scales(start.guidance)
            for name, label in (
                ("guidance_scale", "Guidance scale"),
                ("subject_scale", "Subject scale"),
                ("text_scale", "Text scale"),
            ):
                form[name] = gr.Number(getattr(start, name), label=label, step=0.1, visible=shown[name], min_width=90)
        form["negative_prompt"] = gr.Textbox(start.negative_prompt, label="Negative prompt", max_lines=3)
        with gr.Row(elem_classes="numbers"):
            form["until"] = gr.Number(start.until or 0, label="Retry below likeness", step=0.05, min_width=150)
            form["tries"] = gr.Number(start.tries, label="Further seeds at most", precision=0, min_width=90)
        loras = lora_panel.layout()
        form["loras"] = loras.loras
        refused["advanced"] = _beside()
    return advanced, loras


def _go(form: dict[str, Any], refused: dict[str, gr.HTML]) -> tuple[gr.HTML, gr.Button, gr.Button, gr.Button]:
    with gr.Column(elem_id="go-bar"):
        refused["go"] = _beside()
        cost = gr.HTML("", elem_id="cost", apply_default_css=False)
        with gr.Row():
            counts = [("1 clip", 1), *((str(count), count) for count in range(2, clip_view.MOST + 1))]
            form["count"] = gr.Radio(
                counts, value=1, label="Clips, one seed each", elem_id="count", min_width=160, scale=0
            )
            go = gr.Button("Make clip", variant="primary", elem_id="go", min_width=120, scale=1)
        stop_editing = gr.Button("Leave the job as it is", size="sm", visible=False)
        sanity = gr.Button("Test my setup", size="sm", visible=SANITY_JOB.is_file(), elem_id="sanity")
    return cost, go, stop_editing, sanity


# --- what it shows ---------------------------------------------------------------------------------------------------


def _qualities(preset: Preset) -> list[tuple[str, str]]:
    full = preset.sampling.num_inference_steps
    return [(f"Draft · {preset.draft_steps} steps", "draft"), (f"Standard · {full} steps", "standard")]


def _about(preset: Preset) -> str:
    return f'<p class="about">{escape(preset.about)}</p>'


def _left_out(preset: Preset) -> str:
    """What leaving out steps brings and costs, as it was measured on this model."""
    said = [
        f"{word}: {1 / left.share:.1f}x fewer, {left.costs}."
        for word, left in (("Careful", preset.step_cache.careful), ("Fast", preset.step_cache.fast))
    ]
    return f"Steps that hardly differ from those before are not computed. {' '.join(said)}"


def _length(form: Form) -> str:
    preset = presets.load(form.preset)
    return f'<p class="about">{(form.num_frames or 0) / preset.fps:.1f} s at {preset.fps} frames a second</p>'


def _scales(guidance: str | None) -> dict[str, bool]:
    """Which guidance weights the chosen mode reads."""
    several = guidance in ("dual", "apg", "chained")
    return {"guidance_scale": guidance == "cfg", "subject_scale": several, "text_scale": several}


def _quality_of(form: Form) -> str | None:
    preset = presets.load(form.preset)
    steps = {preset.draft_steps: "draft", preset.sampling.num_inference_steps: "standard"}
    return steps.get(form.num_inference_steps)


def show_error(tab: GenerateTab, error: StudioError | None, said: str = "") -> Updates:
    """The error beside its field and nothing beside the others; without one, what is said above the button."""
    shown: Updates = dict.fromkeys(tab.refused.values(), "")
    if error is None:
        shown[tab.refused["go"]] = markup.note(said)
    else:
        shown[tab.refused[BESIDE.get(error.field, "go")]] = markup.refusal(error)
    return shown


def cost_line(studio: Studio, form: Form, cast: Cast) -> str:
    """Time, memory and disk of these values, before anybody presses Go."""
    try:
        costs = estimate.clip_costs(
            form.priced(cast), studio.queue.rows(states=["done"], limit=40), studio.settings.outputs
        )
    except StudioError as error:
        return f'<p class="cost">{escape(error.next_step)}</p>'
    preset = presets.load(form.preset)
    many = f" for {form.count}" if form.count > 1 else ""
    if not costs.learnt and preset.cost.on != presets.Cost.model_fields["on"].default:
        many += f" on {escape(preset.cost.on)}"  # nobody's processor makes such a clip in that time
    basis = escape("from your own clips" if costs.learnt else f"first guess, on {preset.cost.on}")
    low = " low" if costs.disk_is_low else ""
    return (
        f'<p class="cost"><span title="{basis}"><b>{duration(costs.seconds * form.count)}</b>{many}</span>'
        f'<span class="{"" if costs.fits else "low"}" title="{escape(costs.memory)}">'
        f"<b>{wording.size(costs.memory_mb * 1e6)}</b> memory</span>"
        f'<span class="disk{low}"><b>{wording.size(costs.clip_bytes * form.count)}</b> disk, '
        f"{wording.size(costs.free_bytes)} free</span></p>"
    )


def fill(tab: GenerateTab, studio: Studio, form: Form, cast: Cast) -> Updates:
    """Put a form and its cast on the page."""
    preset = presets.load(form.preset)
    shown: Updates = {part: getattr(form, name) for name, part in tab.form.items()}
    for name, visible in _scales(form.guidance).items():
        shown[tab.form[name]] = gr.Number(value=getattr(form, name), visible=visible)
    shown[tab.form["step_cache"]] = gr.Dropdown(value=form.step_cache or "off", info=_left_out(preset))
    shown[tab.quality] = gr.Radio(_qualities(preset), value=_quality_of(form))
    shown[tab.lack] = models_tab.missing(studio, form.preset)
    shown[tab.about], shown[tab.length] = _about(preset), _length(form)
    if form.loras:  # a LoRA that came with a document is not left behind a closed lid: what is wrong is said there
        shown[tab.advanced] = gr.Accordion(open=True)
    return {
        **shown,
        **lora_panel.paint(tab.loras, form.loras),
        **cast_panel.paint(tab.panel, studio, cast, form.preset),
    }


def paint_stage(rows: Sequence[Row], paused: bool) -> str:
    """The stage for the queue as it stands."""
    shown = clip_view.on_stage(rows)
    ids = {row.id for row in shown}
    behind = sum(row.state == "waiting" and row.id not in ids for row in rows)
    return clip_view.render(shown, waiting=behind, paused=paused)


def opening(studio: Studio) -> tuple[Form, Cast]:
    """What a page shows when it opens: the latest job that this studio can still make, or an example for a newcomer."""
    latest = max(studio.queue.rows(), key=lambda row: row.created, default=None)
    if latest is None or latest.job is None:
        return first_example()
    try:
        form = Form.of(latest.job)
    except StudioError:  # its preset is gone, or takes no such clip any more
        return first_example()
    return replace(form, fresh_seed=True), Cast(tuple(Slot.of(subject) for subject in latest.job.subjects))


# --- handlers --------------------------------------------------------------------------------------------------------


def submit(studio: Studio, form: Form, cast: Cast, editing: int) -> tuple[str, int]:
    """Values -> jobs -> queue. Returns a word of confirmation and the (first) seed.

    Raises:
        StudioError: with the field that does not fit; nothing was queued then.
    """
    seed = form.first_seed()
    jobs = [form.job(cast, seed=(seed + number) % SEEDS if number else seed) for number in range(form.count)]
    presets.check_files(presets.load(form.preset))
    if editing:
        studio.queue.edit(editing, jobs[0])
        return f"Job {editing} is updated.", seed
    until, tries = form.wanted()
    group = uuid.uuid4().hex if len(jobs) > 1 or until is not None else ""
    for job in jobs:
        studio.queue.add(job, group=group, until=until, tries=tries)
    return "", seed


def more_seeds(studio: Studio, row: Row) -> None:
    """Three more clips like this one, with the next seeds, side by side with it."""
    if row.job is None:
        return
    group = row.group or f"{clip_view.LIKE}{row.id}"
    highest = row.job.seed  # of a row that is older than those the queue still lists
    for other in studio.queue.rows():
        if other.job is not None and other.group == group:
            highest = max(highest, other.job.seed)
    for number in range(1, clip_view.MOST):
        studio.queue.add(row.job.model_copy(update={"seed": (highest + number) % SEEDS}), group=group)


def act(studio: Studio, what: str, row: Row) -> Ticket | None:
    """A button below a clip. Returns a ticket when the form should change."""
    queue = studio.queue
    if what == "cancel":
        queue.cancel(row.id)
    elif what == "again":
        queue.run_again(row.id)
    elif what == "variants":
        more_seeds(studio, row)
    elif what == "finish" and row.job is not None:
        queue.add(clip_view.finished(row.job))
    elif what in ("reuse", "seed") and row.job is not None:
        return Ticket.of(row.job)
    return None


def opened(ticket: Ticket) -> tuple[Form, Cast]:
    """The form and cast of a ticket's document.

    Raises:
        StudioError: it cannot be read, or does not fit this studio.
    """
    job = read_job(ticket.document)
    return Form.of(job), Cast(tuple(Slot.of(subject) for subject in job.subjects))


# --- wiring ----------------------------------------------------------------------------------------------------------


def wire(tab: GenerateTab, studio: Studio, ticket: gr.State, load: Any, tabs: gr.Tabs) -> list[Any]:
    """Connect the tab. Returns the events after which the whole page should look again at the queue."""
    cast_panel.wire(tab.panel, studio, preset=tab.form["preset"], prompt=tab.form["prompt"])
    lora_panel.wire(tab.loras)
    _wire_form(tab, studio)
    _wire_open(tab, studio, ticket, load)
    tab.lack.click(lambda: select("models"), None, tabs, **quiet(queue=True))
    return [*_wire_go(tab, studio), _wire_stage(tab, studio, ticket)]


def _wire_form(tab: GenerateTab, studio: Studio) -> None:
    form, panel = tab.form, tab.panel

    def price(values: Values) -> Updates:
        now = tab.form_of(values)
        return {tab.cost: cost_line(studio, now, values[panel.cast]), tab.length: _length(now)}

    def take_preset(name: str, prompt: str, cast: Cast) -> Updates:
        return fill(tab, studio, Form.fresh(presets.load(name), prompt=prompt), cast)

    def take_quality(quality: str, name: str) -> int | None:
        preset = presets.load(name)
        if quality == "draft":
            return preset.draft_steps
        return preset.sampling.num_inference_steps

    def take_guidance(mode: str) -> Updates:
        return {form[name]: gr.Number(visible=shown) for name, shown in _scales(mode).items()}

    free = ("prompt", "seed", "fresh_seed", "negative_prompt", "until", "tries", "loras")
    priced = [part for name, part in form.items() if name not in free]
    gr.on(
        # Each clip since the last time has taught it something, hence also at the button.
        [*(part.change for part in priced), panel.cast.change, tab.go.click],
        price,
        {panel.cast, *form.values()},
        [tab.cost, tab.length],
        **quiet(trigger_mode="always_last"),
    )
    form["preset"].input(take_preset, [form["preset"], form["prompt"], panel.cast], tab.filled, **quiet())
    tab.quality.input(take_quality, [tab.quality, form["preset"]], form["num_inference_steps"], **quiet())
    scales = [form[name] for name in _scales(None)]
    form["guidance"].input(take_guidance, form["guidance"], scales, **quiet())


def _wire_go(tab: GenerateTab, studio: Studio) -> list[Any]:
    def pressed(values: Values) -> Updates:
        cast = cast_panel.edited(tab.panel, values)
        try:
            form = replace(tab.form_of(values), loras=lora_panel.chosen(tab.loras, values))
            said, seed = submit(studio, form, cast, values[tab.editing])
        except StudioError as error:
            return show_error(tab, error)
        return {**show_error(tab, None, said), tab.form["seed"]: str(seed), **_button(tab, 0)}

    def leave() -> Updates:
        return _button(tab, 0)

    def check_sanity() -> None:
        studio.queue.add(read_job(SANITY_JOB.read_text(encoding="utf-8")), group=clip_view.SANITY_GROUP)

    go = tab.go.click(pressed, {tab.editing, *tab.fields}, tab.after(tab.form["seed"], *tab.buttons), **quiet())
    tab.stop_editing.click(leave, None, tab.buttons, **quiet())
    return [go, tab.sanity.click(check_sanity, None, None, **quiet())]


def _button(tab: GenerateTab, editing: int) -> Updates:
    """The big button for a new clip, or for the waiting row that is being edited."""
    words = "Make clip"
    if editing:
        words = f"Update job {editing}"
    return {tab.editing: editing, tab.go: gr.Button(words), tab.stop_editing: gr.Button(visible=bool(editing))}


def _wire_stage(tab: GenerateTab, studio: Studio, ticket: gr.State) -> Any:
    def pressed(evt: gr.EventData) -> Updates:
        try:
            found = act(studio, evt.act, studio.queue.get(int(evt.row)))
        except StudioError as error:
            return {tab.refused["go"]: markup.refusal(error)}
        shown: Updates = {tab.refused["go"]: ""}
        if found is not None:
            shown[ticket] = found
        return shown

    return tab.clip_view.click(pressed, None, [tab.refused["go"], ticket], **sending())


def _wire_open(tab: GenerateTab, studio: Studio, ticket: gr.State, load: Any) -> None:
    def take(found: Ticket) -> Updates:
        try:
            filled = fill(tab, studio, *opened(found))
        except StudioError as error:
            return {**show_error(tab, replace_field(error)), **_button(tab, 0)}
        return {**filled, **show_error(tab, None, found.said), **_button(tab, found.row)}

    def start() -> Updates:
        form, cast = opening(studio)
        return {**fill(tab, studio, form, cast), tab.cost: cost_line(studio, form, cast)}

    ticket.change(take, ticket, tab.after(*tab.filled, *tab.buttons), **quiet())
    load(start, None, [*tab.filled, tab.cost], **quiet())


def replace_field(error: StudioError) -> StudioError:
    """The same error above the button: the field it names holds another document's value at this moment."""
    return StudioError(error.what, error.why, error.next_step)
