"""What the page knows without its widgets: the form, the cast, the cost, the stage, saved subjects."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from app import estimate
from app.library.subjects import Subjects
from app.page import clip_view, markup
from app.page.context import Studio, first_example
from app.page.generate_form import Cast, Form, Slot, free_name, renamed
from app.page.tabs import generate
from app.page.tabs import queue as queue_tab
from app.queue import Queue, Row
from app.settings import Settings
from engine import presets
from engine.job import GenerateJob, Picture
from engine.messages import Progress, Saved, StudioError
from engine.resolve import resolve


@pytest.fixture
def picture(tmp_path: Path) -> Picture:
    path = tmp_path / "red.png"
    Image.new("RGB", (24, 24), "red").save(path)
    return Picture(path=str(path))


@pytest.fixture
def cast(picture: Picture) -> Cast:
    return Cast((Slot("fox", (picture,)), Slot("kite", (picture,), role="background", weight=0.5)))


@pytest.fixture
def form() -> Form:
    return Form.fresh(presets.load("toybox"), prompt="@fox chases @kite")


@pytest.fixture
def job(form: Form, cast: Cast) -> GenerateJob:
    return form.job(cast, seed=7)


# --- form and cast ---------------------------------------------------------------------------------------------------


def test_a_job_opened_in_the_form_makes_the_same_job_again(job: GenerateJob) -> None:
    form, cast = Form.of(job), Cast(tuple(Slot.of(subject) for subject in job.subjects))
    assert form.job(cast, seed=form.first_seed()) == job


def test_a_fresh_seed_is_drawn_and_a_kept_one_is_kept(form: Form) -> None:
    assert replace(form, fresh_seed=True).first_seed(lambda below: below - 1) == 2**31 - 1
    assert replace(form, fresh_seed=False, seed=" 42 ").first_seed() == 42


@pytest.mark.parametrize("seed", ["", "-1", "1.5", "seven", "9" * 19])
def test_a_seed_that_is_no_whole_number_is_refused_at_the_seed(form: Form, seed: str) -> None:
    with pytest.raises(StudioError) as refused:
        replace(form, fresh_seed=False, seed=seed).first_seed()
    assert refused.value.field == "seed"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"prompt": "@fox alone"}, "prompt"),
        ({"num_frames": 80}, "num_frames"),
        ({"width": 500}, "width"),
        ({"guidance_scale": 99.0}, "sampling"),
    ],
)
def test_each_fault_names_its_field(form: Form, cast: Cast, change: dict, field: str) -> None:
    with pytest.raises(StudioError) as refused:
        replace(form, **change).job(cast, seed=0)
    assert refused.value.field == field


def test_a_subject_without_a_picture_is_refused_at_the_subjects(form: Form) -> None:
    with pytest.raises(StudioError, match="@fox has no picture") as refused:
        form.job(Cast((Slot("fox"),)), seed=0)
    assert refused.value.field == "subjects"


def test_names_stay_free_mentionable_and_follow_into_the_prompt(cast: Cast, picture: Picture) -> None:
    assert cast.add(Slot("Fox.PNG", (picture,)), most=4).names() == ["fox", "kite", "fox_png"]
    assert cast.add(Slot("fox", (picture,)), most=4).names()[-1] == "fox2"
    assert free_name("42 ünïcode !!", []) and free_name("", []) == "subject"
    assert renamed("@fox, @foxy and @Fox", "fox", "wolf") == "@wolf, @foxy and @wolf"


def test_a_full_cast_takes_nobody_more(cast: Cast) -> None:
    with pytest.raises(StudioError) as refused:
        cast.add(Slot("car"), most=2)
    assert refused.value.field == "subjects"


# --- cost ------------------------------------------------------------------------------------------------------------


def test_the_first_guess_is_the_presets_own_figures(job: GenerateJob, tmp_path: Path) -> None:
    preset = presets.load("toybox")
    cost, steps = preset.cost, preset.sampling.num_inference_steps or 0
    found = estimate.estimate(resolve(job), [], tmp_path)
    assert found.seconds == pytest.approx(cost.start_s + steps * cost.step_s + cost.decode_s)
    assert not found.learnt


def test_the_memory_said_is_the_plans_and_subjects_count(tmp_path: Path, cast: Cast) -> None:
    studio_job = Form.fresh(presets.load("toybox")).priced(cast)
    assert len(studio_job.subjects) == len(cast.slots)
    found = estimate.estimate(resolve(studio_job), [], tmp_path)
    assert found.fits and "binds" in found.memory and 500 < found.memory_mb < 5000


def test_a_machine_that_takes_twice_as_long_is_believed(job: GenerateJob, tmp_path: Path) -> None:
    guess = estimate.estimate(resolve(job), [], tmp_path).seconds
    done = replace(row_of(job, tmp_path), state="done", started=100.0, finished=100.0 + 2 * guess)
    assert estimate.estimate(resolve(job), [done], tmp_path).seconds == pytest.approx(2 * guess)


def test_steps_that_are_left_out_cost_nothing(job: GenerateJob, tmp_path: Path) -> None:
    preset = presets.load("toybox")
    cost, steps = preset.cost, preset.sampling.num_inference_steps or 0

    def drawing(word: str, count: int) -> float:
        settings = job.sampling.model_copy(update={"step_cache": word, "num_inference_steps": count})
        whole = estimate.estimate(resolve(job.model_copy(update={"sampling": settings})), [], tmp_path).seconds
        return whole - cost.start_s - cost.decode_s

    assert drawing("careful", steps) == pytest.approx(steps * preset.step_cache.careful.share * cost.step_s)
    assert drawing("fast", steps) < drawing("careful", steps) < drawing("off", steps)
    assert drawing("careful", 2 * steps) < 1.5 * drawing("careful", steps)  # twice the steps are not twice the work
    assert drawing("fast", 2) == pytest.approx(2 * cost.step_s)


def row_of(job: GenerateJob, folder: Path) -> Row:
    queue = Queue(folder / "queue.db")
    return queue.get(queue.add(job))


# --- stage -----------------------------------------------------------------------------------------------------------


def test_the_stage_shows_what_runs_then_what_waits_then_what_ended_last(job: GenerateJob, tmp_path: Path) -> None:
    queue = Queue(tmp_path / "queue.db")
    first, second, third = (queue.add(job) for _ in range(3))
    assert [row.id for row in clip_view.on_stage(queue.rows())] == [first]
    queue.take("w")
    queue.finish(first, Saved(tmp_path / "a.mp4", tmp_path / "a.json", tmp_path / "a.webp", 2.0, 17))
    assert [row.id for row in clip_view.on_stage(queue.rows())] == [second]
    queue.cancel(second)
    queue.cancel(third)
    assert [row.id for row in clip_view.on_stage(queue.rows())] == [first]


def test_variants_of_one_group_stand_together_with_the_clip_they_came_from(job: GenerateJob, tmp_path: Path) -> None:
    queue = Queue(tmp_path / "queue.db")
    first = queue.add(job)
    more = [queue.add(job, group=f"{clip_view.LIKE}{first}") for _ in range(3)]
    queue.add(job)
    queue.take("w")
    queue.cancelled(first)
    queue.take("w")
    assert [row.id for row in clip_view.on_stage(queue.rows())] == [first, *more]


def test_variants_stand_as_they_were_asked_for_until_all_have_ended_then_the_likest_comes_first(
    job: GenerateJob, tmp_path: Path
) -> None:
    queue = Queue(tmp_path / "queue.db")
    ids = [queue.add(job, group="g") for _ in range(5)]
    for weakest in (0.2, None, 0.9, 0.4):
        row = queue.take("w")
        assert row is not None
        queue.finish(
            row.id, Saved(tmp_path / "a.mp4", tmp_path / "a.json", tmp_path / "a.webp", 2.0, 17, None, weakest)
        )
    assert [row.id for row in clip_view.on_stage(queue.rows())] == ids[1:]
    queue.cancel(ids[4])
    assert [row.id for row in clip_view.on_stage(queue.rows())] == [ids[2], ids[3], ids[0], ids[1]]


def test_a_second_sanity_check_shows_its_own_clip_and_not_the_first_ones(job: GenerateJob, tmp_path: Path) -> None:
    queue = Queue(tmp_path / "queue.db")
    for weakest in (0.9, 0.1):
        latest = queue.add(job, group=clip_view.SANITY_GROUP)
        queue.take("w")
        queue.finish(latest, Saved(tmp_path / "a.mp4", tmp_path / "a.json", tmp_path / "a.webp", 2, 9, None, weakest))
        assert [row.id for row in clip_view.on_stage(queue.rows())] == [latest]


def test_a_wish_for_a_likeness_is_checked_and_nought_is_no_wish(form: Form) -> None:
    assert replace(form, until=0, tries=5).wanted() == (None, 0)
    assert replace(form, until=0.6, tries=5).wanted() == (0.6, 5)
    for until, tries in ((1.2, 5), (-0.1, 5), (0.5, 999), (0.5, -1)):
        with pytest.raises(StudioError) as refused:
            replace(form, until=until, tries=tries).wanted()
        assert refused.value.field == "until"


def test_what_a_person_wrote_is_shown_as_text(form: Form, cast: Cast, tmp_path: Path) -> None:
    hostile = replace(form, prompt="@fox <script>alert(1)</script> @kite").job(cast, seed=1)
    queue = Queue(tmp_path / "queue.db")
    id = queue.add(hostile)
    queue.take("w")
    queue.report(id, Progress("sample", 1, 2, note="<b>"))
    shown = clip_view.render(queue.rows())
    assert "<script" not in shown and "<b>1</b>" in shown and "&lt;b&gt;" in shown


def test_mentions_carry_their_subjects_colour() -> None:
    assert markup.prompt_text("@kite & @who", ["fox", "kite"]) == (
        '<span class="mention" style="--slot: var(--slot-1)">@kite</span> &amp; <span class="mention">@who</span>'
    )


# --- saved subjects --------------------------------------------------------------------------------------------------


def test_a_saved_subject_comes_back_without_the_file_it_came_from(cast: Cast, tmp_path: Path) -> None:
    saved = Subjects(tmp_path / "subjects")
    subject = cast.slots[1].subject()
    saved.save(subject)
    Path(subject.pictures[0].path).unlink()
    found = saved.load("kite")
    assert (found.role, found.weight, saved.names()) == ("background", 0.5, ["kite"])
    assert np.asarray(Image.open(found.pictures[0].path))[0, 0].tolist() == [255, 0, 0]
    saved.delete("kite")
    assert saved.names() == []


@pytest.mark.parametrize("name", ["../queue", "nobody", "A", ""])
def test_a_name_that_is_nobodys_is_refused_in_words(tmp_path: Path, name: str) -> None:
    with pytest.raises(StudioError):
        Subjects(tmp_path).load(name)


def test_a_clip_that_is_asked_to_stop_says_so_until_its_worker_hears_it(job: GenerateJob, tmp_path: Path) -> None:
    queue = Queue(tmp_path / "queue.db")
    id = queue.add(job)
    queue.take("worker")
    queue.report(id, Progress("sample", 3, 30, eta_s=900))
    queue.cancel(id)
    [row] = queue.rows()
    shown = clip_view.render([row])
    assert "Cancelling" in shown and "left" not in shown and 'data-act="cancel"' not in shown
    listed = queue_tab.render_rows([row])
    assert "Cancelling" in listed and 'data-act="cancel"' not in listed


def test_stage_and_queue_name_the_model_of_a_job(job: GenerateJob, tmp_path: Path) -> None:
    queue = Queue(tmp_path / "queue.db")
    queue.add(job)
    assert "Toybox" in clip_view.render(queue.rows()) and "Toybox" in queue_tab.render_rows(queue.rows())


# --- rows that are older than their preset ---------------------------------------------------------------------------


def outgrown(job: GenerateJob) -> GenerateJob:
    """A job that its preset took once and takes no more."""
    return job.model_copy(update={"num_frames": presets.load("toybox").max_frames + 4})


def test_a_clip_that_its_preset_takes_no_more_teaches_no_costs(job: GenerateJob, tmp_path: Path) -> None:
    old = replace(row_of(outgrown(job), tmp_path), state="done", started=100.0, finished=900.0)
    found = estimate.estimate(resolve(job), [old], tmp_path)
    assert found == estimate.estimate(resolve(job), [], tmp_path) and not found.learnt


def test_a_page_opens_on_the_example_where_the_latest_job_fits_its_preset_no_more(
    job: GenerateJob, tmp_path: Path
) -> None:
    studio = Studio.of(Settings(outputs=tmp_path))
    studio.queue.add(job)
    assert generate.opening(studio)[0].prompt == job.prompt
    studio.queue.add(outgrown(job))
    assert generate.opening(studio) == first_example()


def test_more_seeds_of_a_row_follow_the_highest_of_its_group(job: GenerateJob, tmp_path: Path) -> None:
    studio = Studio.of(Settings(outputs=tmp_path))
    first = studio.queue.get(studio.queue.add(job, group="g"))
    studio.queue.add(job.model_copy(update={"seed": 20}), group="g")
    generate.more_seeds(studio, replace(first, id=10_000))  # not among the rows that the queue lists
    assert {row.job.seed for row in studio.queue.rows() if row.job} == {7, 20, 21, 22, 23}
