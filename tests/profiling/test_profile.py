"""Profiles of single models: by name or from a factory, without weights, and with the memory of training."""

import pytest
import torch
from torch import nn

from msv.models import MSVMamba
from msv.profiling import count, profile_model
from msv.profiling.profile import training_memory

CPU = torch.device("cpu")


def small(in_chans: int, num_classes: int) -> MSVMamba:
    return MSVMamba(in_chans, num_classes, dims=(8, 16, 32, 64), depths=(1, 1, 1, 1))


def test_by_name():
    found = profile_model("msvmamba_nano")
    assert (found.name, found.in_chans, found.size, found.num_classes) == ("msvmamba_nano", 3, (224, 224), 1000)
    assert found.counts.params == 6_864_136
    assert found.memory is None


def test_from_a_factory_at_another_size():
    found = profile_model(small, (64, 96), 1, 10)
    assert (found.name, found.in_chans, found.size, found.num_classes) == ("MSVMamba", 1, (64, 96), 10)
    assert found.counts == count(small(1, 10), 1, (64, 96))
    assert profile_model(small, 64, name="mine").name == "mine"


def test_no_weight_is_made_for_counts():
    devices = set()

    def watched(in_chans: int, num_classes: int) -> nn.Module:
        network = small(in_chans, num_classes)
        devices.update(p.device.type for p in network.parameters())
        return network

    profile_model(watched, 64)
    assert devices == {"meta"}


def test_a_model_that_computes_while_it_is_built():
    class Computing(nn.Module):
        def __init__(self, in_chans: int, num_classes: int) -> None:
            super().__init__()
            self.head = nn.Linear(in_chans, int(torch.ones(1).sum().item()) * num_classes)

        def forward(self, x):
            return self.head(x.mean((2, 3)))

    assert profile_model(Computing, 32, 3, 7).counts.params == 28


def test_memory_of_a_linear_by_hand():
    """A matrix that is its image's only user: weights, images, logits, the gradient of logits, that of weights."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3 * 32 * 32, 500, bias=False)

        def forward(self, x):
            return self.fc(x.flatten(1))

    weights, images, logits = 4 * 3072 * 500, 4 * 2 * 3072, 4 * 2 * 500
    found = training_memory(Flat(), (2, 3, 32, 32), CPU)
    assert found.batch_size == 2
    assert found.device
    # The sum and its gradient are a few bytes; torch may keep the logits or not.
    assert 2 * weights + images <= found.nbytes <= 2 * weights + images + 3 * logits + 64


def test_memory_grows_by_the_image():
    one, two, three = (profile_model(small, 32, batch_size=b, device="cpu").memory.nbytes for b in (8, 16, 24))
    assert one < two < three
    assert three - two == pytest.approx(two - one, rel=0.1)


def test_memory_measures_training():
    class Notes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)
            self.modes = []

        def forward(self, x):
            self.modes.append((self.training, torch.is_grad_enabled()))
            return self.fc(x.mean((2, 3)))

    network = Notes().eval()
    training_memory(network, (1, 3, 32, 32), CPU)
    assert set(network.modes) == {(True, True)}


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: profile_model("msvmamba_nan"), "no model 'msvmamba_nan' in timm's registry; the nearest are msvmamba"),
        (lambda: profile_model(small, 31), "images are 31×31; expected both sides 32 or more"),
        (lambda: profile_model("deit_tiny_patch16_224", 256), r"no image of 3×256×256 fits the model: .*height"),
        (lambda: profile_model(small, 64, batch_size=0), "batch_size is 0; expected 1 or more"),
    ],
    ids=["name", "small", "size", "batch"],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_batch_that_does_not_fit(monkeypatch):
    class Greedy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x):
            raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(ValueError, match=r"a batch of 2 images does not fit into the memory .*; use a smaller one"):
        training_memory(Greedy(), (2, 3, 32, 32), CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_memory_on_a_gpu():
    found = profile_model(small, 64, batch_size=4)
    assert found.memory.device == torch.cuda.get_device_name()
    assert found.memory.nbytes > 4 * found.counts.params * 2
