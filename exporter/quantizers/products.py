"""Linear algebra of the calibrated methods, in torch, so that it keeps to the caller's threads.

numpy's own takes as many threads as its BLAS finds cores, and numpy has no call to say
otherwise; torch has (``torch.set_num_threads``), and calibration, which is the only one to need it,
runs in torch anyway. The arrays are shared with torch, not copied.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

# Columns of one product: with a short inner axis the sum does not depend on how BLAS splits it.
INNER = 256


def add_product(
    total: NDArray[Any], a: NDArray[Any], b: NDArray[Any], *, factor: float = 1.0
) -> None:
    """``total += factor * a @ b`` in place, for arrays of two axes and one dtype.

    The result does not depend on the number of threads.
    """
    out, left, right = _shared(total), _shared(a), _shared(b)
    for start in range(0, a.shape[1], INNER):
        part = slice(start, start + INNER)
        out.addmm_(left[:, part], right[part], alpha=factor)


def product(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
    """``a @ b`` of two matrices of one dtype; see `add_product`."""
    total = np.zeros((a.shape[0], b.shape[1]), a.dtype)
    add_product(total, a, b)
    return total


def lower_factor(a: NDArray[Any]) -> NDArray[Any]:
    """Lower Cholesky factor of a positive definite matrix. Raises LinAlgError for any other."""
    import torch

    factor, failed = torch.linalg.cholesky_ex(_shared(a))
    if int(failed) or not bool(torch.isfinite(factor).all()):
        raise np.linalg.LinAlgError("not positive definite")
    lower: NDArray[Any] = factor.numpy()
    return lower


def triangle_inverse(a: NDArray[Any], *, upper: bool) -> NDArray[Any]:
    """Inverse of the upper or lower triangle of a square matrix, whose other entries do not count."""
    import torch

    ones = torch.eye(a.shape[0], dtype=_shared(a).dtype)
    inverse: NDArray[Any] = torch.linalg.solve_triangular(_shared(a), ones, upper=upper).numpy()
    return inverse


def _shared(values: NDArray[Any]) -> torch.Tensor:
    import torch

    # torch takes neither read-only arrays nor negative strides.
    usable = values.flags.writeable and min(values.strides, default=0) >= 0
    return torch.from_numpy(values if usable else values.copy())
