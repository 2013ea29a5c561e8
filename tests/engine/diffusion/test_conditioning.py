"""What each branch of guidance knows, and that keeping the subjects or reading them again is the same."""

from __future__ import annotations

import pytest
import torch

from engine import tiny
from engine.diffusion.conditioning import Encoded, IdentityBlocks, PlainText, prepare
from engine.models.subject_tower import References


@pytest.fixture(scope="module")
def transformer():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return tiny.stir(tiny.transformer(), 1.0)


@pytest.fixture(scope="module")
def encoded() -> Encoded:
    torch.manual_seed(1)
    references = References(
        latents=torch.randn(1, 2, 1, tiny.LATENT_CHANNELS, 4, 4), vlm_states=torch.randn(1, 5, tiny.VLM_DIM)
    )
    return Encoded(torch.randn(1, 8, tiny.TEXT_DIM), torch.randn(1, 8, tiny.TEXT_DIM), references)


@pytest.fixture(scope="module")
def noisy() -> torch.Tensor:
    return torch.randn(1, tiny.LATENT_CHANNELS, 2, 4, 4)


def test_branches_without_subjects_are_plain_wan(transformer, encoded, noisy):
    with_subjects, plain = prepare("identity", transformer, encoded), prepare("none", transformer, encoded)
    for branch in ("none", "text"):
        assert torch.equal(with_subjects.predict(noisy, 0.7, branch), plain.predict(noisy, 0.7, branch))
    assert torch.equal(plain.predict(noisy, 0.7, "full"), plain.predict(noisy, 0.7, "text"))
    assert torch.equal(plain.predict(noisy, 0.7, "subjects"), plain.predict(noisy, 0.7, "none"))


def test_subjects_alone_have_neither_prompt_nor_vlm(transformer, encoded, noisy):
    silent = Encoded(
        torch.zeros_like(encoded.prompt_embeds),
        encoded.negative_prompt_embeds,
        References(encoded.references.latents, vlm_states=torch.zeros_like(encoded.references.vlm_states)),
    )
    seen, also = (IdentityBlocks(transformer, case).predict(noisy, 0.7, "subjects") for case in (encoded, silent))
    torch.testing.assert_close(seen, also)
    for branch in ("none", "full"):
        assert (seen - IdentityBlocks(transformer, encoded).predict(noisy, 0.7, branch)).abs().max() > 1e-3


@pytest.mark.parametrize("branch", ["none", "subjects", "text", "full"])
def test_reading_the_subjects_again_gives_what_the_cache_gives(transformer, encoded, noisy, branch):
    kept, again = (IdentityBlocks(transformer, encoded, keep=keep) for keep in (True, False))
    assert kept.num_bytes > 0 and again.num_bytes == 0
    torch.testing.assert_close(kept.predict(noisy, 0.7, branch), again.predict(noisy, 0.7, branch))


def test_without_subjects_there_is_nothing_to_keep(transformer, encoded, noisy):
    alone = Encoded(encoded.prompt_embeds, encoded.negative_prompt_embeds)
    conditions = IdentityBlocks(transformer, alone)
    assert conditions.num_bytes == 0
    assert torch.equal(
        conditions.predict(noisy, 0.7, "full"), PlainText(transformer, alone).predict(noisy, 0.7, "full")
    )
