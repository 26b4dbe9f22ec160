"""The importer of published checkpoints: what it takes, and what it refuses in words that name the tensor."""

import collections
from pathlib import Path

import pytest
import torch

from msv.models import PRESETS, MSVMamba, load_published
from msv.models.checkpoint_file import read_checkpoint
from msv.models.published import from_published, infer_arguments

GOLDENS = Path(__file__).parents[1] / "goldens"
GOLDEN = GOLDENS / "small_full_n1.pt"


@pytest.fixture(scope="module")
def published():
    return torch.load(GOLDEN, weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def expected(published):
    network = make_network()
    load_published(network, published)
    return network.state_dict()


def make_network(**arguments):
    return MSVMamba(**{"num_classes": 10, "dims": (16, 32, 64, 128), "depths": (1, 1, 2, 1), **arguments})


def same(network, state):
    found = network.state_dict()
    return found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)


def published_shapes(preset):
    lines = (line.split("\t") for line in (GOLDENS / f"published_keys_{preset}.txt").read_text().splitlines())
    return {name: tuple(int(side) for side in shape.strip("()").split(",") if side) for name, shape in lines}


@pytest.mark.parametrize("preset, tensors", [("msvmamba_nano", 267), ("vmamba_tiny", 212)])
def test_names_and_shapes_of_the_presets_are_the_published_ones(preset, tensors):
    """Every tensor of the published file has one place, and every parameter one tensor."""
    published = {name: torch.empty(shape, device="meta") for name, shape in published_shapes(preset).items()}
    arguments = infer_arguments(published)
    with torch.device("meta"):
        network = MSVMamba(**arguments)
    state = from_published(network, published)
    assert (len(published), state.keys()) == (tensors, network.state_dict().keys())
    expected = {**PRESETS[preset], "in_chans": 3, "num_classes": 1000}
    assert {**expected, **arguments} == {**arguments, **expected}


def test_weights_are_split_between_the_branches(published, expected):
    stacked = published["layers.0.blocks.0.op.A_logs"]  # (2·32, 1): the half branch's rows come first
    assert torch.equal(expected["stages.0.blocks.0.mixer.s6_half.A_log"][0], stacked[:32])
    assert torch.equal(expected["stages.0.blocks.0.mixer.s6_full.A_log"][0], stacked[32:])
    stacked = published["layers.0.blocks.0.op.x_proj_weight"]
    assert torch.equal(expected["stages.0.blocks.0.mixer.s6_half.x_proj"], stacked[:1])
    assert torch.equal(expected["stages.0.blocks.0.mixer.s6_full.x_proj"], stacked[1:])


def test_loaded_weights_are_copies(published):
    network = make_network()
    load_published(network, published)
    before = published["classifier.norm.weight"].clone()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert torch.equal(published["classifier.norm.weight"], before)


@pytest.mark.parametrize("weights, chosen", [("auto", "model_ema"), ("model_ema", "model_ema"), ("model", "model")])
def test_which_weights(tmp_path, published, expected, weights, chosen):
    other = {name: value + 1 for name, value in published.items()}
    content = {"model": other, "model_ema": other, chosen: published, "epoch": 299, "max_accuracy": 77.3}
    torch.save(content, tmp_path / "both.pth")
    network = make_network()
    report = load_published(network, tmp_path / "both.pth", weights)
    assert (report.source, report.weights) == (str(tmp_path / "both.pth"), chosen)
    assert (report.tensors, report.left_out) == (len(published), ())
    assert same(network, expected)


def test_auto_takes_model_where_there_is_no_ema(published, expected):
    network = make_network()
    assert load_published(network, {"model": published, "epoch": 1}).weights == "model"
    assert same(network, expected)
    with pytest.raises(ValueError, match="has no 'model_ema'; expected one of model"):
        load_published(network, {"model": published}, "model_ema")
    with pytest.raises(ValueError, match="plain state dict and has no 'model': use weights='auto'"):
        load_published(network, published, "model")


def old_name(name):
    for new, old in (
        ("patch_embed.0.", "patch_embed.proj."),
        ("patch_embed.2.", "patch_embed.norm."),
        ("classifier.", ""),
        (".op.", ".self_attention."),
    ):
        name = name.replace(new, old)
    return name.replace(".norm.", ".ln_1.") if ".blocks." in name and "out_norm" not in name else name


def test_old_names(published, expected):
    old = {old_name(name): value for name, value in published.items()}
    assert {"patch_embed.proj.weight", "norm.weight", "head.bias", "layers.0.blocks.0.ln_1.weight"} <= old.keys()
    assert "layers.0.blocks.0.self_attention.A_logs" in old
    assert "layers.0.downsample.norm.weight" in old
    network = make_network()
    load_published(network, old)
    assert same(network, expected)


@pytest.fixture
def with_config(tmp_path, published, save_as_published):
    return save_as_published(tmp_path / "published.pth", model=published)


def test_a_file_with_its_configuration_inside(with_config, expected):
    with pytest.raises(Exception, match=r"yacs\.config"):
        torch.load(with_config, weights_only=True)
    network = make_network()
    assert load_published(network, with_config).weights == "model"
    assert same(network, expected)
    config = read_checkpoint(with_config)["config"]
    assert config == {"MODEL": {"TYPE": "vssm", "DEPTHS": [1, 1, 2, 1]}, "SEED": 0, "TAG": None}


def test_a_missing_tensor_of_two_parts_is_named_once(published):
    lacking = {name: value for name, value in published.items() if name != "layers.2.blocks.0.op.A_logs"}
    with pytest.raises(ValueError, match=r"network: missing layers.2.blocks.0.op.A_logs\. Expected"):
        load_published(make_network(), lacking)


def test_drop_head(published, expected, caplog):
    network = make_network(num_classes=3)
    head = {name: value.clone() for name, value in network.head.state_dict().items()}
    message = r"misshapen classifier.head.weight \(10, 128\) for head.fc.weight \(3, 128\).*drop_head=True"
    with pytest.raises(ValueError, match=message):
        load_published(network, published)
    report = load_published(network, published, drop_head=True)
    assert report.left_out == ("classifier.head.weight", "classifier.head.bias")
    assert "state dict: classifier.head.weight (10, 128) is left out" in caplog.text
    assert report.tensors == len(published) - 2
    assert all(torch.equal(network.head.state_dict()[name], value) for name, value in head.items())
    assert same(network, {**expected, **{f"head.{name}": value for name, value in head.items()}})


def test_drop_head_for_no_classes_and_for_as_many(published, expected):
    network = make_network(num_classes=0)
    assert len(load_published(network, published, drop_head=True).left_out) == 2
    assert same(network, {name: value for name, value in expected.items() if not name.startswith("head")})
    network = make_network()
    assert load_published(network, published, drop_head=True).left_out == ()
    assert same(network, expected)


def without(published, *names):
    return {name: value for name, value in published.items() if name not in names}


A_LOGS = "layers.0.blocks.0.op.A_logs"
MISFITS = {
    "missing": (lambda p: without(p, A_LOGS), f"missing {A_LOGS}"),
    "extra": (lambda p: {**p, "layers.9.norm.weight": torch.ones(3)}, "extra layers.9.norm.weight"),
    "misshapen": (
        lambda p: {**p, "classifier.norm.weight": torch.ones(5)},
        r"misshapen classifier.norm.weight \(5,\) for norm.weight \(128,\)",
    ),
    "misshapen-states": (lambda p: {**p, A_LOGS: torch.ones(64, 8)}, rf"misshapen {A_LOGS} \(64, 8\) for stages.0"),
    "misshapen-sets": (lambda p: {**p, A_LOGS: torch.ones(96, 1)}, rf"misshapen {A_LOGS} \(96, 1\) for stages.0"),
    "misshapen-one-set": (lambda p: {**p, A_LOGS: torch.ones(32, 1)}, rf"misshapen {A_LOGS} \(32, 1\) for stages.0"),
}


@pytest.mark.parametrize("change, message", MISFITS.values(), ids=MISFITS)
def test_misfits_are_named_and_nothing_is_loaded(published, change, message):
    network = make_network()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_published(network, change(published))
    assert same(network, before)


@pytest.mark.parametrize(
    "arguments",
    [
        {"full_scans": 4},
        {"full_scans": 2},
        {"full_scans": 0},
        {"d_state": 8},
        {"se": False},
        {"conv_ffn": False},
        {"depths": (1, 1, 3, 1)},
        {"dims": (8, 16, 32, 64)},
        {"share_half": False},
        {"separate_norms": True},
        {"downsample": "conv"},
    ],
    ids=str,
)
def test_another_architecture_is_refused(published, arguments):
    with pytest.raises(ValueError, match=r"does not fit this network: .*choose the preset it was trained as"):
        load_published(make_network(**arguments), published)


def test_many_misfits_are_counted(published):
    gone = [name for name in published if ".A_logs" in name or ".Ds" in name]
    with pytest.raises(ValueError, match=r"; and \d+ more"):
        load_published(make_network(), without(published, *gone))


def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nothing.pth"):
        load_published(make_network(), tmp_path / "nothing.pth")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_published(make_network(), tmp_path)


@pytest.mark.parametrize("kept", [0.5, 0.99, 0.0], ids="kept-{}".format)
def test_a_truncated_file(tmp_path, kept):
    whole = GOLDEN.read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(ValueError, match=r"cut.pth cannot be read as a checkpoint .*it may be truncated"):
        load_published(make_network(), tmp_path / "cut.pth")


def test_files_that_are_no_checkpoints(tmp_path):
    path = tmp_path / "file.pth"
    path.write_text("accuracy: 77.3\n")
    with pytest.raises(ValueError, match=r"file.pth cannot be read as a checkpoint"):
        load_published(make_network(), path)
    torch.save([torch.ones(3)], path)
    with pytest.raises(ValueError, match=r"file\.pth holds a list; expected a dict of weights"):
        load_published(make_network(), path)
    torch.save({"epoch": 3, "lr": 0.1}, path)
    with pytest.raises(ValueError, match="holds no weights; expected a published checkpoint or a state dict"):
        load_published(make_network(), path)


RAN = []


class Malicious:
    def __reduce__(self):
        return RAN.append, ("code of the file ran",)


def test_code_in_a_file_does_not_run(tmp_path, published):
    torch.save({"model": published, "config": Malicious()}, tmp_path / "bad.pth")
    RAN.clear()
    with pytest.raises(ValueError, match=r"bad.pth cannot be read as a checkpoint"):
        load_published(make_network(), tmp_path / "bad.pth")
    assert not RAN


def test_optimizer_states_beside_the_weights_are_left_alone(tmp_path, published, expected):
    content = collections.OrderedDict(
        model=published, optimizer={"state": {}, "param_groups": [{"lr": 1e-3}]}, scaler={}
    )
    torch.save(content, tmp_path / "full.pth")
    network = make_network()
    load_published(network, tmp_path / "full.pth")
    assert same(network, expected)


def test_files_of_before_torch_1_6(tmp_path, published, expected):
    torch.save({"model": published}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    network = make_network()
    assert load_published(network, tmp_path / "old.pth").weights == "model"
    assert same(network, expected)


def test_a_choice_made_for_the_user_is_told(published, caplog):
    load_published(make_network(), {"model": published})
    assert caplog.text == ""
    load_published(make_network(), {"model": published, "model_ema": published})
    assert "takes model_ema; the file has model too" in caplog.text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_weights_that_are_not_finite_are_named(published, caplog, value):
    bad = {name: tensor.clone() for name, tensor in published.items()}
    bad[A_LOGS][:3] = value
    bad["classifier.head.bias"][0] = value
    report = load_published(make_network(), bad)
    assert sorted(report.not_finite) == ["classifier.head.bias", A_LOGS]
    assert f"{A_LOGS} (3 of 64)" in caplog.text
    assert "NaN or infinite weights in 2 tensor(s)" in caplog.text


@pytest.mark.parametrize("arguments, shown", [({"carry_state": False}, "reset at the seams"), ({}, None)], ids=str)
def test_another_function_of_the_same_shapes_is_told(published, caplog, arguments, shown):
    load_published(make_network(**arguments), published)
    assert shown in caplog.text if shown else caplog.text == ""


def test_vmambas_weights_in_the_split_0_4_are_told(caplog):
    ss2d = torch.load(GOLDENS / "small_ss2d.pt", weights_only=True)["state_dict"]
    load_published(make_network(d_state=8, full_scans=0, se=False, conv_ffn=False), ss2d)
    assert "the published model has no split 0/4" in caplog.text


@pytest.mark.parametrize(
    "name, state",
    [("timm", {"layers.0.blocks.0.attn.qkv.weight": torch.ones(3)}), ("bare", {"conv1.weight": torch.ones(3)})],
)
@pytest.mark.parametrize("wrapped", [False, True], ids=["state-dict", "in-model"])
def test_weights_of_another_model(name, state, wrapped):
    with pytest.raises(
        ValueError, match=rf"checkpoint of another model: it has {next(iter(state))}; expected .*A_logs"
    ):
        load_published(make_network(), {"model": state} if wrapped else state)


@pytest.mark.parametrize("prefix", ["", "network."])
def test_weights_in_our_own_naming(prefix):
    state = {f"{prefix}{name}": value for name, value in make_network().state_dict().items()}
    with pytest.raises(ValueError, match=r"this project's own naming.*--model.pretrained takes it as it is"):
        load_published(make_network(), {"state_dict": state} if prefix else state)


def test_a_model_that_is_none_of_ours(published):
    with pytest.raises(TypeError, match="got a Linear; expected an MSVMamba"):
        load_published(torch.nn.Linear(2, 2), published)
