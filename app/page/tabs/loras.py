"""The LoRAs of the Generate tab: up to eight rows of a file and its weight, under Advanced.

In:  the files in the folder of LoRAs; the `Lora`s of a form.
Out: `chosen(...)`: the `Lora`s that the rows hold right now.
Knows nothing of the rest of the form, of the queue, or of what is in such a file.

Every row is there from the start and hidden until it is used: what a page grows while it runs, Gradio would have to
draw anew, and the focus would be lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from app.page.tabs.wiring import quiet
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
    def fields(self) -> list[Any]:
        """What `chosen` takes behind the state: all files, then all weights."""
        return [*self.files, *self.weights]

    @property
    def shown(self) -> list[Any]:
        """What `paint` returns."""
        return [*self.rows, *self.files, *self.weights, self.add, self.hint]


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


def paint(loras: Sequence[Lora], *, asked: bool = False) -> list[Any]:
    """The rows for these LoRAs, in the order of `LoraPanel.shown`.

    Args:
        asked: a person has just asked for one more; where there is none to choose, they are told why.
    """
    here = lora_files.names()
    filled: list[Lora | None] = [*loras, *[None] * (MOST - len(loras))]
    files = [gr.Dropdown(choices=_choices(here, lora), value=lora.path if lora else None) for lora in filled]
    weights = [lora.weight if lora else 1.0 for lora in filled]
    empty = (
        "" if here or not asked else "There is none yet: put safetensors files into the folder loras of your models."
    )
    return [
        *(gr.Row(visible=place < len(loras)) for place in range(MOST)),
        *files,
        *weights,
        gr.Button(interactive=len(loras) < MOST),
        f'<p class="about" role="status">{empty}</p>' if empty else "",
    ]


def _choices(here: Sequence[str], lora: Lora | None) -> list[tuple[str, str]]:
    """Every file that is there; one that a document brought and that is not there stays visible as such."""
    gone = [(f"{lora_files.base_name(lora.path)} (not here)", lora.path)] if lora and lora.path not in here else []
    return [*gone, *((name.removesuffix(lora_files.SUFFIX), name) for name in here)]


def chosen(loras: Sequence[Lora], *fields: Any) -> tuple[Lora, ...]:
    """What the rows say right now. A row keeps its hash while it keeps its file."""
    files, weights = fields[:MOST], fields[MOST:]
    found = []
    for place, before in enumerate(loras):
        path, weight = files[place], float(weights[place] or 0)
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

    def one_more(loras: tuple[Lora, ...], *fields: Any) -> list[Any]:
        more = added(chosen(loras, *fields))
        return [more, *paint(more, asked=True)]

    def one_less(place: int) -> Any:
        def press(loras: tuple[Lora, ...], *fields: Any) -> list[Any]:
            now = chosen(loras, *fields)
            less = (*now[:place], *now[place + 1 :])
            return [less, *paint(less)]

        return press

    inputs, outputs = [panel.loras, *panel.fields], [panel.loras, *panel.shown]
    panel.add.click(one_more, inputs, outputs, **quiet())
    for place, button in enumerate(panel.removes):
        button.click(one_less(place), inputs, outputs, **quiet())
