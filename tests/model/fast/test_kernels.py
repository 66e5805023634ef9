"""Each kernel against its formula in float64, gradients by autograd; compiled and by torch, and how it is compiled."""

from __future__ import annotations

import math
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from finetune.model.fast import native
from finetune.model.fast.kernels import Kernels, load_kernels, make_kernels
from finetune.model.fast.native import Unavailable, load_library, openmp_runtime, private_folder

DTYPES = [torch.float32, torch.bfloat16]
LIMIT = {torch.float32: 2e-6, torch.bfloat16: 2**-8 + 1e-5}  # of the norm; bfloat16 rounds by up to 2^-8
SHAPES = [(1, 1), (1, 64), (5, 17), (3, 257), (40, 768)]


@pytest.fixture(params=["compiled", "torch"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return compiled() if request.param == "compiled" else Kernels()


def compiled() -> Kernels:
    found = load_kernels()
    if found.reason.startswith(("no C compiler", "kernels are compiled on Linux only")):
        pytest.skip(f"no compiled kernels on this machine: {found.reason}")
    assert found.library is not None, found.reason
    return found


def drawn(*shape: int, dtype: torch.dtype, seed: int = 0, size: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * size).to(dtype)


def agree(ours: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype, *, roundings: int = 1) -> bool:
    assert ours.shape == exact.shape
    return (ours.double() - exact).norm().item() <= roundings * LIMIT[dtype] * exact.norm().item() + 1e-9


def gradients(function: Callable, *inputs: torch.Tensor, upstream: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The formula's value and its gradients, all in float64."""
    wide = [each.double().requires_grad_() for each in inputs]
    value = function(*wide)
    return value.detach(), *torch.autograd.grad(value, wide, upstream.double())


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def gate(a: torch.Tensor, b: torch.Tensor, gelu: bool) -> torch.Tensor:
    if gelu:
        return 0.5 * a * (1 + torch.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3))) * b
    return a / (1 + torch.exp(-a)) * b


def rotated(x_THD: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor) -> torch.Tensor:
    low, high = x_THD.chunk(2, dim=-1)
    return x_THD * cos_TD[:, None] + torch.cat((-high, low), -1) * sin_TD[:, None]


def cross_entropy(products: torch.Tensor, targets: torch.Tensor, scale: float, cap: float) -> torch.Tensor:
    logits = products * scale
    logits = cap * torch.tanh(logits / cap) if cap else logits
    return torch.log(torch.exp(logits).sum(-1)) - logits[torch.arange(len(targets)), targets]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_norm(kernels: Kernels, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, g, weight = drawn(*shape, dtype=dtype), drawn(*shape, dtype=dtype, seed=1), torch.rand(shape[1]) + 0.5
    y, scale = kernels.rms_norm(x, weight, 1e-3)
    dx = kernels.rms_norm_gradient(g, x, weight, scale)
    exact_y, exact_dx = gradients(lambda v: norm(v, weight, 1e-3), x, upstream=g)
    assert agree(y, exact_y, dtype)
    assert (dx.double() - exact_dx).norm() <= LIMIT[dtype] * (exact_dx.norm() + (0.1 if shape[1] == 1 else 0))


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gates(kernels: Kernels, shape: tuple[int, int], dtype: torch.dtype, gelu: bool) -> None:
    a, b, g = (drawn(*shape, dtype=dtype, seed=seed, size=3) for seed in range(3))
    exact_y, exact_da, exact_db = gradients(lambda v, w: gate(v, w, gelu), a, b, upstream=g)
    roundings = 1 if kernels.library else 2  # torch rounds the activation, and g up
    assert agree(kernels.gated(a, b, gelu=gelu), exact_y, dtype, roundings=roundings)
    da, db = kernels.gated_gradient(g, a, b, gelu=gelu)
    assert agree(da, exact_da, dtype, roundings=roundings)
    assert agree(db, exact_db, dtype, roundings=roundings)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "positions", "size"), [(1, 1, 2), (6, 6, 64), (6, 3, 10), (41, 41, 128)])
def test_rotary(kernels: Kernels, tokens: int, positions: int, size: int, dtype: torch.dtype) -> None:
    """Heads before tokens in memory or behind, cosines that repeat, and halves with different angles."""
    cos, sin = drawn(positions, size, dtype=dtype, seed=1), drawn(positions, size, dtype=dtype, seed=2)
    for x in (drawn(tokens, 3, size, dtype=dtype), drawn(3, tokens, size, dtype=dtype).transpose(0, 1)):
        g = drawn(tokens, 3, size, dtype=dtype, seed=3)
        repeats = tokens // positions
        exact_y, exact_dx = gradients(
            lambda v, r=repeats: rotated(v, cos.double().repeat(r, 1), sin.double().repeat(r, 1)), x, upstream=g
        )
        y = kernels.rotate(x, cos, sin)
        assert y.is_contiguous()
        assert agree(y, exact_y, dtype)
        assert agree(kernels.rotate(g, cos, sin, back=True), exact_dx, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("scale", "cap"), [(1.0, 0.0), (0.25, 0.0), (1.0, 3.0), (0.7, 30.0)])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 17), (2, 32_001)])
def test_cross_entropy(kernels: Kernels, rows: int, width: int, scale: float, cap: float, dtype: torch.dtype) -> None:
    products, weights = drawn(rows, width, dtype=dtype, size=3), torch.rand(rows) + 0.1
    targets = torch.tensor([width - 1, 0, width // 2])[:rows]
    exact_losses, exact_gradient = gradients(
        lambda v: cross_entropy(v, targets, scale, cap), products, upstream=weights
    )
    before = products.clone()
    losses = kernels.cross_entropy_(products, targets, scale=scale, cap=cap)
    assert agree(losses, exact_losses, torch.float32)
    assert torch.equal(products, before), "without weights the products stay"
    assert torch.equal(kernels.cross_entropy_(products, targets, weights, scale=scale, cap=cap), losses)
    assert agree(products, exact_gradient, dtype)


def test_one_rounding_to_bfloat16() -> None:
    """Compiled results are the exact ones rounded to the nearest, but where those lie between two within 1e-6."""
    a, b = (drawn(1000, 64, dtype=torch.bfloat16, seed=seed, size=2) for seed in range(2))
    ours, exact = compiled().gated(a, b, gelu=False), gate(a.double(), b.double(), False)
    assert (ours == exact.to(torch.bfloat16)).double().mean() > 0.9999
    assert ((ours.double() - exact).abs() <= exact.abs() * (2**-8 + 1e-6) + 1e-40).all()


def test_ties_go_to_even() -> None:
    """A product of two bfloat16 numbers is exact in float32, and one in 256 lies in the middle between two."""
    x, cos = drawn(50, 4, 128, dtype=torch.bfloat16), drawn(50, 128, dtype=torch.bfloat16, seed=1)
    exact = x.double() * cos.double()[:, None]
    middles = (exact.float().view(torch.int32) & 0xFFFF) == 0x8000
    assert middles.double().mean() > 1e-3
    assert torch.equal(compiled().rotate(x, cos, torch.zeros_like(cos)), exact.float().to(torch.bfloat16))


def test_every_nan_stays_one() -> None:
    """Also one whose bits are all set, which rounding up would turn into zero."""
    weight = torch.tensor([1.0, 2.0]).repeat(20)
    weight[7:9] = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    y, _ = compiled().rms_norm(drawn(3, 40, dtype=torch.bfloat16), weight, 1e-5)
    assert torch.equal(y.isnan(), weight.isnan().expand(3, 40))


def test_the_exponential_in_its_whole_range() -> None:
    """By the sigmoid: x = 1 * sigmoid(-x) would show an error of exp everywhere from -87 to 87."""
    x = torch.linspace(-87, 87, 100_001)
    ours, exact = compiled().gated(x, torch.ones_like(x), gelu=False), gate(x.double(), torch.ones(()).double(), False)
    relative = ((ours.double() - exact) / exact)[exact != 0].abs()
    assert relative.max() < 5e-7


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_seen(kernels: Kernels, bad: float, dtype: torch.dtype) -> None:
    """In its own row, as in the formula; the row beside it stays finite."""
    x = drawn(2, 37, dtype=dtype)
    spoilt = x.clone()
    spoilt[0, 20] = bad
    weight = torch.ones(37)
    y, scale = kernels.rms_norm(spoilt, weight, 1e-6)
    dx = kernels.rms_norm_gradient(x, spoilt, weight, scale)
    dx_by_g = kernels.rms_norm_gradient(spoilt, x, weight, kernels.rms_norm(x, weight, 1e-6)[1])
    activated = kernels.gated(spoilt, x, gelu=False)
    d_gate, d_up = kernels.gated_gradient(spoilt, x, x, gelu=False)
    losses = kernels.cross_entropy_(spoilt.clone(), torch.tensor([20, 0]))
    for result in (y, dx, dx_by_g, d_gate, d_up, losses):
        assert not result[0].isfinite().all()
        assert result[1].isfinite().all()
    exact = gate(spoilt.double(), x.double(), False)
    assert torch.equal(activated.isfinite(), exact.isfinite())


def test_a_target_outside_the_vocabulary_gives_nan(kernels: Kernels) -> None:
    losses = kernels.cross_entropy_(torch.zeros(3, 5), torch.tensor([5, -100, 4]), torch.ones(3))
    assert losses.isnan().tolist() == [True, True, False]


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_change_a_bit(set_threads: Callable[[int], None], dtype: torch.dtype) -> None:
    def everything() -> list[torch.Tensor]:
        k, x, g = compiled(), drawn(65, 769, dtype=dtype), drawn(65, 769, dtype=dtype, seed=1)
        y, scale = k.rms_norm(x, torch.ones(769), 1e-5)
        logits = x.clone()
        losses = k.cross_entropy_(logits, torch.arange(65), torch.ones(65))
        turned = k.rotate(drawn(80, 4, 64, dtype=dtype), *drawn(2, 80, 64, dtype=dtype))
        gated = k.gated(x, g, gelu=True), *k.gated_gradient(g, x, g, gelu=False)
        return [y, scale, k.rms_norm_gradient(g, x, torch.ones(769), scale), logits, losses, turned, *gated]

    results = []
    for threads in (1, 2, 1):
        set_threads(threads)
        results.append(everything())
    for one, two, again in zip(*results, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, again)


def test_what_compiled_code_does_not_take_goes_to_torch() -> None:
    k, weight, plain = compiled(), torch.ones(64), drawn(6, 64, dtype=torch.float32)
    for x in (
        drawn(6, 128, dtype=torch.float32)[:, ::2],
        drawn(6, 64, dtype=torch.float16),
        torch.ones(6, 64).double(),
    ):
        assert torch.equal(k.rms_norm(x, weight, 1e-5)[0], Kernels().rms_norm(x, weight, 1e-5)[0])
    for up in (plain.t().contiguous().t(), plain.double(), plain[:1]):
        assert torch.allclose(k.gated(plain, up, gelu=False).double(), (torch.sigmoid(plain) * plain * up).double())


def test_vectors_of_another_kind_or_length() -> None:
    """Compiled code reads them through a pointer: they are made plain before, or refused."""
    k, logits, targets = compiled(), drawn(4, 9, dtype=torch.float32), torch.tensor([1, 8, 0, 3])
    exact = k.cross_entropy_(logits.clone(), targets)
    for other in (targets.int(), torch.stack([targets, targets], 1)[:, 0]):
        assert torch.equal(k.cross_entropy_(logits.clone(), other), exact)
    doubled = logits.clone()
    k.cross_entropy_(doubled, targets, torch.tensor(2.0).expand(4))
    k.cross_entropy_(logits, targets, torch.ones(4))
    assert torch.equal(doubled, 2 * logits)
    with pytest.raises(AssertionError):
        k.cross_entropy_(logits, targets[:3])
    with pytest.raises(AssertionError):
        k.rms_norm(logits, torch.ones(8), 1e-5)


ONE_RUNTIME = """
import os, re, torch
from finetune.model.fast.kernels import load_kernels
def runtimes():
    return {line.split()[-1] for line in open("/proc/self/maps") if re.search(r"lib(gomp|iomp|omp)", line)}
def threads():
    return len(os.listdir("/proc/self/task"))
torch.set_num_threads(3)
before, alone = runtimes(), threads()
load_kernels().gated(torch.empty(300, 999), torch.empty(300, 999), gelu=False)
working = threads()
(torch.zeros(600, 600) @ torch.zeros(600, 600)).exp()
assert runtimes() == before, runtimes()
print(working - alone, threads() - working)
"""


def test_torchs_openmp_runtime_is_the_only_one() -> None:
    """Three threads work for the kernels, and the same three for torch: no second library, no thread more."""
    compiled()
    assert openmp_runtime().is_relative_to(Path(torch.__file__).parent.parent)
    done = subprocess.run([sys.executable, "-c", ONE_RUNTIME], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "2 0\n"), done.stderr


# How the library is compiled and kept


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    compiled()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "finetune" / "kernels"


@pytest.fixture
def small_source(tmp_path: Path) -> Path:
    source = tmp_path / "small.c"
    source.write_text("int answer(void) { return 42; }\n")
    return source


def write_compiler(folder: Path, script: str) -> str:
    file = folder / "odd-cc"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o700)
    return str(file)


def test_compiled_once_then_found(fresh_cache: Path, small_source: Path) -> None:
    assert load_library(source=small_source).answer() == 42
    (file,) = fresh_cache.iterdir()
    assert stat.S_IMODE(fresh_cache.stat().st_mode) == stat.S_IMODE(file.stat().st_mode) == 0o700
    made = file.stat().st_mtime_ns
    assert load_library(source=small_source).answer() == 42
    assert [each.stat().st_mtime_ns for each in fresh_cache.iterdir()] == [made]


def test_another_source_or_compiler_is_another_library(fresh_cache: Path, small_source: Path, tmp_path: Path) -> None:
    load_library(source=small_source)
    small_source.write_text("int answer(void) { return 43; }\n")
    assert load_library(source=small_source).answer() == 43
    assert len(list(fresh_cache.iterdir())) == 2
    for version in (1, 2, 2):  # under one name, as after an upgrade or on another computer with the same home
        compiler = write_compiler(tmp_path, f'exec cc -DVERSION={version} "$@"')
        load_library(source=small_source, compilers=(compiler,))
    assert len(list(fresh_cache.iterdir())) == 4


@pytest.mark.parametrize("harm", ["cut", "changed", "emptied", "opened"])
def test_a_damaged_library_is_made_again(
    fresh_cache: Path, small_source: Path, harm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_library(source=small_source)
    (file,) = fresh_cache.iterdir()
    whole = file.read_bytes()
    middle = len(whole) // 2
    spoilt = {"cut": whole[:middle], "changed": whole[:middle] + b"\xff" + whole[middle + 1 :], "emptied": b""}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))  # the first one is mapped into this process
    other = private_folder(tmp_path / "other" / "finetune" / "kernels") / file.name
    other.write_bytes(spoilt.get(harm, whole))
    other.chmod(0o722 if harm == "opened" else 0o700)
    assert load_library(source=small_source).answer() == 42
    assert len(other.read_bytes()) == len(whole)
    assert stat.S_IMODE(other.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("exit 3", "exit status 3"),
        ('case "$*" in *-dM*) ;; *) echo "a.c:1: error: no such thing" >&2; exit 1;; esac', "error: no such thing"),
        ("exit 0", "kernels.so"),  # says nothing, makes nothing
        ('case "$*" in *-shared*) echo no library > kernels.so;; esac', "ELF|file too short|invalid"),
    ],
)
def test_a_compiler_that_fails(fresh_cache: Path, small_source: Path, tmp_path: Path, script: str, said: str) -> None:
    with pytest.raises(Unavailable, match=said):
        load_library(source=small_source, compilers=(write_compiler(tmp_path, script),))
    assert not list(fresh_cache.glob("making-*"))


def test_a_source_that_does_not_compile_or_link(fresh_cache: Path, small_source: Path) -> None:
    for text in ("int answer(void) { return 42 }", "int nowhere(void); int answer(void) { return nowhere(); }"):
        small_source.write_text(text)
        with pytest.raises(Unavailable, match="could not compile the kernels: .*(error|undefined)"):
            load_library(source=small_source)
    assert not list(fresh_cache.iterdir())


def test_no_compiler_no_openmp_another_system(
    fresh_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(Unavailable, match=r"no C compiler was found \(no-such-cc\)"):
        load_library(compilers=("no-such-cc",))
    monkeypatch.setattr(native.torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
    with pytest.raises(Unavailable, match="no OpenMP runtime"):
        load_library()
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(Unavailable, match="Linux only, not on darwin"):
        load_library()


def test_without_a_compiler_torch_computes_the_same(tmp_path: Path) -> None:
    """In a process whose PATH is empty."""
    code = """if True:
        import torch
        from finetune.model.fast.kernels import load_kernels
        k = load_kernels()
        assert k.library is None and k.reason.startswith("no C compiler was found"), k.reason
        x = torch.arange(-4.0, 4.0)
        assert torch.allclose(k.gated(x, x, gelu=False), x * x / (1 + torch.exp(-x)))
    """
    environment = {**os.environ, "PATH": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, cwd=Path(__file__).parents[3])


def test_two_processes_at_once(fresh_cache: Path, small_source: Path) -> None:
    """Both wait for a line before they compile; one whole file is left."""
    code = """if True:
        import sys
        from pathlib import Path
        from finetune.model.fast.native import load_library
        print("ready", flush=True)
        sys.stdin.readline()
        print(load_library(source=Path(sys.argv[1])).answer())
    """
    command = [sys.executable, "-c", code, str(small_source)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    running = [subprocess.Popen(command, **pipes) for _ in range(2)]
    assert [each.stdout.readline() for each in running] == ["ready\n"] * 2
    for each in running:
        each.stdin.write("go\n")
        each.stdin.flush()
    assert [each.communicate()[0] for each in running] == ["42\n"] * 2
    assert [each.suffix for each in fresh_cache.iterdir()] == [".so"]


def test_a_folder_others_can_write_to_is_not_trusted(fresh_cache: Path, small_source: Path) -> None:
    load_library(source=small_source)
    for folder in (fresh_cache, fresh_cache.parent):
        folder.chmod(0o777)
        with pytest.raises(Unavailable, match=rf"others can write to {folder};"):
            load_library(source=small_source)
        folder.chmod(0o700)
    fresh_cache.parent.chmod(0o1777)  # as /tmp: others cannot replace what is ours
    assert load_library(source=small_source).answer() == 42
    fresh_cache.chmod(0o1777)
    with pytest.raises(Unavailable, match="others can write"):
        load_library(source=small_source)


def test_a_folder_of_another_user_is_not_trusted(fresh_cache: Path, small_source: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder to another user")
    load_library(source=small_source)
    for folder in (fresh_cache, fresh_cache.parent):
        os.chown(folder, 12_345, 0)
        with pytest.raises(Unavailable, match="belongs to another user"):
            load_library(source=small_source)
        os.chown(folder, 0, 0)
    (file,) = fresh_cache.iterdir()
    made = file.stat().st_ino
    os.chown(file, 12_345, 0)
    assert load_library(source=small_source).answer() == 42
    assert next(fresh_cache.iterdir()).stat().st_ino != made


def test_the_source_compiles_without_a_warning(tmp_path: Path) -> None:
    """Also without OpenMP, and without this CPU's vectors."""
    compiled()
    for flags in (["-fopenmp"], ["-fopenmp", "-march=native", "-O3"]):
        command = [shutil.which("cc") or "cc", "-std=gnu11", "-Wall", "-Wextra", "-Werror", *flags, "-fPIC", "-c"]
        subprocess.run([*command, str(native.SOURCE), "-o", str(tmp_path / "kernels.o")], check=True)


def test_kernels_of_a_wrong_library_are_refused(fresh_cache: Path, small_source: Path) -> None:
    with pytest.raises(AttributeError):
        make_kernels(load_library(source=small_source))
