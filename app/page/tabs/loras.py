"""The LoRAs of the Generate tab: up to eight rows of a file and its weight, under Advanced.

In:  the files in the folder of LoRAs; the `Lora`s of a form.
Out: `chosen(...)`: the `Lora`s that the rows hold right now.
Knows nothing of the rest of the form, of the queue, or of what is in such a file.

Every row is there from the start and hidden until it is used: what a page grows while it runs, Gradio would have to
draw anew, and the focus would be lost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from app.page.tabs.wiring import Updates, Values, quiet
from engine import lora_files
from engine.job import GenerateJob, Lora

MOST = next(limit.max_length for limit in GenerateJob.model_fields["loras"].metadata if hasattr(limit, "max_length"))
LOWEST, HIGHEST = -4.0, 4.0  # what a document can say


@dataclass(frozen=True)
class LoraPanel:
    """The components; `loras` holds what the rows were filled with, since a row does not show a file's hash."""

    loras: gr.State
    rows: list[gr.Row]
    files: list[gr.Dropdown]
    weights: list[gr.Slider]
    removes: list[gr.Button]
    add: gr.Button
    hint: gr.HTML

    @property
    def fields(self) -> set[Any]:
        """What `chosen` reads."""
        return {self.loras, *self.files, *self.weights}

    @property
    def shown(self) -> list[Any]:
        """What `paint` changes."""
        return [self.loras, *self.rows, *self.files, *self.weights, self.add, self.hint]


def layout() -> LoraPanel:
    """No row yet, and a button that adds one."""
    rows, files, weights, removes = [], [], [], []
    with gr.Column(elem_id="loras"):
        loras = gr.State(())
        for number in range(1, MOST + 1):
            with gr.Row(visible=False, elem_classes="lora") as row:
                files.append(gr.Dropdown([], label=f"LoRA {number}", min_width=120, scale=4, elem_classes="lora-file"))
                weights.append(
                    gr.Slider(
                        LOWEST,
                        HIGHEST,
                        value=1,
                        step=0.05,
                        label=f"Weight {number}",
                        buttons=[],
                        min_width=120,
                        scale=4,
                    )
                )
                removes.append(
                    gr.Button(f"Remove LoRA {number}", size="sm", min_width=34, scale=0, elem_classes="lora-x")
                )
            rows.append(row)
        with gr.Row(elem_classes="tools"):
            add = gr.Button("Add a LoRA", size="sm", min_width=100, scale=0, elem_id="add-lora")
            hint = gr.HTML("", apply_default_css=False)
    return LoraPanel(loras, rows, files, weights, removes, add, hint)


def paint(panel: LoraPanel, loras: Sequence[Lora], *, asked: bool = False) -> Updates:
    """The rows for these LoRAs.

    Args:
        asked: a person has just asked for one more; where there is none to choose, they are told why.
    """
    here = lora_files.names()
    shown: Updates = {panel.loras: tuple(loras), panel.add: gr.Button(interactive=len(loras) < MOST), panel.hint: ""}
    if asked and not here:
        empty = "There is none yet: put safetensors files into the folder loras of your models."
        shown[panel.hint] = f'<p class="about" role="status">{empty}</p>'
    for place in range(MOST):
        path, weight = None, 1.0
        if place < len(loras):
            path, weight = loras[place].path, loras[place].weight
        shown[panel.rows[place]] = gr.Row(visible=place < len(loras))
        shown[panel.files[place]] = gr.Dropdown(choices=_choices(here, path), value=path)
        shown[panel.weights[place]] = weight
    return shown


def _choices(here: Sequence[str], path: str | None) -> list[tuple[str, str]]:
    """Every file that is there; one that a document brought and that is not there stays visible as such."""
    choices = [(name.removesuffix(lora_files.SUFFIX), name) for name in here]
    if path is not None and path not in here:
        choices.insert(0, (f"{lora_files.base_name(path)} (not here)", path))
    return choices


def chosen(panel: LoraPanel, values: Values) -> tuple[Lora, ...]:
    """What the rows say right now. A row keeps its hash while it keeps its file."""
    found = []
    for before, file, slider in zip(values[panel.loras], panel.files, panel.weights, strict=False):
        path, weight = values[file], float(values[slider] or 0)
        if path is None or path == before.path:
            found.append(before.model_copy(update={"weight": weight}))
        else:
            found.append(Lora(path=path, weight=weight))
    return tuple(found)


def added(loras: tuple[Lora, ...]) -> tuple[Lora, ...]:
    """One more row, with the first file that no row has yet; the same ones where there is none, or no room."""
    used = {lora.path for lora in loras}
    here = lora_files.names()
    if not here or len(loras) >= MOST:
        return loras
    free = next((name for name in here if name not in used), here[0])
    return (*loras, Lora(path=free))


def wire(panel: LoraPanel) -> None:
    """Connect the rows."""

    def one_more(values: Values) -> Updates:
        return paint(panel, added(chosen(panel, values)), asked=True)

    def one_less(place: int) -> Callable[[Values], Updates]:
        def press(values: Values) -> Updates:
            now = chosen(panel, values)
            return paint(panel, (*now[:place], *now[place + 1 :]))

        return press

    panel.add.click(one_more, panel.fields, panel.shown, **quiet())
    for place, button in enumerate(panel.removes):
        button.click(one_less(place), panel.fields, panel.shown, **quiet())
