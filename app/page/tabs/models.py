"""The Models tab: what each preset is, under which licence, what of it is here, and fetching the rest.

In:  presets, and the pulls of this process.
Out: wishes told to the pulls; presets and files taken away after a person was asked.
Knows nothing of how bytes are moved, of the queue, or of torch.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from huggingface_hub import constants

from app import wording
from app.library import models
from app.library.downloads import ADD, ADOPT, Pull, Pulls
from app.page import markup
from app.page.context import Studio
from app.page.tabs.wiring import CLICKS, quiet
from engine import presets
from engine.hub.cache import Hub
from engine.messages import StudioError, duration
from engine.paths import models_dir

SELF = "as its own files tell"


@dataclass(frozen=True)
class ModelsTab:
    """The tab's components; `asked` is the preset whose removal a person was asked about."""

    asked: gr.State
    head: gr.HTML
    refused: gr.HTML
    cards: gr.HTML
    judges: gr.Checkbox
    unlicensed: gr.Checkbox
    folder: gr.Textbox
    adopt: gr.Button
    adopting: gr.HTML
    repo: gr.Textbox
    like: gr.Dropdown
    add: gr.Button
    adding: gr.HTML
    token: gr.Textbox
    hold: gr.Button

    @property
    def shown(self) -> list[gr.HTML]:
        """What `paint` returns."""
        return [self.head, self.cards, self.adopting, self.adding]


# --- layout ----------------------------------------------------------------------------------------------------------


def layout() -> ModelsTab:
    """How the disk stands, a card for each preset, and below what is rarely needed."""
    with gr.Column(elem_id="models"):
        head = gr.HTML("", elem_id="models-head", apply_default_css=False)
        with gr.Row(elem_id="models-options"):
            judges = gr.Checkbox(False, label=f"Fetch the networks that judge likeness, too ({_judging()}, once)")
            unlicensed = gr.Checkbox(False, label="Also what names no licence, at my own risk")
        refused = gr.HTML("", elem_classes="beside", apply_default_css=False)
        cards = gr.HTML("", js_on_load=CLICKS, elem_id="model-cards", apply_default_css=False)
        with gr.Row(elem_id="models-more", equal_height=False):
            with gr.Column(min_width=280):
                folder = gr.Textbox(label="Folder of another program", placeholder="ComfyUI/models", max_lines=1)
                adopting = gr.HTML("", elem_id="adopting", elem_classes="beside", apply_default_css=False)
                adopt = gr.Button("Adopt its files", size="sm")
            with gr.Column(min_width=280):
                repo = gr.Textbox(label="Repository of your own", placeholder="owner/name", max_lines=1)
                like = gr.Dropdown(likes(), value="", label="Defaults")
                adding = gr.HTML("", elem_id="adding", elem_classes="beside", apply_default_css=False)
                add = gr.Button("Add repository", size="sm")
            with gr.Column(min_width=280):
                token = gr.Textbox(label="Token for private repositories", type="password", max_lines=1)
                hold = gr.Button("Hold until the studio stops", size="sm")
    asked = gr.State("")
    return ModelsTab(
        asked, head, refused, cards, judges, unlicensed, folder, adopt, adopting, repo, like, add, adding, token, hold
    )  # fmt: skip


def _judging() -> str:
    """Size of the networks that judge clips, each counted once."""
    named = {}
    for preset in presets.list_readable():
        for part, own in preset.downloads().items():
            if part in presets.OPTIONAL:
                named |= dict.fromkeys(own)
    return wording.size(sum(files.num_bytes for files in named))


def likes() -> list[tuple[str, str]]:
    """Whose defaults a repository may take."""
    return [(SELF, ""), *((f"like {preset.title}", preset.name) for preset in presets.list_readable())]


# --- what it shows ---------------------------------------------------------------------------------------------------


def choices(studio: Studio) -> list[tuple[str, str]]:
    """Every preset for a dropdown, those that are not here marked."""
    hub = studio.pulls.hub()
    found = [models.state(preset, hub) for preset in presets.list_readable()]
    return [(each.preset.title + ("" if each.here else " · not here"), each.preset.name) for each in found]


def missing(studio: Studio, name: str) -> str:
    """What stands beside a chosen preset that cannot make clips yet, with the way to this tab; else nothing."""
    preset = presets.find(name)
    found = models.state(preset, studio.pulls.hub()) if preset else None
    if preset is None or found is None or found.here:
        return ""
    what = f"{wording.size(found.bytes_to_fetch)} to fetch" if found.to_fetch else "it needs a checkpoint of yours"
    words = f"The files of {escape(preset.title)} are not here yet: {what}."
    return f'<p class="refusal">{words} {markup.button("Open Models", "models")}</p>'


def render_head(studio: Studio) -> str:
    """The disk, and whether anything can be fetched at all."""
    cache = Path(constants.HF_HUB_CACHE)
    parts = [f"{wording.size(_free(cache))} free in {escape(str(cache))}"]
    if constants.HF_HUB_OFFLINE:
        parts.append("offline: what is here works, and nothing is fetched")
    if studio.pulls.has_token:
        parts.append("a token is held until the studio stops")
    return f'<div class="queue-head"><h2>Models</h2><p>{" · ".join(parts)}</p></div>'


def _aside(pull: Pull | None) -> str:
    """How adopting or adding stands."""
    if pull is None:
        return ""
    if pull.busy:
        counted = f"file {pull.here} of {pull.total}" if pull.total else "asking"
        return f'<p class="about" role="status">{counted} {escape(pull.file)}</p>'
    return markup.refusal(pull.error) if pull.error else markup.note(pull.said)


def render_cards(studio: Studio, asked: str) -> str:
    """One card for each preset; `asked` is the one whose removal is being asked about."""
    hub, free = studio.pulls.hub(), _free(Path(constants.HF_HUB_CACHE))
    cards = []
    for name in presets.names():
        try:
            preset = presets.load(name)
        except StudioError as error:
            cards.append(f'<li class="model"><h3>{escape(name)}</h3>{markup.refusal(error)}</li>')
            continue
        cards.append(_card(models.state(preset, hub), studio.pulls.of(name), hub, free, asked == name))
    return f'<ol class="rows models">{"".join(cards)}</ol>'


def _card(found: models.State, pull: Pull | None, hub: Hub, free: int, asked: bool) -> str:
    preset, busy = found.preset, pull is not None and pull.busy
    page = models.link(preset)
    link = (
        f'<a href="{escape(page)}" target="_blank" rel="noopener noreferrer" '
        f'aria-label="Page of {escape(preset.title)} on the Hub">its page</a>'
        if page.startswith("https://")
        else ""
    )
    facts = [f"<span>Licence <b>{escape(preset.licence)}</b></span>", link, _sizes(found, free, busy)]
    own = "".join(
        f'<p class="about">Its {part.replace("_", " ")} is a checkpoint of yours, in '
        f"{escape(str(models_dir() / str(getattr(preset.components, part))))}.</p>"
        for part in found.own
    )
    word = pull.stage if pull is not None and (busy or pull.stage == "paused") else found.word
    kind = "running" if busy else "here" if found.here else ""
    acts = _question(found, hub) if asked else f'<div class="acts">{_buttons(found, pull)}</div>'
    return (
        f'<li class="model {kind}" data-preset="{escape(preset.name)}"><div class="what">'
        f'<h3>{escape(preset.title)} <span class="word">{word}</span></h3><p class="about">{escape(preset.about)}</p>'
        f'{own}<p class="facts">{"".join(facts)}</p></div>{_progress(pull)}{acts}</li>'
    )


def _sizes(found: models.State, free: int, busy: bool) -> str:
    if found.fetched:
        return ""
    low = " low" if found.bytes_to_fetch + found.bytes_to_convert > free else ""
    arrived = f", {wording.size(found.arrived)} of it under way" if found.arrived and not busy else ""
    more = f" and {wording.size(found.bytes_to_convert)} to make safetensors of it" if found.bytes_to_convert else ""
    return (
        f'<span class="disk{low}"><b>{wording.size(found.bytes_to_fetch)}</b> to fetch{arrived}{more}, '
        f"{wording.size(free)} free</span>"
    )


def _progress(pull: Pull | None) -> str:
    """A bar with its figures while something goes on, and how it ended."""
    if pull is None:
        return ""
    if pull.error is not None:
        return markup.refusal(pull.error)
    if not pull.busy and pull.stage != "paused":
        return markup.note(pull.said)
    share = 100 * pull.here / pull.total if pull.total else 0
    figures = [f"{wording.size(pull.here)} of {wording.size(pull.total)}"] if pull.total else []
    if pull.stage == "fetching" and pull.bytes_per_s:
        figures.append(f"{wording.size(pull.bytes_per_s)}/s")
    if pull.stage == "fetching" and pull.seconds_left is not None:
        figures.append(f"{duration(pull.seconds_left)} left")
    figures.append(escape(pull.file))
    alone = f" · {escape(', '.join(pull.by_library))}: fetched by the library, begins anew after a pause"
    return (
        f'<div class="bar {"" if pull.total or pull.stage == "paused" else "unknown"}" role="progressbar" '
        f'aria-label="Fetched" aria-valuemin="0" aria-valuemax="100" aria-valuenow="{share:.0f}">'
        f'<i style="width: {share:.1f}%"></i></div>'
        f'<p class="step"><span>{" · ".join(figures)}{alone if pull.by_library else ""}</span>'
        f"<b>{share:.0f} %</b></p>"
    )


def _buttons(found: models.State, pull: Pull | None) -> str:
    name, title = found.preset.name, found.preset.title

    def act(label: str, what: str, *, kind: str = "") -> str:
        return markup.button(label, what, kind=kind, title=f"{label} {title}", name=name)

    if pull is not None and pull.busy:
        return act("Pause", "pause") + act("Cancel", "cancel")
    if not found.preset.downloads():
        return ""
    buttons = []
    if not found.fetched:
        under_way = found.arrived > 0 or (pull is not None and pull.stage == "paused")
        buttons.append(act("Go on", "fetch", kind="primary") if under_way else act("Fetch", "fetch"))
        buttons += [act("Cancel", "cancel")] if under_way else []
    elif not found.judges:
        buttons.append(act("Fetch judges", "judges"))
    if found.fetched:
        buttons += [act("Verify", "verify"), act("Remove", "ask")]
    if (presets.own_presets_dir() / f"{name}.json").is_file():
        buttons.append(act("Forget", "forget"))
    return "".join(buttons)


def _question(found: models.State, hub: Hub) -> str:
    """Asked in the page before anything is taken away."""
    name, gone = found.preset.name, models.removal(found.preset, hub)
    words = (
        f"Remove {wording.files(len(gone.files))}, {wording.size(gone.num_bytes)}?{escape(gone.kept)} "
        "Other programs that use this cache would have to fetch them again."
    )
    yes = markup.button("Remove", "remove", kind="danger", title=f"Remove {found.preset.title} for good", name=name)
    no = markup.button("Keep", "keep", title=f"Keep {found.preset.title}", name=name)
    return f'<div class="acts question" role="alert"><span>{words}</span>{yes}{no}</div>'


def _free(folder: Path) -> int:
    there = next((each for each in (folder, *folder.parents) if each.exists()), Path.cwd())
    return shutil.disk_usage(there).free


# --- handlers --------------------------------------------------------------------------------------------------------


def act(pulls: Pulls, what: str, name: str, *, judges: bool, unlicensed: bool) -> str:
    """One button of one card. Returns the preset whose removal is to be asked about, or nothing.

    Raises:
        StudioError: what was asked for does not go.
    """
    if what in ("fetch", "judges"):
        pulls.fetch(name, judges=judges or what == "judges", accept_no_licence=unlicensed)
    elif what == "pause":
        pulls.pause(name)
    elif what == "cancel":
        pulls.give_up(name)
    elif what == "verify":
        pulls.verify(name)
    elif what == "ask":
        return name
    elif what == "remove":
        models.remove(presets.load(name), pulls.hub())
        pulls.clear(name)
    elif what == "forget":
        models.forget(presets.load(name))
        pulls.clear(name)
        pulls.clear(ADD)
    return ""


# --- wiring ----------------------------------------------------------------------------------------------------------


def wire(tab: ModelsTab, studio: Studio) -> list[Any]:
    """Connect the tab. Returns the events after which the page should look again."""
    pulls = studio.pulls

    def pressed(judges: bool, unlicensed: bool, evt: gr.EventData) -> list[str]:
        try:
            asked = act(pulls, evt.act, evt.name, judges=judges, unlicensed=unlicensed)
        except StudioError as error:
            return ["", markup.refusal(error)]
        finally:
            pulls.touch()
        return [asked, ""]

    def adopt(folder: str) -> None:
        pulls.adopt(Path(folder.strip()).expanduser() if folder.strip() else None)

    def add(repo: str, like: str, unlicensed: bool) -> None:
        pulls.add(repo, like=like or "", accept_no_licence=unlicensed)

    def hold(token: str) -> str:
        pulls.hold_token(token)
        return ""  # out of the page again

    options = [tab.judges, tab.unlicensed]
    return [
        tab.cards.click(pressed, options, [tab.asked, tab.refused], **quiet(queue=True)),
        tab.adopt.click(adopt, tab.folder, None, **quiet()),
        tab.add.click(add, [tab.repo, tab.like, tab.unlicensed], None, **quiet()),
        tab.hold.click(hold, tab.token, tab.token, **quiet()),
    ]


def paint(studio: Studio, asked: str) -> Sequence[str]:
    """Head and cards, and beside its button how adopting and adding stand."""
    asides = (_aside(studio.pulls.of(key)) for key in (ADOPT, ADD))
    return [render_head(studio), render_cards(studio, asked), *asides]
