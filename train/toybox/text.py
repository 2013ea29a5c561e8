"""The toybox's readers: two tokenizers, a UMT5 that understands captions, a Qwen2.5-VL that describes pictures.

In:  captions, facts and reference pictures drawn by `train.toybox.world`.
Out: tokenizer, text_encoder, vlm_tokenizer and vlm folders, trained and then frozen.
Knows nothing of latents, transformers of video, or how their states are used.

UMT5 learns by naming the facts behind a caption (who does what, where); Qwen2.5-VL learns to continue
"pictures + prompt" with a description of every subject, so that its hidden states hold what it saw.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own spelling
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    UMT5Config,
    UMT5EncoderModel,
)

from engine.models.encoders import vlm_inputs
from train.runs import checkpoint
from train.runs.updates import descend, run_updates
from train.toybox import world
from train.toybox.world.captions import CAMERA_WORDS, describe, noun, with_article

TEXT_TOKENS = 64
TEXT_STEPS, TEXT_BATCH = 1000, 96
# Times the rate, for UMT5's table of distances. It starts near nothing, and which verb belongs to which subject is told
# by nearness: at the rate of all else, 700 updates left it at .71 of the verbs; now .99 after 150.
NEARNESS = 20.0
MOMENTS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of a clip, at which a subject's place is asked for
WAYS = ("left", "leftwards", "right", "rightwards")
VLM_STEPS, VLM_BATCH = 1600, 16
VLM_ALONE = 0.7  # share of the updates on one subject: seeing comes first, telling subjects apart second
VLM_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")


# --- tokenizers ------------------------------------------------------------------------------------------------------


def _corpus(count: int) -> list[str]:
    rng = np.random.default_rng(21)
    scenes = (world.make_scene(seed) for seed in range(count))
    return [world.caption(scene, bool(rng.random() < 0.4), rng) for scene in scenes] + [*world.vocabulary()] * 20


def _train_tokenizer(special: tuple[str, ...], corpus: list[str]) -> Tokenizer:
    """Byte-level BPE: every word of the world is one token, every other text still has some."""
    raw = Tokenizer(models.BPE())
    raw.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    raw.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=900, special_tokens=list(special), initial_alphabet=alphabet)
    )
    return raw


def write_tokenizers(folder: Path) -> None:
    """Train both tokenizers on 4,000 captions (seconds) and write them under `folder`."""
    corpus = _corpus(4000)
    raw = _train_tokenizer(("<pad>", "</s>", "<unk>"), corpus)
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    words = PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=TEXT_TOKENS, **names)
    words.save_pretrained(folder / "tokenizer")
    vlm_words = PreTrainedTokenizerFast(
        tokenizer_object=_train_tokenizer(VLM_SPECIAL, corpus),
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=[*VLM_SPECIAL[1:]],
        padding_side="left",
    )
    vlm_words.save_pretrained(folder / "vlm_tokenizer")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """One of the two tokenizers, from disk."""
    return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)


# --- UMT5 ------------------------------------------------------------------------------------------------------------


def new_text_encoder(vocab_size: int) -> UMT5EncoderModel:
    """Three layers, 96 wide."""
    torch.manual_seed(1)
    config = UMT5Config(
        vocab_size=vocab_size, d_model=96, d_kv=24, d_ff=256, num_layers=3, num_heads=4,
        dropout_rate=0.0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return UMT5EncoderModel(config)


class Quiz(nn.Module):
    """Questions put to a caption's states: of the whole (place, camera), and at each word that numbers a subject.

    The second kind is answered by that one word's state, in straight lines, so that whoever looks for "who jumps" finds
    it at the number. Among them is the subject's way through the frame as far as words foretell it: a place in the
    video then finds the number of whoever belongs there by one product of query and key.
    """

    WHOLE: dict[str, tuple[str, ...]] = {  # noqa: RUF012 - constant
        "place": world.BACKGROUNDS,
        "camera": ("unsaid", *world.CAMERAS),
    }
    SLOT: dict[str, tuple[str, ...]] = {  # noqa: RUF012 - constant
        "kind": ("unsaid", *world.KINDS),
        "part": ("actor", "other"),
        "verb": world.VERBS,
        "way": ("none", "left", "right"),
        "with": ("nobody", "subject 1", "subject 2", "subject 3", "subject 4"),
    }

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 1, width) * 0.5)
        self.look = nn.MultiheadAttention(width, 4, batch_first=True)
        self.whole = nn.ModuleDict({key: nn.Linear(width, len(names)) for key, names in self.WHOLE.items()})
        self.slots = nn.ModuleDict({key: nn.Linear(width, len(names)) for key, names in self.SLOT.items()})
        self.path = nn.Linear(width, 3 * len(MOMENTS))

    def forward(self, states: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """(B, T, D), (B, T) -> logits: of each question of the whole (B, answers), of a slot (B, T, answers).

        "path" are no logits but numbers, as `path_of` gives them: (B, T, 3 * moments).
        """
        query = self.query.expand(len(states), -1, -1)
        seen = self.look(query, states, states, key_padding_mask=~mask.bool(), need_weights=False)[0][:, 0]
        whole = {key: head(seen) for key, head in self.whole.items()}
        return whole | {key: head(states) for key, head in self.slots.items()} | {"path": self.path(states)}


def answers(facts: world.Facts, text: str) -> dict[str, Any]:
    """The right answers that a caption allows: indices into the quiz's answers, those of a slot as lists over slots."""
    camera = next((words for words in CAMERA_WORDS[facts.camera] if words in text), "")
    said = set(world.words_of(text.replace(camera, "")))
    slots: dict[str, list[int]] = {key: [0] * len(facts.kinds) for key in Quiz.SLOT}
    for k, kind in enumerate(facts.kinds):
        if noun(kind) in said:
            slots["kind"][k] = Quiz.SLOT["kind"].index(kind)
    for action in facts.actions:
        # Only pairs leave their direction out, and then nobody else in the scene has one.
        way = "none"
        if action.direction and any(word in said for word in WAYS):
            way = action.direction
        for place, slot in enumerate(action.slots):
            slots["part"][slot - 1] = place
            slots["verb"][slot - 1] = Quiz.SLOT["verb"].index(action.verb)
            slots["way"][slot - 1] = Quiz.SLOT["way"].index(way)
            if len(action.slots) == 2:
                slots["with"][slot - 1] = action.slots[1 - place]
            else:
                slots["with"][slot - 1] = 0
    camera_said = 0
    if camera:
        camera_said = Quiz.WHOLE["camera"].index(facts.camera)
    return {"place": world.BACKGROUNDS.index(facts.background), "camera": camera_said, **slots}


def path_of(scene: world.Scene) -> list[list[float]]:
    """For each slot x, y and size at MOMENTS, as the camera sees it, about zero mean and unit spread."""
    seen = [world.poses_at(scene, moment, duration=1.0) for moment in MOMENTS]
    paths = []
    for poses in zip(*seen, strict=True):
        path: list[float] = []
        for pose in poses:
            path += (4 * pose.x - 2, 4 * pose.y - 2, 8 * pose.scale - 3)
        paths.append(path)
    return paths


def slots_of_words(numbers: Tensor, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """(B, T) token numbers -> (B, T): which subject each word numbers, 0 for none."""
    slots = torch.zeros_like(numbers)
    for slot in range(1, world.MAX_SUBJECTS + 1):
        slots[numbers == tokenizer(f"subject {slot}", add_special_tokens=False)["input_ids"][-1]] = slot
    return slots


def _loss_of_quiz(
    logits: dict[str, Tensor], targets: Sequence[dict[str, Any]], slots: Tensor
) -> tuple[Tensor, dict[str, float]]:
    """Cross entropy of all questions, and the share of right answers to each; of the path, mean squares.

    Args:
        slots: what `slots_of_words` gives.
    """
    row, word = slots.nonzero(as_tuple=True)
    places = [(i, slot - 1) for i, slot in zip(row.tolist(), slots[row, word].tolist(), strict=True)]
    losses, right = [], {}
    for key, values in logits.items():
        if key in Quiz.WHOLE:
            answered = values
            wanted = torch.tensor([target[key] for target in targets])
        else:
            answered = values[row, word]
            wanted = torch.tensor([targets[i][key][slot] for i, slot in places])
        if key == "path":
            losses.append(F.mse_loss(answered, wanted))
            right[key] = losses[-1].item()
        else:
            losses.append(F.cross_entropy(answered, wanted))
            right[key] = (answered.argmax(-1) == wanted).float().mean().item()
    return torch.stack(losses).sum(), right


def train_text_encoder(state: Path, tokenizer: PreTrainedTokenizerFast, *, seconds: float) -> bool:
    """Teach UMT5 to answer the quiz; True once done."""
    encoder = new_text_encoder(len(tokenizer))
    quiz = Quiz(encoder.config.d_model)
    both = nn.ModuleDict({"encoder": encoder, "quiz": quiz})

    def loss_at(step: int) -> tuple[Tensor, dict[str, float]]:
        texts, targets = _draw_captions(step)
        batch = tokenizer(texts, padding="longest", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt")
        logits = quiz(encoder(**batch).last_hidden_state, batch["attention_mask"])
        return _loss_of_quiz(logits, targets, slots_of_words(batch["input_ids"], tokenizer))

    return _teach("text", both, loss_at, state, TEXT_STEPS, 2e-3, seconds)


def _draw_captions(step: int) -> tuple[list[str], list[dict[str, Any]]]:
    """One batch of captions and what they let one know."""
    texts, targets = [], []
    for seed in range(step * TEXT_BATCH, (step + 1) * TEXT_BATCH):
        scene = world.make_scene(10_000 + seed)
        texts.append(world.caption(scene))
        targets.append({**answers(scene.facts, texts[-1]), "path": path_of(scene)})
    return texts, targets


# --- Qwen2.5-VL ------------------------------------------------------------------------------------------------------


def new_vlm(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLForConditionalGeneration:
    """Three layers, 128 wide; a 64 px picture is 16 tokens."""
    torch.manual_seed(2)
    numbers: dict[str, Any] = {token: tokenizer.convert_tokens_to_ids(token) for token in VLM_SPECIAL}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
            "bos_token_id": numbers["<|endoftext|>"], "eos_token_id": numbers["<|im_end|>"],
            "pad_token_id": numbers["<|endoftext|>"],
        },
        vision_config={
            "depth": 3, "hidden_size": 96, "intermediate_size": 256, "num_heads": 3, "patch_size": 8,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 64, "out_hidden_size": 128,
            "fullatt_block_indexes": [1, 2],
        },
        image_token_id=numbers["<|image_pad|>"],
        video_token_id=len(tokenizer) + 1,  # never written: references are stills
        vision_start_token_id=numbers["<|vision_start|>"],
        vision_end_token_id=numbers["<|vision_end|>"],
        tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(config)


def schedule(step: int, total: int) -> float:
    """Share of the peak rate: short warm-up, flat, linear decay over the last third."""
    return min(1.0, (step + 1) / 50, max(0.02, (total - step) / (0.33 * total)))


def _teach(name: str, module: nn.Module, loss_at: Any, state: Path, total: int, peak: float, seconds: float) -> bool:
    """The loop both readers share: AdamW, warm-up, linear decay, saved every two minutes."""
    by_rate: dict[float, list[nn.Parameter]] = {1.0: [], NEARNESS: []}
    for key, parameter in module.named_parameters():
        rate = 1.0
        if "relative_attention_bias" in key:
            rate = NEARNESS
        by_rate[rate].append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": own, "peak": rate * peak} for rate, own in by_rate.items() if own],
        lr=peak,
        betas=(0.9, 0.98),
        weight_decay=0.01,
    )
    step = 0
    if saved := checkpoint.load(state):
        step, groups, _ = saved
        module.load_state_dict(groups["model"])
        checkpoint.restore_optimizer(optimizer, groups["optimizer"])

    def update(step: int) -> dict[str, float]:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * schedule(step, total)
        loss, values = loss_at(step)
        descend(loss, module.parameters(), optimizer)
        return {"loss": loss.item(), **values}

    def keep(step: int) -> None:
        groups = {"model": module.state_dict(), "optimizer": checkpoint.optimizer_tensors(optimizer)}
        checkpoint.save(state, step, groups)

    return run_updates(name, state, update, keep, start=step, total=total, seconds=seconds)


def draw_vlm_batch(step: int, count: int, seed: int) -> tuple[list[str], list[list[list[np.ndarray]]], list[str]]:
    """Prompts, pictures of every subject, and what there is to say about them: B of each."""
    prompts, pictures, replies = [], [], []
    for i in range(count):
        rng = np.random.default_rng((seed, step, i))
        num_subjects = None  # as many as the scene draws
        if step < VLM_ALONE * VLM_STEPS:
            num_subjects = 1
        scene = world.make_scene(int(rng.integers(2**28)), num_subjects=num_subjects)
        prompts.append(world.caption(scene, False, rng))
        pictures.append([[world.reference_picture(s, int(rng.integers(2**28)))[0]] for s in scene.subjects])
        sentences = []
        for slot, subject in enumerate(scene.subjects, start=1):
            sentences.append(f"subject {slot} is {with_article(full_description(subject))}.")
        replies.append(" ".join(sentences))
    return prompts, pictures, replies


def full_description(subject: world.ToySubject) -> str:
    """Everything a caption could say of a subject: 'striped red and blue fox with a green hat'."""
    rng = np.random.default_rng(0)
    return max((describe(subject, rng) for _ in range(8)), key=len)


def append_replies(
    inputs: dict[str, Tensor], replies: list[str], tokenizer: PreTrainedTokenizerFast
) -> tuple[dict[str, Tensor], Tensor]:
    """The assistant's replies behind the user's turns, and labels that are -100 everywhere but in the replies."""
    rows, labels, end = [], [], tokenizer.convert_tokens_to_ids("<|im_end|>")
    for numbers, mask, reply in zip(inputs["input_ids"], inputs["attention_mask"], replies, strict=True):
        question = numbers[mask.bool()]
        answer = torch.tensor([*tokenizer(reply, add_special_tokens=False)["input_ids"], end])
        rows.append(torch.cat([question, answer]))
        labels.append(torch.cat([torch.full_like(question, -100), answer]))
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0)
    wanted = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
    lengths = torch.tensor([len(row) for row in rows])
    kinds = nn.functional.pad(inputs["mm_token_type_ids"], (0, padded.shape[1] - inputs["input_ids"].shape[1]))
    mask = (torch.arange(padded.shape[1]) < lengths.unsqueeze(1)).long()
    return {**inputs, "input_ids": padded, "attention_mask": mask, "mm_token_type_ids": kinds}, wanted


def train_vlm(state: Path, tokenizer: PreTrainedTokenizerFast, *, seconds: float) -> bool:
    """Teach Qwen2.5-VL to describe every subject after reading pictures and prompt; True once done."""
    vlm = new_vlm(tokenizer).train()

    def loss_at(step: int) -> tuple[Tensor, dict[str, float]]:
        count = VLM_BATCH
        if step < VLM_ALONE * VLM_STEPS:
            count = 2 * VLM_BATCH
        prompts, pictures, replies = draw_vlm_batch(step, count, 31)
        inputs, labels = append_replies(vlm_inputs(prompts, pictures, tokenizer, vlm), replies, tokenizer)
        logits = vlm(**inputs).logits[:, :-1]
        wanted = labels[:, 1:]
        loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=-100)
        counted = wanted != -100
        right = (logits.argmax(-1) == wanted)[counted].float().mean().item()
        return loss, {"right": right}

    return _teach("vlm", vlm, loss_at, state, VLM_STEPS, 1e-3, seconds)


def export(state: Path, folder: Path) -> None:
    """Write both readers and both tokenizers in transformers' layout, half precision."""
    for name in ("tokenizer", "vlm_tokenizer"):
        load_tokenizer(state / name).save_pretrained(folder / name)
    encoder = new_text_encoder(len(load_tokenizer(state / "tokenizer")))
    vlm = new_vlm(load_tokenizer(state / "vlm_tokenizer"))
    for name, module, prefix in (("text", encoder, "encoder."), ("vlm", vlm, "")):
        saved = checkpoint.load(state / name)
        if saved is None:
            raise FileNotFoundError(f"no {name} has been trained in {state}")
        weights = {key.removeprefix(prefix): t for key, t in saved[1]["model"].items() if key.startswith(prefix)}
        module.load_state_dict(weights)
        module.half().save_pretrained(folder / {"text": "text_encoder"}.get(name, name), safe_serialization=True)
