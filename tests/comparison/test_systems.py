import pytest

from msv.ablation.paper import TABLE_1, TABLE_6
from msv.comparison.systems import COMPILED_TOO, MODELS, SYSTEMS, TABLE_1_MODELS, counts, find, order


def test_every_row_of_the_paper_stands_once_and_in_its_order():
    assert [system.paper for system in SYSTEMS if system.paper] == list(TABLE_1)
    assert {system.name for system in SYSTEMS if system.source == "not in this project"} == {
        "ViM-T", "ViM-S", "LocalVMamba-T", "LocalVMamba-S", "EffVMamba-T", "EffVMamba-S", "EffVMamba-B"
    }  # fmt: skip


def test_the_row_printed_as_vmamba_b_is_vmamba_small():
    small, base = MODELS["vmamba_small"], MODELS["vmamba_base"]
    assert (small.paper.name, small.paper.params_m, small.paper.gflops) == ("VMamba-B", 44, 11.2)
    assert "printed as" in small.name
    assert base.paper is None
    assert set(COMPILED_TOO) < set(MODELS)
    assert "convnext_tiny" not in TABLE_1_MODELS


@pytest.mark.parametrize(
    "model, params, gflops",
    [
        ("regnety_008", 6_263_168, 0.798),
        ("deit_small_patch16_224", 22_050_664, 4.608),
        ("swin_tiny_patch4_window7_224", 28_288_354, 4.509),
        ("vmamba_small", 44_417_416, 11.232),
        ("msvmamba_tiny", 33_046_312, 4.613),
    ],
)
def test_counts(model, params, gflops):
    found = counts(model)
    assert found.params == params
    assert round(found.flops_fvcore / 1e9, 3) == gflops


def test_counts_are_near_what_the_papers_print():
    for system in SYSTEMS:
        if system.key and system.paper and system.source == "timm":
            found = counts(system.key)
            assert found.params / 1e6 == pytest.approx(system.paper.params_m, abs=1)
            assert found.flops_fvcore / 1e9 == pytest.approx(system.paper.gflops, abs=0.1)


@pytest.mark.parametrize("name", ["swin_tiny", "swin_tiny_patch4_window7_224", "swin_tiny_patch4_window7_224.ms_in1k"])
def test_names_that_a_user_may_say(name):
    assert find(name, "--only") == "swin_tiny_patch4_window7_224"


def test_an_unknown_name():
    with pytest.raises(ValueError, match=r"--only: 'vmamba_tyny' is no model .*did you mean vmamba_tiny"):
        find("vmamba_tyny", "--only")
    with pytest.raises(ValueError, match=r"did you mean vmamba_tiny or msvmamba_tiny or \w+\?$"):
        find("vmamba_tyny", "--only")


@pytest.mark.parametrize(
    "name, family",
    [("vim_tiny", "ViM"), ("ViM-S", "ViM"), ("localvmamba_tiny", "LocalVMamba"), ("efficientvmamba-b", "EffVMamba")],
)
def test_a_system_that_is_not_here(name, family):
    with pytest.raises(ValueError, match=rf"--only: '{name}': {family} is not in this project.*Expected one of regnet"):
        find(name, "--only")


def test_the_papers_own_models_come_first():
    assert sorted(MODELS, key=order)[:4] == list(TABLE_6)
