"""The reader of captions: what a caption lets one know, and that the shipped one knows it at the word that is asked."""

from __future__ import annotations

import numpy as np
import torch

from train.toybox import recipe, text, world


def test_a_caption_lets_one_know_who_does_what_to_whom() -> None:
    facts = world.Facts(("fox", "kite"), (world.Action("chases", (2, 1), "left"),), "beach", "pan left")
    told = text.answers(facts, "subject 1, a fox, is chased by subject 2, a kite, on a beach, the camera pans left")
    assert told["part"] == [1, 0] and told["with"] == [2, 1]
    assert [text.Quiz.SLOT["kind"][answer] for answer in told["kind"]] == ["fox", "kite"]
    assert told["way"] == [0, 0]  # the camera's left is not theirs
    assert text.Quiz.WHOLE["camera"][told["camera"]] == "pan left"
    told = text.answers(facts, "subject 2 chases subject 1 to the left")
    assert told["way"] == [1, 1] and told["kind"] == [0, 0] and told["camera"] == 0
    tokenizer = text.load_tokenizer(recipe.ASSETS / "tokenizer")
    words = tokenizer("subject 2 chases subject 1 to the left", return_tensors="pt")["input_ids"]
    numbers = text.slots_of_words(words, tokenizer)
    assert numbers[numbers > 0].tolist() == [2, 1]


def test_a_path_is_where_each_subject_is_seen_at_each_moment() -> None:
    scene = world.make_scene(5, num_subjects=2, verb="chases left", camera="still")
    actor, other = (k - 1 for k in scene.actions[0].slots)
    paths = torch.tensor(text.path_of(scene)).view(2, len(text.MOMENTS), 3)
    assert (paths[actor, :, 0] > paths[other, :, 0]).all()  # whoever chases is behind
    assert (paths[:, 1:, 0] < paths[:, :-1, 0]).all()
    rising = world.make_scene(6, num_subjects=1, verb="flies up", camera="still")
    path = torch.tensor(text.path_of(rising)).view(len(text.MOMENTS), 3)
    assert (path[1:, 1] < path[:-1, 1]).all()
    every = torch.tensor([row for seed in range(200) for row in text.path_of(world.make_scene(seed))])
    assert 0.3 < float(every.std()) < 2 and abs(float(every.mean())) < 0.5


@torch.no_grad()
def test_the_shipped_reader_of_captions_says_at_each_number_who_acts_and_how() -> None:
    """A linear look at the word's state is enough: fitted on some captions, right on others."""
    tokenizer = text.load_tokenizer(recipe.ASSETS / "tokenizer")
    encoder = text.UMT5EncoderModel.from_pretrained(recipe.ASSETS / "text_encoder", dtype=torch.float32).eval()
    rng = np.random.default_rng(7)
    states, parts, verbs = [], [], []
    for _ in range(600):
        scene = world.make_scene(int(rng.integers(2**28)), num_subjects=2, split="heldout")
        facts, caption = scene.facts, world.caption(scene, False, rng)
        words = tokenizer([caption], return_tensors="pt")
        told, numbers = text.answers(facts, caption), text.slots_of_words(words["input_ids"], tokenizer)[0]
        seen = encoder(**words).last_hidden_state[0]
        for word in numbers.nonzero().flatten().tolist():
            slot = int(numbers[word]) - 1
            states.append(seen[word])
            parts.append(told["part"][slot])
            verbs.append(told["verb"][slot])
    x = torch.nn.functional.pad(torch.stack(states).double(), (0, 1), value=1)
    for answers, least in ((parts, 0.9), (verbs, 0.9)):
        wanted = torch.nn.functional.one_hot(torch.tensor(answers)).double()
        known, asked = slice(0, 900), slice(900, None)
        fit = torch.linalg.lstsq(x[known], wanted[known]).solution
        assert float(((x[asked] @ fit).argmax(1) == wanted[asked].argmax(1)).double().mean()) > least
