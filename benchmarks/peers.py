"""4-bit weight quantization by other projects, on the same matrices and calibration prompts.

Each gives back what its stored form stands for, as float32. They are imported when they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from methods import onnxruntime_matrix
from numpy.typing import NDArray

from exporter.calibrate.prompts import EmbeddedPrompt
from exporter.calibrate.walk import walk_decoder
from exporter.core.activations import InputStatistics
from exporter.core.blocks import BlockFormat
from exporter.core.tensors import Checkpoint
from exporter.families.base import DecoderSpec

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Task:
    """What a method gets: the model, its decoder, the format and the calibration prompts."""

    model: Path
    checkpoint: Checkpoint
    spec: DecoderSpec
    fmt: BlockFormat
    prompts: Sequence[EmbeddedPrompt]
    threads: int

    def matrices(self) -> Iterator[str]:
        """Names of the decoder's linear layers."""
        return (t.name for t in self.spec.tensors() if t.role == "decoder")


@dataclass
class Found:
    """Changed tensors by name, as float32, and the bytes that the method stores for the matrices."""

    values: dict[str, Array] = field(default_factory=dict)
    nbytes: int = 0


def _each(function: Callable[[Array, BlockFormat], tuple[Array, int]]) -> Callable[[Task], Found]:
    """A method that takes matrices one by one, without calibration."""

    def run(task: Task) -> Found:
        found = Found()
        for name in task.matrices():
            found.values[name], size = function(task.checkpoint.float32(name), task.fmt)
            found.nbytes += size
        return found

    return run


def onnxruntime_own(kind: str) -> Callable[[Task], Found]:
    """Of onnxruntime: MatMulNBitsQuantizer: Default (round to nearest), HQQ or k_quant."""

    def one(weight: Array, fmt: BlockFormat) -> tuple[Array, int]:
        result = onnxruntime_matrix(kind, weight, fmt)
        return result.values, result.nbytes

    return _each(one)


def bitsandbytes_nf4(weight: Array, fmt: BlockFormat) -> tuple[Array, int]:
    """nf4 as bitsandbytes stores it: a float32 maximum per block, no second quantization."""
    import torch
    from bitsandbytes import functional

    tensor = torch.from_numpy(weight)
    data, state = functional.quantize_4bit(tensor, blocksize=fmt.block, quant_type="nf4")
    back = functional.dequantize_4bit(data, state, blocksize=fmt.block, quant_type="nf4")
    return back.float().numpy(), data.numel() + 4 * state.absmax.numel()


def gptqmodel_gptq(task: Task) -> Found:
    """GPTQModel's own GPTQ with its defaults, in our walk: same inputs, same order of blocks.

    It gets inputs with exactly the second moment that ours gets; GPTQ sees nothing else of them.
    """
    import torch
    from gptqmodel.quantization.config import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    found = Found(nbytes=asymmetric_bytes(task))

    def one(weight: Array, stats: InputStatistics) -> Array:
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data = torch.from_numpy(weight.copy())
        settings = QuantizeConfig(bits=4, group_size=task.fmt.block, sym=task.fmt.symmetric)
        worker = GPTQ(linear, settings)
        worker.quantizer.configure(perchannel=True)
        moment = stats.second_moment.astype(np.float64)
        moment.flat[:: len(moment) + 1] += 1e-9 * moment.diagonal().mean()
        rows = torch.from_numpy(np.linalg.cholesky(moment).T.astype(np.float32))
        worker.add_batch(rows[None], linear(rows)[None])
        values = worker.quantize()[0].float().numpy()
        return np.ascontiguousarray(values, np.float32)

    def visit(
        layer: int,  # noqa: ARG001 (part of the protocol)
        weights: Mapping[str, Array],
        inputs: Mapping[str, InputStatistics],
    ) -> Mapping[str, Array]:
        names = [n for n in weights if n in inputs]
        changed = {n: one(weights[n], inputs[n]) for n in names}
        found.values.update(changed)
        return changed

    walk_decoder(
        task.checkpoint, task.spec, task.prompts, visit, balance=False, threads=task.threads
    )
    return found


def asymmetric_bytes(task: Task) -> int:
    """4-bit codes, a float16 scale and a 4-bit zero point for each block of the decoder's matrices."""
    size = 0
    for tensor in task.spec.tensors():
        if tensor.role == "decoder":
            blocks = tensor.shape[0] * -(-tensor.shape[1] // task.fmt.block)
            size += int(np.prod(tensor.shape)) // 2 + blocks * 2 + blocks // 2
    return size


def llmcompressor_awq(task: Task) -> Found:
    """AWQ of llm-compressor (which took over AutoAWQ's), with its own search over the same prompts."""
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from tokenizers import Tokenizer, models
    from torch.utils.data import DataLoader
    from transformers import PreTrainedTokenizerFast

    # Version 0.14 pins memory without asking whether there is a GPU to pin it for.
    torch.Tensor.pin_memory = lambda self, *_, **__: self  # type: ignore[assignment,method-assign]
    torch.set_num_threads(task.threads)
    args = QuantizationArgs(
        num_bits=4, type="int", symmetric=False, strategy="group", group_size=task.fmt.block
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    batches = [{"inputs_embeds": torch.from_numpy(p.embeds)[None]} for p in task.prompts]
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    with TemporaryDirectory() as folder:
        model = _plain_llama(task, Path(folder))
        oneshot(
            model=model,
            dataset=DataLoader(batches, batch_size=None),  # type: ignore[arg-type]
            recipe=[
                AWQModifier(duo_scaling="both"),
                QuantizationModifier(config_groups={"all": scheme}, ignore=["lm_head"]),
            ],
            pipeline="basic",
            num_calibration_samples=len(batches),
            processor=PreTrainedTokenizerFast(tokenizer_object=words),
        )
    found = Found(nbytes=asymmetric_bytes(task))
    with torch.no_grad():
        for name, module in model.model.layers.named_modules():
            if hasattr(module, "weight_scale"):
                weight = fake_quantize(
                    module.weight, module.weight_scale, module.weight_zero_point, args
                )
            elif name.endswith("norm"):
                weight = module.weight
            else:
                continue
            values = np.ascontiguousarray(weight.float().numpy(), np.float32)
            found.values[f"{task.spec.prefix}layers.{name}.weight"] = values
    return found


def _plain_llama(task: Task, folder: Path) -> Any:
    """The decoder as transformers' LlamaForCausalLM, loaded from `folder`, where it is saved first."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    spec, read = task.spec, task.checkpoint.float32
    config = LlamaConfig(
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        vocab_size=spec.vocab_size,
        rms_norm_eps=spec.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": spec.rope_theta},
        max_position_embeddings=spec.max_positions,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    names = {t.name for t in spec.tensors()}
    state = {n.removeprefix(spec.prefix): torch.from_numpy(read(n).copy()) for n in names}
    state = {f"model.{n}" if n != spec.head else "lm_head.weight": v for n, v in state.items()}
    if spec.head not in names:
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    model.load_state_dict(state, strict=True)
    model.save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder).eval()


PEERS: dict[str, Callable[[Task], Found]] = {
    "onnxruntime-rtn": onnxruntime_own("Default"),
    "onnxruntime-hqq": onnxruntime_own("HQQ"),
    "onnxruntime-k-quant": onnxruntime_own("k_quant"),
    "bitsandbytes-nf4": _each(bitsandbytes_nf4),
    "gptqmodel-gptq": gptqmodel_gptq,
    "llmcompressor-awq": llmcompressor_awq,
}
