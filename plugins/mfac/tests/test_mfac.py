from sparsekit import ParameterSpace
from sparsekit_mfac.estimator import MFAC, MFACSettings
from sparsekit_mfac.presets import PRESETS


def test_the_whole_network_is_one_block():
    assert MFAC(ParameterSpace({"a": (7, 5), "b": (3,)}), MFACSettings())._sizes == [38]


def test_blocks_cross_layers_as_published():
    assert MFAC(ParameterSpace({"a": (7, 5), "b": (3,)}), MFACSettings(block_size=20))._sizes == [20, 18]


def test_blocks_may_be_kept_within_layers():
    made = MFAC(ParameterSpace({"a": (7, 5), "b": (3,)}), MFACSettings(block_size=20, across_layers=False))
    assert made._sizes == [20, 15, 3]


def test_memory_is_that_of_the_rows():
    space = ParameterSpace({"a": (1000, 1000)})
    needed = MFAC.memory(space, MFACSettings(examples=512, batch_size=1))
    assert 1 <= needed / (512 * 10**6 * 4) < 1.2


def test_presets_hold_valid_settings():
    for preset in PRESETS:
        MFACSettings.model_validate({k: v for k, v in preset.settings["estimator"].items() if k != "name"})
