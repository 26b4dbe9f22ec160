import pytest
import torch

from msv.profiling.timing import medians_interleaved, nbytes, peak_memory

CPU = torch.device("cpu")


def test_peak_counts_what_is_alive_at_once():
    def work():
        first = torch.ones(100_000)  # 400 kB
        second = torch.ones(200_000)  # 1,200 kB alive
        del first
        third = torch.ones(50_000)  # 1,000 kB alive
        del second
        return third, torch.ones(25_000)

    assert peak_memory(work, CPU) == 1_200_000


def test_peak_leaves_out_what_was_there_and_counts_what_is_returned():
    before = torch.ones(1_000_000)
    assert peak_memory(lambda: before.neg_(), CPU) == 0
    assert peak_memory(lambda: before.neg(), CPU) == 4_000_000


def test_peak_sees_the_backward_and_its_temporaries():
    x = torch.ones(100_000, requires_grad=True)
    upstream = torch.ones(100_000)

    def work():
        y = x.exp()
        return y, torch.autograd.grad(y, x, upstream)

    # y and the gradient; a third of that size would show a copy.
    assert peak_memory(work, CPU) == 800_000


def test_bytes_of_expanded_tensors_and_views():
    x = torch.ones(10, 10)
    assert nbytes(x, x[0]) == 440
    assert nbytes(x[:1].expand(1000, 10), torch.ones(3).expand(1000, 3)) == 400 + 12


def test_turns_are_interleaved():
    order = []
    works = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    times = medians_interleaved(works, CPU, repeats=3, warmup=1)
    assert "".join(order) == "aabb" * 4
    assert list(times) == ["a", "b"]
    assert all(0 <= timing.minimum <= timing.median for timing in times.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_peak_on_a_gpu():
    device = torch.device("cuda")
    assert peak_memory(lambda: torch.ones(1 << 20, device=device), device) == 4 << 20
