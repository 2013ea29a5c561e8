"""Settings of the machine: from options through the environment to the process that reads them."""

from __future__ import annotations

import pytest

from app import settings
from engine.hardware.options import MachineOptions, machine_options, restrict_to_device
from engine.messages import StudioError


@pytest.mark.parametrize(
    "given", [MachineOptions(), MachineOptions("cuda:1", "sage", True), MachineOptions("cpu", "native", False)]
)
def test_what_is_written_into_the_environment_is_read_back(given: MachineOptions) -> None:
    assert machine_options(given.variables()) == given


def test_nothing_said_is_the_fastest_device_and_whatever_kernels_serve_it() -> None:
    assert machine_options({}) == MachineOptions("", "auto", False)


@pytest.mark.parametrize("variables", [{"IDCRAFTER_ATTENTION": "magic"}, {"IDCRAFTER_DEVICE": "cuda:x"}])
def test_a_word_that_names_nothing_is_refused_with_those_that_do(variables: dict[str, str]) -> None:
    with pytest.raises(StudioError) as refused:
        machine_options(variables)
    assert "sage" in refused.value.why or "cuda" in refused.value.why


def test_devices_are_listed_with_commas() -> None:
    assert settings.read_devices(" cuda:0, cuda:1 ") == ("cuda:0", "cuda:1")
    assert settings.read_devices("") == ()
    with pytest.raises(StudioError, match="gpu1"):
        settings.read_devices("cuda:0,gpu1")


@pytest.mark.parametrize(
    ("seen", "device", "wanted"),
    [(None, "cuda:1", "1"), ("4,6", "cuda:1", "6"), ("4", "cuda:1", "-1"), ("4,6", "cuda", "4,6"), ("4", "cpu", "4")],
)
def test_a_process_sees_its_own_card_among_those_its_parent_sees(seen: str | None, device: str, wanted: str) -> None:
    before = {} if seen is None else {"CUDA_VISIBLE_DEVICES": seen}
    after = restrict_to_device(device, before)
    assert after["CUDA_VISIBLE_DEVICES"] == wanted and after["IDCRAFTER_DEVICE"] == device.partition(":")[0]
    assert restrict_to_device("", before) == before
