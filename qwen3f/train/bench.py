"""The training step's speed and memory on GPUs: python -m qwen3f.train.bench "preset=qwen3-1.7b rows=4" "mesh=dp2" …

Each argument is a case: words `key=value` (the fields of Case). Cases run one after another, on as many GPUs of this
host as the largest mesh has. The step is that of `launch.py`: float32 master weights, bfloat16 forward and backward
pass, donated fused update; tokens are random. Each case prints a line: milliseconds per step, tokens/s and MFU per GPU
(defined in README.md), peak memory, milliseconds per step of computation, of collectives, of collectives that no
computation hides, and of idleness, and the plan's prediction. If a case has no mesh while others have one, all GPUs run
it at the same time, each by itself.
"""

import dataclasses
import gc
import os
import sys
import time
from collections.abc import Iterable

import torch

from qwen3f import model, presets
from qwen3f.config import ModelConfig
from qwen3f.errors import UserError
from qwen3f.plan.case import Case as PlanCase
from qwen3f.plan.hardware import TABLE
from qwen3f.plan.make import MeshPlan, make
from qwen3f.processes import ranks
from qwen3f.processes.world import ALONE, World
from qwen3f.train.choices import find_compile_mode
from qwen3f.train.guards.gc import short_pauses
from qwen3f.train.metrics import flops_per_token, peak_flops
from qwen3f.train.objective import NEXT_TOKEN, Batch
from qwen3f.train.optimizer import AdamW
from qwen3f.train.schedule import Schedule
from qwen3f.train.state import init_state
from qwen3f.train.step import StepOptions, make_train_step
from sharding.axes import ONE, axes_of, make_mesh
from sharding.layout import Layout, find_gather_dtype
from sharding.mesh import MeshShape, parse_mesh
from sharding.pipeline.cut import Pipeline

COMPUTE = torch.bfloat16
_PARTS = {"computing": "computing", "collectives": "communicating", "not hidden": "exposed", "idle": "idle"}


@dataclasses.dataclass(frozen=True)
class Case:
    """One case of the benchmark.

    Attributes:
      mesh: as config.mesh; empty: one GPU. preset: from qwen3f/presets.py. layers: number of layers to keep; 0: all.
      rows: rows of the batch per rank of dr, dp and ep; ranks of tp, cp and pp share them. tokens: tokens per row.
        documents: mean length of the documents packed into a row; 0: one document per row. microbatches: parts that the
        batch is cut into.
      remat: recomputation: none, selective or full. pure: bfloat16 weights and moments.
      compile: as config.compile. reduce: as config.fsdp.reduce. schedule, stages, stage_layers: as schedule, stages and
        layers of config.pipeline. steps: number of timed steps.
    """

    mesh: str = ""
    preset: str = "qwen3-1.7b"
    layers: int = 0
    rows: int = 4
    tokens: int = 4096
    documents: int = 0
    microbatches: int = 1
    remat: str = "none"
    pure: bool = False
    compile: str = "auto"
    reduce: str = "compute"
    schedule: str = "1f1b"
    stages: int = 1
    stage_layers: int = 0
    steps: int = 10

    @property
    def shape(self) -> MeshShape:
        return parse_mesh(self.mesh)

    @property
    def model(self) -> ModelConfig:
        cfg = presets.get(self.preset).replace(gradient_checkpointing=self.remat)
        return cfg.replace(num_hidden_layers=self.layers) if self.layers else cfg

    @property
    def pipeline(self) -> Pipeline:
        return Pipeline(self.schedule, self.stages, self.stage_layers)

    @property
    def batch_size(self) -> int:
        return self.rows * self.shape.dr * self.shape.dp * self.shape.ep


@dataclasses.dataclass(frozen=True)
class Measured:
    """One rank's results. peak: the largest allocated memory in bytes. Seconds per step: in total; with computation;
    with collectives; exposed: with collectives, but no computation; idle: with neither."""

    seconds: float
    peak: int
    computing: float
    communicating: float
    exposed: float
    idle: float


def parse_case(text: str) -> Case:
    """A case from text, words `key=value`. UserError for a word that is not a key and value of Case."""
    kinds = {field.name: field.type for field in dataclasses.fields(Case)}
    values: dict[str, object] = {}
    for word in text.split():
        key, equals, value = word.partition("=")
        if key not in kinds or not equals:
            raise UserError(f"'{word}' is not part of a case; write key=value, with one of the keys {', '.join(kinds)}")
        if kinds[key] is bool:
            if value.lower() not in ("true", "false"):
                raise UserError(f"'{word}': write {key}=True or {key}=False")
            values[key] = value.lower() == "true"
            continue
        try:
            values[key] = kinds[key](value)
        except ValueError as error:
            raise UserError(f"'{word}': {value!r} is not of type {kinds[key].__name__}") from error
    return Case(**values)


def random_batch(rows: int, length: int, vocabulary: int, mean: int, seed: int = 0) -> Batch:
    """A batch on the GPU with uniformly random tokens. mean: mean length of the documents, which are of exponential
    length; 0: one document per row."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocabulary, (rows, length + 1), generator=g)
    starts = torch.rand(rows, length, generator=g) < 1 / mean if mean else torch.zeros(rows, length, dtype=torch.bool)
    segments = 1 + starts.cumsum(1, dtype=torch.int32)
    place = torch.arange(length)
    positions = place - torch.where(starts, place, 0).cummax(1).values
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_weights": torch.ones(rows, length),
        "segments": segments,
        "positions": positions,
    }
    return {key: value.cuda() for key, value in batch.items()}


def measure(case: Case, world: World) -> Measured:
    """Measure the case on this rank; all ranks of the world call it together."""
    cfg, shape, hyper = case.model, case.shape, AdamW()
    mesh = make_mesh(shape, "cuda") if shape.size > 1 else None
    gather_dtype = find_gather_dtype(case.reduce, COMPUTE)
    layout = Layout(axes_of(mesh) if mesh else ONE, pipeline=case.pipeline, gather_dtype=gather_dtype)
    device, dtype = torch.device("cuda"), COMPUTE if case.pure else torch.float32
    state = init_state(cfg, 0, hyper, device=device, dtype=dtype, layout=layout, mesh=mesh)
    batch = random_batch(case.rows, case.tokens, cfg.vocab_size, case.documents, seed=layout.axes.rows[0])
    options = StepOptions(
        hyper,
        Schedule("constant", 3e-4, 100),
        microbatches=case.microbatches,
        compute_dtype=COMPUTE,
        execution=model.Execution(find_compile_mode(case.compile, device)),
        donate=True,
        cross_documents=case.documents == 0,  # plain causal attention
        layout=layout,
    )
    step = make_train_step(cfg, NEXT_TOKEN, options)

    def run(times: int) -> float:
        """Seconds per step by the host's clock, from the common start of all ranks to this rank's end."""
        nonlocal state
        torch.cuda.synchronize()
        world.highest(0)
        begin = time.perf_counter()
        for _ in range(times):
            state, _ = step(state, batch)
        torch.cuda.synchronize()
        return (time.perf_counter() - begin) / times

    torch.cuda.reset_peak_memory_stats()
    run(3)
    with short_pauses() as settle:  # as in training
        settle()
        seconds = run(case.steps)
    peak = torch.cuda.max_memory_allocated()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run(3)
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    spans = [(event.name.startswith("nccl"), event.time_range.start, event.time_range.end) for event in events]
    every, sent, computed = (
        _covered((start, end) for collective, start, end in spans if collective in kinds) * 1e-6 / 3
        for kinds in ({True, False}, {True}, {False})
    )
    return Measured(seconds, peak, computed, sent, every - computed, max(0.0, seconds - every))


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of the spans' union."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def plan(case: Case) -> MeshPlan:
    """The plan of the case, on H100s."""
    execution = model.Execution(find_compile_mode(case.compile, torch.device("cuda")))
    options = {"reduce": case.reduce, "pipeline": case.pipeline, "execution": execution, "compute": COMPUTE}
    sizes = case.batch_size, case.tokens
    return make(PlanCase(case.model, case.shape, *sizes, TABLE["h100"], microbatches=case.microbatches, **options))


def report(case: Case, text: str, by_rank: list[Measured]) -> str:
    """The line of a case: time of the slowest rank; other values as the range over ranks, if they differ."""
    seconds, devices = max(m.seconds for m in by_rank), case.shape.size
    speed = case.batch_size * case.tokens / seconds / devices
    mfu = speed * flops_per_token(case.model, case.tokens) / peak_flops(torch.device("cuda"))
    ending = ""
    if not case.pure and not case.documents:  # plans know neither pure bfloat16 nor packed documents
        planned = plan(case)
        room = max(memory.peak for memory in planned.memory)
        ending = f"; planned {planned.time.step * 1e3:.1f} ms, {room / 2**30:.1f} GiB"
    between = ", ".join(
        f"{what} {_range([getattr(m, name) * 1e3 for m in by_rank])} ms" for what, name in _PARTS.items()
    )
    return (
        f"{text or 'one GPU'}: {seconds * 1e3:.1f} ms, {speed:,.0f} tokens/s a GPU, MFU {mfu:.1%}, "
        f"peak {_range([m.peak / 2**30 for m in by_rank])} GiB, {between}{ending}"
    )


def _range(values: list[float]) -> str:
    low, high = f"{min(values):.1f}", f"{max(values):.1f}"
    return low if low == high else f"{low}–{high}"


def run_cases(texts: list[str], world: World) -> None:
    print(f"{torch.cuda.get_device_name()}, {world.size} at work, torch {torch.__version__}", flush=True)
    for text in texts:
        case = parse_case(text)
        by_rank = [Measured(*values) for values in world.gather(dataclasses.astuple(measure(case, world)))]
        print(report(case, text, by_rank), flush=True)
        gc.collect()
        torch.cuda.empty_cache()


def main(texts: list[str]) -> int:
    if not torch.cuda.is_available():
        raise UserError("this benchmark needs a CUDA device")
    texts = texts or [""]
    sizes = {parse_case(text).shape.size for text in texts}
    largest = max(sizes)
    if sizes - {1, largest}:
        raise UserError(
            f"the cases have meshes of {sorted(sizes)} GPUs; put only meshes of one size (and cases without a mesh) "
            "into one command"
        )
    shape = next(case.shape for case in map(parse_case, texts) if case.shape.size == largest)
    command = ["-m", "qwen3f.train.bench", *texts]
    decision = ranks.decide(os.environ, largest, ranks.local_devices("cuda"), "cuda", command)
    if decision.mode == "start":
        return ranks.start(decision, command)
    if decision.mode == "single":
        run_cases(texts, ALONE)
    else:
        with ranks.joined(decision, shape, timeout=300) as world:
            run_cases(texts, world)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
