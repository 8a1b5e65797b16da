"""The triton backend against the dense definition in float64, on the float32 numbers that it was
given.
"""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from kernel_cases import DEVICE, MARKS
from recorder import Noted
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

from ufm_fast.backends import Gradients, HeadInput, ReferenceBackend, TiledBackend, triton_memory
from ufm_fast.backends import triton as module
from ufm_fast.backends.base import HeadShape
from ufm_fast.backends.triton import TritonBackend
from ufm_fast.backends.triton_memory import plan_chunk, reserved
from ufm_fast.errors import InputError
from ufm_fast.losses import make_loss
from ufm_fast.objective import Objective
from ufm_fast.point import Point
from ufm_fast.problem import Problem
from ufm_fast.targets import Targets
from ufm_kernels.replays import Replays

pytestmark = MARKS

LOSSES = [
    make_loss("ce"),
    make_loss("ce", smoothing=0.1),
    make_loss("focal"),
    make_loss("focal", gamma=0.5),
    make_loss("pick-all"),
    make_loss("mse"),
]
SETS = Targets(torch.tensor([2, 0, 1, 4, 3, 6, 1, 5, 0]), torch.tensor([0, 1, 3, 4, 7, 8, 9]))
NAMES = [f"{loss.name}-{getattr(loss, 'gamma', loss.smoothing)}" for loss in LOSSES]
PARTS = ("features", "weight", "bias")


def case(loss, targets=None, bias=True, dtype=torch.float32, rows=6, classes=7, dim=3, scale=1.0):
    make = torch.Generator().manual_seed(3)
    normal = lambda *shape: torch.randn(*shape, generator=make).to(DEVICE)  # noqa: E731
    features, weight = (scale * normal(rows, dim)).to(dtype), normal(classes, dim).to(dtype)
    if targets is None:
        targets = Targets(torch.randint(classes, (rows,), generator=make))
    row_weight = torch.rand(rows, generator=make, dtype=torch.float64).to(DEVICE)
    return HeadInput(
        loss, features, weight, normal(classes) if bias else None, targets.to(DEVICE), row_weight
    )


def direction(x):
    return HeadInput(
        x.loss,
        torch.randn_like(x.features),
        torch.randn_like(x.weight),
        None if x.bias is None else torch.randn_like(x.bias),
        x.targets,
        x.row_weight,
    )


def gradients(backend, x):
    """(value, gradients) of a head, into fresh buffers of the dtype of sums."""
    dtype = torch.float64 if x.weight.dtype == torch.float64 else torch.float32
    out = [
        torch.empty(part.shape, dtype=dtype, device=DEVICE)
        for part in (x.features, x.weight, x.bias)
    ]
    return backend.head(x, Gradients(*out, fresh=True)).value, *out


def exact(x):
    bias = None if x.bias is None else x.bias.double()
    return HeadInput(x.loss, x.features.double(), x.weight.double(), bias, x.targets, x.row_weight)


def buffers(x, fill=0.0, dtype=torch.float32, without=(), fresh=False):
    parts = {name: getattr(x, name) for name in PARTS}
    made = [
        None if value is None or name in without else torch.full_like(value, fill, dtype=dtype)
        for name, value in parts.items()
    ]
    return Gradients(*made, fresh=fresh)


def close(found, expected, tolerance=1e-4):
    for name in PARTS:
        a, b = getattr(found, name), getattr(expected, name)
        assert (a is None) == (b is None)
        if a is not None:
            assert float((a.double() - b).norm()) <= tolerance * max(float(b.norm()), 1e-12), name


def check_head(x, backend, tolerance=1e-4):
    out, wanted = buffers(x, 0.25), buffers(x, 0.25, torch.float64)
    found = backend.head(x, out, statistics=True)
    expected = ReferenceBackend().head(exact(x), wanted, statistics=True)
    assert found.value.dtype == torch.float64
    assert float(found.value) == pytest.approx(float(expected.value), rel=tolerance)
    close(out, wanted, tolerance)
    assert (found.statistics is None) == (expected.statistics is None)
    if found.statistics is not None:
        for name in ("margin", "log_off_target_mass"):
            a, b = getattr(found.statistics, name), getattr(expected.statistics, name)
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        backend.losses(x), ReferenceBackend().losses(exact(x)), rtol=tolerance, atol=1e-6
    )


@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
def test_head(loss):
    check_head(case(loss), TritonBackend(chunk=4 if loss is LOSSES[0] else None))


@pytest.mark.parametrize("loss", [LOSSES[1], LOSSES[5]], ids=["ce", "mse"])
def test_head_without_bias(loss):
    check_head(case(loss, bias=False), TritonBackend())


def test_head_of_target_sets():
    check_head(case(make_loss("pick-all"), SETS), TritonBackend())


@pytest.mark.parametrize("targets", [None, SETS], ids=["single", "sets"])
def test_hostile_logits_and_small_masses(targets):
    """Losses of hundreds of nats, and rows whose mass leaves float32."""
    x = case(make_loss("pick-all" if targets else "ce"), targets, scale=60.0)
    found = TritonBackend().head(x, buffers(x), statistics=True)
    expected = ReferenceBackend().head(exact(x), buffers(x, dtype=torch.float64), statistics=True)
    assert float(found.value) == pytest.approx(float(expected.value), rel=1e-5)
    mass, wanted = found.statistics.log_off_target_mass, expected.statistics.log_off_target_mass
    assert wanted.max() > 150
    kept = wanted > -85
    torch.testing.assert_close(mass[kept], wanted[kept], rtol=1e-5, atol=1e-4)
    assert (mass[~kept] < -85).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("loss", [LOSSES[0], LOSSES[5]], ids=["ce", "mse"])
def test_half_precision(loss, dtype, tolerance):
    check_head(case(loss, dtype=dtype), TritonBackend(), tolerance)


def test_one_pass_where_no_chunk_fits(monkeypatch):
    monkeypatch.setattr(triton_memory, "free_bytes", lambda device: 64)
    monkeypatch.setattr(module, "softmax_value_and_grad", None)
    check_head(case(LOSSES[1]), TritonBackend())
    check_head(case(LOSSES[4], SETS), TritonBackend())


@pytest.mark.parametrize(
    ("without", "dtype"), [(("features",), torch.float32), (("weight", "bias"), torch.float64)]
)
@pytest.mark.parametrize("loss", [LOSSES[0], LOSSES[5]], ids=["ce", "mse"])
def test_frozen_parts_and_fresh_buffers(loss, without, dtype):
    """Fresh memory holds anything."""
    x = case(loss)
    wanted, out = (
        buffers(x, 0.0, torch.float64, without),
        buffers(x, float("nan"), dtype, without, fresh=True),
    )
    ReferenceBackend().head(exact(x), wanted)
    TritonBackend().head(x, out)
    close(out, wanted)


def test_a_buffer_of_another_layout():
    x = case(LOSSES[0])
    out, wanted = (
        Gradients(None, torch.ones(3, 7, device=DEVICE).T, None),
        buffers(x, 1.0, torch.float64, ("features", "bias")),
    )
    ReferenceBackend().head(exact(x), wanted)
    TritonBackend().head(x, out)
    close(out, wanted)


@pytest.mark.parametrize(
    ("loss", "targets"),
    [(LOSSES[0], None), (LOSSES[2], None), (LOSSES[3], None), (LOSSES[4], SETS), (LOSSES[5], None)],
    ids=["ce", "focal-2", "focal-0.5", "sets", "mse"],
)
def test_hessian_vector_product(loss, targets):
    x = case(loss, targets)
    v = direction(x)
    wanted, out = buffers(x, 0.25, torch.float64), buffers(x, 0.25)
    ReferenceBackend().head_hvp(exact(x), exact(v), wanted)
    backend = TritonBackend()
    if loss.name != "mse":
        head = backend.of(loss)
        getattr(head, "inner", head).tiled = None  # the kernels do it
    backend.head_hvp(x, v, out)
    close(out, wanted)


@pytest.mark.parametrize("without", ["features", "weight"])
def test_hessian_vector_product_of_a_frozen_part(without):
    x = case(LOSSES[1])
    v = direction(x)
    wanted, out = (
        buffers(x, 0.0, torch.float64, (without,)),
        buffers(x, float("nan"), without=(without,), fresh=True),
    )
    ReferenceBackend().head_hvp(exact(x), exact(v), wanted)
    TritonBackend(chunk=4).head_hvp(x, v, out)
    close(out, wanted)


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e6])
def test_half_precision_takes_directions_of_any_scale(scale):
    x = case(LOSSES[0], dtype=torch.float16)
    v = direction(x)
    features, weight = (part.double() * scale for part in (v.features, v.weight))
    v = HeadInput(
        x.loss,
        features.float(),
        weight.float(),
        strided_bias(v.bias.float() * scale),
        x.targets,
        x.row_weight,
    )
    wanted, out = buffers(x, 0.0, torch.float64), buffers(x, 0.0, torch.float32)
    ReferenceBackend().head_hvp(exact(x), exact(v), wanted)
    TritonBackend().head_hvp(x, v, out)
    for name in PARTS:
        a, b = getattr(out, name).double(), getattr(wanted, name)
        assert float((a - b).norm()) < 2e-3 * float(b.norm())


def strided_bias(b):
    """The same numbers with gaps between them."""
    return torch.stack((b, b + 7), 1)[:, 0]


def test_terminal_phase_keeps_its_digits():
    """Margins of 50: a loss of 1e-21, and a focal loss of 1e-61 which float32 does not hold."""
    make = torch.Generator().manual_seed(0)
    weight = (torch.eye(7) + 0.02 * torch.randn(7, 7, generator=make)).to(DEVICE)
    targets = Targets(torch.arange(7)).to(DEVICE)
    for loss in (LOSSES[0], LOSSES[2]):
        x = HeadInput(
            loss,
            50 * weight,
            weight,
            None,
            targets,
            torch.ones(7, dtype=torch.float64, device=DEVICE),
        )
        out, wanted = buffers(x), buffers(x, 0.0, torch.float64)
        found, expected = (
            TritonBackend().head(x, out).value,
            TiledBackend().head(exact(x), wanted).value,
        )
        assert float(expected) < 1e-18
        assert float(found) == pytest.approx(float(expected), rel=5e-5)
        if loss.name == "ce":
            close(out, wanted, 1e-5)


@pytest.mark.parametrize("columns", [18, 70])
@pytest.mark.parametrize(
    ("loss", "targets"), [(LOSSES[1], None), (LOSSES[4], SETS), (LOSSES[5], None)]
)
def test_products_with_the_logit_gradient(loss, targets, columns):
    x = case(loss, targets)
    right, left = torch.randn(7, columns, device=DEVICE), torch.randn(6, columns, device=DEVICE)
    found, wanted = (
        TritonBackend(chunk=4).logit_gradient(x),
        ReferenceBackend().logit_gradient(exact(x)),
    )
    for a, b in (
        (found.times(right), wanted.times(right.double())),
        (found.transposed_times(left), wanted.transposed_times(left.double())),
    ):
        assert a.dtype == right.dtype
        assert float((a.double() - b).norm()) < 1e-4 * float(b.norm())


def test_negative_row_weights_no_rows_and_wide_sets():
    for loss in (LOSSES[0], LOSSES[5]):
        x = case(loss)
        check_head(
            HeadInput(loss, x.features, x.weight, x.bias, x.targets, x.row_weight - 0.5),
            TritonBackend(),
        )
        none = HeadInput(
            loss, x.features[:0], x.weight, x.bias, Targets(x.targets.indices[:0]), x.row_weight[:0]
        )
        out = buffers(none, float("nan"), fresh=True)
        assert float(TritonBackend().head(none, out).value) == 0.0
        assert not out.weight.any()
    sets = Targets(torch.cat([torch.arange(34), torch.tensor([3])]), torch.tensor([0, 34, 35]))
    check_head(case(LOSSES[4], sets, rows=2, classes=40), TritonBackend())


@pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.get_device_capability()[0] != 9, reason="sm_90 only"
)
def test_mode_fp8_serves_what_it_can_and_says_what_it_cannot():
    x = case(make_loss("focal"), dtype=torch.bfloat16, rows=40, classes=300, dim=16)
    found, expected = gradients(TritonBackend("fp8"), x), gradients(ReferenceBackend(), exact(x))
    torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-4, atol=0.0)
    for mine, theirs in zip(found[1:], expected[1:], strict=True):
        assert float((mine.double() - theirs).norm() / theirs.norm()) < 2e-2
    for wrong in (
        case(make_loss("ce", smoothing=0.1), dtype=torch.bfloat16),
        case(make_loss("ce")),
    ):
        with pytest.raises(InputError, match="mode fp8 takes bfloat16 heads"):
            gradients(TritonBackend("fp8"), wrong)


def test_remembers_targets_only_while_they_are_the_same():
    backend, x = TritonBackend(), case(LOSSES[0])
    other = case(LOSSES[0], Targets((x.targets.indices.cpu() + 1) % 7))
    for y in (x, other, x):
        expected = ReferenceBackend().losses(exact(y))
        torch.testing.assert_close(backend.losses(y), expected, rtol=1e-5, atol=1e-6)


def test_an_objective_over_it():
    problem = Problem(
        counts=[2, 1, 3],
        dim=4,
        lambda_w=0.02,
        lambda_h=0.005,
        bias="penalised",
        lambda_b=0.03,
        dtype="float32",
        device=DEVICE,
    )
    results = []
    for backend in (TiledBackend(), TritonBackend()):
        objective = Objective(problem, backend=backend)
        make = torch.Generator().manual_seed(0)
        x = Point(
            *(
                torch.randn(*s, generator=make).to(DEVICE)
                for s in ((3, 4), (objective.rows.number, 4), (3,))
            )
        )
        results.append((objective.value_and_grad(x), objective.hvp(x, x)))
    (expected, moved), (found, product) = results
    assert found.value == pytest.approx(expected.value, rel=1e-5)
    for a, b in zip(
        (*found.gradient.parts(), *product.parts()),
        (*expected.gradient.parts(), *moved.parts()),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_plan_of_a_chunk():
    assert plan_chunk(100_000, 64, 100_000, "bf16", 80 << 30) == 10624  # 2 GiB
    assert plan_chunk(100_000, 64, 1_000_000, "bf16", 80 << 30) == 8192
    assert plan_chunk(100, 64, 100_000, "bf16", 80 << 30) == 100
    assert plan_chunk(10_000, 64, 1_000_000, "tf32x3", 16 << 30) == 512
    assert plan_chunk(10_000, 64, 1_000_000, "tf32x3", 1 << 30) == 0
    assert plan_chunk(10, 64, 100, "bf16", 100) == 0
    rows = plan_chunk(50_000_000, 512, 10, "bf16", 80 << 30)  # where the features are most of a row
    assert rows * (16 * 512 + 32) <= 2 << 30


def test_chunk_is_halved_when_memory_runs_out(monkeypatch):
    asked = []

    def empty(size, **options):
        asked.append(size)
        if len(asked) < 3:
            raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(triton_memory.torch, "empty", empty)
        assert reserved(1024, 64, 1000, "bf16", torch.device(DEVICE)) == 256
        assert asked[0] > asked[1] > asked[2]


def test_refusals_in_words():
    x = exact(case(LOSSES[0]))
    backend = TritonBackend()
    for call in (
        lambda: backend.head(x, buffers(x, dtype=torch.float64)),
        lambda: backend.losses(x),
        lambda: backend.head_hvp(x, x, buffers(x)),
        lambda: backend.logit_gradient(x),
    ):
        with pytest.raises(InputError, match="use backend tiled for float64"):
            call()
    with pytest.raises(InputError, match="bf16x3"):
        TritonBackend(mode="int4")


@pytest.mark.parametrize("loss", LOSSES[:5], ids=NAMES[:5])
@pytest.mark.parametrize("fused", [TiledBackend(), TritonBackend()], ids=["tiled", "triton"])
def test_rows_that_weigh_nothing_may_lose_infinitely(fused, loss):
    """A row without weight, whose class is impossible, changes neither value nor derivatives."""
    pointer = torch.arange(7, device=DEVICE) if loss.multi_label else None
    x = case(loss, Targets(torch.tensor([2, 0, 1, 4, 3, 1]), pointer))
    x.bias[0], x.row_weight[1] = -torch.inf, 0.0
    kept = torch.tensor([0, 2, 3, 4, 5], device=DEVICE)
    fewer = Targets(x.targets.indices[kept], None if pointer is None else pointer[:-1])
    without = HeadInput(loss, x.features[kept], x.weight, x.bias, fewer, x.row_weight[kept])
    found, wanted = buffers(x), buffers(without)
    assert float(fused.head(x, found).value) == pytest.approx(
        float(fused.head(without, wanted).value), rel=1e-5
    )
    padded = Gradients(
        torch.zeros_like(x.features).index_copy(0, kept, wanted.features),
        wanted.weight,
        wanted.bias,
    )
    close(found, padded)
    v = direction(x)
    of_fewer = HeadInput(loss, v.features[kept], v.weight, v.bias, fewer, x.row_weight[kept])
    found, wanted = buffers(x), buffers(without)
    fused.head_hvp(x, v, found)
    fused.head_hvp(without, of_fewer, wanted)
    close(
        found,
        Gradients(
            torch.zeros_like(x.features).index_copy(0, kept, wanted.features),
            wanted.weight,
            wanted.bias,
        ),
    )


def test_the_layout_of_targets_lives_as_long_as_they_do():
    """A captured graph reads it at every replay, whatever the backend was asked since."""
    x, other, backend = (
        case(LOSSES[0]),
        case(LOSSES[0], Targets(torch.tensor([0, 0, 1, 2, 3, 3]))),
        TritonBackend(),
    )
    backend.head(x, buffers(x))
    (layout,) = x.targets.remembered.values()
    backend.head(other, buffers(other))
    backend.head(x, buffers(x))
    assert list(x.targets.remembered.values()) == [layout]
    for copied in (
        copy.deepcopy(x.targets),
        pickle.loads(pickle.dumps(x.targets)),
        copy.copy(x.targets),
    ):
        assert torch.equal(copied.indices, x.targets.indices)
        assert not copied.remembered


def test_a_mode_by_name():
    check_head(case(LOSSES[0]), TritonBackend(mode="bf16x3"), 1e-3)


def replaying(replay=True):
    """(a backend, what its recorder is asked for)."""
    backend, noted = TritonBackend(replay=replay), Noted()
    backend.of(LOSSES[0]).replays = Replays(most=99, recorder=noted)
    return backend, noted.log


def test_a_repeated_step_is_recorded_and_replays_on_new_numbers():
    x, (backend, log) = case(LOSSES[0]), replaying()
    out = buffers(x, fresh=True)
    for scale in (1.0, -1.5, 0.5):
        x.features.mul_(scale)
        found, wanted = backend.head(x, out), buffers(x, 0.0, torch.float64)
        value = float(ReferenceBackend().head(exact(x), wanted).value)
        assert float(found.value) == pytest.approx(value, rel=1e-4)
        close(out, wanted)
    assert log == ["record", "replay", "replay"]


def test_all_that_a_step_reads_is_in_the_key():
    x, (backend, log) = case(LOSSES[0]), replaying()
    out = buffers(x)
    for _ in range(2):
        backend.head(x, out)
    others = {name: getattr(x, name).clone() for name in ("features", "weight", "bias")}
    others |= {"row_weight": x.row_weight.clone(), "loss": LOSSES[1]}
    others["targets"] = Targets(x.targets.indices.clone())
    for name, other in others.items():
        backend.head(replace(x, **{name: other}), out)
        assert log == ["record", "replay"], name
    backend.head(x, buffers(x))
    backend.head(x, replace(out, fresh=True))
    backend.losses(x)
    assert log == ["record", "replay"], "other buffers, or none"


def test_the_table_decides_whether_steps_are_replayed_and_says_no(monkeypatch):
    x, (backend, log) = case(LOSSES[0]), replaying(None)
    out = buffers(x)
    for _ in range(3):
        backend.head(x, out)
    assert log == []
    monkeypatch.setattr(module, "REPLAYED", frozenset({"tf32x3"}))
    for _ in range(2):
        backend.head(x, out)
    assert log == ["record", "replay"]


def test_a_plan_knows_what_a_recording_holds():
    shape = HeadShape(LOSSES[0], 600, 70, 30, 70, False, torch.float32, torch.device(DEVICE))
    plain, recorded = (TritonBackend(replay=replay).plan(shape) for replay in (None, True))
    assert plain.kept == 0
    assert (recorded.workspace, recorded.kept) == (2 * plain.workspace, plain.workspace)


@pytest.mark.skipif(DEVICE != "cuda", reason="graphs are captured on CUDA")
@pytest.mark.parametrize(
    ("loss", "targets"),
    [(LOSSES[0], None), (LOSSES[4], None), (LOSSES[4], SETS), (LOSSES[5], None)],
    ids=["ce", "pick-all", "sets", "mse"],
)
def test_a_step_can_be_captured_in_a_graph(loss, targets):
    """Nothing in a step waits for the device, so it replays on new numbers in the same memory."""
    x, backend = case(loss, targets), TritonBackend()
    out = buffers(x, fresh=True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            backend.head(x, out)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = backend.head(x, out).value
    # Labels of other calls take no memory that the graph reads.
    for seed in range(8):
        other = Targets(
            torch.randint(7, (6,), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
        )
        backend.head(
            HeadInput(
                LOSSES[0],
                x.features,
                x.weight,
                x.bias,
                other,
                torch.ones(other.rows, device=DEVICE),
            ),
            buffers(x),
        )
    x.features.mul_(-1.5)
    graph.replay()
    wanted = buffers(x, 0.0, torch.float64)
    assert float(value) == pytest.approx(
        float(ReferenceBackend().head(exact(x), wanted).value), rel=1e-4
    )
    close(out, wanted)


class Launches(TorchDispatchMode):
    """Counts torch's operations that work on data; those of the interpreter inside a kernel are not
    among them.
    """

    VIEWS = (
        "slice",
        "select",
        "view",
        "expand",
        "t",
        "unsqueeze",
        "squeeze",
        "detach",
        "empty",
        "empty_like",
        "new_empty",
    )

    def __init__(self, monkeypatch):
        super().__init__()
        self.torch, self.kernels, self.inside = 0, 0, False
        if DEVICE == "cpu":
            run = GridExecutor.__call__

            def counted(executor, *given, **named):
                self.kernels, self.inside = self.kernels + 1, True
                run(executor, *given, **named)
                self.inside = False

            monkeypatch.setattr(GridExecutor, "__call__", counted)

    def __torch_dispatch__(self, function, types, given=(), named=None):
        if not self.inside and function.overloadpacket.__name__ not in self.VIEWS:
            self.torch += 1
        return function(*given, **(named or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("loss", "bias", "kernels", "others"),
    [(LOSSES[0], False, 7, 0), (LOSSES[0], True, 8, 0), (LOSSES[2], True, 8, 15)],
    ids=["ce", "bias", "focal"],
)
def test_launches_of_a_chunk_of_rows(monkeypatch, dtype, loss, bias, kernels, others):
    """E, its fallback, what lies between (two), dH, the rows of dW and dW; with small d, every
    launch more would show.

    A bias has one more; the slope of the focal loss is torch's.
    """
    x = case(loss, bias=bias, rows=32, classes=24, dim=16, dtype=dtype)
    counts = []
    for chunk in (16, 8):  # two chunks, and four
        backend = TritonBackend(chunk=chunk)
        backend.head(x, buffers(x))
        with monkeypatch.context() as patch, Launches(patch) as launches:
            backend.head(x, buffers(x))
        counts.append(launches)
    more = counts[1].torch - counts[0].torch
    library = 0 if DEVICE == "cpu" else 2 * 7  # multiplies on a device, in two calls and some views
    assert 2 * others <= more <= 2 * others + library
    if DEVICE == "cpu":
        assert counts[1].kernels - counts[0].kernels == 2 * kernels
