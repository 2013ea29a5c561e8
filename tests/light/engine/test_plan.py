"""Plans: what fits which machine, which limit binds, and what to change where it does not fit."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from app import cli
from engine import presets
from engine.hardware import costs
from engine.hardware.oom import OutOfMemory
from engine.hardware.plan import SLACK, Plan, cheaper, explain_oom, make_plan, plan_or_raise
from engine.hardware.probe import GB, Hardware
from engine.job import GenerateJob, Lora, Picture, Sampling, Subject
from engine.messages import StudioError
from engine.presets import Components, HubFiles, Preset, Shape, Size
from engine.resolve import resolve

WAN = {"text_dim": 4096, "freq_dim": 256, "in_channels": 16, "out_channels": 16, "patch": (1, 2, 2)}
SMALL = Shape(dim=1536, num_layers=30, ffn_dim=8960, num_heads=12, **WAN)
LARGE = Shape(dim=5120, num_layers=40, ffn_dim=13824, num_heads=40, **WAN)
NOWHERE = HubFiles(repo="nobody/nothing", path="none", num_bytes=1, licence="Apache-2.0")
CARD = Hardware("cuda", "a card", 24 * GB, 64 * GB, 200 * GB)


def preset_of(shape: Shape, conditioning: Any = "frames") -> Preset:
    toybox = presets.load("toybox")
    parts = Components(transformer=NOWHERE, vae=NOWHERE, text_encoder=NOWHERE, tokenizer=NOWHERE)
    sizes = (Size(width=832, height=480), Size(width=480, height=272))
    return toybox.model_copy(
        update={
            "components": parts,
            "shape": shape,
            "conditioning": conditioning,
            "sizes": sizes,
            "frames_per_latent": 4,
            "num_frames": 81,
            "max_frames": 129,
            "reference_size": 768,
        }
    )


def job_of(**changes: Any) -> GenerateJob:
    subject = Subject(name="fox", pictures=(Picture(path="fox.png"),))
    values = {"num_frames": 81, "width": 832, "height": 480, **changes}
    return GenerateJob(
        prompt="@fox", subjects=(subject,), sampling=Sampling(guidance="dual", num_inference_steps=50), **values
    )


def planned(shape: Shape, vram: float, ram: float = 64, **changes: Any) -> Plan:
    return make_plan(
        resolve(job_of(**changes), preset_of(shape)), replace(CARD, vram=round(vram * GB), ram=round(ram * GB))
    )


def while_sampling(made: Plan) -> int:
    return next(phase.vram for phase in made.phases if phase.name == "sampling")


def test_a_large_card_holds_a_small_model_whole_and_exact() -> None:
    made = planned(SMALL, 24)
    assert made.fits and not made.tiled
    assert made.parts["transformer"] == replace(made.parts["transformer"], precision="bf16", where="device", memory=0)


@pytest.mark.parametrize("vram", [6, 8, 12, 16, 24])
@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=["1.3b", "14b"])
def test_every_plan_that_fits_stays_below_every_limit(shape: Shape, vram: float) -> None:
    made = planned(shape, vram)
    if made.fits:
        assert made.vram <= vram * GB and made.ram <= 64 * GB and made.disk <= made.machine.disk
    else:
        assert made.binding[0] == "VRAM"


def test_a_smaller_card_is_met_by_visiting_blocks_before_any_precision_is_given_up() -> None:
    part = planned(LARGE, 12).parts["transformer"]
    assert (part.precision, part.where) == ("bf16", "memory")
    assert part.device < 3 * GB < 25 * GB < part.memory


def test_little_memory_beside_the_card_costs_precision_and_the_sentence_names_the_limit() -> None:
    made = planned(LARGE, 12, ram=16)
    assert made.fits and made.parts["transformer"].precision == "nf4"
    tight = planned(LARGE, 12, ram=3)
    assert tight.parts["transformer"].where == "disk" or not tight.fits


def test_a_precision_that_the_job_names_is_kept() -> None:
    assert planned(LARGE, 24, precision="int8").parts["transformer"].precision == "int8"


def test_a_small_card_decodes_in_tiles() -> None:
    assert planned(SMALL, 8).tiled and not planned(SMALL, 24).tiled


def test_more_of_anything_never_needs_less() -> None:
    preset = preset_of(SMALL)
    base = make_plan(resolve(job_of(), preset), CARD)
    for more in ({"num_frames": 121}, {"width": 1280, "height": 720}):
        assert while_sampling(make_plan(resolve(job_of(**more), preset), CARD)) > while_sampling(base)
        assert make_plan(resolve(job_of(**more), preset), CARD).petaflop > base.petaflop
    twice = job_of().subjects[0].model_copy(update={"pictures": (Picture(path="a.png"), Picture(path="b.png"))})
    with_two = make_plan(resolve(job_of().model_copy(update={"subjects": (twice,)}), preset), CARD)
    assert while_sampling(with_two) > while_sampling(base)


def test_sources_are_counted_by_their_own_sizes_in_the_forwards_that_read_them() -> None:
    preset = preset_of(SMALL, "sources")  # pictures of 768
    clip = 21 * 52 * 30
    whole, nobody = job_of(), job_of().model_copy(update={"subjects": ()})
    [fox] = whole.subjects
    shown = {
        48**2: fox.model_copy(update={"cut_out": False}),
        39**2: fox,  # its longest side .8 of the square's
        2 * 39**2: fox.model_copy(update={"pictures": fox.pictures * 2}),
        0: fox.model_copy(update={"weight": 0.0}),
    }
    for tokens, subject in shown.items():
        load = costs.load_of(resolve(whole.model_copy(update={"subjects": (subject,)}), preset))
        assert (load.source_tokens, load.tokens) == (tokens, clip + tokens)
    alone, both = (costs.load_of(resolve(job, preset)) for job in (nobody, whole))
    expected = 50 * (2 * costs.flops(SMALL, both) + costs.flops(SMALL, alone))  # dual: one of three reads none
    assert costs.clip_flops(SMALL, both) == pytest.approx(expected)


def test_a_job_that_does_not_fit_is_refused_with_changes_that_do() -> None:
    preset, here = preset_of(LARGE), replace(CARD, vram=round(5.3 * GB))
    with pytest.raises(StudioError) as refused:
        plan_or_raise(resolve(job_of(), preset), here)
    assert "VRAM does not suffice" in refused.value.why
    offered = [job for words, job in cheaper(resolve(job_of(), preset)) if words in refused.value.next_step]
    assert offered and all(make_plan(job, here).fits for job in offered)


def test_where_nothing_fits_no_change_is_promised() -> None:
    with pytest.raises(StudioError, match="smaller preset"):
        plan_or_raise(resolve(job_of(), preset_of(LARGE)), replace(CARD, vram=GB))


def test_a_profile_takes_from_the_card_and_where_memory_is_shared_from_the_machine() -> None:
    assert CARD.limited("8").vram == 8 * GB and CARD.limited("8").ram == CARD.ram
    assert CARD.limited("auto") == CARD.limited("all") == CARD
    apple = Hardware("mps", "a", 32 * GB, 32 * GB, GB)
    assert apple.limited("8").ram == apple.limited("8").vram == 8 * GB


def test_on_a_processor_everything_is_counted_as_its_memory() -> None:
    here = Hardware("cpu", "a processor", 64 * GB, 64 * GB, 100 * GB)
    made = make_plan(resolve(job_of(), preset_of(SMALL)), here)
    assert made.binding[0] == "RAM" and made.parts["transformer"].precision == "fp32"


def test_the_explanation_offers_what_needs_a_third_less() -> None:
    said = explain_oom(OutOfMemory("VRAM"), resolve(job_of(), preset_of(SMALL)), replace(CARD, vram=8 * GB))
    assert "card" in said.what and "frames" in said.next_step


def test_the_verb_says_work_and_time_in_plain_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--preset", "wan-1.3b", "--vram", "24", "--ram", "64"]) == 0
    assert re.search(r"^\d\d,\d{3} TFLOP, about \d+ min at", capsys.readouterr().out, re.MULTILINE)
    assert cli.main(["plan", "--vram", "24", "--ram", "64"]) == 0
    assert "TFLOP, about 1 s at" in capsys.readouterr().out


@pytest.mark.parametrize("given", ["-3", "0", "nan", "inf", "a lot"])
def test_a_card_of_no_size_is_not_understood(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", f"--vram={given}"]) == 2
    assert "--vram" in capsys.readouterr().err


def test_a_lora_is_counted_where_it_computes_and_one_that_is_missing_or_weighs_nothing_is_not(tmp_path: Path) -> None:
    file = tmp_path / "style.safetensors"
    file.write_bytes(bytes(3_000_000))
    preset, [weighs, nothing, missing] = preset_of(SMALL), [
        job_of(loras=[Lora(path=str(path), weight=weight)])
        for path, weight in ((file, 0.5), (file, 0.0), (tmp_path / "none.safetensors", 1.0))
    ]  # fmt: skip

    def plan_of(job: GenerateJob, here: Hardware = CARD) -> Plan:
        return make_plan(resolve(job, preset), here)

    more = while_sampling(plan_of(weighs)) - while_sampling(plan_of(job_of()))
    assert more == pytest.approx(3_000_000 * SLACK, abs=1)
    assert plan_of(nothing) == plan_of(missing) == plan_of(job_of())
    processor = replace(CARD, device="cpu", vram=CARD.ram)
    more = while_sampling(plan_of(weighs, processor)) - while_sampling(plan_of(job_of(), processor))
    assert more == 6_000_000, "in fp32"


def test_judges_are_counted_in_the_machines_memory_where_they_are_here_and_asked(tmp_path: Path) -> None:
    bare, seen = preset_of(SMALL), tmp_path / "detector"
    seen.mkdir()
    header = json.dumps({"w": {"dtype": "F16", "shape": [1000, 1000], "data_offsets": [0, 2_000_000]}}).encode()
    (seen / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    judged = bare.model_copy(update={"components": bare.components.model_copy(update={"detector": str(seen)})})
    more = make_plan(resolve(job_of(), judged), CARD).ram - make_plan(resolve(job_of(), bare), CARD).ram
    assert more == 4_000_000, "they compute in fp32"
    nobody = job_of().model_copy(update={"subjects": ()})
    assert make_plan(resolve(nobody, judged), CARD).ram == make_plan(resolve(nobody, bare), CARD).ram


def test_blocks_that_wait_in_files_are_counted_on_the_disk_and_nowhere_else() -> None:
    tight = planned(LARGE, 8, ram=3, precision="nf4")
    part = tight.parts["transformer"]
    assert part.where == "disk" and part.disk > 5 * GB > 2 * GB > part.memory
    assert tight.disk > part.disk


def test_a_transformer_whose_blocks_visit_has_left_the_card_when_frames_are_decoded() -> None:
    def while_decoding(precision: str) -> int:
        made = planned(LARGE, 12, precision=precision)
        assert made.parts["transformer"].where == "memory"
        return next(phase.vram for phase in made.phases if phase.name == "decoding")

    assert while_decoding("bf16") == while_decoding("int8")
