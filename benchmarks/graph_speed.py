"""Speed of the constructed graphs at the SmolVLM-500M shape, with random packed weights.

    python benchmarks/graph_speed.py decoder --out decoder.json
    python benchmarks/graph_speed.py tower --out tower.json

All variants are loaded at once and take turns in each round, so that what else the machine does
meets them alike; the table gives the median and the best round, and the CPU time of all threads,
which a busy machine disturbs least. Weights are random: the time of
these kernels does not depend on the values.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from exporter.core.blocks import QDATA, SCALES, ZEROS, BlockFormat
from exporter.core.tensors import SafetensorsWriter
from exporter.families.base import DecoderSpec, TowerSpec
from exporter.graphs.decoder import DecoderOptions, write_decoder
from exporter.graphs.tower import write_tower
from exporter.graphs.weights import WeightSource

DECODER = DecoderSpec(
    hidden_size=960,
    layers=32,
    heads=15,
    kv_heads=5,
    head_dim=64,
    intermediate_size=2560,
    vocab_size=49280,
    norm_eps=1e-5,
    rope_theta=1e5,
    max_positions=8192,
    prefix="model.text_model.",
    embedding="model.text_model.embed_tokens.weight",
    final_norm="model.text_model.norm.weight",
    head="lm_head.weight",
    tied=False,
)
TOWER = TowerSpec(
    hidden_size=768,
    layers=12,
    heads=12,
    intermediate_size=3072,
    patch_size=16,
    image_size=512,
    norm_eps=1e-6,
    activation="gelu_pytorch_tanh",
    shuffle=4,
    output_size=960,
    prefix="model.vision_model.",
    projection="model.connector.modality_projection.proj.weight",
)
PROMPT, STEPS, BUFFER = 128, 16, 512


@dataclass(frozen=True)
class Row:
    """One variant: seconds by what was timed (median and best of the rounds), and its size."""

    variant: str
    median: dict[str, float]
    best: dict[str, float]
    rounds: int
    megabytes: float
    load_seconds: float


def decoder_tensors(spec: DecoderSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of all decoder tensors but the embedding."""
    width, narrow = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    for layer in range(spec.layers):
        at = f"{spec.prefix}layers.{layer}."
        for part, rows in (("q", width), ("k", narrow), ("v", narrow)):
            yield f"{at}self_attn.{part}_proj.weight", (rows, spec.hidden_size)
        yield f"{at}self_attn.o_proj.weight", (spec.hidden_size, width)
        for part in ("gate", "up"):
            yield f"{at}mlp.{part}_proj.weight", (spec.intermediate_size, spec.hidden_size)
        yield f"{at}mlp.down_proj.weight", (spec.hidden_size, spec.intermediate_size)
        for part in ("input", "post_attention"):
            yield f"{at}{part}_layernorm.weight", (spec.hidden_size,)
    yield spec.final_norm, (spec.hidden_size,)
    yield spec.head, (spec.vocab_size, spec.hidden_size)


def tower_tensors(spec: TowerSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of all tower tensors."""
    size, wide = spec.hidden_size, spec.intermediate_size
    at = f"{spec.prefix}embeddings."
    yield f"{at}patch_embedding.weight", (size, 3, spec.patch_size, spec.patch_size)
    yield f"{at}patch_embedding.bias", (size,)
    yield f"{at}position_embedding.weight", (spec.patches**2, size)
    for layer in range(spec.layers):
        at = f"{spec.prefix}encoder.layers.{layer}."
        linears = {
            f"self_attn.{p}": (size, size) for p in ("q_proj", "k_proj", "v_proj", "out_proj")
        }
        linears |= {"mlp.fc1": (wide, size), "mlp.fc2": (size, wide)}
        for name, shape in linears.items():
            yield f"{at}{name}.weight", shape
            yield f"{at}{name}.bias", shape[:1]
        for norm in ("layer_norm1", "layer_norm2"):
            yield f"{at}{norm}.weight", (size,)
            yield f"{at}{norm}.bias", (size,)
    yield f"{spec.prefix}post_layernorm.weight", (size,)
    yield f"{spec.prefix}post_layernorm.bias", (size,)
    yield spec.projection, (spec.output_size, size * spec.shuffle**2)


def write_random(
    folder: Path,
    tensors: Iterator[tuple[str, tuple[int, ...]]],
    choose: Callable[[str], BlockFormat | None],
) -> Path:
    """A quantized (or float16) folder with random weights."""
    folder.mkdir()
    entries: dict[str, tuple[str, tuple[int, ...]]] = {}
    layers: list[dict[str, Any]] = []
    for name, shape in tensors:
        form = choose(name) if len(shape) == 2 and "position" not in name else None
        if form is None:
            entries[name] = ("F16", shape)
            continue
        rows, columns = shape
        blocks = -(-columns // form.block)
        entries[name + QDATA] = ("U8", (rows, blocks, form.block * form.bits // 8))
        entries[name + SCALES] = ("F16", (rows, blocks))
        if not form.symmetric:
            entries[name + ZEROS] = ("U8", (rows, -(-blocks * form.bits // 8)))
        layers.append({"name": name, "kind": "linear", "columns": columns, **asdict(form)})
    rng = np.random.default_rng(0)
    with SafetensorsWriter(folder / "model.safetensors", entries) as writer:
        for name, (dtype, shape) in entries.items():
            if dtype == "U8":
                writer.write(name, rng.integers(0, 256, shape, np.uint8))
            else:
                spread = 0.002 if name.endswith(SCALES) else 0.02
                values = np.abs(rng.standard_normal(shape, np.float32)) * spread
                writer.write(name, values.astype(np.float16))
    (folder / "quantization.json").write_text(json.dumps({"schema": 1, "layers": layers}))
    return folder


def open_session(path: Path, threads: int) -> tuple[ort.InferenceSession, float]:
    """A session that may use `threads` threads, and the seconds that loading took."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    # Threads that wait by spinning would count as CPU time, and disturb the variant that is next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    start = time.perf_counter()
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session, time.perf_counter() - start


def now() -> tuple[float, float]:
    """Wall-clock seconds, and CPU seconds of all threads of this process."""
    return time.perf_counter(), time.process_time()


class DecoderVariant:
    """A decoder graph with KV buffers shared in place."""

    def __init__(self, session: ort.InferenceSession, spec: DecoderSpec) -> None:
        self.session = session
        self.spec = spec
        self.rng = np.random.default_rng(1)
        shape = (1, spec.kv_heads, BUFFER, spec.head_dim)
        self.buffers = {
            i.name: ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))
            for i in session.get_inputs()
            if i.name.startswith("past_key_values")
        }
        self.binding = session.io_binding()
        for name, buffer in self.buffers.items():
            self.binding.bind_ortvalue_input(name, buffer)
            self.binding.bind_ortvalue_output(name.replace("past_key_values", "present"), buffer)
        self.binding.bind_cpu_input("num_logits_to_keep", np.array(1, np.int64))
        self.binding.bind_output("logits")

    def step(self, length: int, total: int) -> None:
        """Feed `length` positions, so that `total` are in the buffers."""
        embeds = self.rng.standard_normal((1, length, self.spec.hidden_size), np.float32)
        self.binding.bind_cpu_input("inputs_embeds", embeds)
        self.binding.bind_cpu_input("attention_mask", np.ones((1, total), np.int64))
        self.session.run_with_iobinding(self.binding)

    def time(self) -> dict[str, float]:
        """Seconds of one prefill, and of one token after it."""
        start = now()
        self.step(PROMPT, PROMPT)
        prefill = now()
        for at in range(STEPS):
            self.step(1, PROMPT + at + 1)
        end = now()
        return {
            "prefill": prefill[0] - start[0],
            "token": (end[0] - prefill[0]) / STEPS,
            "prefill_cpu": prefill[1] - start[1],
            "token_cpu": (end[1] - prefill[1]) / STEPS,
        }


class TowerVariant:
    """A tower graph on one tile."""

    def __init__(self, session: ort.InferenceSession, spec: TowerSpec) -> None:
        shape = (1, 1, 3, spec.image_size, spec.image_size)
        self.pixels = np.random.default_rng(2).uniform(-1, 1, shape).astype(np.float32)
        self.session = session

    def time(self) -> dict[str, float]:
        """Seconds of one tile."""
        start = now()
        self.session.run(None, {"pixel_values": self.pixels})
        end = now()
        return {"tile": end[0] - start[0], "tile_cpu": end[1] - start[1]}


def decoder_variants(
    work: Path, blocks: list[int], levels: list[int], fused: list[bool]
) -> Iterator[tuple[str, Path]]:
    """Graphs with int4 linears and an int8 head, for each block size, level and fusion."""
    for block in blocks:
        head = BlockFormat(8, block, True)
        form = BlockFormat(4, block, False)
        source = write_random(
            work / f"b{block}",
            decoder_tensors(DECODER),
            lambda name, head=head, form=form: head if name == DECODER.head else form,
        )
        for level in levels:
            for fuse in fused:
                name = f"int4 block {block} level {level} {'fused' if fuse else 'separate'} MLP"
                folder = work / name.replace(" ", "_")
                folder.mkdir()
                options = DecoderOptions(level, fuse)
                weights = WeightSource(source, "float16")
                write_decoder(folder, DECODER, weights, options)
                yield name, folder


def tower_variants(work: Path) -> Iterator[tuple[str, Path]]:
    """Float32 arithmetic, and int8 blocks at both levels."""
    cases: list[tuple[str, BlockFormat | None, int]] = [("float", None, 0)]
    form = BlockFormat(8, 128, True)
    cases += [
        ("int8 block 128 level 0", form, 0),
        ("int8 block 128 level 4", form, 4),
        ("int8 block 32 level 4", BlockFormat(8, 32, True), 4),
    ]
    for name, form, level in cases:
        folder = work / name.replace(" ", "_")
        source = write_random(
            folder.with_suffix(".src"), tower_tensors(TOWER), lambda _, form=form: form
        )
        folder.mkdir()
        write_tower(folder, TOWER, WeightSource(source, "float16"), level)
        yield name, folder


def measure(
    variants: Iterator[tuple[str, Path]],
    open_variant: Callable[[ort.InferenceSession], DecoderVariant | TowerVariant],
    threads: int,
    rounds: int,
) -> list[Row]:
    """Load all variants, run each once to warm up, then `rounds` times in turn."""
    loaded = {}
    for name, folder in variants:
        session, seconds = open_session(next(folder.glob("*.onnx")), threads)
        size = sum(p.stat().st_size for p in folder.iterdir()) / 1e6
        loaded[name] = (open_variant(session), Row(name, {}, {}, rounds, size, seconds))
    times: dict[str, list[dict[str, float]]] = {name: [] for name in loaded}
    for turn in range(rounds + 1):
        # Each round starts with another variant: nobody always follows the same neighbour.
        names = list(loaded)
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            seconds = loaded[name][0].time()
            if turn:
                times[name].append(seconds)
    rows = []
    for name, (_, row) in loaded.items():
        keys = times[name][0]
        median = {k: statistics.median(t[k] for t in times[name]) for k in keys}
        best = {k: min(t[k] for t in times[name]) for k in keys}
        rows.append(replace(row, median=median, best=best))
    return rows


def print_table(rows: list[Row]) -> None:
    """Rates for the decoder, seconds for the tower."""
    for row in rows:
        parts = [f"{row.variant:42s} {row.megabytes:6.0f} MB  load {row.load_seconds:5.2f} s"]
        for label, values in (("median", row.median), ("best", row.best)):
            if "token" in values:
                parts.append(
                    f"{label}: {1 / values['token']:6.1f} tok/s, "
                    f"prefill {PROMPT / values['prefill']:6.0f} tok/s, "
                    f"CPU {1e3 * values['token_cpu']:5.1f} ms/tok {values['prefill_cpu']:5.2f} s"
                )
            else:
                parts.append(
                    f"{label}: {values['tile']:6.3f} s a tile, CPU {values['tile_cpu']:6.3f} s"
                )
        print("  ".join(parts), flush=True)


def main() -> None:
    """Parse the arguments, measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("decoder", "tower"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--blocks", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--levels", type=int, nargs="+", default=[0, 4])
    parser.add_argument(
        "--mlp", nargs="+", choices=("fused", "separate"), default=["fused", "separate"]
    )
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.part == "decoder":
            fused = [m == "fused" for m in arguments.mlp]
            rows = measure(
                decoder_variants(Path(folder), arguments.blocks, arguments.levels, fused),
                lambda session: DecoderVariant(session, DECODER),
                arguments.threads,
                arguments.rounds,
            )
        else:
            rows = measure(
                tower_variants(Path(folder)),
                lambda session: TowerVariant(session, TOWER),
                arguments.threads,
                arguments.rounds,
            )
    print_table(rows)
    if arguments.out:
        record = {
            "machine": platform.processor() or platform.machine(),
            "onnxruntime": ort.__version__,
            "threads": arguments.threads,
            "prompt": PROMPT,
            "steps": STEPS,
            "rows": [asdict(r) for r in rows],
        }
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
