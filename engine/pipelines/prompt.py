"""The prompt as a model was taught to read it: what stands in place of each @name.

In:  a job's prompt and subjects, and its preset's mention style.
Out: text.
Knows nothing of tokenizers or encoders.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

from engine.job import MENTION, GenerateJob, Subject
from engine.presets import Preset

# What Bernini's prompts begin with: `SYSTEM_PROMPTS` of bernini/prompt_enhancer.py, bytedance/Bernini 8c805a5.
BERNINI = "You are a helpful assistant specialized in {}-to-video generation."


def render(prompt: str, subjects: Sequence[Subject], mention: Literal["slot", "noun", "image"]) -> str:
    """The prompt as the model was taught to read it.

    Args:
        prompt: with @names; every name belongs to one of the subjects (`engine.job` sees to that).
        subjects: in slot order; the first one is subject 1.
        mention: "slot" writes "subject 2, a red fox," the first time and "subject 2" after that (ID-Crafter, toybox);
            "noun" writes "a red fox", then "the red fox" (Phantom, VACE); "image" writes "the red fox from image0",
            with the numbers of its pictures among all that are shown (Bernini).
    """
    numbers = {subject.name: number for number, subject in enumerate(subjects, start=1)}
    images = itertools.count()
    shown = {s.name: [f"image{next(images)}" for _ in s.pictures] if s.weight > 0 else [] for s in subjects}
    said: set[str] = set()
    pieces, end = [], 0
    for match in MENTION.finditer(prompt):
        name = match[1].lower()
        noun = noun_phrase(subjects[numbers[name] - 1])
        known = noun if with_article(noun) == noun else f"the {noun}"
        first = name not in said
        said.add(name)
        if mention == "noun":
            words = with_article(noun) if first else known
        elif mention == "image":
            sources = " and ".join(shown[name])
            words = f"{known} from {sources}" if sources else known
        else:
            words = f"subject {numbers[name]}"
            if first:
                # The comma that closes the apposition, unless the sentence brings one or stops here.
                follows = prompt[match.end() :].lstrip()[:1]
                words += f", {with_article(noun)}" + ("," if follows.isalnum() or follows == "@" else "")
        pieces += [prompt[end : match.start()], words]
        end = match.end()
    return " ".join(("".join(pieces) + prompt[end:]).split())


def render_job(job: GenerateJob, preset: Preset) -> str:
    """The job's prompt as its preset's encoders read it."""
    prompt = render(job.prompt, job.subjects, preset.mention)
    if preset.conditioning != "sources":
        return prompt
    return BERNINI.format("subject" if any(subject.weight > 0 for subject in job.subjects) else "text") + prompt


def noun_phrase(subject: Subject) -> str:
    """What a subject is, in words: its noun, or its name."""
    return subject.noun.strip() or subject.name.replace("_", " ")


def with_article(words: str) -> str:
    """ "a fox", "an orange fox"; nothing is added where an article or a possessive already stands."""
    if words.split()[0].lower() in {"a", "an", "the", "my", "our", "his", "her", "their", "some"}:
        return words
    return f"{'an' if words[0].lower() in 'aeiou' else 'a'} {words}"
