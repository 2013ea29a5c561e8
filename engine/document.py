"""The base class of every document on disk, and the error that explains why one was refused.

In:  pydantic's complaint about a value.
Out: a StudioError whose sentences use the page's words.
Knows nothing of any particular document's meaning.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar, cast

from pydantic import BaseModel, ConfigDict, ValidationError

from engine.messages import StudioError

# Fields that have another name in the page.
FIELD_LABELS = {
    "num_frames": "The number of frames",
    "width": "The width",
    "height": "The height",
    "seed": "The seed",
    "sampling.num_inference_steps": "The number of steps",
    "sampling.shift": "The shift",
    "sampling.final_sigma": "The last noise level",
    "sampling.guidance_scale": "The guidance scale",
    "sampling.subject_scale": "The subject scale",
    "sampling.text_scale": "The text scale",
}

F = TypeVar("F", bound=Callable[..., Any])
_LIMITS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}


class Document(BaseModel):
    """Whatever we write to disk. Frozen, unknown keys refused, field docstrings shown as help in form and CLI."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def cached(maxsize: int) -> Callable[[F], F]:
    """`functools.lru_cache` for functions of documents. They are frozen, so pydantic gives them a hash; type checkers
    cannot know."""
    return cast(Any, lru_cache(maxsize=maxsize))


def explain_validation_error(error: ValidationError) -> StudioError:
    """Pydantic's first complaint in words for a person; `field` names where it belongs."""
    first = error.errors(include_url=False)[0]
    where = [str(part) for part in first["loc"]]
    field = "".join(where[:1])
    label = ".".join(where) or "document"
    context = first.get("ctx", {})
    kind = first["type"]
    if kind == "extra_forbidden":
        why = f"This studio knows no field called {label!r}."
        return StudioError("The job document was refused.", why, "Remove that field.", field=field)
    if kind == "missing":
        return StudioError(f"The job has no {label}.", "It is needed.", f"Fill in {label}.", field=field)
    if field == "prompt" and "empty" in str(first["msg"]):
        return StudioError(
            "The prompt is empty.",
            "The clip follows what the prompt says.",
            "Write what should happen, mentioning each subject as @name.",
            field="prompt",
        )
    if kind == "too_long":
        most = context.get("max_length")
        return StudioError(
            f"{label} holds {context.get('actual_length')} entries.",
            f"At most {most} fit.",
            f"Keep {most} or fewer.",
            field=field,
        )
    what = f"{FIELD_LABELS.get(label, label)} is {_format_value(first.get('input'))}."
    limits = [f"{word} {context[key]}" for key, word in _LIMITS.items() if key in context]
    if limits:
        why = f"It has to be {' and '.join(limits)}."
    else:
        reason = str(first["msg"]).removeprefix("Value error, ").rstrip(".")
        why = f"{reason[:1].upper()}{reason[1:]}."
    return StudioError(what, why, "Change it to a value that fits.", field=field)


def _format_value(value: object) -> str:
    if isinstance(value, int | float):
        return f"{value:,}"[:60]
    return repr(str(value)[:60])
