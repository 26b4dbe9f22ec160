"""What timm's users expect of a model in its registry."""

from itertools import pairwise

import pytest
import timm
import timm.optim
import torch
from timm.models import group_parameters

from msv.models import PRESETS, MSVMamba, TimmModel

SMALL = {"dims": (8, 16, 32, 64), "depths": (1, 1, 2, 1)}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_registered(name):
    assert timm.is_model(name)
    network = timm.create_model(name, num_classes=7, **SMALL).eval()
    assert isinstance(network, MSVMamba)
    assert network(torch.randn(1, 3, 32, 32)).shape == (1, 7)


DROP_PATH = {"vmamba_small": 0.3, "vmamba_base": 0.5}


@pytest.mark.parametrize("name", PRESETS)
def test_drop_path_of_presets(name):
    with torch.device("meta"):
        network = timm.create_model(name)
    assert network.stages[3].blocks[-1].drop_path.drop_prob == pytest.approx(DROP_PATH.get(name, 0.2))
    with torch.device("meta"):
        network = timm.create_model(name, drop_path_rate=0.1)
    assert network.stages[3].blocks[-1].drop_path.drop_prob == pytest.approx(0.1)


@pytest.mark.parametrize("name", PRESETS)
def test_features_only(name):
    network = timm.create_model(name, features_only=True, **SMALL).eval()
    assert network.feature_info.channels() == [8, 16, 32, 64]
    assert network.feature_info.reduction() == [4, 8, 16, 32]
    maps = network(torch.randn(2, 3, 64, 96))
    assert [m.shape for m in maps] == [(2, 8, 16, 24), (2, 16, 8, 12), (2, 32, 4, 6), (2, 64, 2, 3)]


def test_features_are_what_the_stages_leave(make_small):
    network = make_small()
    images = torch.randn(1, 3, 45, 70)
    left = []
    for stage in network.stages:
        stage.register_forward_hook(lambda _, inputs, output: left.append(output))
    final, maps = network.forward_intermediates(images)
    for found, expected in zip(maps, left[:4], strict=True):
        assert torch.equal(found, expected.permute(0, 3, 1, 2))
    assert torch.equal(final, network.forward_features(images))
    last = network.forward_intermediates(images, indices=1, norm=True, output_fmt="NHWC", intermediates_only=True)
    assert len(last) == 1
    assert torch.equal(last[0], final)
    two = network.forward_intermediates(images, indices=[0, 1], stop_early=True, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(two, maps[:2], strict=True))
    with pytest.raises(ValueError, match="output_fmt is 'NLC'; expected 'NCHW' or 'NHWC'"):
        network.forward_intermediates(images, output_fmt="NLC")


def test_chosen_features():
    network = timm.create_model("msvmamba_nano", features_only=True, out_indices=(1, 3), **SMALL).eval()
    assert network.feature_info.channels() == [16, 64]
    assert [m.shape[1] for m in network(torch.randn(1, 3, 32, 32))] == [16, 64]
    shallow = timm.create_model("msvmamba_nano", features_only=True, out_indices=(0, 1), **SMALL).eval()
    assert len(shallow.model.stages) == 2
    assert [tuple(m.shape) for m in shallow(torch.randn(1, 3, 32, 32))] == [(1, 8, 8, 8), (1, 16, 4, 4)]


def test_prune_intermediate_layers(make_small):
    network = make_small()
    assert network.prune_intermediate_layers([1], prune_norm=True) == [1]
    assert len(network.stages) == 2
    assert isinstance(network.norm, torch.nn.Identity)


def test_the_head(make_small):
    network, images = make_small(), torch.randn(2, 3, 40, 33)
    features = network.forward_features(images)
    pooled = network.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, features.mean(dim=(1, 2)))
    classifier = network.get_classifier()
    torch.testing.assert_close(network.forward_head(features), pooled @ classifier.weight.T + classifier.bias)
    assert torch.equal(network(images), network.forward_head(features))


def test_reset_classifier(make_small):
    network, images = make_small(), torch.randn(2, 3, 32, 32)
    pooled = network.forward_head(network.forward_features(images), pre_logits=True)
    network.reset_classifier(5)
    assert network.num_classes == 5
    assert network.get_classifier().out_features == 5
    assert network(images).shape == (2, 5)
    network.reset_classifier(0)
    assert network.num_classes == 0
    assert torch.equal(network(images), pooled)
    network.reset_classifier(0, "")
    assert torch.equal(network(images), network.forward_features(images))
    network.reset_classifier(4, "avg")
    assert network(images).shape == (2, 4)
    with torch.device("meta"):
        assert MSVMamba(num_classes=0).num_classes == 0


def test_no_classes_give_pooled_features(make_small):
    network, images = make_small(num_classes=0), torch.randn(2, 3, 32, 32)
    assert torch.equal(network(images), network.forward_head(network.forward_features(images), pre_logits=True))
    assert network(images).shape == (2, network.num_features) == (2, network.head_hidden_size)


@pytest.mark.parametrize("in_chans", [1, 4])
def test_other_channels(in_chans):
    network = timm.create_model("msvmamba_nano", in_chans=in_chans, num_classes=3, **SMALL).eval()
    assert network.in_chans == in_chans
    assert network(torch.randn(2, in_chans, 32, 32)).shape == (2, 3)
    with pytest.raises(ValueError, match=rf"expected \(B, {in_chans}, H, W\)"):
        network(torch.randn(2, 3, 32, 32))


@pytest.mark.parametrize("coarse", [False, True], ids=["fine", "coarse"])
def test_groups_run_from_stem_to_head(make_small, coarse):
    network = make_small(downsample="conv", separate_norms=True)
    layers = group_parameters(network, network.group_matcher(coarse=coarse), reverse=True)
    assert layers.keys() == {name for name, _ in network.named_parameters()}
    assert {layer for name, layer in layers.items() if name.startswith("stem")} == {0}
    by_stage = [[layers[n] for n in layers if n.startswith(f"stages.{i}.")] for i in range(4)]
    for shallow, deep in pairwise(by_stage):
        assert max(shallow) < min(deep) + (not coarse)  # a downsampling may lie with the stage that it leaves
    assert layers["head.fc.weight"] == max(layers.values())
    assert layers["norm.weight"] > max(by_stage[2])
    if not coarse:
        assert layers["stages.2.blocks.0.norm1.weight"] < layers["stages.2.blocks.1.norm1.weight"]


def test_layer_wise_learning_rates(make_small):
    network = make_small()
    groups = timm.optim.param_groups_layer_decay(
        network, weight_decay=0.05, no_weight_decay_list=network.no_weight_decay(), layer_decay=0.7
    )
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert len(scale) == len(list(network.parameters()))
    assert scale[id(network.head.fc.weight)] == 1
    assert scale[id(network.stem.proj.weight)] == min(scale.values()) < 0.2


def test_default_cfg():
    for name in PRESETS:
        config = timm.get_pretrained_cfg(name).to_dict()
        assert config["input_size"] == (3, 224, 224)
        assert config["crop_pct"] == 0.875
        assert config["interpolation"] == "bicubic"
        assert config["mean"] == (0.485, 0.456, 0.406)
        assert config["std"] == (0.229, 0.224, 0.225)
    network = timm.create_model("vmamba_nano", **SMALL)
    modules = dict(network.named_modules())
    assert modules[network.default_cfg["first_conv"]] is network.stem.proj
    assert modules[network.default_cfg["classifier"]] is network.get_classifier()
    assert timm.data.resolve_data_config(model=network)["input_size"] == (3, 224, 224)


def test_grad_checkpointing_by_timms_name(make_small):
    network = make_small()
    network.set_grad_checkpointing()
    assert all(stage.grad_checkpointing for stage in network.stages)
    network.set_grad_checkpointing(False)
    assert not any(stage.grad_checkpointing for stage in network.stages)


def test_timm_model_makes_networks_for_data():
    network = TimmModel("msvmamba_nano", drop_path_rate=0.4, model_args={**SMALL, "se": False})(1, 5).eval()
    assert network(torch.randn(2, 1, 32, 32)).shape == (2, 5)
    assert network.stages[3].blocks[-1].drop_path.drop_prob == pytest.approx(0.4)
    assert isinstance(network.stages[0].blocks[0].mixer.se, torch.nn.Identity)
    own_rate = TimmModel("msvmamba_nano", model_args=SMALL)(3, 5)
    assert own_rate.stages[3].blocks[-1].drop_path.drop_prob == pytest.approx(0.2)


def test_timm_model_takes_timms_own():
    network = TimmModel("resnet10t")(3, 4).eval()
    assert network(torch.randn(1, 3, 32, 32)).shape == (1, 4)


def test_timm_model_leaves_its_arguments_alone():
    arguments = dict(SMALL)
    TimmModel("msvmamba_nano", drop_path_rate=0.4, model_args=arguments)
    assert arguments == SMALL


def test_an_unknown_name_gives_the_nearest():
    with pytest.raises(
        ValueError, match=r"no model 'msvmamba_nanoo' in timm's registry; the nearest are msvmamba_nano"
    ):
        TimmModel("msvmamba_nanoo")
    with pytest.raises(ValueError, match=r"no model '%%%%%%%%%%%%' in timm's registry$"):
        TimmModel("%" * 12)
