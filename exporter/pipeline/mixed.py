"""The scheme `mixed`: measure what each unit costs, choose bits to a budget, quantize, measure again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

from exporter.calibrate.draw import draw_cases
from exporter.calibrate.evaluate import CaptionModel
from exporter.calibrate.prompts import EmbeddedPrompt, embed_prompts
from exporter.calibrate.walk import walk_decoder
from exporter.compare.tradeoff import TRADEOFF
from exporter.core.activations import BlockVisitor
from exporter.core.cases import Case
from exporter.core.digest import canonical_json, sha256_json
from exporter.core.errors import InputRefused
from exporter.core.modelfiles import read_config, read_json
from exporter.core.progress import Progress, silent
from exporter.core.tensors import Checkpoint
from exporter.families.specs.llama import require_llama
from exporter.families.table import family_of
from exporter.pipeline.budget import Budget
from exporter.pipeline.calibrated import CALIBRATION, Calibration, calibration_record
from exporter.pipeline.tradeoff import Choice, Chooser, record
from exporter.pipeline.vision import VisionVariants
from exporter.quantizers.plan import LayerPlan
from exporter.quantizers.run import REPORT
from exporter.quantizers.schemes import Scheme
from exporter.quantizers.sensitivity import (
    Bits,
    Journal,
    OnFloatInputs,
    measure_units,
    open_blocks,
    planned_weights,
)
from exporter.quantizers.sequential import BlockQuantizer, BlockStore, assemble
from exporter.quantizers.units import FLOAT16, UnitPlans, plan_units

SENSITIVITY_SAMPLES, HELD_OUT_SAMPLES = 16, 32


@dataclass(frozen=True)
class MixedJob:
    """What is quantized, from what, and where: folders as in `quantize_calibrated`."""

    merged: Path
    exported: Path
    out: Path
    scheme: Scheme
    calibration: Calibration
    budget: Budget
    scratch: Path
    threads: int
    progress: Progress = silent


@dataclass(frozen=True)
class Drawn:
    """The cases of one job: GPTQ's, those of them that sensitivities are measured on, and others
    that nothing was fitted to.
    """

    calibration: Calibration
    sensitivity: tuple[Case, ...]
    held_out: tuple[Case, ...]


def draw(calibration: Calibration) -> Drawn:
    """Held-out cases are of the calibration set and, where it has enough, not among its cases.

    Otherwise a quarter of the cases is set aside. Raises `InputRefused` with fewer than two.
    """
    used = {case.id for case in calibration.cases}
    others = [case for case in calibration.images.cases() if case.id not in used]
    cases = calibration.cases
    if len(others) < max(1, min(HELD_OUT_SAMPLES, len(cases) // 4)):
        if len(cases) < 2:
            raise InputRefused(
                f"{len(cases)} calibration images; a mixed scheme needs at least two, one of them "
                "to measure the result on"
            )
        count = max(1, min(HELD_OUT_SAMPLES, len(cases) // 4))
        others = list(draw_cases(cases, count, seed=calibration.seed + 1))
        kept = {case.id for case in others}
        cases = tuple(case for case in cases if case.id not in kept)
    return Drawn(
        replace(calibration, cases=cases),
        draw_cases(cases, SENSITIVITY_SAMPLES, seed=calibration.seed),
        draw_cases(others, HELD_OUT_SAMPLES, seed=calibration.seed),
    )


def quantize_mixed(job: MixedJob) -> str:
    """Quantize `job.merged` into the empty folder `job.out`, each unit in the bits that pay most.

    Two runs on the same inputs leave the same bytes; one that was killed goes on from `job.scratch`.
    Returns one line on what was chosen. Raises `InputRefused` for a budget that cannot be met: by
    sizes alone before anything is computed, by KL once it is measured.
    """
    model = _Model(job)
    drawn = draw(job.calibration)
    key = sha256_json({"scheme": repr(job.scheme), "calibration": drawn.calibration.options()})
    chooser = Chooser(model.plans, job.budget)
    prompts = model.embed(drawn.calibration.cases)
    probe = BlockStore(job.scratch / "probe", key)
    visitor = OnFloatInputs(BlockQuantizer(probe, model.decoder, model.fewest_bits))
    model.fill(probe, prompts, visitor)
    numbers = {case.id: i for i, case in enumerate(drawn.calibration.cases)}
    some = [prompts[numbers[case.id]] for case in drawn.sensitivity]
    with Meter(model, drawn.sensitivity, some, probe, "sensitivity", key) as meter:
        units = measure_units(model.plans, meter.kl, job.progress)
    others = model.embed(drawn.held_out)
    with Meter(model, drawn.held_out, others, probe, "held-out", key) as meter:
        chooser.measure(units, meter.kl, job.progress)
        choice = chooser.choose(lambda bits: model.quantize(bits, prompts, meter, key))
        document = record(chooser, choice, units)
    samples = {
        "seed": job.calibration.seed,
        "sensitivity": [case.id for case in drawn.sensitivity],
        "held_out": [case.id for case in drawn.held_out],
    }
    model.finish(choice, key, document["allocation"] | {"samples": samples})
    (job.out / TRADEOFF).write_bytes(canonical_json(document["tradeoff"]))
    done = calibration_record(drawn.calibration, prompts)
    (job.out / CALIBRATION).write_bytes(canonical_json(done))
    return f"{choice.bytes / 1e6:.2f} MB, KL {choice.final_kl:.2e} nats on held-out prompts"


class _Model:
    """The checkpoint of a job with the plans of its units."""

    def __init__(self, job: MixedJob) -> None:
        self.job = job
        config = read_config(job.merged / "config.json")
        family = family_of(config)
        self.decoder = require_llama(family.decoder_spec(config), f"scheme {job.scheme.name}")
        tower = family.tower_spec(config)
        self.vision = {tensor.name for tensor in tower.tensors()}
        self.checkpoint = Checkpoint.open(job.merged)
        self.plans: UnitPlans = plan_units(self.checkpoint, self.decoder, tower, job.scheme)

    @property
    def fewest_bits(self) -> tuple[LayerPlan, ...]:
        return self.plans.by_bits[self.plans.choices[0]]

    def embed(self, cases: Sequence[Case]) -> list[EmbeddedPrompt]:
        job = self.job
        return embed_prompts(
            job.merged,
            job.exported / "model",
            cases,
            job.calibration.prompt,
            threads=job.threads,
        )

    def fill(
        self, store: BlockStore, prompts: Sequence[EmbeddedPrompt], visitor: BlockVisitor
    ) -> None:
        """Let `visitor` put every block into `store`, unless they are all there."""
        job = self.job
        if len(open_blocks(store, self.decoder)) == self.decoder.layers:
            return
        walk_decoder(
            self.checkpoint,
            self.decoder,
            prompts,
            visitor,
            keep=job.scratch / f"{store.folder.name}-states",
            balance=job.calibration.balance,
            threads=job.threads,
            progress=job.progress,
        )

    def store(self, bits: Bits, key: str) -> BlockStore:
        """Where the blocks of this choice are, made one after the other on their real inputs."""
        name = sha256_json(dict(bits))[:16]
        return BlockStore(self.job.scratch / f"blocks-{name}", key)

    def quantize(
        self, bits: Bits, prompts: Sequence[EmbeddedPrompt], meter: Meter, key: str
    ) -> float:
        """Quantize the decoder as `bits` says and give back the KL of the whole."""
        plan, store = self.plans.chosen(bits), self.store(bits, key)
        self.fill(store, prompts, BlockQuantizer(store, self.decoder, plan))
        return meter.kl_of(plan, store)

    def finish(self, choice: Choice, key: str, allocation: Mapping[str, object]) -> None:
        """Write the quantized folder and add the allocation to quantization.json."""
        job, plan = self.job, self.plans.chosen(choice.bits)
        store = self.store(choice.bits, key)
        assemble(
            job.merged,
            job.out,
            job.scheme,
            self.decoder,
            store,
            plan=plan,
            threads=job.threads,
            progress=job.progress,
        )
        document = read_json(job.out / REPORT)
        (job.out / REPORT).write_bytes(canonical_json(document | {"allocation": allocation}))


class Meter:
    """Measures the KL of choices of bits on some prompts; decoder matrices below 8 bits come from
    `probe`, where each block was quantized on the float model's inputs.
    """

    def __init__(
        self,
        model: _Model,
        cases: Sequence[Case],
        prompts: Sequence[EmbeddedPrompt],
        probe: BlockStore,
        name: str,
        key: str,
    ) -> None:
        job = model.job
        self._model, self._stack = model, ExitStack()
        self._blocks = open_blocks(probe, model.decoder)
        ids = [case.id for case in cases]
        self._journal = Journal(job.scratch / f"{name}.json", sha256_json([key, ids]))
        self._vision = VisionVariants(
            job.merged,
            job.exported / "model",
            cases,
            job.calibration.prompt,
            job.scratch / "vision",
            job.threads,
        )
        self._captions = CaptionModel(
            model.checkpoint,
            model.decoder,
            prompts,
            spill=job.scratch / f"{name}-states",
            threads=job.threads,
            progress=job.progress,
        )

    def __enter__(self) -> Meter:
        self._stack.enter_context(self._captions)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def kl(self, bits: Bits) -> float:
        """KL in nats per token; units left out are float16."""
        plans = self._model.plans
        whole = {unit.name: bits.get(unit.name, FLOAT16) for unit in plans.units}
        return self._journal.kl(bits, lambda _: self._measured(plans.chosen(whole), self._blocks))

    def kl_of(self, plan: Sequence[LayerPlan], store: BlockStore) -> float:
        """KL of the blocks in `store` with everything else as `plan` says."""
        return self._measured(plan, open_blocks(store, self._model.decoder))

    def _measured(self, plan: Sequence[LayerPlan], blocks: Sequence[Checkpoint]) -> float:
        vision = [p for p in plan if p.name in self._model.vision]
        decoder = [p for p in plan if p.name not in self._model.vision]
        features = self._vision.features(vision) if any(p.format for p in vision) else None
        weights = planned_weights(self._model.checkpoint, decoder, blocks)
        return self._captions.kl(weights, features)
