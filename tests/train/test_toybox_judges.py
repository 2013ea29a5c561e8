"""Judges and report: what they take in, that they answer for the right subject, and that faults cost likeness."""

from __future__ import annotations

import base64
import io
import math
import shutil
from itertools import permutations
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from PIL import Image

from engine import presets
from engine.identity import reporter as identity
from engine.identity.crops import CROP, crop_subjects, to_unit
from engine.identity.reporter import AT_ONCE, Assignment, Reporter, enlarge, match_regions
from engine.identity.toybox import Embedder, Finder, Judges, ToyboxEvaluator, geometry, locate
from engine.job import read_job
from engine.loading.pool import ModelPool
from engine.media import video
from engine.paths import ROOT
from train.evaluation import statistics
from train.evaluation.clips import as_png, remake_clip
from train.toybox import benchmark, contact_sheet, judge_sanity, out_of_domain, world
from train.toybox.judges import losses, lost_shapes, teach
from train.toybox.judges.pools import CriticFrames
from train.toybox.recipe import ASSETS

SHIPPED = ROOT / "assets" / "judges" / "reward"


@pytest.fixture(scope="module")
def raw() -> Judges:
    """Judges that have learnt nothing."""
    torch.manual_seed(0)
    names = (list(world.VERBS), ["left", "right"], list(world.BACKGROUNDS), list(world.KINDS))
    return Judges("raw", 8, *names).eval().requires_grad_(False)


def subjects_of(*indices: int, kind: str = "robot") -> list[world.ToySubject]:
    return [world.make_subject(world.subject_seed(i, "heldout"), kind) for i in indices]


def pictures_of(subjects: list[world.ToySubject], seed: int = 3) -> list[np.ndarray]:
    return [world.reference_picture(subject, seed)[0] for subject in subjects]


# --- what they take in ---


def test_a_cut_out_is_the_subject_alone_in_the_middle_whatever_lies_around_it() -> None:
    frame = torch.rand(1, 3, 64, 64)
    mask = torch.zeros(1, 64, 64)
    mask[0, 5:25, 40:60] = 1
    mask[0, 5:12, 40:48] = 0  # a corner of its box is not its own
    elsewhere = torch.where(mask.bool().unsqueeze(1), frame, torch.rand(1, 3, 64, 64))
    first, second = crop_subjects(frame, mask), crop_subjects(elsewhere, mask)
    assert first.shape == (1, 3, CROP, CROP)
    assert torch.equal(first, second)
    moved = crop_subjects(frame.roll((7, -11), (2, 3)), mask.roll((7, -11), (1, 2)))
    assert torch.equal(first, moved)
    assert float(first[0, :, 0].min()) == 1.0  # a rim of paper


def test_a_reference_is_cut_out_by_its_white_paper() -> None:
    page = torch.ones(1, 3, 64, 64)
    page[0, :, 20:30, 8:48] = 0.2
    mask = torch.zeros(1, 64, 64)
    mask[0, 20:30, 8:48] = 1
    assert torch.equal(crop_subjects(page), crop_subjects(page, mask))
    assert torch.equal(crop_subjects(torch.ones(1, 3, 64, 64)), torch.ones(1, 3, CROP, CROP))


def test_geometry_knows_where_a_mask_is_how_large_and_which_way_it_leans() -> None:
    masks = torch.zeros(2, 2, 32, 32)
    masks[0, 0, 4:12, 20:28] = 1
    masks[1, 0] = torch.eye(32)
    area, y, x, down, across, slant, there = geometry(masks)[:, ::2].T
    assert float(area[0]) == pytest.approx(8 / 32) and float(y[0]) == pytest.approx(8 / 32 - 0.5)
    assert float(x[0]) == pytest.approx(24 / 32 - 0.5) and float(down[0]) == pytest.approx(float(across[0]))
    assert float(slant[0]) == pytest.approx(0, abs=1e-5) and float(slant[1]) > 1
    assert there.tolist() == [1, 1]
    assert geometry(masks)[:, 1::2].abs().max() == 0  # nobody


def test_shares_of_pixels_add_up_to_one_and_follow_the_order_of_the_references(raw: Judges) -> None:
    frames, pictures = torch.rand(2, 3, 64, 64), torch.rand(3, 2, 3, 64, 64)
    with torch.no_grad():
        looked = raw.locator.look(frames)
    shares = raw.locator(looked, pictures)
    assert shares.shape == (2, 4, 64, 64)
    torch.testing.assert_close(shares.sum(1), torch.ones(2, 64, 64))
    turned = raw.locator(looked, pictures[[2, 0, 1]])
    torch.testing.assert_close(turned[:, 1:], shares[:, [3, 1, 2]])


def test_a_subject_is_matched_alike_in_whatever_cast_and_however_many_pictures_others_have(raw: Judges) -> None:
    frames, pictures = torch.rand(2, 3, 64, 64), torch.rand(3, 2, 3, 64, 64)
    finder = Finder(raw, frames)
    first, second, third = (finder.match(own) for own in pictures)
    torch.testing.assert_close(finder.shares([first, second, third]), locate(raw, frames, list(pictures)))
    with torch.no_grad():
        torch.testing.assert_close(locate(raw, frames, list(pictures)), raw.locator(raw.locator.look(frames), pictures))
    torch.testing.assert_close(finder.match(pictures[0, [0, 1, 0, 1]]), first)  # twice each counts as once each
    torch.testing.assert_close(finder.shares([first, third]), locate(raw, frames, [pictures[0], pictures[2]]))


def test_references_of_their_own_for_each_frame_are_read_as_one_frame_would(raw: Judges) -> None:
    frames, pictures = torch.rand(2, 3, 64, 64), torch.rand(2, 3, 1, 3, 64, 64)
    figure, together = raw.locator.scores(frames, pictures)
    for number in range(2):
        alone_figure, alone = raw.locator.scores(frames[number : number + 1], pictures[number])
        torch.testing.assert_close(together[number], alone[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(figure[number], alone_figure[0], atol=1e-4, rtol=1e-4)


def test_a_set_is_read_back_as_it_was_written(raw: Judges, tmp_path: Path) -> None:
    raw.save(tmp_path)
    again = Judges.load(tmp_path)
    assert (again.name, again.verbs, again.places) == (raw.name, raw.verbs, raw.places)
    for name, value in raw.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value.half().to(value.dtype))


def test_a_set_has_a_critic_once_it_has_been_taught_one(raw: Judges, tmp_path: Path) -> None:
    assert raw.critic is None
    with pytest.raises(ValueError, match="no critic"):
        raw.drawn_probability(torch.rand(1, 3, 64, 64))
    both = Judges("raw", 8, raw.verbs, ["left", "right"], raw.places, raw.kinds, critic=True)
    both.save(tmp_path)
    frames = torch.rand(3, 3, 64, 64)
    sure = Judges.load(tmp_path).drawn_probability(frames)
    torch.testing.assert_close(sure, both.eval().drawn_probability(frames).detach(), atol=1e-2, rtol=0)
    assert sure.shape == (3,) and bool(((sure >= 0) & (sure <= 1)).all())


def test_a_critic_learns_to_tell_two_kinds_of_frames() -> None:
    pool = CriticFrames.__new__(CriticFrames)
    rng = np.random.default_rng(0)
    pool.drawn = rng.integers(0, 255, (24, 4, 4, 3), dtype=np.uint8).repeat(16, 1).repeat(16, 2)
    pool.generated = np.clip(pool.drawn + rng.integers(-60, 60, pool.drawn.shape), 0, 255).astype(np.uint8)
    judges = teach.new_judges("reward").train()
    optimizer = torch.optim.AdamW(judges.critic.parameters(), lr=5e-3)
    for _ in range(150):
        loss = losses.critic_loss(judges, pool, rng)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        sure = [judges.drawn_probability(to_unit(torch.from_numpy(frames))) for frames in (pool.drawn, pool.generated)]
    assert float((sure[0] > 0.5).float().mean()) > 0.9 and float((sure[1] < 0.5).float().mean()) > 0.9


# --- the report ---


def reported(who: Judges, frames: np.ndarray, pictures: list[np.ndarray], at_once: int = AT_ONCE):
    names = tuple((f"s{place + 1}", place) for place in range(len(pictures)))
    answer = Assignment(ToyboxEvaluator(who, [[p] for p in pictures]), names)
    reporter = Reporter([answer], fps=8, num_frames=len(frames), at_once=at_once)
    for frame in frames:
        reporter.see(frame)
    return reporter.finish()


def test_every_region_is_given_to_whom_it_resembles_one_to_one() -> None:
    similarity = np.array([[0.2, 0.9, 0.1], [0.8, 0.7, 0.1], [0.3, 0.3, 0.2]])
    assert match_regions(similarity) == [1, 0, 2]
    assert match_regions(similarity[:2]) == [1, 0, None]
    assert match_regions(similarity[:0]) == [None, None, None]
    greedy = np.array([[0.9, 0.8], [0.85, 0.1]])
    assert match_regions(greedy) == [1, 0]  # the sum counts, not the first come


@pytest.mark.parametrize("regions", [2, 3, 5])
@pytest.mark.parametrize("seed", range(6))
def test_the_best_matching_is_the_best_of_all(regions: int, seed: int) -> None:
    similarity = np.random.default_rng(seed).random((regions, 3)) * 2 - 1
    found = match_regions(similarity)
    pairs = [(region, subject) for subject, region in enumerate(found) if region is not None]
    fewer, more = sorted((regions, 3))
    assert len(pairs) == fewer == len({region for region, _ in pairs})
    orders = [list(zip(range(fewer), order, strict=True)) for order in permutations(range(more), fewer)]
    totals = [sum(float(similarity[(a, b) if regions <= 3 else (b, a)]) for a, b in order) for order in orders]
    assert sum(float(similarity[pair]) for pair in pairs) == pytest.approx(max(totals))


def test_a_report_does_not_depend_on_how_many_frames_are_judged_at_once(raw: Judges) -> None:
    pair = subjects_of(1, 2)
    clip = world.render(world.make_scene(5, subjects=pair, split="heldout"), num_frames=9)
    assert reported(raw, clip.frames, pictures_of(pair), 2) == reported(raw, clip.frames, pictures_of(pair), 9)


def test_a_clip_of_another_size_is_judged_at_the_size_the_judges_know(raw: Judges) -> None:
    shares = locate(raw, torch.rand(1, 3, 96, 128), [torch.rand(1, 3, 64, 64), torch.rand(2, 3, 64, 64)])
    assert shares.shape == (1, 3, 96, 128)


def test_an_outline_runs_around_its_subject_and_nowhere_else() -> None:
    frame, instance_ids = np.full((16, 16, 3), 90, np.uint8), np.zeros((16, 16), np.uint8)
    instance_ids[4:10, 5:12] = 2
    drawn = enlarge(frame, 64)
    identity.draw_outline(drawn, instance_ids == 2, (0, 255, 0))
    changed = (drawn != 90).any(-1)
    assert drawn.shape == (64, 64, 3) and changed.any()
    assert tuple(drawn[changed][0]) == (0, 255, 0)
    assert not changed[:12].any() and not changed[:, 52:].any() and not changed[24:32, 30:40].any()


# --- the shipped judges, on drawings they have never seen ---


@pytest.fixture(scope="module")
def shipped() -> Judges:
    return Judges.load(SHIPPED)


def test_planted_faults_lower_the_score(shipped: Judges) -> None:
    vae = AutoencoderKLWan.from_pretrained(ASSETS / "vae").float().eval()
    shares = judge_sanity.measure_noticed_faults(shipped, vae, count=4)
    assert set(shares) == {"swapped", "missing", "merged", "recoloured", "frozen", "flickering", "shape lost", "grain"}
    assert min(shares.values()) >= 0.75 and sum(shares.values()) / len(shares) >= 0.9


def test_drawn_clips_stand_high_on_the_scale_and_lost_shapes_low(shipped: Judges) -> None:
    vae = AutoencoderKLWan.from_pretrained(ASSETS / "vae").float().eval()
    shares = judge_sanity.measure_likenesses(shipped, vae, count=5)
    assert shares["drawn above 0.85"] >= 0.8 and shares["lost below 0.4"] >= 0.9


def test_a_fault_changes_what_it_says_and_nothing_else() -> None:
    of = judge_sanity.draw_fault_case(0)
    clean = world.render(of.scene, num_frames=9)
    elsewhere = clean.instance_ids != 2
    assert np.array_equal(judge_sanity.recolour_second(of, clean)[elsewhere], clean.frames[elsewhere])
    frozen = judge_sanity.freeze(of, clean)
    assert np.array_equal(frozen[0], frozen[-1]) and not np.array_equal(clean.frames[0], clean.frames[-1])
    flickering = judge_sanity.flicker(of, clean)
    assert np.array_equal(flickering[::2], clean.frames[::2]) and not np.array_equal(flickering[1], clean.frames[1])
    assert not (judge_sanity.hide_second(of, clean) == clean.frames).all()


@pytest.mark.parametrize("shape", [*lost_shapes.SHAPES])
def test_a_lost_shape_keeps_the_colours_and_the_place_and_nothing_else_changes(shape: str) -> None:
    scene = world.make_scene(7, subjects=tuple(subjects_of(3, 4, kind="fox")), split="heldout")
    clip, bare = world.render(scene, num_frames=1), world.render(scene, num_frames=1, hide=(2,))
    mask = clip.instance_ids[0] == 2
    frame, where = lost_shapes.lose_shape(bare.frames[0], clip.frames[0], mask, shape, seed=5)
    again, _ = lost_shapes.lose_shape(bare.frames[0], clip.frames[0], mask, shape, seed=5)
    assert np.array_equal(frame, again)
    inside = cv2.dilate(where.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
    assert np.abs(frame[~inside].astype(int) - bare.frames[0][~inside]).mean() < 6  # redrawn larger, averaged down
    assert (where & mask).sum() / (where | mask).sum() > 0.3
    colourful = clip.frames[0][mask & (clip.frames[0].max(-1) > lost_shapes.DARK)].mean(0)
    assert np.abs(frame[where & (frame.max(-1) > lost_shapes.DARK)].mean(0) - colourful).max() < 60
    nothing = np.zeros_like(mask)
    unchanged, _ = lost_shapes.lose_shape(bare.frames[0], clip.frames[0], nothing, shape, seed=5)
    assert np.array_equal(unchanged, bare.frames[0])


def test_a_scale_of_likeness_keeps_the_order_and_leads_through_its_knots(raw: Judges, tmp_path: Path) -> None:
    cosines = torch.linspace(-1, 1, 41)
    assert torch.equal(raw.likeness(cosines), cosines)
    names = (raw.verbs, ["left", "right"], raw.places, raw.kinds)
    scaled = Judges("raw", 8, *names, knots=[(0.3, 0.2), (0.6, 0.4), (0.8, 0.95)])
    scaled.save(tmp_path)
    for judges in (scaled, Judges.load(tmp_path)):
        found = judges.likeness(cosines)
        assert bool((found.diff() > 0).all()) and found[0] == -1 and found[-1] == 1
        knots = judges.likeness(torch.tensor([0.3, 0.6, 0.8, 0.7]))
        torch.testing.assert_close(knots, torch.tensor([0.2, 0.4, 0.95, 0.675]))


def test_an_embedding_has_length_one_and_another_kind_leaves_half_of_it(raw: Judges) -> None:
    looks, scores = raw.embedder.describe(torch.rand(3, 3, CROP, CROP))
    assert scores.shape == (3, len(raw.kinds) + 1)  # one more for "none of them"
    whole = raw.embedder.join(looks, scores)
    torch.testing.assert_close(whole.norm(dim=1), torch.ones(3))
    fox, ball = (torch.full_like(scores, -200.0).index_fill(1, torch.tensor([place]), 200.0) for place in (0, 9))
    sure_fox, sure_ball = raw.embedder.join(looks, fox), raw.embedder.join(looks, ball)
    torch.testing.assert_close((sure_fox * sure_fox).sum(1), torch.ones(3))
    torch.testing.assert_close((sure_fox * sure_ball).sum(1), torch.full((3,), 0.5))


def test_an_embedder_has_a_slope_where_it_is_sure_of_a_kind() -> None:
    embedder = Embedder(4, kinds=2)
    scores = torch.tensor([[300.0, 0.0, -300.0], [0.0, 300.0, 0.0]], requires_grad=True)
    looks = torch.eye(64)[:2]
    first, second = embedder.join(looks, scores)
    (first * second).sum().backward()
    assert scores.grad is not None and bool(scores.grad.isfinite().all())


def test_the_shipped_critic_tells_the_shipped_clip_from_drawings(shipped: Judges) -> None:
    vae = AutoencoderKLWan.from_pretrained(ASSETS / "vae").float().eval()
    clips = [world.render(world.make_scene(number, split="heldout"), num_frames=1).frames for number in range(12)]
    drawings = benchmark.round_trip(np.concatenate(clips)[:9], vae)
    made = video.read_frames(ASSETS.parent / "sanity.mp4", display_scale=presets.load("toybox").display_scale)
    of_drawings, of_made = (
        float(shipped.drawn_probability(to_unit(torch.from_numpy(each))).mean()) for each in (drawings, made)
    )
    assert of_made < 0.5 < of_drawings


def test_the_shipped_clip_is_what_the_shipped_checkpoint_makes_of_its_document(tmp_path: Path) -> None:
    for suffix in (".json", ".mp4", ".webp"):
        shutil.copyfile(ASSETS.parent / f"sanity{suffix}", tmp_path / f"sanity{suffix}")
    scale, before = presets.load("toybox").display_scale, tmp_path / "sanity.mp4"
    shipped_frames = video.read_frames(before, display_scale=scale)
    before.unlink()
    remake_clip(tmp_path / "sanity.json", ModelPool(torch.device("cpu")))
    made = video.read_frames(before, display_scale=scale)
    assert made.shape == shipped_frames.shape
    assert np.abs(made.astype(int) - shipped_frames).mean() < 3  # levels; processors differ in their last bits
    assert read_job((tmp_path / "sanity.json").read_text(encoding="utf-8")).sampling == presets.load("toybox").sampling


def test_a_subject_is_nearer_to_its_own_picture_than_to_others_of_its_kind(shipped: Judges) -> None:
    robots = subjects_of(*range(40, 48))
    known = shipped.embedder(crop_subjects(to_unit(torch.from_numpy(np.stack(pictures_of(robots))))))
    again = shipped.embedder(crop_subjects(to_unit(torch.from_numpy(np.stack(pictures_of(robots, seed=8))))))
    assert (again @ known.T).argmax(1).tolist() == list(range(8))


# --- the benchmark ---


def test_the_benchmark_holds_as_many_jobs_of_each_kind_as_opens2vs_and_every_third_is_a_third() -> None:
    jobs = benchmark.list_cases()
    assert len(jobs) == 270 and len({each.id for each in jobs}) == 270
    counts = [sum(len(each.scene.subjects) == number for each in jobs) for number in (1, 2, 3, 4)]
    assert counts == [90, 60, 60, 60]
    assert len(benchmark.list_cases(every=3)) == 90
    for each in jobs:
        assert all(world.split_of(subject.seed) == "heldout" for subject in each.scene.subjects)
        words = set(each.job.prompt.split()) | {s.noun for s in each.job.subjects}
        assert not words & world.ATTRIBUTE_WORDS
    assert benchmark.list_cases()[7].job == jobs[7].job


def test_candidates_are_of_the_subjects_kind_and_never_itself() -> None:
    case = benchmark.draw_case("toybox", "twocreatures", 0, 2)
    own = case.scene.subjects[0]
    out_of_domain = benchmark._draw_others(case.id, 0, own)
    assert len(out_of_domain) == benchmark.CANDIDATES - 1
    own_picture = to_unit(torch.from_numpy(world.reference_picture(own, 0)[0]))
    assert min(float((other - own_picture).abs().mean()) for other in out_of_domain) > 0.005


def test_every_candidate_is_looked_for_in_the_same_way(shipped: Judges) -> None:
    """Which of them is the own one is nowhere told: in another order each has the figure it had."""
    case = benchmark.draw_case("toybox", "twocreatures", 2, 2)
    frames = to_unit(torch.from_numpy(world.render(case.scene, num_frames=5).frames))
    pictures = [to_unit(torch.from_numpy(benchmark._decode_picture(subject)[None])) for subject in case.job.subjects]
    candidates = torch.cat([pictures[1], benchmark._draw_others(case.id, 1, case.scene.subjects[1])[:4]])
    finder = Finder(shipped, frames)
    matches = [finder.match(own) for own in pictures]
    found = benchmark._measure_looks(shipped, frames, finder, matches, 1, candidates)
    assert found[0] == max(found) > 0.5
    elsewhere = [matches[0], finder.match(candidates[3:4])]
    turned = benchmark._measure_looks(shipped, frames, finder, elsewhere, 1, candidates.flip(0))
    assert turned[::-1] == pytest.approx(found, abs=1e-5)
    white = Finder(shipped, torch.ones_like(frames))
    matches = [white.match(own) for own in pictures]
    assert benchmark._measure_looks(shipped, torch.ones_like(frames), white, matches, 1, candidates) == [0.0] * 5


def test_withheld_references_leave_words_alone_and_swapped_ones_keep_them() -> None:
    case = benchmark.draw_case("toybox", "samekind", 1, 2)
    alone = benchmark.withhold_references(case, attributes=False).instead
    assert alone is not None and alone.subjects == () and "subject 1, a" in alone.prompt and "@" not in alone.prompt
    told = benchmark.withhold_references(case, attributes=True).instead
    assert told is not None and set(told.prompt.replace(",", " ").split()) & world.ATTRIBUTE_WORDS
    turned = benchmark.swap_references(case)
    assert turned.job.prompt == case.job.prompt and turned.scene.subjects == case.scene.subjects[::-1]
    assert turned.job.subjects[0].pictures == case.job.subjects[1].pictures


def test_an_interval_holds_its_mean_and_narrows_with_more_jobs() -> None:
    few, many = [[0.0], [1.0]] * 5, [[0.0], [1.0]] * 500
    mean, low, high = statistics.interval(few)
    assert low < mean == 0.5 < high
    _, nearer_low, nearer_high = statistics.interval(many)
    assert nearer_high - nearer_low < (high - low) / 3
    assert statistics.interval([[], []]) is None


def test_orders_agree_when_ranks_do_whatever_the_figures_are() -> None:
    values = [0.1, 0.5, 0.2, 0.9, 0.4]
    assert statistics.spearman(values, [math.exp(8 * v) for v in values]) == pytest.approx(1)
    assert statistics.spearman(values, [-v for v in values]) == pytest.approx(-1)
    assert statistics.spearman([1, 1, 2, 3], [1, 2, 2, 3]) == pytest.approx(
        5 / 6
    )  # equals share the mean of their ranks
    assert statistics.spearman([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(0.8)
    assert statistics.spearman(values, [0.3] * 5) == 0


def test_two_sets_are_asked_about_the_same_clips(shipped: Judges, tmp_path: Path) -> None:
    preset = presets.load("toybox")
    jobs = [benchmark.draw_case("toybox", "onething", number, 1) for number in range(3)]
    frames = [world.render(each.scene, num_frames=9).frames for each in jobs]
    for each, clip in zip(jobs, frames, strict=True):
        size, scale = (64, 64), preset.display_scale
        path = tmp_path / f"{each.id}.mp4"
        with video.ClipWriter(path, fps=8, size=size, display_scale=scale, document="{}") as writer:
            for frame in clip:
                writer.write(frame)
    found = [benchmark.judge(each, clip, shipped) for each, clip in zip(jobs, frames, strict=True)]
    assert benchmark.measure_agreement(jobs, found, tmp_path, shipped) >= 0.5  # mp4 changes little
    assert benchmark.measure_agreement(jobs, [*reversed(found)], tmp_path, shipped) < 0.5


def test_ground_truth_is_recognised_by_the_benchmark(shipped: Judges) -> None:
    jobs = [benchmark.draw_case("toybox", "creaturething", number, 2) for number in range(4)]
    rows = benchmark.table({"drawn": benchmark.judge_ground_truth(jobs, shipped, presets.load("toybox"))})
    assert rows["drawn"]["own picture first of 16"][0] >= 0.75
    assert rows["drawn"]["place"][0] >= 0.75
    assert "| drawn |" in statistics.as_text(rows)


@pytest.mark.parametrize("subjects", [1, 2, 3, 4])
def test_a_sheet_has_jobs_for_every_number_of_subjects(subjects: int) -> None:
    for number in range(6):
        job = contact_sheet.held_out_job(number, subjects=subjects)
        assert len(job.subjects) == subjects and job == contact_sheet.held_out_job(number, subjects=subjects)


def test_a_png_holds_the_picture() -> None:
    picture = np.arange(12 * 12 * 3, dtype=np.uint8).reshape(12, 12, 3)
    with Image.open(io.BytesIO(base64.b64decode(as_png(picture)))) as image:
        assert np.array_equal(np.asarray(image), picture)


# --- subjects that somebody else drew ---


def drawn_shape(turn: float, scale: float, colour: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """An L of one colour, turned and scaled."""
    outline = np.array([[-20, -30], [0, -30], [0, 10], [25, 10], [25, 30], [-20, 30]], float) * scale
    c, s = np.cos(turn), np.sin(turn)
    points = (outline @ np.array([[c, s], [-s, c]]) + 64).round().astype(np.int32)
    mask = np.zeros((128, 128), np.uint8)
    cv2.fillPoly(mask, [points], 1)
    picture = np.full((128, 128, 3), 255, np.uint8)
    picture[mask > 0] = colour
    return picture, mask > 0


def test_traits_do_not_care_how_large_or_turned_a_subject_is_and_tell_colours_and_shapes_apart() -> None:
    still = out_of_domain.traits(*drawn_shape(0, 1, (200, 40, 40)))
    turned = out_of_domain.traits(*drawn_shape(0.7, 0.8, (200, 40, 40)))
    blue = out_of_domain.traits(*drawn_shape(0, 1, (40, 40, 200)))
    picture, mask = drawn_shape(0, 1, (200, 40, 40))
    square = np.zeros_like(mask)
    square[40:90, 40:90] = True
    boxed = out_of_domain.traits(np.where(square[..., None], [[[200, 40, 40]]], 255).astype(np.uint8), square)
    assert out_of_domain.distance(still, still) == pytest.approx(0, abs=1e-6)
    assert out_of_domain.distance(still, turned) < 0.1 < out_of_domain.distance(still, boxed)
    assert out_of_domain.distance(still, blue) > 0.4
    assert out_of_domain.traits(picture, mask)[0].sum() == pytest.approx(1)


def test_a_subject_that_cannot_be_seen_finds_nothing_and_one_that_is_copied_finds_itself() -> None:
    known = [out_of_domain.traits(*drawn_shape(0.3 * i, 0.6 + 0.03 * i, (10 * i, 255 - 12 * i, 90))) for i in range(18)]
    assert not out_of_domain.finds_own_picture(4, None, known)
    assert all(out_of_domain.finds_own_picture(i, known[i], known) for i in range(18))
    assert not out_of_domain.finds_own_picture(4, known[9], [*known[:4], known[17], *known[5:]])
