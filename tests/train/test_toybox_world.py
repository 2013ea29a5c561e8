"""The toybox world, without torch: seeds, masks, captions, references, room in the frame."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from train.toybox import world
from train.toybox.world.drawing import PATTERNS, far_apart

pytest.importorskip("cv2")


def test_the_same_seed_gives_the_same_pixels_masks_and_caption():
    a, b = (world.render(world.make_scene(7), 64, 9) for _ in range(2))
    assert np.array_equal(a.frames, b.frames) and np.array_equal(a.instance_ids, b.instance_ids)
    assert a.caption == b.caption and a.poses == b.poses
    assert not np.array_equal(a.frames, world.render(world.make_scene(8), 64, 9).frames)


def test_identities_of_two_splits_never_meet():
    ranges = [(world.subject_seed(0, s), world.subject_seed(world.IDENTITIES - 1, s)) for s in world.SPLITS]
    for (_, last), (first, _) in zip(sorted(ranges), sorted(ranges)[1:], strict=False):
        assert last < first
    for split in world.SPLITS:
        for seed in range(50):
            assert {world.split_of(s.seed) for s in world.make_scene(seed, split=split).subjects} == {split}


def test_an_identity_outside_its_split_is_refused():
    with pytest.raises(ValueError, match="outside"):
        world.subject_seed(-1, "heldout")
    with pytest.raises(ValueError, match="is no split"):
        world.subject_seed(0, "validation")


@pytest.mark.parametrize("kind", world.KINDS)
def test_two_identities_of_a_kind_look_different(kind):
    pose = world.Pose(0.5, 0.5, 0.8)
    pictures = []
    for index in range(8):
        canvas = np.full((64, 64, 3), 255, np.uint8)
        world.draw(canvas, world.make_subject(world.subject_seed(index), kind), pose)
        pictures.append(canvas.astype(int))
    differences = [np.abs(a - b).mean() for i, a in enumerate(pictures) for b in pictures[:i]]
    assert min(differences) > 4  # of 255, and three quarters of the picture are white


def test_leaving_a_subject_out_changes_pixels_only_where_it_was():
    for seed in range(12):
        scene = world.make_scene(seed, num_subjects=1 + seed % 4)
        whole = world.render(scene, 64, 5)
        for slot in range(1, len(scene.subjects) + 1):
            without = world.render(scene, 64, 5, hide=(slot,))
            assert not (without.instance_ids == slot).any()
            for frame in range(5):
                changed = (whole.frames[frame] != without.frames[frame]).any(-1)
                assert not (changed & ~_grown(whole.instance_ids[frame] == slot, 2)).any()
                inside = ~_grown(whole.instance_ids[frame] != slot, 2)
                assert changed[inside].mean() > 0.8 if inside.any() else True


def _grown(mask, steps):
    for _ in range(steps):
        padded = np.pad(mask, 1)
        shifts = [padded[1 + dy : 65 + dy, 1 + dx : 65 + dx] for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
        mask = np.any(shifts, axis=0)
    return mask


def test_face_boxes_lie_on_creatures_and_on_nothing_else():
    for seed in range(30):
        clip = world.render(world.make_scene(seed), 64, 1)
        for k, subject in enumerate(clip.scene.subjects):
            box = clip.face_boxes[0, k]
            assert np.isnan(box).all() == (subject.role != "creature")
            if subject.role == "creature":
                pose = clip.poses[0][k]
                assert abs(box[[0, 2]].mean() / 64 - pose.x) < pose.scale
                assert 2 < box[2] - box[0] < 64 and 2 < box[3] - box[1] < 64


def test_every_word_of_a_caption_is_in_the_vocabulary():
    known = set(world.vocabulary())
    for seed in range(400):
        scene = world.make_scene(seed)
        for attributes in (True, False):
            assert set(world.words_of(world.caption(scene, attributes))) <= known


def test_captions_without_attributes_name_no_colour_pattern_or_accessory():
    for seed in range(400):
        words = set(world.words_of(world.caption(world.make_scene(seed), False)))
        assert not words & world.ATTRIBUTE_WORDS
    named = [bool(set(world.words_of(world.caption(world.make_scene(s)))) & world.ATTRIBUTE_WORDS) for s in range(800)]
    assert 0.18 < np.mean(named) < 0.27


def test_captions_say_who_does_what():
    scene = world.make_scene(3, num_subjects=2, verb="chases left", background="beach")
    (action,) = scene.actions
    assert action.verb == "chases" and action.direction == "left" and sorted(action.slots) == [1, 2]
    for seed in range(40):
        text = world.caption(scene, False, np.random.default_rng(seed))
        assert "subject 1" in text and "subject 2" in text
        assert "right" not in text


@pytest.mark.parametrize("verb", world.VERBS)
def test_subjects_stay_inside_the_frame_for_every_verb(verb):
    for seed in range(6):
        scene = world.make_scene(seed, verb=verb)
        for frame in range(17):
            for subject, pose in zip(scene.subjects, world.poses_at(scene, frame / 16, 2.0), strict=True):
                left, top, right, bottom = world.extents(subject, pose)
                seen_x = min(1, pose.x + right) - max(0, pose.x + left)
                seen_y = min(1, pose.y + bottom) - max(0, pose.y + top)
                assert seen_x * seen_y > 0.8 * (right - left) * (bottom - top)


@pytest.mark.parametrize(
    ("verb", "axis", "sign"),
    [
        ("walks left", "x", -1),
        ("walks right", "x", 1),
        ("chases right", "x", 1),
        ("flies up", "y", -1),
        ("falls down", "y", 1),
    ],
)
def test_what_a_verb_says_is_what_happens_within_nine_frames(verb, axis, sign):
    for seed in range(10):
        scene = world.make_scene(seed, verb=verb, num_subjects=2, camera="still")
        first, last = (world.poses_at(scene, u, 1.0) for u in (0.0, 1.0))
        for slot in scene.actions[0].slots:
            moved = getattr(last[slot - 1], axis) - getattr(first[slot - 1], axis)
            assert moved * sign > 0.15
            if axis == "x":
                assert last[slot - 1].flip == (sign < 0)


def test_clips_of_sixty_five_frames_and_odd_shapes_work():
    scene = world.make_scene(5, num_subjects=2)
    long = world.render(scene, 32, 65)
    assert long.frames.shape == (65, 32, 32, 3)
    wide = world.render(scene, (96, 48), 5)
    assert wide.frames.shape == (5, 48, 96, 3) and wide.instance_ids.shape == (5, 48, 96)
    assert set(np.unique(wide.instance_ids)) == {0, 1, 2}


def test_eight_frames_are_refused_with_the_two_nearest_lengths():
    with pytest.raises(ValueError, match="Use 5 or 9"):
        world.render(world.make_scene(0), 32, 8)


def test_a_still_shows_the_moment_asked_for():
    scene = world.make_scene(1, num_subjects=1, verb="walks right")
    clip, still = world.render(scene, 64, 17), world.render(scene, 64, 1, moment=0.5)
    assert np.array_equal(clip.frames[8], still.frames[0])


def test_a_reference_shows_another_pose_than_the_clip():
    for seed in range(10):
        scene = world.make_scene(seed, num_subjects=1)
        clip = world.render(scene, 64, 5)
        picture, mask = world.reference_picture(scene.subjects[0], seed)
        assert picture.shape == (64, 64, 3) and mask.shape == (64, 64) and mask.dtype == bool
        rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
        assert 0.5 < max(np.ptp(rows), np.ptp(columns)) / 64 < 0.95
        assert (picture[~_grown(mask, 2)] == 255).all()
        for frame in range(5):
            cut, _ = world.cut_from_clip(clip, 1, frame)
            assert np.abs(cut.astype(int) - picture).mean() > 4
        assert not np.array_equal(picture, world.reference_picture(scene.subjects[0], seed + 1)[0])


def test_a_cut_reference_holds_the_clips_own_pixels():
    clip = world.render(world.make_scene(2, num_subjects=1, verb="stands still"), 64, 5)
    cut, mask = world.cut_from_clip(clip, 1, 0, 64)
    inside = clip.frames[0][clip.instance_ids[0] == 1].astype(int).mean(0)
    assert np.abs(cut[mask].astype(int).mean(0) - inside).max() < 12
    with pytest.raises(ValueError, match="cannot be seen"):
        world.cut_from_clip(clip, 2, 0)


def test_a_quarter_of_training_subjects_are_patchwork_and_casts_often_share_a_kind():
    scenes = [world.make_scene(seed) for seed in range(1200)]
    kinds = [s.kind for scene in scenes for s in scene.subjects]
    assert 0.21 < np.mean([k == world.PATCHWORK for k in kinds]) < 0.31
    crowds = [scene for scene in scenes if len(scene.subjects) > 1]
    assert 0.3 < np.mean([len({s.kind for s in c.subjects}) < len(c.subjects) for c in crowds]) < 0.55


def test_every_colour_has_partners_it_stays_apart_from():
    for colour in world.PALETTE:
        assert sum(far_apart(colour, other) for other in world.PALETTE) >= 4
    assert set(PATTERNS) >= {"plain", "stripes", "spots", "checks", "halves", "rings"}


def test_verbs_that_need_more_room_are_refused_in_crowds():
    with pytest.raises(ValueError, match="needs 2 to 2 subjects"):
        world.make_scene(0, verb="circles", num_subjects=3)
    with pytest.raises(ValueError, match="is no verb"):
        world.make_scene(0, verb="spins left")


def test_importing_the_world_needs_neither_torch_nor_cv2():
    code = "import sys, train.toybox.world; assert not {'torch', 'cv2'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
