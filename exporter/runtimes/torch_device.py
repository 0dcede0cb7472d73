"""A torch model on another device or in another float type, fed by code that knows of neither.

Families make their tensors from numpy arrays on the CPU in float32. What enters the model's larger
parts is moved and cast there, so that no family has to know where its model is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from exporter.core.errors import EnvironmentLacks, InputRefused
from exporter.runtimes.providers import DEVICES, Device

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Place:
    """Where and in which float type a model computes."""

    device: Device = "cpu"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.device not in DEVICES or self.dtype not in DTYPES:
            raise InputRefused(
                f"device {self.device!r}, dtype {self.dtype!r}; expected one of "
                f"{', '.join(DEVICES)} and one of {', '.join(DTYPES)}"
            )

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type as torch names it."""
        import torch

        found: torch.dtype = getattr(torch, self.dtype)
        return found

    def require(self) -> None:
        """Raise `EnvironmentLacks` when torch has no such device."""
        import torch

        if self.device == "cuda" and not torch.cuda.is_available():
            built = torch.version.cuda or "no CUDA"
            raise EnvironmentLacks(
                f"--device cuda: torch {torch.__version__} is built for {built} and sees no GPU; it "
                "needs an NVIDIA driver (`nvidia-smi`) and a CUDA wheel of torch (pytorch.org)"
            )

    def put(self, value: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """`value` on the device; floats in the type (or in `dtype`), all else as it is."""
        kind = (dtype or self.torch_dtype) if value.is_floating_point() else value.dtype
        return value.to(device=self.device, dtype=kind)

    def settle(self, model: Any) -> Any:
        """Move `model` and let what enters it and its parts, two levels down, be `put` in the type of
        the part's weights: transformers keeps some parts, such as a Q-Former, in float32.

        The weights must already have their types: casting a whole model would round the frequencies
        of rotary positions too.
        """
        model.to(self.device)
        for name, module in model.named_modules():
            if name.count(".") < 2:
                floats = (p.dtype for p in module.parameters() if p.is_floating_point())
                hook = partial(self._enter, dtype=next(floats, None))
                module.register_forward_pre_hook(hook, with_kwargs=True)
        return model

    def wait(self) -> None:
        """Wait until the device is done, so that a clock read afterwards is right."""
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()

    def _enter(
        self,
        _module: Any,
        given: tuple[Any, ...],
        named: Mapping[str, Any],
        dtype: torch.dtype | None,
    ) -> Any:
        values = tuple(self._moved(v, dtype) for v in given)
        return values, {k: self._moved(v, dtype) for k, v in named.items()}

    def _moved(self, value: Any, dtype: torch.dtype | None) -> Any:
        import torch

        return self.put(value, dtype) if isinstance(value, torch.Tensor) else value


CPU_FLOAT32 = Place()
