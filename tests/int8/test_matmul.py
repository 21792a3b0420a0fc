"""The W8A8 product against numpy, its laws, and the choice of a backend."""

import threading
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from haq.int8 import cpu, grid, matmul, reference, speed
from haq.int8.tokens import row_sums

Pack = Callable[[Tensor, Tensor], matmul.PackedWeight]
RandomWeight = Callable[[int, int], tuple[Tensor, Tensor]]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = {  # T, K, N
    "one token": (1, 64, 48),
    "one of everything": (1, 1, 1),
    "odd": (5, 333, 77),
    "many tokens": (130, 65, 33),
    "long rows": (3, 20_001, 5),
}

fixtures_are_constant = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_numpy(
    pack: Pack,
    random_weight: RandomWeight,
    numpy_linear: Callable[..., Tensor],
    generator: torch.Generator,
    shape: tuple[int, int, int],
    with_bias: bool,
    dtype: torch.dtype,
) -> None:
    tokens, in_features, out_features = shape
    weight, scale = random_weight(out_features, in_features)
    x = (torch.randn(tokens, in_features, generator=generator) / 64).to(dtype)
    bias = torch.randn(out_features, generator=generator) if with_bias else None
    result = matmul.linear(x, pack(weight, scale), bias)
    assert result.dtype == dtype
    torch.testing.assert_close(result, numpy_linear(x, weight, scale, bias), rtol=0, atol=0)


def test_float64_is_computed_in_float32(pack: Pack, random_weight: RandomWeight) -> None:
    packed = pack(*random_weight(7, 33))
    x = torch.linspace(-1, 1, 66).view(2, 33)
    result = matmul.linear(x.double(), packed)
    torch.testing.assert_close(result, matmul.linear(x, packed).double(), rtol=0, atol=0)


def test_integers_are_those_of_the_grid_at_and_beside_every_tie(pack: Pack) -> None:
    """Quotients k + 1/2, one ulp below and one above, for every k: all must round as the grid."""
    ties = torch.arange(-126, 127) + 0.5
    infinity = torch.tensor(torch.inf)
    x = torch.stack([ties, torch.nextafter(ties, infinity), torch.nextafter(ties, -infinity)])
    x = torch.cat([x, torch.full((3, 1), 127.0)], dim=1)  # [3, K]: every row has scale 1
    identity = torch.eye(x.shape[1], dtype=torch.int8)
    integers = matmul.linear(x, pack(identity, torch.ones(len(identity), 1)))
    expected, scale = grid.quantize_rows(x)
    torch.testing.assert_close(scale, torch.ones(3, 1), rtol=0, atol=0)
    torch.testing.assert_close(integers, expected.float(), rtol=0, atol=0)


@given(st.integers(2, 40), st.integers(0, 2**31), st.sampled_from(DTYPES), st.data())
@fixtures_are_constant
def test_a_token_gives_the_same_bits_alone_and_in_a_batch(
    pack: Pack, tokens: int, seed: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-127, 128, (37, 133), dtype=torch.int8, generator=generator)
    packed = pack(weight, torch.rand(37, 1, generator=generator) + 0.01)
    bias = torch.randn(37, generator=generator)
    x = torch.randn(tokens, 133, generator=generator).to(dtype)
    together = matmul.linear(x, packed, bias)
    cut = data.draw(st.integers(1, tokens - 1))
    apart = torch.cat([matmul.linear(part, packed, bias) for part in (x[:cut], x[cut:])])
    alone = torch.cat([matmul.linear(token, packed, bias)[None] for token in x])
    torch.testing.assert_close(apart, together, rtol=0, atol=0)
    torch.testing.assert_close(alone, together, rtol=0, atol=0)


@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "zero point"])
@pytest.mark.parametrize("tokens", [64, 65, 128, 129, 300])
def test_a_long_prompt_gives_the_bits_of_its_tokens(
    pack: Pack, random_weight: RandomWeight, tokens: int, asymmetric: bool, with_bias: bool
) -> None:
    weight, scale = random_weight(9, 65)
    packed = pack(weight, scale)
    bias = torch.randn(9) if with_bias else None
    sums = row_sums(weight, scale) if asymmetric else None
    x = torch.randn(2, tokens, 65).bfloat16()
    x[1, -1, 3] = torch.nan
    together = matmul.linear(x, packed, bias, sums)
    assert together.shape == (2, tokens, 9)
    alone = torch.stack([matmul.linear(token, packed, bias, sums) for token in x.view(-1, 65)])
    torch.testing.assert_close(together.view(-1, 9), alone, rtol=0, atol=0, equal_nan=True)
    assert together.isnan().any(-1).sum() == 1


@given(st.integers(1, 20), st.integers(0, 2**31), st.sampled_from(DTYPES))
@fixtures_are_constant
def test_negation_commutes_with_the_product(
    pack: Pack, tokens: int, seed: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-127, 128, (9, 65), dtype=torch.int8, generator=generator)
    packed = pack(weight, torch.rand(9, 1, generator=generator) + 0.01)
    x = torch.randn(tokens, 65, generator=generator).to(dtype)
    torch.testing.assert_close(matmul.linear(-x, packed), -matmul.linear(x, packed), rtol=0, atol=0)


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(6, 40).t()[:, :6],
        torch.randn(4, 12)[:, ::2],
        torch.randn(1, 6).expand(3, 6),
        torch.randn(2, 3, 6).transpose(0, 1),
        torch.randn(6).as_strided((1, 6), (0, 1)),
        torch.randn(6, 1).t(),
    ],
    ids=["transposed", "strided", "expanded", "permuted", "stride 0", "column"],
)
def test_layout_of_the_input_does_not_matter(
    pack: Pack, random_weight: RandomWeight, x: Tensor
) -> None:
    packed = pack(*random_weight(5, 6))
    before = x.clone()
    expected = matmul.linear(x.contiguous(), packed)
    torch.testing.assert_close(matmul.linear(x, packed), expected, rtol=0, atol=0)
    torch.testing.assert_close(x, before, rtol=0, atol=0)  # inputs are not written to


@pytest.mark.parametrize("leading", [(), (1,), (0,), (2, 0), (2, 3), (1, 2, 3)], ids=str)
def test_leading_shape_is_kept(
    pack: Pack, random_weight: RandomWeight, leading: tuple[int, ...]
) -> None:
    weight, scale = random_weight(5, 6)
    result = matmul.linear(torch.ones(*leading, 6), pack(weight, scale), torch.ones(5))
    row = weight.sum(1) * 127 * scale.flatten() * (torch.ones(()) / 127) + 1
    torch.testing.assert_close(result, row.expand(*leading, 5))


def test_autocast_changes_nothing(pack: Pack, random_weight: RandomWeight) -> None:
    packed = pack(*random_weight(5, 300))
    x = torch.linspace(-1, 1, 900).view(3, 300)
    expected = matmul.linear(x, packed)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = matmul.linear(x, packed)
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_stays_in_its_row(
    pack: Pack, random_weight: RandomWeight, value: float, dtype: torch.dtype
) -> None:
    packed = pack(*random_weight(5, 33))
    clean = torch.linspace(-1, 1, 99).view(3, 33).to(dtype)
    spoiled = clean.clone()
    spoiled[1, 7] = value
    result, expected = matmul.linear(spoiled, packed), matmul.linear(clean, packed)
    assert not result[1].isfinite().any()
    torch.testing.assert_close(result[[0, 2]], expected[[0, 2]], rtol=0, atol=0)


def test_nan_gives_nan(pack: Pack, random_weight: RandomWeight) -> None:
    x = torch.ones(2, 33)
    x[0, 0] = torch.nan
    result = matmul.linear(x, pack(*random_weight(5, 33)), torch.ones(5))
    assert result[0].isnan().all()


@pytest.mark.parametrize("magnitude", [0.0, 1e-44, 1e-38], ids=str)
def test_a_token_of_nothing_gives_the_bias(
    pack: Pack, random_weight: RandomWeight, magnitude: float
) -> None:
    bias = torch.arange(5.0) + 1
    x = torch.full((2, 33), magnitude)
    result = matmul.linear(x, pack(*random_weight(5, 33)), bias)
    torch.testing.assert_close(result, bias.expand(2, 5), rtol=0, atol=0)


# --- The choice -----------------------------------------------------------------------------------


@pytest.fixture
def fresh_proofs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process: nothing proved and nothing asked for."""
    monkeypatch.setattr(matmul, "_verdicts", {})
    monkeypatch.delenv("HAQ_BACKEND", raising=False)


def one_by_one() -> tuple[Tensor, Tensor]:
    return torch.ones(1, 1, dtype=torch.int8), torch.ones(1, 1)


def status_of(name: str) -> matmul.BackendStatus:
    return next(status for status in matmul.backends() if status.name == name)


@pytest.mark.usefixtures("fresh_proofs")
def test_a_backend_that_is_not_exact_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = cpu.FbgemmWeight.product
    monkeypatch.setattr(cpu.FbgemmWeight, "product", lambda self, x: exact(self, x) + 1)
    packed = matmul.pack(*one_by_one())
    assert packed.backend != "fbgemm"
    assert (status_of("fbgemm").available, status_of("fbgemm").exact) == (True, False)
    assert "int64" in status_of("fbgemm").reason
    assert status_of(packed.backend).tokens == "all"


@pytest.mark.usefixtures("fresh_proofs")
def test_a_backend_that_does_not_exist_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(weight: Tensor, scale: Tensor) -> matmul.PackedWeight:
        raise AttributeError("'_OpNamespace' 'onednn' object has no attribute 'qlinear_prepack'")

    monkeypatch.setattr(matmul, "BACKENDS", (matmul.Backend("gone", "cpu", missing), REFERENCE))
    assert matmul.pack(*one_by_one()).backend == "reference"
    assert (status_of("gone").available, status_of("gone").exact) == (False, False)
    assert "qlinear_prepack" in status_of("gone").reason


REFERENCE = matmul.BACKENDS[-1]


@pytest.mark.usefixtures("fresh_proofs")
def test_no_exact_backend_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "int_product", lambda a, b: (a.float() @ b.float().t()).char())
    monkeypatch.setattr(matmul, "BACKENDS", (REFERENCE,))
    with pytest.raises(RuntimeError, match="No int8 product is exact on 'cpu' devices"):
        matmul.pack(*one_by_one())


@pytest.mark.usefixtures("fresh_proofs")
def test_defaults_of_the_process_change_nothing(pack: Pack) -> None:
    """Loaders of models set both, the device and the dtype, while they build."""
    expected = [status.exact for status in matmul.backends()]
    matmul._verdicts.clear()
    weight, scale = one_by_one()
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            packed = pack(weight, scale)
            exact = [status.exact for status in matmul.backends()]
    finally:
        torch.set_default_dtype(dtype)
    assert exact == expected
    result = matmul.linear(torch.ones(1, 1), packed)
    torch.testing.assert_close(result, torch.ones(1, 1), rtol=1e-6, atol=0)


@pytest.mark.usefixtures("fresh_proofs")
def test_many_threads_prove_once(monkeypatch: pytest.MonkeyPatch) -> None:
    proofs = []
    difference = reference.difference

    def counting(*arguments: object) -> str:
        proofs.append(arguments)
        return difference(*arguments)

    monkeypatch.setattr(reference, "difference", counting)
    start = threading.Barrier(8)
    names = []

    def first_use() -> None:
        start.wait()
        names.append(matmul.pack(*one_by_one()).backend)

    threads = [threading.Thread(target=first_use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(proofs) == len(matmul._verdicts)  # Of those that are not exact here, too.
    assert len(names) == 8
    assert len(set(names)) == 1


def test_asking_for_a_backend_in_a_block(pack: Pack) -> None:
    usual = matmul.pack(*one_by_one()).backend
    with matmul.use_backend("int_mm"):
        with matmul.use_backend("reference"):
            assert matmul.pack(*one_by_one()).backend == "reference"
        assert matmul.pack(*one_by_one()).backend == "int_mm"
    assert matmul.pack(*one_by_one()).backend == usual


def test_asking_for_a_backend_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAQ_BACKEND", "reference")
    assert matmul.pack(*one_by_one()).backend == "reference"
    assert status_of("reference").tokens == "all"
    assert status_of("int_mm").reason == "reference was asked for"


def test_a_block_comes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAQ_BACKEND", "int_mm")
    with matmul.use_backend("reference"):
        assert matmul.pack(*one_by_one()).backend == "reference"


def test_an_unknown_name_in_a_block() -> None:
    message = (
        "`name` must be one of llvm, fbgemm, onednn, fbgemm_signs, int_mm, triton, reference; got"
    )
    with pytest.raises(ValueError, match=message), matmul.use_backend("fast"):
        pass


def test_an_unknown_name_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAQ_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"variable HAQ_BACKEND must be one of .*; got 'fast'"):
        matmul.pack(*one_by_one())


@pytest.mark.usefixtures("fresh_proofs")
def test_asking_for_what_is_not_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = cpu.FbgemmWeight.product
    monkeypatch.setattr(cpu.FbgemmWeight, "product", lambda self, x: exact(self, x) + 1)
    with (
        matmul.use_backend("fbgemm"),
        pytest.raises(RuntimeError, match="'fbgemm' was asked for and cannot be used: not exact"),
    ):
        matmul.pack(*one_by_one())


def test_asking_for_what_does_not_run_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = matmul.Backend("elsewhere", "cuda", reference.pack)
    monkeypatch.setattr(matmul, "BACKENDS", (elsewhere, REFERENCE))
    with (
        matmul.use_backend("elsewhere"),
        pytest.raises(RuntimeError, match="it does not run on 'cpu' devices"),
    ):
        matmul.pack(*one_by_one())


@pytest.mark.usefixtures("fresh_proofs")
def test_the_table_says_which_and_why() -> None:
    table = matmul.backends()
    on_cpu = [status for status in table if status.device == "cpu"]
    names = ["llvm", "fbgemm", "onednn", "fbgemm_signs", "int_mm", "reference"]
    assert [status.name for status in on_cpu] == names
    assert [status.tokens for status in on_cpu].count("all") == 1
    assert [bool(status.reason) for status in on_cpu].count(False) == 1
    used = next(status for status in on_cpu if status.tokens == "all")
    assert used.exact
    assert matmul.pack(*one_by_one()).backend == used.name


RIVALS = ("llvm", "int_mm")


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has not timed its backends, in which four elements are worth it."""
    monkeypatch.setattr(matmul, "_measured_seconds", {})
    monkeypatch.setattr(matmul, "_WORTH_MEASURING", 4)
    # On every processor at least these two are exact: which ones rival is not the question here.
    monkeypatch.setattr(matmul, "_RIVALS", RIVALS)
    matmul._measured_seconds.clear()


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("faster", RIVALS)
def test_the_faster_rival_packs_large_weights(faster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopwatch(packs: dict[str, Pack], linear: object) -> dict[str, float]:
        timed.append(set(packs))
        return {name: 1.0 if name == faster else 1.5 for name in packs}

    timed: list[set[str]] = []
    monkeypatch.setattr(matmul.speed, "seconds_per_layer", stopwatch)
    assert matmul.pack(*one_by_one()).backend == matmul.BACKENDS[0].name
    assert timed == []  # One element is not worth it.
    large = (torch.ones(2, 2, dtype=torch.int8), torch.ones(2, 1))
    assert [matmul.pack(*large).backend for _ in range(2)] == [faster, faster]
    assert timed == [set(RIVALS)]  # once
    (slower,) = set(RIVALS) - {faster}
    assert status_of(slower).reason == f"measured: takes 1.50 times as long as {faster}"
    with matmul.use_backend(slower):
        assert matmul.pack(*large).backend == slower


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize(("seconds", "chosen"), [(0.9, "llvm"), (0.7, "int_mm")])
def test_llvm_may_take_a_little_longer(
    seconds: float, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is around its products is kernels, too."""
    timed = {"llvm": 1.0, "int_mm": seconds}
    monkeypatch.setattr(matmul.speed, "seconds_per_layer", lambda *_: timed)
    large = (torch.ones(2, 2, dtype=torch.int8), torch.ones(2, 1))
    assert matmul.pack(*large).backend == chosen
    (other,) = set(RIVALS) - {chosen}
    reason = status_of(other).reason
    if chosen == "llvm":
        assert reason == (
            "measured: takes 0.90 times as long as llvm, which makes up for it around the products"
        )
    else:
        assert reason == "measured: takes 1.43 times as long as int_mm"


def test_products_are_timed_on_weights_that_are_not_the_same_memory() -> None:
    packed = []

    def pack(weight: Tensor, scale: Tensor) -> matmul.PackedWeight:
        packed.append(matmul.BACKENDS[0].pack(weight, scale))
        return packed[-1]

    seconds = speed.seconds_per_layer({"one": pack, "other": pack}, matmul.linear)
    assert set(seconds) == {"one", "other"}
    assert all(0 < value < 10 for value in seconds.values())
    assert len(packed) == 2 * speed._COPIES


def test_the_table_is_there_when_what_was_asked_for_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    elsewhere = matmul.Backend("elsewhere", "cuda", reference.pack)
    monkeypatch.setattr(matmul, "BACKENDS", (elsewhere, REFERENCE))
    with matmul.use_backend("elsewhere"):
        table = matmul.backends()
    assert [(row.tokens, row.reason) for row in table if row.device == "cpu"] == [
        ("none", "elsewhere was asked for")
    ]


def test_the_table_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "BACKENDS", (REFERENCE,))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert str(matmul.backends()).splitlines() == [
        "backend    device  available  exact  tokens  why not",
        "reference  cpu     yes        yes    all",
    ]


def test_a_weight_on_the_meta_device_waits_unproved() -> None:
    packed = matmul.pack(*(part.to("meta") for part in one_by_one()))
    assert packed.unpack().is_meta
