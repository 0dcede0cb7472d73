from __future__ import annotations

import numpy as np
import pytest

from exporter.quantizers.products import add_product, lower_factor, product, triangle_inverse


@pytest.mark.parametrize("inner", [3, 256, 700])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_products_are_numpys(inner: int, dtype: type[np.floating]) -> None:
    rng = np.random.default_rng(inner)
    a, b = (rng.standard_normal(s).astype(dtype) for s in ((20, inner), (inner, 30)))
    close = {"rtol": 0, "atol": 1e-5 * np.sqrt(inner)}

    np.testing.assert_allclose(product(a, b), a.astype("f8") @ b.astype("f8"), **close)

    total = rng.standard_normal((20, 30)).astype(dtype)
    expected = total - 0.5 * (a @ b)
    add_product(total, a, b, factor=-0.5)
    np.testing.assert_allclose(total, expected, **close)


def test_parts_of_arrays_are_changed_in_place() -> None:
    whole = np.zeros((6, 8), np.float32)
    a = np.ones((8, 4), np.float32)
    a.flags.writeable = False
    add_product(whole[1:5, ::2], a[::-2], np.eye(4, dtype=np.float32))
    assert whole.sum() == whole[1:5, ::2].sum() == 16


@pytest.mark.parametrize("upper", [False, True])
def test_the_inverse_of_a_triangle(upper: bool) -> None:
    a = np.random.default_rng(0).standard_normal((40, 40)) + 8 * np.eye(40)
    triangle = np.triu(a) if upper else np.tril(a)
    np.testing.assert_allclose(triangle_inverse(a, upper=upper) @ triangle, np.eye(40), atol=1e-12)


def test_the_factor_of_a_matrix_that_has_none_is_an_error() -> None:
    x = np.random.default_rng(0).standard_normal((50, 30))
    lower = lower_factor(x.T @ x)
    np.testing.assert_allclose(lower @ lower.T, x.T @ x, atol=1e-10)
    for bad in (-np.eye(3), np.full((3, 3), np.nan)):
        with pytest.raises(np.linalg.LinAlgError):
            lower_factor(bad)
