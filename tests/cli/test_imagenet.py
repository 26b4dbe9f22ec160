"""The ImageNet recipes, proven by a dry run: `fit` for a few steps on a folder in ImageNet's layout of 1000 classes.

What is asserted was read back from the objects that trained (tests/configs/witness.py), not from the YAML. Two runs
share the work, so that a CPU can do it: one of the real network and images with a small batch, one of the real batch
with a small network and small images.
"""

import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "experiments" / "recipes"

spec = importlib.util.spec_from_file_location("cli", ROOT / "cli.py")
assert spec is not None
assert spec.loader is not None
cli = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cli)

IMAGES = 1024  # of training: one step of an epoch at the published batch


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """1000 class folders, 1024 training images and 1000 to validate; all the same few pixels."""
    root = tmp_path_factory.mktemp("imagenet")
    file = root / "image.JPEG"
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((60, 48), Image.Resampling.BICUBIC).save(file)
    for split in ("train", "val"):
        for index in range(1000):
            folder = root / split / f"n{index:08}"
            folder.mkdir(parents=True)
            for copy in range(2 if split == "train" and index < IMAGES - 1000 else 1):
                (folder / f"{copy}.JPEG").hardlink_to(file)
    return root


def dry_run(root: Path, folder: Path, recipe: str, steps: int, ask: list[int], *words: str) -> dict:
    """What the witness of a `fit` of Table 4's last row saw."""
    kept_argv, kept_path = sys.argv, list(sys.path)
    sys.path.insert(0, str(ROOT / "tests" / "configs"))  # where the run's process finds the witness
    given = ["fit", "--config", str(ROOT / "experiments/ablate_components.yaml"), "--config",
             str(RECIPES / f"{recipe}.yaml"), "--data.root", str(root), "--data.num_workers", "0",
             "--grid.only", '["msvmamba_nano"]', "--grid.results", str(folder / "results"),
             "--trainer.accelerator", "cpu", "--trainer.limit_val_batches", "1", "--trainer.limit_test_batches", "1",
             "--trainer.callbacks+=witness.Witness", "--trainer.callbacks.path", str(folder / "seen.json"),
             "--trainer.callbacks.steps", str(steps), "--trainer.callbacks.ask", json.dumps(ask), *words]  # fmt: skip
    sys.argv = ["cli.py", *given]
    try:
        assert cli.main(given) == 0
    finally:
        sys.argv, sys.path[:] = kept_argv, kept_path
    (record,) = (folder / "results" / "ablate_components" / recipe).rglob("record.json")
    return {**json.loads((folder / "seen.json").read_text()), "record": json.loads(record.read_text())}


def published_lr(step: int, epochs: int, per_epoch: int, batch: int) -> float:
    """Warm-up from 1e-6 over 20 epochs, cosine from 1e-3 to 1e-5 over the others, a value a step, at batch 1024."""
    warmup, total = 20 * per_epoch, epochs * per_epoch
    if step < warmup:
        lr = 1e-6 + (1e-3 - 1e-6) * step / warmup
    else:
        lr = 1e-5 + 0.5 * (1e-3 - 1e-5) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
    return lr * batch / 1024


PER_EPOCH = IMAGES // 8
ASK_300 = [20 * PER_EPOCH - 1, 20 * PER_EPOCH, 160 * PER_EPOCH, 300 * PER_EPOCH - 1, 300 * PER_EPOCH]
ASK_100 = [0, 19, 20, 21, 60, 99, 100]


@pytest.fixture(scope="module")
def network_as_published(imagenet, tmp_path_factory):
    """imagenet_300e with msvmamba_nano at 224 px; 8 images a step instead of 1024, in two batches."""
    folder = tmp_path_factory.mktemp("network")
    words = ["--model.global_batch_size", "8", "--data.batch_size", "4"]
    return dry_run(imagenet, folder, "imagenet_300e", 3, ASK_300, *words)


@pytest.fixture(scope="module")
def batch_as_published(imagenet, tmp_path_factory):
    """imagenet_100e with 1024 images a step, in 8 batches; a network of 8 channels and images of 32 px."""
    folder = tmp_path_factory.mktemp("batch")
    # In float32: on a CPU the bf16 weight gradient of a 7×7 convolution on one pixel is now and then uninitialised.
    words = ["--data.image_size", "32", "--model.network.dims", "[8, 16, 32, 64]", "--trainer.precision", "32-true"]
    return dry_run(imagenet, folder, "imagenet_100e", 2, ASK_100, *words)


def test_optimizer_groups(network_as_published):
    seen = network_as_published
    assert seen["optimizer"] == "AdamW"
    same = {"betas": [0.9, 0.999], "eps": 1e-8, "initial_lr": pytest.approx(1e-3 * 8 / 1024)}
    assert sorted(seen["groups"], key=lambda group: group["weight_decay"]) == [
        {"parameters": 45_928, "weight_decay": 0.0, **same},
        {"parameters": 6_818_208, "weight_decay": 0.05, **same},
    ]
    assert seen["trained"] == 6_864_136


def test_batch(network_as_published, batch_as_published):
    seen = batch_as_published
    assert (seen["accumulate"], seen["batches"]) == (8, [[128, 3, 32, 32]] * 16)
    assert seen["record"]["schedule"]["global_batch_size"] == 1024
    assert network_as_published["batches"] == [[4, 3, 224, 224]] * 6


def test_learning_rate_by_step(network_as_published, batch_as_published):
    for seen, epochs, per_epoch, batch, ask in (
        (network_as_published, 300, PER_EPOCH, 8, ASK_300),
        (batch_as_published, 100, 1, 1024, ASK_100),
    ):
        assert (seen["epochs"], seen["steps"]) == (epochs, epochs * per_epoch)
        assert seen["schedule"]["interval"] == "step"
        taken = [published_lr(step, epochs, per_epoch, batch) for step in range(len(seen["lr"]))]
        assert seen["lr"] == [pytest.approx([lr, lr]) for lr in taken]
        asked = [published_lr(step, epochs, per_epoch, batch) for step in ask[:-1]]
        assert seen["schedule"]["lr"] == pytest.approx([*asked, 1e-5 * batch / 1024])
    assert [len(seen["lr"]) for seen in (network_as_published, batch_as_published)] == [3, 2]
    assert batch_as_published["lr"][0] == [1e-6, 1e-6]
    assert max(batch_as_published["schedule"]["lr"]) == batch_as_published["groups"][0]["initial_lr"] == 1e-3


@pytest.fixture(params=["network_as_published", "batch_as_published"])
def seen(request):
    return request.getfixturevalue(request.param)


def test_precision(network_as_published):
    assert network_as_published["precision"] == "bf16-mixed"


def test_average_clipping_and_drop_path(seen):
    assert seen["ema"] == [0.9999] * 3
    assert seen["ema_of"] == "Classification"
    assert seen["clip"] == [5.0, None]  # None is Lightning's for clipping by norm
    assert seen["drop_path"] == pytest.approx(0.2)


def test_mixing(seen):
    assert seen["mix"] == {
        "mixup_alpha": 0.8, "cutmix_alpha": 1.0, "mix_prob": 1.0, "switch_prob": 0.5, "label_smoothing": 0.1,
        "mode": "batch",
    }  # fmt: skip
    assert (seen["classes"], seen["loss"]) == (1000, "SoftTargetCrossEntropy")


def test_augmentation(seen, network_as_published):
    side = 224 if seen is network_as_published else 32
    assert seen["train"]["drop_last"]
    assert seen["train"]["crop"] == [side, side, 0.08, 1.0, "bicubic"]
    assert seen["train"]["ratio"] == pytest.approx([3 / 4, 4 / 3])
    assert seen["train"]["flip"] == 0.5
    # rand-m9-mstd0.5-inc1: two of timm's 15 operations an image, six of the 15 in their increasing form.
    assert seen["train"]["policy"] == ["RandAugment", 2, 15]
    assert seen["train"]["ops"] == [[9, 0.5, 0.5]]
    assert seen["train"]["increasing"] == 6
    assert seen["record"]["data"]["augmentation"]["auto_augment"] == "rand-m9-mstd0.5-inc1"
    assert seen["train"]["erasing"] == [0.25, 1, True, False]
    assert seen["train"]["mean"] == pytest.approx([0.485, 0.456, 0.406])
    assert seen["train"]["std"] == pytest.approx([0.229, 0.224, 0.225])


def test_test_images(network_as_published):
    assert network_as_published["test"] == {"resize": [256, "bicubic"], "crop": [224, 224]}
    assert "val split" in network_as_published["record"]["data"]["note"]


def test_the_recipes_differ_in_their_epochs_alone():
    long, short = (yaml.safe_load((RECIPES / f"imagenet_{n}e.yaml").read_text()) for n in (300, 100))
    assert (long["trainer"].pop("max_epochs"), short["trainer"].pop("max_epochs")) == (300, 100)
    assert long == short
