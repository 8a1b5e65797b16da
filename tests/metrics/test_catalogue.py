"""Metrics against their dense definitions in extended precision, and the relations that they must
obey.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ufm_fast.metrics import METRICS, ClassStatistics, balancedness, collect

LONG = np.longdouble
quick = settings(
    deadline=None, max_examples=25, suppress_health_check=list(HealthCheck), derandomize=True
)


def norm(array):
    return np.sqrt((array * array).sum())


def eigenvalues_of_symmetric(matrix):
    """Eigenvalues and vectors in extended precision: float64's, refined by Jacobi sweeps."""
    vectors = np.linalg.qr(np.linalg.eigh(matrix.astype(np.float64))[1])[0].astype(LONG)
    for _ in range(3):  # Newton-Schulz: orthogonal to extended precision
        vectors = vectors @ (3 * np.eye(len(vectors), dtype=LONG) - vectors.T @ vectors) / 2
    rotated = vectors.T @ matrix @ vectors
    scale = np.abs(rotated).max()
    for _ in range(8):
        pairs = np.argwhere(np.triu(np.abs(rotated), 1) > 1e-22 * scale)
        if not len(pairs):
            break
        for p, q in pairs:
            if rotated[p, q] == 0:
                continue
            theta = (rotated[q, q] - rotated[p, p]) / (2 * rotated[p, q])
            t = (1 if theta >= 0 else -1) / (abs(theta) + np.sqrt(1 + theta * theta))
            c = 1 / np.sqrt(1 + t * t)
            turn = np.array([[c, t * c], [-t * c, c]])
            rotated[[p, q]] = turn.T @ rotated[[p, q]]
            rotated[:, [p, q]] = rotated[:, [p, q]] @ turn
            vectors[:, [p, q]] = vectors[:, [p, q]] @ turn
    return np.diag(rotated), vectors


def pseudo_inverse(matrix, rank):
    values, vectors = eigenvalues_of_symmetric(matrix)
    order = np.argsort(-values)[:rank]
    kept = [i for i in order if values[i] > len(matrix) * np.finfo(np.float64).eps * values.max()]
    return sum(np.outer(vectors[:, i], vectors[:, i]) / values[i] for i in kept)


def cosines(rows):
    unit = rows / np.sqrt((rows * rows).sum(1))[:, None]
    return (unit @ unit.T)[~np.eye(len(rows), dtype=bool)], unit


def of_rows(name, rows):
    """Definitions that hold for the classifier's rows and for centred class means alike."""
    count = len(rows)
    norms = np.sqrt((rows * rows).sum(1))
    cosine, _ = cosines(rows)
    small = rows.T @ rows if rows.shape[1] <= count else rows @ rows.T
    energy = np.clip(eigenvalues_of_symmetric(small)[0], 0, None)
    share = np.sqrt(energy) / np.sqrt(energy).sum()
    share = share[share > 0]
    return {
        f"norm_variation_{name}": norms.std(ddof=1) / norms.mean(),
        f"cosine_mean_{name}": cosine.mean(),
        f"cosine_std_{name}": cosine.std(),
        f"effective_rank_{name}": np.exp(-(share * np.log(share)).sum()),
        f"participation_ratio_{name}": energy.sum() ** 2 / (energy**2).sum(),
        f"stable_rank_{name}": energy.sum() / energy.max(),
        f"equiangularity_{name}": abs(cosine + LONG(1) / (count - 1)).mean(),
        f"max_cosine_{name}": cosine.max(),
    }


def etf(count):
    return (np.eye(count, dtype=LONG) - LONG(1) / count) / np.sqrt(LONG(count - 1))


def distance(gram, target):
    return norm(gram / norm(gram) - target)


def definitions(features, weight, labels, bias, lambda_w, lambda_h):
    """Every metric of the table by its formula: dense, in extended precision, a loop where the
    formula has a sum.
    """
    H, W, b = (x.astype(LONG) for x in (features, weight, bias))
    present = np.unique(labels)
    K, N = len(present), len(labels)
    # Differences about one of the rows: means formed far from zero would cost the oracle its own
    # digits.
    origin = H[0]
    shifted = H - origin
    means = np.stack([shifted[labels == k].mean(0) for k in present])
    M = means + origin
    scatter = shifted - means[np.searchsorted(present, labels)]
    v = np.array([(scatter[labels == k] ** 2).sum(1).mean() for k in present])
    mu_samples = H.mean(0)
    M_s, M_c, P = means - shifted.mean(0), means - means.mean(0), W[present]
    within, between = scatter.T @ scatter / N, M_s.T @ M_s / K
    frame, frame_means = np.eye(len(W)) / np.sqrt(LONG(len(W))), np.eye(K) / np.sqrt(LONG(K))
    duality = (P * M_s).sum(1) / np.sqrt((P * P).sum(1) * (M_s * M_s).sum(1))
    uncentred = (P * M).sum(1) / np.sqrt((P * P).sum(1) * (M * M).sum(1))
    squares = ((means[:, None] - means) ** 2).sum(2)
    pairs = ~np.eye(K, dtype=bool)
    predicted = (H @ W.T + b).argmax(1)
    nearest = present[((H[:, None] - M) ** 2).sum(2).argmin(1)]
    difference = W.T @ W - LONG(lambda_h) / LONG(lambda_w) * (H.T @ H)
    return {
        "nc1_pinv": np.trace(within @ pseudo_inverse(between, K - 1)) / K,
        "nc1_trace": np.trace(within @ pseudo_inverse(M_c.T @ M_c / K, K - 1)),
        "nc1_quotient": np.trace(within) / np.trace(between),
        "nc2_classifier": distance(W @ W.T, etf(len(W))),
        "nc2_classifier_centred": distance((W - W.mean(0)) @ (W - W.mean(0)).T, etf(len(W))),
        "nc2_classifier_frame": distance(W @ W.T, frame),
        "nc2_means": distance(M_c @ M_c.T, etf(K)),
        "nc2_means_uncentred": distance(M @ M.T, etf(K)),
        "nc2_means_frame": distance(M @ M.T, frame_means),
        "nc3": distance(P @ M_s.T, etf(K)),
        "nc3_centred": distance((P - P.mean(0)) @ M_s.T, etf(K)),
        "nc3_uncentred": distance(P @ M.T, etf(K)),
        "nc3_frame": distance(P @ M.T, frame_means),
        "nc3_papyan": norm(P / norm(P) - M_c / norm(M_c)) ** 2,
        "self_duality_gap": (1 - duality).mean(),
        "self_duality_cosine": duality.mean(),
        "self_duality_gap_uncentred": (1 - uncentred).mean(),
        "self_duality_variance": duality.var(ddof=1),
        "nc_bias": norm(W @ mu_samples + b),
        **of_rows("classifier", W),
        **of_rows("means", M_c),
        "balancedness": norm(difference),
        "balancedness_relative": norm(difference) / norm(W.T @ W),
        "nc4": LONG((predicted == nearest).mean()),
        "cdnv": ((v[:, None] + v)[pairs] / (2 * squares[pairs])).mean(),
    }


def example(seed, classes, dim, spread=0.5, offset=0.0, drop=0):
    """Random features, classifier, labels and bias; `drop` classes get no samples, the others from
    one to four.
    """
    rng = np.random.default_rng(seed)
    used = rng.permutation(classes)[: max(2, classes - drop)]
    labels = np.repeat(used, rng.integers(1, 5, len(used)))
    rng.shuffle(labels)
    means = rng.standard_normal((classes, dim)) + offset
    features = means[labels] + spread * rng.standard_normal((len(labels), dim))
    return features, rng.standard_normal((classes, dim)), labels, rng.standard_normal(classes)


def simplex(classes, dim):
    """K rows in R^d, d >= K-1, at the vertices of a regular simplex about zero."""
    corners = np.linalg.qr(np.eye(classes) - 1 / classes)[0][:, : classes - 1]
    rotation = np.linalg.qr(np.random.default_rng(classes).standard_normal((dim, dim)))[0]
    return corners @ rotation[: classes - 1]


def torched(features, weight, labels, bias):
    return (
        torch.from_numpy(features),
        torch.from_numpy(weight),
        torch.from_numpy(labels),
        torch.from_numpy(bias),
    )


def assert_matches(data, absolute=1e-13, relative=1e-8, **options):
    found = collect(*torched(*data), lambda_w=0.3, lambda_h=0.2, **options)
    expected = definitions(*data, 0.3, 0.2)
    assert found.keys() == METRICS.keys() == expected.keys() | METRICS.keys()
    for name, value in expected.items():
        error = abs(LONG(found[name]) - value)
        assert error <= absolute + relative * abs(value), (
            f"{name}: {found[name]} against {value}, error {error}"
        )


shapes = st.tuples(st.integers(2, 9), st.integers(1, 10))


@quick
@given(
    shape=shapes,
    seed=st.integers(0, 10**6),
    drop=st.integers(0, 3),
    offset=st.sampled_from([0.0, 3.0]),
)
def test_equals_the_dense_definitions(shape, seed, drop, offset):
    classes, dim = shape
    assert_matches(example(seed, classes, dim, offset=offset, drop=drop))


@pytest.mark.parametrize(
    ("classes", "dim"), [(2, 1), (2, 7), (40, 3), (30, 29), (30, 30), (31, 45), (60, 12)]
)
def test_equals_the_dense_definitions_at_named_shapes(classes, dim):
    assert_matches(example(classes + dim, classes, dim))


@pytest.mark.parametrize("perturbation", [0.0, 1e-12, 1e-9, 1e-6])
@pytest.mark.parametrize(("classes", "dim"), [(2, 1), (2, 3), (5, 4), (8, 8), (9, 20)])
def test_near_collapse(classes, dim, perturbation):
    rng = np.random.default_rng(classes)
    corners = simplex(classes, dim)
    labels = np.repeat(np.arange(classes), 3)
    features = 2 * corners[labels] + perturbation * rng.standard_normal((len(labels), dim))
    weight = corners + perturbation * rng.standard_normal((classes, dim))
    assert_matches((features, weight, labels, np.zeros(classes)))


def test_nc2_and_nc3_keep_eight_digits_at_a_distance_of_one_in_a_billion():
    classes, dim = 10, 9
    rng = np.random.default_rng(0)
    weight = simplex(classes, dim) + 1e-9 * rng.standard_normal((classes, dim))
    data = (
        weight + 1e-9 * rng.standard_normal((classes, dim)),
        weight,
        np.arange(classes),
        np.zeros(classes),
    )
    found, expected = collect(*torched(*data)), definitions(*data, 1, 1)
    for name in (
        "nc2_classifier",
        "nc2_classifier_centred",
        "nc2_means",
        "nc2_means_uncentred",
        "nc3",
        "nc3_uncentred",
    ):
        assert 1e-10 < expected[name] < 1e-7
        assert found[name] == pytest.approx(float(expected[name]), rel=1e-8)


@pytest.mark.parametrize("spread", [1e-6, 1e-10, 1e-12])
def test_spread_of_the_means_far_below_their_size(spread):
    """Means that agree to ten digits: what depends on their differences keeps its own digits."""
    features, weight, labels, bias = example(3, 7, 5)
    features = 1.0 + spread * features
    assert_matches((features, weight, labels, bias))


def test_within_class_spread_far_below_the_means():
    data = example(4, 6, 8, spread=1e-10, offset=1.0)
    found, expected = collect(*torched(*data)), definitions(*data, 1, 1)
    for name in ("nc1_pinv", "nc1_trace", "nc1_quotient", "cdnv"):
        assert found[name] == pytest.approx(float(expected[name]), rel=1e-8)
        assert 0 < found[name] < 1e-17


def test_class_means_that_almost_coincide():
    features, weight, labels, bias = example(5, 6, 4, offset=0.0)
    first, second = np.unique(labels)[:2]
    for label, shift in ((first, 0.0), (second, 1e-7)):
        features[labels == label] = 1.0 + shift + 1e-9 * np.arange((labels == label).sum())[:, None]
    expected = definitions(features, weight, labels, bias, 1, 1)
    found = collect(*torched(features, weight, labels, bias))
    assert found["cdnv"] == pytest.approx(float(expected["cdnv"]), rel=1e-8)


@quick
@given(shape=shapes, seed=st.integers(0, 10**6))
def test_counts_equal_repeated_rows(shape, seed):
    features, weight, labels, bias = example(seed, *shape)
    counts = np.random.default_rng(seed).integers(1, 4, len(labels))
    data = torched(features, weight, labels, bias)
    weighted = collect(*data, counts=torch.from_numpy(counts), lambda_w=1.0, lambda_h=0.5)
    repeated = (x.repeat_interleave(torch.from_numpy(counts), 0) for x in (data[0], data[2]))
    features, labels = repeated
    plain = collect(features, data[1], labels, data[3], lambda_w=1.0, lambda_h=0.5)
    assert weighted == pytest.approx(plain, rel=1e-9, abs=1e-12, nan_ok=True)


@quick
@given(shape=shapes, seed=st.integers(0, 10**6))
def test_rotation_and_permutations_change_nothing(shape, seed):
    features, weight, labels, bias = example(seed, *shape, drop=1)
    rng = np.random.default_rng(seed)
    rotation = np.linalg.qr(rng.standard_normal((shape[1], shape[1])))[0]
    order, samples = rng.permutation(shape[0]), rng.permutation(len(labels))
    inverse = np.argsort(order)
    moved = (
        (features @ rotation)[samples],
        (weight @ rotation)[order],
        inverse[labels][samples],
        bias[order],
    )
    before = collect(*torched(features, weight, labels, bias), lambda_w=1.0, lambda_h=0.5)
    after = collect(*torched(*moved), lambda_w=1.0, lambda_h=0.5)
    assert after == pytest.approx(before, rel=1e-9, abs=1e-11, nan_ok=True)


@pytest.mark.parametrize("tile", [1, 2, 7, 64])
def test_tiles_and_blocks_change_nothing(tile, monkeypatch):
    data = torched(*example(6, 23, 5, offset=1.0))
    whole = collect(*data, lambda_w=1.0, lambda_h=0.5)
    monkeypatch.setattr("ufm_fast.metrics.rows.BLOCK_ELEMENTS", 5 * tile)
    assert collect(*data, lambda_w=1.0, lambda_h=0.5, tile=tile) == pytest.approx(
        whole, rel=1e-12, abs=1e-14
    )


def test_blocks_of_rows_in_the_entrywise_branch(monkeypatch):
    """K <= d+1 with several blocks: the target's diagonal moves along with the block."""
    data = example(7, 25, 24)
    monkeypatch.setattr("ufm_fast.metrics.rows.block_rows", lambda dim: 4)
    assert_matches(data)


def test_sampled_estimates_lie_within_their_errors():
    features, weight, labels, bias = torched(*example(8, 300, 6, offset=0.5))
    weight[labels] = features  # a classifier that often agrees with the nearest mean
    exact = collect(features, weight, labels, bias, pairwise="exact")
    names = ["nc4", "equiangularity_classifier", "equiangularity_means", "cdnv"]
    scores = {name: [] for name in names}
    for seed in range(40):
        found = collect(
            features, weight, labels, bias, pairwise="sampled", pairs=3000, rows=120, seed=seed
        )
        for name in names:
            assert found[f"{name}_stderr"] > 0
            scores[name].append((found[name] - exact[name]) / found[f"{name}_stderr"])
        assert found["max_cosine_means"] <= exact["max_cosine_means"] + 1e-12
    for name in names:
        spread = math.sqrt(sum(score**2 for score in scores[name]) / 40)
        assert 0.6 < spread < 1.6, name
    assert found == collect(
        features, weight, labels, bias, pairwise="sampled", pairs=3000, rows=120, seed=39
    )


def test_rows_that_stand_for_unequal_counts_are_drawn_by_them():
    """Long-tailed counts: the estimate is unbiased, and its error is the right one."""
    make = torch.Generator().manual_seed(0)
    features, labels = (
        torch.randn(400, 6, generator=make, dtype=torch.float64),
        torch.arange(400) % 40,
    )
    weight = 0.1 * torch.randn(40, 6, generator=make, dtype=torch.float64)
    weight += torch.zeros(40, 6).double().index_add_(0, labels, features) / 10
    counts = torch.rand(400, generator=make, dtype=torch.float64) ** -0.8
    exact = collect(features, weight, labels, counts=counts, pairwise="exact")["nc4"]
    assert 0.05 < exact < 0.95
    scores = []
    for seed in range(100):
        found = collect(
            features,
            weight,
            labels,
            counts=counts,
            pairwise="sampled",
            rows=60,
            pairs=10,
            seed=seed,
        )
        scores.append((found["nc4"] - exact) / found["nc4_stderr"])
    assert abs(sum(scores) / 100) < 0.3
    assert 0.8 < math.sqrt(sum(score**2 for score in scores) / 100) < 1.25


def test_auto_samples_beyond_its_limit_only(monkeypatch):
    data = torched(*example(9, 60, 4))
    assert not any(name.endswith("_stderr") for name in collect(*data, pairs=100, rows=20))
    monkeypatch.setattr("ufm_fast.metrics.pairwise.EXACT_CLASSES", 59)
    assert sum(name.endswith("_stderr") for name in collect(*data, pairs=100, rows=20)) == 4


def test_a_draw_has_no_repeats():
    from ufm_fast.metrics import Sampling

    for seed in range(20):
        drawn = Sampling(seed=seed).draw(100, 60)
        assert drawn.unique().numel() == 60
        assert int(drawn.max()) < 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_summed_in_float64(dtype):
    features, weight, labels, bias = torched(*example(10, 12, 5))
    features, weight, bias = (x.to(dtype) for x in (features, weight, bias))
    low = collect(features, weight, labels, bias, lambda_w=1.0, lambda_h=0.5)
    high = collect(
        features.double(), weight.double(), labels, bias.double(), lambda_w=1.0, lambda_h=0.5
    )
    assert low == pytest.approx(high, rel=1e-14)


def test_one_row_a_class_equals_the_general_path():
    """Rows that stand for several samples, in any order, have no scatter and are their own
    means.
    """
    features, weight, _, bias = torched(*example(11, 9, 4))
    labels = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    features = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    single = collect(features, weight, labels, bias, counts=torch.full((9,), 2))
    double = collect(features.repeat(2, 1), weight, labels.repeat(2), bias)
    assert single == pytest.approx(double, rel=1e-12, abs=1e-14)
    assert single["nc1_pinv"] == 0


def test_rows_without_samples_do_not_count():
    features, weight, labels, bias = torched(*example(12, 8, 5))
    counts = torch.ones(len(labels))
    counts[labels == labels[0]] = 0
    kept = counts > 0
    found = collect(features, weight, labels, bias, counts=counts)
    assert found == pytest.approx(collect(features[kept], weight, labels[kept], bias), nan_ok=True)


def test_statistics_hold_the_plain_means_and_covariances():
    features, _, labels, _ = example(13, 6, 4, offset=2.0)
    statistics = ClassStatistics(features, labels)
    means = np.stack([features[labels == k].mean(0) for k in np.unique(labels)])
    centred = features - means[np.searchsorted(np.unique(labels), labels)]
    assert statistics.present.tolist() == np.unique(labels).tolist()
    np.testing.assert_allclose(statistics.class_means, means, rtol=1e-14)
    np.testing.assert_allclose(statistics.sample_centre, features.mean(0), rtol=1e-13)
    np.testing.assert_allclose(statistics.class_centre, means.mean(0), rtol=1e-13)
    np.testing.assert_allclose(
        statistics.within, centred.T @ centred / len(labels), rtol=1e-12, atol=1e-15
    )
    for centre, about in (("samples", features.mean(0)), ("classes", means.mean(0))):
        expected = (means - about).T @ (means - about) / len(means)
        np.testing.assert_allclose(statistics.between(centre), expected, rtol=1e-12, atol=1e-14)


def test_features_or_classifier_alone_give_their_own_metrics():
    features, weight, labels, bias = torched(*example(14, 5, 3))
    everything = collect(features, weight, labels, bias)
    head, means = collect(None, weight, None), collect(features, None, labels)
    assert head.keys() == {name for name, metric in METRICS.items() if metric.needs == {"weight"}}
    assert means.keys() == {
        name for name, metric in METRICS.items() if metric.needs == {"features"}
    }
    assert {**head, **means}.items() <= everything.items()


def test_the_cheap_set_is_what_is_linear():
    data = torched(*example(15, 5, 3))
    cheap = collect(*data, lambda_w=1.0, lambda_h=1.0, pairwise="none")
    assert list(cheap) == [name for name, metric in METRICS.items() if metric.cost == "linear"]


def test_balanced_factors_are_seen():
    weight = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    counts = torch.arange(1, 8, dtype=torch.float64)
    features = weight * math.sqrt(2) / counts.sqrt()[:, None]
    absolute, relative = balancedness(weight, features, lambda_w=1.0, lambda_h=0.5, counts=counts)
    assert absolute < 1e-13
    assert relative < 1e-14


@pytest.mark.parametrize("size", [1e-9, 1e-17, 1e-60])
def test_a_row_of_the_classifier_keeps_its_direction_however_small(size):
    for seed in range(4):
        features, weight, labels, bias = example(seed, 6, 5)
        weight[0] = size * weight[1]
        weight[2] *= size
        assert_matches((features, weight, labels, bias))
        found = collect(*torched(features, weight, labels, bias))
        assert found["max_cosine_classifier"] == pytest.approx(1.0, abs=1e-15)


def test_sampled_angles_of_small_rows():
    _, weight, _, _ = example(3, 40, 5)
    plain = collect(None, weight, None, pairwise="sampled", pairs=200)
    shrunk = weight * 10.0 ** np.random.default_rng(0).integers(-200, 3, (40, 1))
    found = collect(None, shrunk, None, pairwise="sampled", pairs=200)
    for name in (
        "equiangularity_classifier",
        "max_cosine_classifier",
        "cosine_mean_classifier",
        "cosine_std_classifier",
    ):
        assert found[name] == pytest.approx(plain[name], abs=1e-13)


def test_undefined_numbers_are_nan_and_raise_nothing():
    features, weight, labels, bias = torched(*example(16, 4, 3))
    zero_row = weight.clone()
    zero_row[1] = 0
    assert math.isnan(collect(features, zero_row, labels, bias)["cosine_std_classifier"])
    same = collect(torch.ones_like(features), weight, labels, bias)
    assert math.isnan(same["nc1_pinv"])
    assert math.isnan(same["nc2_means"])
    assert math.isnan(collect(features, torch.zeros_like(weight), labels)["nc2_classifier"])


@pytest.mark.parametrize("spread", [1.0, 1e-6, 0.0])
def test_many_dimensions_give_the_same_metrics(spread):
    """Zeros beyond the rows' span change nothing, whichever path they lead to."""
    generator = torch.Generator().manual_seed(4)
    means, W = (torch.randn(3, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.arange(9) % 3
    H = 1e-8 * (
        means[labels] + spread * torch.randn(9, 6, generator=generator, dtype=torch.float64)
    )
    few = collect(H, W, labels, lambda_w=0.1, lambda_h=0.2)
    padded = (torch.nn.functional.pad(x, (0, 300)) for x in (H, W))
    many = collect(*padded, labels, lambda_w=0.1, lambda_h=0.2)
    assert few.keys() == many.keys()
    for name, value in few.items():
        assert many[name] == pytest.approx(value, rel=1e-8, abs=1e-13, nan_ok=True), name
