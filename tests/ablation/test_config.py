import copy

import pytest

from msv.ablation.config import apply_overrides, config_hash, get_path

NETWORK = "model.init_args.network.init_args"


def base():
    return {
        "seed_everything": 0,
        "ckpt_path": None,
        "model": {
            "class_path": "msv.tasks.Classification",
            "init_args": {
                "network": {
                    "class_path": "msv.models.MSVMamba",
                    "init_args": {"dims": [48, 96], "full_scans": 1, "d_state": 8, "model_args": {"a": 1}},
                },
                "lr": 1e-3,
                "pretrained": None,
                "options": {},
            },
        },
        "data": {"class_path": "msv.data.Digits", "init_args": {"root": "data", "num_workers": 2, "batch_size": 64}},
        "trainer": {"max_epochs": 3, "accelerator": "cpu", "devices": 1, "logger": True, "callbacks": None},
        "grid": {"name": "g"},
    }


def changed(key, value):
    return config_hash(apply_overrides(base(), {key: value})) != config_hash(base())


def test_override_sets_one_value_of_a_copy():
    config = base()
    before = copy.deepcopy(config)
    value = [1, 2]
    result = apply_overrides(config, {f"{NETWORK}.full_scans": 4, f"{NETWORK}.dims": value})
    value.append(3)
    assert get_path(result, f"{NETWORK}.full_scans") == 4
    assert get_path(result, f"{NETWORK}.dims") == [1, 2]
    assert config == before


def test_a_subtree_may_be_replaced_and_then_set_inside_in_any_order():
    network = {"class_path": "msv.models.TimmModel", "init_args": {"name": "x", "model_args": None}}
    overrides = {f"{NETWORK}.name": "y", "model.init_args.network": network}
    result = apply_overrides(base(), overrides)
    assert result["model"]["init_args"]["network"]["init_args"] == {"name": "y", "model_args": None}
    assert network["init_args"]["name"] == "x"


@pytest.mark.parametrize(
    "key", [f"{NETWORK}.model_args.b", "model.init_args.options.x", "model.init_args.pretrained.x", "trainer.callbacks"]
)
def test_new_keys_in_free_dicts_and_existing_keys(key):
    assert get_path(apply_overrides(base(), {key: 5}), key) == 5


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        (f"{NETWORK}.ful_scans", f"{NETWORK}.full_scans"),
        ("model.network.full_scans", f"{NETWORK}.full_scans"),
        ("model.init_args.network.d_state", f"{NETWORK}.d_state"),
        ("full_scans", f"{NETWORK}.full_scans"),
        ("model.lr", "model.init_args.lr"),
        ("data.init_arg.batch_size", "data.init_args.batch_size"),
        ("trainer.max_epoch", "trainer.max_epochs"),
        ("trainr.devices", "trainer.devices"),
    ],
)
def test_a_typo_gets_the_nearest_full_path(key, suggestion):
    with pytest.raises(ValueError, match=r"matches nothing in the config") as error:
        apply_overrides(base(), {key: 1})
    assert repr(key) in str(error.value)
    assert str(error.value).partition("did you mean ")[2].startswith(suggestion)


@pytest.mark.parametrize("key", ["zzz", f"{NETWORK}.full_scans.x", "ckpt_path.x", f"{NETWORK}.new", "model..lr", ""])
def test_a_key_with_no_place_is_refused(key):
    with pytest.raises(ValueError, match="matches nothing in the config"):
        apply_overrides(base(), {key: 1})


def test_hash_is_eight_hex_digits_and_stable():
    assert len(config_hash(base())) == 8
    assert int(config_hash(base()), 16) >= 0
    # A change of this value makes every run on disk "missing": change it knowingly or not at all.
    assert config_hash({"seed_everything": 0, "trainer": {"max_epochs": 3, "devices": 2}}) == "a4ca8f19"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed_everything", 1),
        ("model.init_args.lr", 2e-3),
        (f"{NETWORK}.full_scans", 4),
        (f"{NETWORK}.dims", [96, 48]),
        ("data.init_args.batch_size", 32),
        ("data.class_path", "msv.data.CIFAR10"),
        ("trainer.max_epochs", 4),
        ("trainer.callbacks", [{"class_path": "my.Callback"}]),
        ("model.init_args.pretrained", "weights/nano.pth"),
    ],
)
def test_what_is_trained_changes_the_hash(key, value):
    assert changed(key, value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.init_args.root", "/elsewhere"),
        ("data.init_args.num_workers", 8),
        ("trainer.accelerator", "gpu"),
        ("trainer.devices", 8),
        ("trainer.logger", False),
        ("trainer.callbacks", []),
        ("trainer.callbacks", [{"class_path": "lightning.pytorch.callbacks.RichProgressBar"}]),
        (
            "trainer.callbacks",
            {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"dirpath": "x"}},
        ),
        ("ckpt_path", "last.ckpt"),
        ("grid", {"name": "other"}),
        ("model.init_args.lr", 1e-3),
        (f"{NETWORK}.dims", (48, 96)),
        (f"{NETWORK}.full_scans", 1.0),
    ],
)
def test_where_it_runs_leaves_the_hash(key, value):
    assert not changed(key, value)


def test_a_run_that_is_not_tested_is_another():
    assert config_hash(base(), tested=True) == config_hash(base())
    assert config_hash(base(), tested=False) != config_hash(base())


def test_new_keys_that_follow_or_say_nothing_leave_the_hash():
    config = base()
    config["trainer"]["strategy"] = "ddp"
    config["trainer"]["limit_val_batches"] = None
    config["data"]["init_args"] |= {"pin_memory": True, "predict_paths": ["a"], "seed": 0}
    config["model"]["init_args"] |= {"seed": 0, "compile": True}
    assert config_hash(config) == config_hash(base())


@pytest.mark.parametrize("recurrence", [True, False])
def test_an_option_that_came_later_leaves_the_hash_of_what_was_before(recurrence):
    config = base()
    config["model"]["init_args"]["network"]["init_args"]["recurrence"] = recurrence
    same = config_hash(config) == config_hash(base())
    assert same is recurrence  # which it always was
    assert config["model"]["init_args"]["network"]["init_args"]["recurrence"] is recurrence


def test_pretrained_counts_by_file_name():
    here = apply_overrides(base(), {"model.init_args.pretrained": "/a/nano.pth"})
    there = apply_overrides(base(), {"model.init_args.pretrained": "/b/c/nano.pth"})
    other = apply_overrides(base(), {"model.init_args.pretrained": "/a/tiny.pth"})
    assert config_hash(here) == config_hash(there) != config_hash(other)


def test_hash_leaves_the_config_and_ignores_key_order():
    def reverse(value):
        return {key: reverse(value[key]) for key in reversed(value)} if isinstance(value, dict) else value

    config = base()
    config_hash(config)
    assert config == base()
    assert config_hash(reverse(base())) == config_hash(base())
