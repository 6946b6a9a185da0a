from sparsekit import ParameterSpace
from sparsekit_woodfisher.estimator import WoodFisher, WoodFisherSettings
from sparsekit_woodfisher.presets import PRESETS


def test_chunks_lie_within_layers():
    made = WoodFisher(ParameterSpace({"a": (50, 50), "b": (30,)}), WoodFisherSettings())
    assert made._sizes == [2000, 500, 30]


def test_long_chunks_keep_the_rows():
    space = ParameterSpace({"a": (50, 50)})
    few, many = WoodFisherSettings(examples=100), WoodFisherSettings(examples=3000)
    assert (few.keeps_rows(2000), many.keeps_rows(2000)) == (True, False)
    assert WoodFisher.memory(space, few) < WoodFisher.memory(space, many)


def test_presets_hold_valid_settings():
    for preset in PRESETS:
        WoodFisherSettings.model_validate({k: v for k, v in preset.settings["estimator"].items() if k != "name"})


def test_a_published_damping_is_in_units_of_the_fisher():
    resnet50 = next(p for p in PRESETS if p.name == "woodfisher-resnet50").settings["estimator"]
    assert (resnet50["examples"], resnet50["average"], resnet50["damping"]) == (160_000, 400, 4e-3)
