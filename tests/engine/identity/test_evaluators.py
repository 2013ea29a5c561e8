"""Who answers for whom: faces and things in their real formats, on weights of our own choice or random ones."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    Dinov2Config,
    Dinov2Model,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    PreTrainedTokenizerFast,
    Sam2Config,
    Sam2Model,
    SwinConfig,
)
from transformers.models.grounding_dino.modeling_grounding_dino import GroundingDinoObjectDetectionOutput
from transformers.models.sam2.configuration_sam2 import (
    Sam2HieraDetConfig,
    Sam2MaskDecoderConfig,
    Sam2PromptEncoderConfig,
    Sam2VisionConfig,
)

from engine import presets, tiny
from engine.identity.faces import FaceEvaluator, FaceModels
from engine.identity.report import read_report
from engine.identity.reporter import Assignment, Detections, Reporter
from engine.identity.things import THINGS, ThingEvaluator
from engine.job import GenerateJob, make_job
from engine.loading.pool import ModelPool
from engine.messages import StudioError
from engine.pipelines.report import assign_evaluators
from engine.run import run
from tests.support.jobs import prepared
from tests.support.onnx_files import write_faces

RED, MAGENTA, BLUE = (255, 0, 0), (255, 0, 255), (0, 0, 255)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def faces(tmp_path_factory) -> Path:
    return write_faces(tmp_path_factory.mktemp("faces"))


def frame_with(*squares: tuple[int, int, tuple[int, int, int]], size: tuple[int, int] = (96, 128)) -> np.ndarray:
    """White, with squares of 32 pixels at (top, left) in a colour."""
    frame = np.full((*size, 3), 255, np.uint8)
    for top, left, colour in squares:
        frame[top : top + 32, left : left + 32] = colour
    return frame


# --- faces ---


def test_people_are_known_by_their_faces_wherever_they_stand(faces: Path) -> None:
    files = FaceModels(faces)
    known = [files.known([frame_with((32, 32, colour))]) for colour in (RED, MAGENTA)]
    squares = [((32, 128, RED), (64, 32, MAGENTA)), ((64, 160, MAGENTA), (32, 32, BLUE))]
    frames = np.stack([frame_with(*each, size=(160, 256)) for each in squares])
    reporter = Reporter([Assignment(FaceEvaluator(files, known), (("anna", 0), ("ben", 1)))], fps=8, num_frames=2)
    for frame in frames:
        reporter.see(frame)
    anna, ben = reporter.finish().subjects
    assert (anna.presence, ben.presence) == (0.5, 1.0)  # blue is nobody's face
    assert anna.own[0] == pytest.approx(1, abs=1e-3) and ben.own == pytest.approx((1, 1), abs=1e-3)
    assert anna.other[0] is not None and anna.other[0] < 0.9
    assert anna.judge == "faces, YuNet and SFace"


def test_a_face_is_marked_where_it_is(faces: Path) -> None:
    files = FaceModels(faces)
    evaluator = FaceEvaluator(files, [files.known([frame_with((0, 0, RED), size=(64, 64))])])
    there, empty = evaluator.look(np.stack([frame_with((32, 64, RED)), frame_with()]))
    assert there.regions.shape == (1, 96, 128) and there.similarity.shape == (1, 1)
    rows, columns = np.nonzero(there.regions[0])
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (32, 63, 64, 95)
    assert empty.regions.shape == (0, 96, 128) and empty.similarity.shape == (0, 1)


def test_a_picture_without_a_face_is_no_face(faces: Path) -> None:
    files = FaceModels(faces)
    assert len(files.known([frame_with((0, 0, BLUE))])) == 0
    assert len(files.known([frame_with((0, 0, BLUE)), frame_with((0, 0, RED))])) == 1


def test_of_two_faces_in_a_picture_the_surer_one_is_meant(faces: Path) -> None:
    files = FaceModels(faces)
    picture = frame_with((32, 32, RED), (32, 128, MAGENTA), size=(96, 192))
    picture[32:50, 32:64] = 255  # less than half of a face
    boxes, _ = files.find(picture)
    assert len(boxes) == 2
    meant = files.known([frame_with((32, 32, MAGENTA))])
    np.testing.assert_allclose(files.known([picture]), meant, atol=1e-3)


def test_of_several_years_the_newest_detector_is_read(faces: Path) -> None:
    (faces / "face_detection_yunet_2023mar.onnx").write_bytes(b"for older versions")
    assert len(FaceModels(faces).known([frame_with((0, 0, RED))])) == 1


# --- things ---


def dino() -> GroundingDinoForObjectDetection:
    swin = SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4, out_indices=[2, 3, 4]
    )
    words = BertConfig(
        vocab_size=1100, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    layers = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in
              (("layers", 2), ("attention_heads", 2), ("ffn_dim", 16))}  # fmt: skip
    config = GroundingDinoConfig(backbone_config=swin, text_config=words, d_model=32, num_queries=10, **layers)
    return GroundingDinoForObjectDetection(config)


def words() -> PreTrainedTokenizerFast:
    """Its marks and the full stop have BERT's numbers, which the network knows by heart."""
    vocabulary = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, ".": 1012, "?": 1029, "dog": 200, "kite": 201}
    raw = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 101), ("[SEP]", 102)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=256, model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def sam(side: int = 128) -> Sam2Model:
    trunk = Sam2HieraDetConfig(
        hidden_size=8, image_size=[side, side], embed_dim_per_stage=[8, 16, 32, 64],
        num_attention_heads_per_stage=[1, 1, 1, 1], blocks_per_stage=[1, 1, 2, 1], window_size_per_stage=[8, 4, 4, 4],
        global_attention_blocks=[3], window_positional_embedding_background_size=[4, 4],
    )  # fmt: skip
    sizes = [[side // k] * 2 for k in (4, 8, 16)]
    vision = Sam2VisionConfig(
        backbone_config=trunk, backbone_channel_list=[64, 32, 16, 8], backbone_feature_sizes=sizes, fpn_hidden_size=32
    )
    prompt = Sam2PromptEncoderConfig(hidden_size=32, image_size=side)
    masks = Sam2MaskDecoderConfig(hidden_size=32, mlp_dim=32, num_attention_heads=2, iou_head_hidden_dim=32)
    return Sam2Model(Sam2Config(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=masks))


@pytest.fixture(scope="module")
def things_files(tmp_path_factory) -> Path:
    """All networks of `ThingEvaluator` in transformers' layout, random weights."""
    folder = tmp_path_factory.mktemp("things")
    torch.manual_seed(0)
    dino().save_pretrained(folder / "detector")
    words().save_pretrained(folder / "detector_tokenizer")
    sam().save_pretrained(folder / "segmenter")
    small = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(small).save_pretrained(folder / "embedder")
    return folder


def preset_with(folder: Path, **parts: Path | str) -> presets.Preset:
    """The tiny preset without judges of drawings, with these evaluators."""
    plain = tiny.preset_of(folder)
    named = {"judges": "", **{part: str(path) for part, path in parts.items()}}
    return plain.model_copy(update={"components": plain.components.model_copy(update=named), "frames_per_latent": 4})


def things_of(files: Path, *pictures: np.ndarray) -> ThingEvaluator:
    pool, preset = ModelPool(torch.device("cpu")), preset_with(files, **{part: files / part for part in THINGS})
    parts = [pool.part(part, preset) for part in THINGS]
    return ThingEvaluator(*parts, nouns=["dog", "kite"][: len(pictures)], pictures=[[picture] for picture in pictures])


def drawn(shape: str, colour: tuple[int, int, int]) -> np.ndarray:
    picture = np.full((64, 64, 3), 255, np.uint8)
    if shape == "disc":
        cv2.circle(picture, (32, 32), 20, colour, -1)
    else:
        cv2.rectangle(picture, (8, 24), (56, 40), colour, -1)
    return picture


def test_things_are_looked_for_in_every_frame_from_files_alone(things_files: Path) -> None:
    things = things_of(things_files, drawn("disc", RED), drawn("bar", BLUE))
    sights = things.look(np.random.default_rng(0).integers(0, 255, (2, 48, 80, 3), dtype=np.uint8))
    assert len(sights) == 2
    for sight in sights:
        assert sight.regions.shape[1:] == (48, 80) and sight.regions.dtype == bool
        assert sight.similarity.shape == (len(sight.regions), 2) and np.abs(sight.similarity).max(initial=0) <= 1.001
    assert sum(len(sight.regions) for sight in sights) > 0  # random scores are well above the threshold


def test_whatever_is_cut_out_is_likest_to_its_own_picture(things_files: Path, monkeypatch) -> None:
    disc, bar = drawn("disc", RED), drawn("bar", BLUE)
    things = things_of(things_files, disc, bar)
    frame = np.full((96, 160, 3), 120, np.uint8)
    regions = torch.zeros(2, 96, 160, dtype=torch.bool)
    for number, (picture, top, left) in enumerate(((bar, 4, 90), (disc, 30, 6))):
        held = (picture < 250).any(-1)
        frame[top : top + 64, left : left + 64][held] = picture[held]
        regions[number, top : top + 64, left : left + 64] = torch.from_numpy(held)
    monkeypatch.setattr(things, "_regions", lambda *_: regions)
    (sight,) = things.look(frame[None])
    assert sight.similarity[0, 1] > 0.999 > sight.similarity[0, 0]
    assert sight.similarity[1, 0] > 0.999 > sight.similarity[1, 1]


def test_boxes_are_sure_ones_of_the_frame_and_twice_found_is_once(things_files: Path) -> None:
    things = things_of(things_files, drawn("disc", RED))
    asked = {}

    def found(**inputs: torch.Tensor) -> GroundingDinoObjectDetectionOutput:
        asked.update(inputs)
        rows = [[0.5, 0.5, 0.2, 0.4], [0.5, 0.52, 0.2, 0.4], [0.1, 0.1, 0.4, 0.2], [0.8, 0.8, 0.1, 0.1]]
        scores = torch.tensor([0.6, 0.9, 0.4, 0.1]).logit()
        logits = torch.full((1, 4, 256), -20.0)
        logits[0, :, 1] = scores
        return GroundingDinoObjectDetectionOutput(logits=logits, pred_boxes=torch.tensor([rows]))

    things._detector = found
    boxes = things._boxes(torch.rand(1, 3, 480, 832))
    torch.testing.assert_close(boxes, torch.tensor([[0.4, 0.32, 0.6, 0.72], [0.0, 0.0, 0.3, 0.2]]))
    assert asked["pixel_values"].shape == (1, 3, 769, 1333)  # as its authors show pictures to it
    assert asked["input_ids"].tolist() == [[101, 200, 1012, 102]]


# --- who answers ---


def painted(folder: Path, name: str, colour: tuple[int, int, int]) -> dict[str, str]:
    Image.fromarray(frame_with((32, 32, colour), size=(96, 96))).resize((192, 192), 0).save(folder / f"{name}.png")
    return {"path": str(folder / f"{name}.png")}


def job_of(folder: Path) -> GenerateJob:
    subjects = [
        {"name": "anna", "noun": "dog", "role": "person", "pictures": [painted(folder, "anna", RED)]},
        {"name": "ben", "noun": "dog", "role": "person", "pictures": [painted(folder, "ben", BLUE)]},
        {"name": "kite", "noun": "kite", "pictures": [painted(folder, "kite", RED)]},
        {"name": "hill", "noun": "hill", "role": "background", "pictures": [painted(folder, "hill", RED)]},
    ]
    values = {"prompt": "@anna and @ben fly @kite over @hill", "num_frames": 9, "width": 32, "height": 32, "seed": 3}
    return make_job(preset="toybox", subjects=subjects, sampling={"num_inference_steps": 2}, **values)


def who_answers(folder: Path, preset: presets.Preset) -> list[tuple[str, tuple[str, ...]]]:
    found = assign_evaluators(prepared(job_of(folder), preset), ModelPool(torch.device("cpu")))
    return [(answer.evaluator.title.split(",")[0], tuple(name for name, _ in answer.subjects)) for answer in found]


def test_people_with_a_face_answer_by_it_and_everyone_else_by_what_they_are(faces, things_files, tmp_path) -> None:
    things = {part: things_files / part for part in THINGS}
    assert who_answers(tmp_path, preset_with(tmp_path, faces=faces, **things)) == [
        ("faces", ("anna",)),
        ("things", ("ben", "kite")),
    ]
    assert who_answers(tmp_path, preset_with(tmp_path, faces=faces)) == [("faces", ("anna",))]
    assert who_answers(tmp_path, preset_with(tmp_path, **things)) == [("things", ("anna", "ben", "kite"))]


def test_files_that_are_not_there_cost_the_report_and_not_the_clip(faces, things_files, tmp_path) -> None:
    preset = preset_with(tmp_path, faces=tmp_path / "nowhere", **{part: things_files / part for part in THINGS[:3]})
    assert who_answers(tmp_path, preset) == []
    presets.check_files(preset_with(tiny.write_tiny(tmp_path / "tiny"), faces=tmp_path / "nowhere"))


def test_a_damaged_witness_is_named(tmp_path) -> None:
    (tmp_path / "faces").mkdir()
    with pytest.raises(StudioError, match="The faces in faces cannot be loaded"):
        who_answers(tmp_path, preset_with(tmp_path, faces=tmp_path / "faces"))
    write_faces(tmp_path / "faces")
    (tmp_path / "faces" / "face_detection_yunet_2026may.onnx").write_bytes(b"nonsense")
    with pytest.raises(StudioError, match="cannot be loaded"):
        who_answers(tmp_path, preset_with(tmp_path, faces=tmp_path / "faces"))


def test_a_clip_of_the_real_world_brings_a_report_of_both_judges(faces, things_files, tmp_path, monkeypatch) -> None:
    weights = tiny.write_tiny(tmp_path / "tiny")
    preset = preset_with(weights, faces=faces, **{part: things_files / part for part in THINGS})
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "toybox.json").write_text(preset.model_dump_json(), encoding="utf-8")
    monkeypatch.setattr(presets, "PRESETS", tmp_path / "presets")
    saved = run(job_of(tmp_path), lambda _: None, outputs=tmp_path / "out", pool=ModelPool(torch.device("cpu")))
    found = read_report(saved.clip)
    assert found is not None and [subject.name for subject in found.subjects] == ["anna", "ben", "kite"]
    assert found.judges == (FaceEvaluator.title, ThingEvaluator.title)
    assert found.every == preset.frames_per_latent == 4
    assert [len(subject.own) for subject in found.subjects] == [3, 3, 3]


def test_every_nth_frame_is_judged_and_the_strip_shows_those(tmp_path) -> None:
    class Bright:
        """Sees one region, as alike as the frame is bright."""

        title = "brightness"

        def look(self, frames: np.ndarray) -> list[Detections]:
            return [
                Detections(np.ones((1, *f.shape[:2]), bool), np.array([[f.mean() / 255]], np.float32)) for f in frames
            ]

    reporter = Reporter([Assignment(Bright(), (("a", 0),))], fps=8, num_frames=9, every=4, at_once=2)
    for number in range(9):
        reporter.see(np.full((16, 16, 3), 20 * number, np.uint8))
    (subject,) = reporter.finish().subjects
    assert subject.own == pytest.approx((0, 80 / 255, 160 / 255), abs=1e-3)
    reporter.write_strip(tmp_path / "strip.webp")
    with Image.open(tmp_path / "strip.webp") as strip:
        assert strip.size == (3 * 256, 256)
