"""The few lines that every tab's wiring shares.

In:  nothing.
Out: keyword arguments of Gradio's listeners, the script behind our HTML buttons, and the ticket between tabs.
Knows nothing of any tab.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from engine.job import GenerateJob, write_job

# A click on a button with data-act reaches Python as gr.EventData with all of its data-* values.
CLICKS = """
element.addEventListener('click', (event) => {
  const pressed = event.target.closest('[data-act]');
  if (pressed && element.contains(pressed)) trigger('click', {...pressed.dataset});
});
"""


def quiet(**more: Any) -> dict[str, Any]:
    """For handlers of the page itself: not in the API, no spinner over what they change, no wait behind other calls.

    `queue=False` answers in one request: the queue's event stream would cost a second one for every click.
    """
    return {"api_visibility": "private", "show_progress": "hidden", "queue": False, **more}


def sending(**more: Any) -> dict[str, Any]:
    """`quiet` for handlers that hand a `Ticket` on: Gradio tells of a changed `gr.State` through its queue alone."""
    return quiet(queue=True, **more)


@dataclass(frozen=True)
class Ticket:
    """A document on its way to the Generate tab; `row` is the waiting row it edits, 0 for a new clip.

    `said` is what a person should know about where it comes from.
    """

    document: str = ""
    row: int = 0
    said: str = ""
    stamp: float = field(default_factory=time.time)  # the same document twice is two tickets

    @classmethod
    def of(cls, job: GenerateJob, *, row: int = 0, said: str = "") -> Ticket:
        """A ticket that opens this job."""
        return cls(write_job(job), row, said)


Values = Mapping[Any, Any]
"""What a handler is given: the value of each of the components that it asked for, as a set."""
Updates = dict[Any, Any]
"""What a handler gives back: a value, or a component with other properties, for each one that changes."""


def select(tab: str) -> gr.Tabs:
    """The update that brings a tab to the front."""
    return gr.Tabs(selected=tab)
