"""The prompt as a model was taught to read it: what stands in place of each @name.

In:  a job's prompt and subjects, and its preset's mention style.
Out: text.
Knows nothing of tokenizers or encoders.
"""

from __future__ import annotations

import html
import itertools
from collections.abc import Sequence
from typing import Literal

import ftfy

from engine.job import MENTION, Subject
from engine.resolve import ResolvedJob

# What Bernini's prompts begin with: `SYSTEM_PROMPTS` of bernini/prompt_enhancer.py, bytedance/Bernini 8c805a5.
BERNINI = "You are a helpful assistant specialized in {}-to-video generation."
DETERMINERS = {"a", "an", "the", "my", "our", "his", "her", "their", "some"}


def render_prompt(prompt: str, subjects: Sequence[Subject], mention: Literal["slot", "noun", "image"]) -> str:
    """The prompt as the model was taught to read it.

    Args:
        prompt: with @names; every name belongs to one of the subjects (`engine.job` sees to that).
        subjects: in slot order; the first one is subject 1.
        mention: "slot" writes "subject 2, a red fox," the first time and "subject 2" after that (ID-Crafter, toybox);
            "noun" writes "a red fox", then "the red fox" (Phantom, VACE); "image" writes "the red fox from image0",
            with the numbers of its pictures among all that are shown (Bernini).
    """
    numbers = {subject.name: number for number, subject in enumerate(subjects, start=1)}
    images = _number_images(subjects)
    mentioned: set[str] = set()
    pieces: list[str] = []
    end = 0
    for match in MENTION.finditer(prompt):
        name = match[1].lower()
        number = numbers[name]
        noun = noun_phrase(subjects[number - 1])
        first = name not in mentioned
        mentioned.add(name)
        if mention == "noun":
            words = _render_noun(noun, first)
        elif mention == "image":
            words = _render_images(noun, images[name])
        else:
            words = _render_slot(noun, number, first, rest=prompt[match.end() :])
        pieces += [prompt[end : match.start()], words]
        end = match.end()
    return clean("".join(pieces) + prompt[end:])


def clean(text: str) -> str:
    """Text as Wan's captions were cleaned for training: broken encodings mended, typographic quotes plain, HTML's
    entities read, every white space one blank.

    Source: `basic_clean` and `whitespace_clean` of wan/modules/tokenizers.py, Wan-Video/Wan2.1.
    """
    mended = html.unescape(html.unescape(ftfy.fix_text(text)))  # twice, as there: entities are often escaped again
    return " ".join(mended.split())


def _number_images(subjects: Sequence[Subject]) -> dict[str, list[str]]:
    """ "image0", "image1", ... for every picture that is shown, by the name of its subject."""
    numbers = itertools.count()
    images: dict[str, list[str]] = {}
    for subject in subjects:
        images[subject.name] = []
        if subject.weight > 0:
            images[subject.name] = [f"image{next(numbers)}" for _ in subject.pictures]
    return images


def _render_noun(noun: str, first: bool) -> str:
    """ "a red fox" the first time, "the red fox" after that."""
    if first:
        return with_article(noun)
    return _with_definite_article(noun)


def _render_images(noun: str, images: Sequence[str]) -> str:
    """ "the red fox from image0 and image1"."""
    words = _with_definite_article(noun)
    if images:
        words += f" from {' and '.join(images)}"
    return words


def _render_slot(noun: str, number: int, first: bool, rest: str) -> str:
    """ "subject 2, a red fox," the first time, "subject 2" after that; `rest` is the prompt after this mention."""
    words = f"subject {number}"
    if not first:
        return words
    words += f", {with_article(noun)}"
    # The comma that closes the apposition, unless the sentence brings one or stops here.
    next_character = rest.lstrip()[:1]
    if next_character.isalnum() or next_character == "@":
        words += ","
    return words


def render_job(resolved: ResolvedJob) -> str:
    """The job's prompt as its preset's encoders read it."""
    document, preset = resolved.document, resolved.preset
    prompt = render_prompt(document.prompt, document.subjects, preset.mention)
    if preset.conditioning != "sources":
        return prompt
    task = "text"
    if any(subject.weight > 0 for subject in document.subjects):
        task = "subject"
    return BERNINI.format(task) + prompt


def noun_phrase(subject: Subject) -> str:
    """What a subject is, in words: its noun, or its name."""
    return subject.noun.strip() or subject.name.replace("_", " ")


def with_article(words: str) -> str:
    """ "a fox", "an orange fox"; nothing is added where an article or a possessive already stands."""
    if _begins_with_determiner(words):
        return words
    article = "an" if words[0].lower() in "aeiou" else "a"
    return f"{article} {words}"


def _with_definite_article(words: str) -> str:
    """ "the fox"; nothing is added where an article or a possessive already stands."""
    if _begins_with_determiner(words):
        return words
    return f"the {words}"


def _begins_with_determiner(words: str) -> bool:
    return words.split()[0].lower() in DETERMINERS
