import io
import os
import subprocess
import tarfile
import types
from pathlib import Path

import pytest
import torch

from msv.kernels import selective_scan
from msv.profiling import mamba_cuda
from msv.profiling.mamba_cuda import MODULE, PACKAGE, VERSION, RivalMissingError

FILES = {
    "PKG-INFO": "Metadata-Version: 2.4\nName: mamba_ssm\nVersion: 9.8.post7\n",
    "setup.py": "raise SystemExit",
    "csrc/selective_scan/selective_scan.cpp": "// binding",
    "csrc/selective_scan/selective_scan_bwd_kernel.cuh": "// kernel",
    "csrc/other/other.cpp": "// not ours",
}
NAMES = {"selective_scan.cpp": b"// binding", "selective_scan_bwd_kernel.cuh": b"// kernel"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
    return folder / "msv_mamba"


@pytest.fixture
def sdist(tmp_path):
    """Makes an archive of the files, in a top folder as pip makes them."""

    def make(files=FILES):
        path = tmp_path / "mamba_ssm-9.8.post7.tar.gz"
        with tarfile.open(path, "w:gz") as archive:
            for name, text in files.items():
                info = tarfile.TarInfo(f"mamba_ssm-9.8.post7/{name}")
                info.size = len(text)
                archive.addfile(info, io.BytesIO(text.encode()))
        return path

    return make


@pytest.fixture
def a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """A folder with an nvcc, and torch's `load` as the test wants it."""
    from torch.utils import cpp_extension

    nvcc = tmp_path / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.touch(mode=0o755)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path / "toolkit"))
    return lambda load: monkeypatch.setattr(cpp_extension, "load", load)


def test_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RivalMissingError, match="needs a GPU, and torch finds none here"):
        mamba_cuda.load()


def test_an_archive_and_its_folder(sdist, tmp_path):
    source = mamba_cuda.read(sdist())
    assert (source.version, source.files) == ("9.8.post7", NAMES)
    with tarfile.open(sdist()) as archive:
        archive.extractall(tmp_path)
    assert mamba_cuda.read(tmp_path / "mamba_ssm-9.8.post7") == source


def test_a_checkout_tells_its_version_in_the_package(tmp_path):
    for name, text in {**FILES, "mamba_ssm/__init__.py": '__version__ = "1.2.3"\n'}.items():
        if name != "PKG-INFO":
            path = tmp_path / "checkout" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    assert mamba_cuda.read(tmp_path / "checkout").version == "1.2.3"
    (tmp_path / "checkout" / "mamba_ssm" / "__init__.py").unlink()
    assert mamba_cuda.read(tmp_path / "checkout").version == "unknown"


@pytest.mark.parametrize("name", ["missing.tar.gz", "missing", "missing.so"])
def test_no_source(a_gpu, tmp_path, name):
    with pytest.raises(RivalMissingError, match=rf"{name} does not exist; expected"):
        mamba_cuda.load(tmp_path / name)


def test_a_broken_archive(a_gpu, sdist):
    path = sdist()
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], whole[:20] + b"\xff" * 40 + whole[60:], b"not an archive", b""):
        path.write_bytes(broken)
        with pytest.raises(RivalMissingError, match=r"tar\.gz cannot be read: .*; expected the source distribution"):
            mamba_cuda.load(path)


def test_another_package_s_archive(a_gpu, sdist):
    with pytest.raises(RivalMissingError, match=r"holds no csrc/selective_scan/selective_scan\.cpp"):
        mamba_cuda.load(sdist({"PKG-INFO": FILES["PKG-INFO"]}))


def test_no_compiler(a_gpu, sdist, monkeypatch):
    from torch.utils import cpp_extension

    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    with pytest.raises(RivalMissingError, match="needs nvcc, and there is none here; install CUDA"):
        mamba_cuda.load(sdist())


def test_a_failing_build_tells_the_compiler_s_errors(a_gpu, sdist, compiler, cache):
    def load(*arguments, **options):
        lines = [
            "Error building extension",
            "nvcc -Werror ...",
            *["noise"] * 50,
            "a.cu(3): error: no member",
            "stopped",
        ]
        raise RuntimeError("\n".join(lines))

    compiler(load)
    with pytest.raises(RivalMissingError, match=r"mamba_ssm 9\.8\.post7 does not compile") as caught:
        mamba_cuda.load(sdist())
    assert "a.cu(3): error: no member" in str(caught.value)
    assert "noise" not in str(caught.value) and "-Werror" not in str(caught.value)
    assert list(cache.iterdir()) == []


def test_what_is_compiled_and_kept(sdist, compiler, cache):
    calls = []

    def load(name, sources, build_directory, extra_cuda_cflags, **options):
        assert all(Path(source).is_file() for source in sources)
        calls.append((name, [Path(source).name for source in sources], extra_cuda_cflags))
        made = Path(build_directory) / "made.so"
        made.touch()
        return str(made)

    compiler(load)
    path = mamba_cuda.build(sdist(), (9, 0))
    assert path.parent == cache and path.is_file()
    assert mamba_cuda.build(sdist(), (9, 0)) == path
    assert len(calls) == 1
    name, sources, flags = calls[0]
    assert (name, "-gencode=arch=compute_90,code=sm_90" in flags) == (MODULE, True)
    dtypes = ("fp32", "fp16", "bf16")
    kernels = [f"msv_{way}_{dtype}.cu" for way in ("fwd", "bwd") for dtype in dtypes]
    assert sources == ["selective_scan.cpp", *kernels, "msv_rest.cpp"]
    others = [mamba_cuda.build(sdist(), (8, 0)), mamba_cuda.build(sdist({**FILES, "PKG-INFO": "Version: 1\n"}), (9, 0))]
    assert len({path, *others}) == len(calls) == 3


def test_a_file_that_is_no_extension(a_gpu, tmp_path):
    (tmp_path / "kernels.so").write_text("not a library")
    with pytest.raises(RivalMissingError, match=r"kernels\.so cannot be loaded by torch .*; compile it again"):
        mamba_cuda.load(tmp_path / "kernels.so")


def test_an_installed_package_that_does_not_run(a_gpu, monkeypatch):
    kernels = types.SimpleNamespace(__file__="/installed.so")
    monkeypatch.setattr(mamba_cuda, "_installed", lambda: mamba_cuda.Rival(PACKAGE, "1.0", kernels))
    with pytest.raises(RivalMissingError, match=r"mamba_ssm 1\.0 \(/installed\.so\) does not run on this GPU"):
        mamba_cuda.load()


def test_download(sdist, monkeypatch, cache):
    commands = []

    def run(command, **options):
        commands.append(command)
        assert options["env"]["MAMBA_SKIP_CUDA_BUILD"] == "TRUE"
        sdist().rename(Path(command[-1]) / "mamba_ssm.tar.gz")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    path = mamba_cuda.download()
    assert mamba_cuda.read(path).version == "9.8.post7"
    assert mamba_cuda.download() == path
    assert list(cache.iterdir()) == [path]
    (command,) = commands
    assert f"{PACKAGE}=={VERSION}" in command


def test_no_network(monkeypatch):
    def run(command, **options):
        return subprocess.CompletedProcess(command, 1, "", "WARNING: Retrying\nERROR: No matching distribution found\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(RivalMissingError, match=r"pip cannot download .*: ERROR: No matching distribution found; down"):
        mamba_cuda.download()


def test_which_arguments_and_gradients():
    calls = {}

    def fwd(*arguments):
        calls["fwd"] = arguments
        return ["y", "states"]

    def bwd(*arguments):
        calls["bwd"] = arguments
        return ["du", "ddelta", "dA", "dB", "dC", "dD", "dbias"]

    rival = mamba_cuda.Rival(PACKAGE, "1", types.SimpleNamespace(fwd=fwd, bwd=bwd))
    u, B = torch.ones(1, 2, 3), torch.ones(1, 1, 3, 2).mT
    A, D = torch.ones(2, 2), torch.ones(2)
    assert rival.forward_backward(u, u, A, B, B, D, None, u) == ("y", "du", "ddelta", "dA", "dB", "dC", "dD")
    assert calls["bwd"][3].is_contiguous() and torch.equal(calls["bwd"][3], B)
    assert [calls["fwd"][k] is value for k, value in ((5, D), (6, None), (7, None), (8, True))] == [True] * 4
    assert rival.forward_backward(u, u, A, B, B, None, D, u)[-1] == "dbias"
    assert rival.forward(u, u, A, B, B, delta_softplus=False) == "y"
    assert calls["fwd"][8] is False


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("length", "softplus"), [(49, True), (128, True), (784, False), (2048, True), (2100, False)])
def test_it_computes_what_the_reference_does(rival, dtype, length, softplus):
    def random(*shape, dtype=torch.float32):
        return torch.randn(*shape, device="cuda", dtype=dtype)

    u, dy = random(2, 4, length, dtype=dtype), random(2, 4, length, dtype=dtype)
    delta = random(2, 4, length, dtype=dtype) if softplus else torch.rand_like(u) * 0.1
    B, C = random(2, 2, 3, length, dtype=dtype), random(2, 2, 3, length, dtype=dtype)
    A, D, bias = -random(4, 3).exp(), random(4), random(4) if softplus else torch.zeros(4, device="cuda")
    found = rival.forward_backward(u, delta, A, B, C, D, bias, dy, softplus)
    assert torch.equal(found[0], rival.forward(u, delta, A, B, C, D, bias, softplus))

    tensors = [t.double().requires_grad_() for t in (u, delta, A, B, C, D, bias)]
    u64, delta64, A64, B64, C64, D64, bias64 = tensors
    y = selective_scan(
        u64, delta64, A64, B64, C64, D64, delta_bias=bias64, delta_softplus=softplus, backend="reference"
    )
    expected = (y, *torch.autograd.grad(y, tensors, dy.double()))
    tolerance = 1e-3 if dtype == torch.float32 else 1e-2
    for ours, theirs, leaf in zip(expected, found, (u, u, delta, A, B, C, D, bias), strict=True):
        assert (theirs.dtype, theirs.shape) == (leaf.dtype, leaf.shape)
        assert (theirs.double() - ours).norm() <= tolerance * ours.norm()


@pytest.fixture(scope="module")
def rival():
    """Mamba's kernels, from what the variable MSV_MAMBA names where it is set."""
    try:
        return mamba_cuda.load(os.environ.get("MSV_MAMBA"))
    except RivalMissingError as error:
        pytest.skip(str(error))
