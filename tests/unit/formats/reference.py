"""GPTQ and AWQ packing as their tools define it, written separately in plain torch loops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack_rows(values: torch.Tensor, bits: int) -> torch.Tensor:
    """int ``[K, N]`` to int32 ``[K * bits / 32, N]``: value i of a word at bit ``i * bits``."""
    per = 32 // bits
    out = torch.zeros(values.shape[0] // per, values.shape[1], dtype=torch.int64)
    for i in range(per):
        out |= values[i::per].to(torch.int64) << (bits * i)
    return signed(out)


def unpack_rows(words: torch.Tensor, bits: int) -> torch.Tensor:
    per = 32 // bits
    parts = [(words.to(torch.int64) >> (bits * i)) & ((1 << bits) - 1) for i in range(per)]
    return torch.stack(parts, dim=1).reshape(-1, words.shape[1])


def signed(words: torch.Tensor) -> torch.Tensor:
    wrapped = words & 0xFFFFFFFF
    return torch.where(wrapped >= 1 << 31, wrapped - (1 << 32), wrapped).to(torch.int32)


def gptq_pack(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    g_idx: torch.Tensor,
    bits: int,
    version: int,
) -> dict[str, torch.Tensor]:
    """codes ``[N, K]``, scales and zeros ``[N, G]``; zeros are stored less one in version 1."""
    stored = zeros.T.to(torch.int64) - (1 if version == 1 else 0)
    if (stored < 0).any():
        raise ValueError("version 1 has no zero point 0")
    return {
        "qweight": pack_rows(codes.T, bits).contiguous(),
        "qzeros": pack_rows(stored.T, bits).T.contiguous(),
        "scales": scales.T.to(torch.float16).contiguous(),
        "g_idx": g_idx.to(torch.int32).contiguous(),
    }


def gptq_weights(part: dict[str, torch.Tensor], bits: int, version: int) -> torch.Tensor:
    """Float32 ``[N, K]``, by the formula of the kernels: ``scale[g] * (code - zero[g])``."""
    codes = unpack_rows(part["qweight"], bits)
    zeros = unpack_rows(part["qzeros"].T, bits).T + (1 if version == 1 else 0)
    g = part["g_idx"].long()
    return ((codes - zeros[g]).float() * part["scales"].float()[g]).T


def awq_pack(codes: torch.Tensor) -> torch.Tensor:
    """int ``[R, N]`` to int32 ``[R, N / 8]`` in AutoAWQ's gemm order."""
    out = torch.zeros(codes.shape[0], codes.shape[1] // 8, dtype=torch.int64)
    for word in range(out.shape[1]):
        for field, column in enumerate(AWQ_ORDER):
            out[:, word] |= codes[:, 8 * word + column].to(torch.int64) << (4 * field)
    return signed(out)


def quantize(
    weight: torch.Tensor, bits: int, g_idx: torch.Tensor, *, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round ``[N, K]`` to nearest by groups: codes ``[N, K]``, scales and zeros ``[N, G]``."""
    groups, top = int(g_idx.max()) + 1, (1 << bits) - 1
    codes = torch.zeros_like(weight, dtype=torch.int64)
    scales = torch.zeros(len(weight), groups)
    zeros = torch.zeros(len(weight), groups, dtype=torch.int64)
    for g in range(groups):
        part = weight[:, g_idx == g]
        if symmetric:
            scale = 2 * part.abs().amax(1) / top
            zero = torch.full((len(weight),), (top + 1) // 2, dtype=torch.int64)
        else:
            low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
            scale = (high - low) / top
            zero = torch.round(-low / scale).long().clamp(1, top)
        scale = scale.to(torch.float16).float()
        codes[:, g_idx == g] = (torch.round(part / scale[:, None]).long() + zero[:, None]).clamp(
            0, top
        )
        scales[:, g], zeros[:, g] = scale, zero
    return codes, scales, zeros


def linears(model: Path) -> list[str]:
    """Names of the decoder's linear weights in a tiny model folder."""
    from safetensors import safe_open

    with safe_open(model / "model.safetensors", "pt") as file:
        return [n for n in file.keys() if "_proj.weight" in n and ".text_model." in n]  # noqa: SIM118 (no mapping)


def write_gptq_checkpoint(
    model: Path,
    out: Path,
    *,
    bits: int = 4,
    group: int = 32,
    version: int = 2,
    label: str | None = "gptq_v2",
    symmetric: bool = False,
    order: bool = False,
    seed: int = 0,
    settings: dict[str, Any] | None = None,
) -> dict[str, torch.Tensor]:
    """A GPTQ checkpoint of a tiny model, written by the reference; returns the weights it means.

    `version` is what is stored, `label` what is said; `order`: groups of inputs drawn at random.
    """
    from safetensors.torch import load_file

    tensors = load_file(model / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    meant = {}
    for name in linears(model):
        weight = tensors.pop(name).float()
        columns = weight.shape[1]
        length = columns if group == -1 else group
        g_idx = torch.arange(columns) // length
        if order:
            g_idx = g_idx[torch.randperm(columns, generator=generator)]
        codes, scales, zeros = quantize(weight, bits, g_idx, symmetric=symmetric)
        part = gptq_pack(codes, scales, zeros, g_idx, bits, version)
        meant[name] = gptq_weights(part, bits, version)
        module = name.removesuffix(".weight")
        tensors |= {f"{module}.{k}": v for k, v in part.items()}
    values: dict[str, Any] = {
        "bits": bits,
        "group_size": group,
        "desc_act": order,
        "sym": symmetric,
        "quant_method": "gptq",
        **({"checkpoint_format": label} if label else {}),
        **(settings or {}),
    }
    _write(model, out, tensors, values)
    return meant


def write_awq_checkpoint(
    model: Path, out: Path, *, group: int = 32, **settings: Any
) -> dict[str, torch.Tensor]:
    """An AWQ checkpoint (gemm) of a tiny model; returns the weights it means."""
    from safetensors.torch import load_file

    tensors = load_file(model / "model.safetensors")
    meant = {}
    for name in linears(model):
        weight = tensors.pop(name).float()
        g_idx = torch.arange(weight.shape[1]) // group
        codes, scales, zeros = quantize(weight, 4, g_idx, symmetric=False)
        meant[name] = (codes - zeros[:, g_idx]).float() * scales[:, g_idx]
        module = name.removesuffix(".weight")
        tensors[f"{module}.qweight"] = awq_pack(codes.T)
        tensors[f"{module}.qzeros"] = awq_pack(zeros.T)
        tensors[f"{module}.scales"] = scales.T.to(torch.float16).contiguous()
    values = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group,
        "zero_point": True,
        "version": "gemm",
        **settings,
    }
    _write(model, out, tensors, values)
    return meant


def _write(
    model: Path, out: Path, tensors: dict[str, torch.Tensor], values: dict[str, Any]
) -> None:
    out.mkdir(parents=True)
    for file in model.iterdir():
        if file.suffix != ".safetensors":
            (out / file.name).write_bytes(file.read_bytes())
    config = json.loads((model / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "quantization_config": values}))
    (out / "quantize_config.json").write_text(json.dumps(values))
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
