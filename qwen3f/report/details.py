"""The tables of a stage in collapsed sections: every number, configuration, placements, data, machine, experts."""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from qwen3f.report import names, words
from qwen3f.report.charts import Chart, Line
from qwen3f.report.data import Run
from qwen3f.report.words import duration, figure


@dataclasses.dataclass(frozen=True)
class Table:
    """A table. rows: cells as texts; the first cell of a row is its name. said: a text for each row, shown below its
    name. note: a text below the table."""

    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    said: tuple[str, ...] = ()


def every_number(run: Run) -> Table:
    """All logged numbers, with their meaning if it is known."""
    rows, texts = [], []
    for name, series in run.metrics.series.items():
        meaning = names.find(name, run.kind)
        unit = meaning.unit if meaning else ""
        cells = [figure(x, unit) for x in _ends(series.values)] if series.values else ["no finite number"] * 4
        said = f"{meaning.title}: {meaning.meaning}" if meaning else "not described here"
        rows.append((name, *cells))
        texts.append(said[:1].upper() + said[1:])
    return Table(("name", "first", "last", "lowest", "highest"), tuple(rows), said=tuple(texts))


def _ends(values: Sequence[float]) -> tuple[float, ...]:
    return values[0], values[-1], min(values), max(values)


def groups(run: Run) -> Table | None:
    """Held-out results by kind of question: the first and last value of each "NAME/GROUP"."""
    rows = []
    for name, series in run.metrics.series.items():
        meaning = names.find(name, run.kind)
        if "/" in name and name.startswith(("val_", "bench_")) and meaning and series.values:
            rows.append(
                (meaning.title, figure(series.values[0], meaning.unit), figure(series.values[-1], meaning.unit))
            )
    return Table(("held out", "first", "last"), tuple(rows)) if rows else None


def results(run: Run) -> Table | None:
    """The results of an evaluation."""
    rows = tuple((name, words.interval(one, "share"), f"{one.n:,}") for name, one in run.results)
    return Table(("benchmark, metric", "95% interval", "questions"), rows) if rows else None


def counts(run: Run) -> Table | None:
    """The counts of a rejection sampling: asked, right, wrong, not ended, repeated."""
    rows = tuple((str(name), f"{value:,}") for name, value in run.counts.items() if isinstance(value, int))
    return Table(("what", "number"), rows) if rows else None


def data_lines(run: Run) -> list[str]:
    """The stage's log lines about its data: sources, what was dropped and why."""
    lines = run.record.get("lines")
    return [str(line) for line in lines] if isinstance(lines, list) else []


_LOST = re.compile(r"drop|left out|skip|truncat|cut|too long|too_long")


def lost_lines(run: Run) -> list[str]:
    """Those data lines that say that something was left out."""
    return [line for line in data_lines(run) if _LOST.search(line)]


# -- configuration -----------------------------------------------------------------------------------------------------


def changed_keys(run: Run) -> Table | None:
    """Keys of the configuration that are not the stage's defaults, and the model's sizes."""
    own = dict(_flat(run.config))
    if not own:
        return None
    defaults = _defaults(run.kind)
    rows = [
        (f"config.{key}", _value(value), _value(defaults[key]) if key in defaults else "")
        for key, value in sorted(own.items())
        if not key.startswith("model.") and defaults.get(key, own) != value
    ]
    rows += [(f"config.{key}", _value(own[key]), "") for key in _MODEL if own.get(key) not in (None, 0, False)]
    note = "" if defaults else "The defaults of this stage are not known, so all keys are shown."
    return Table(("key", "value", "by default"), tuple(rows), note)


_MODEL = tuple(
    f"model.{name}"
    for name in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "max_position_embeddings", "rope_theta", "tie_word_embeddings",
        "num_experts", "num_experts_per_tok", "moe_intermediate_size", "vision_enabled", "gradient_checkpointing",
    )
)  # fmt: skip


@functools.lru_cache(maxsize=16)
def _defaults(stage: str) -> dict[str, Any]:
    import json

    from qwen3f.stages import configs

    make = getattr(configs, f"{stage}_config", None)
    if make is None:
        return {}
    return dict(_flat(json.loads(make("nano_vl" if stage == "multimodal" else "nano").to_json_best_effort())))


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    out: list[tuple[str, Any]] = []
    for key, value in tree.items():
        out += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [(f"{prefix}{key}", value)]
    return out


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return '""' if value == "" else str(value)


# -- where and how it ran ----------------------------------------------------------------------------------------------


def machine(run: Run) -> Table | None:
    """The machine, code, versions and time of the run."""
    record = run.record
    if not record:
        return None
    found, versions = (record.get(key) if isinstance(record.get(key), dict) else {} for key in ("machine", "versions"))
    card = found.get("card")
    sizes = {"parameters": record.get("parameters"), "of them used for a token": record.get("active_parameters")}
    if sizes["parameters"] == sizes["of them used for a token"]:
        sizes.pop("of them used for a token")
    peak = record.get("peak_flops")
    facts = {
        "code": record.get("commit") or "not known",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "processor": f"{found.get('processor', '')}, {found.get('threads', '?')} threads",
        "card": f"{card}, {figure(found.get('card_memory', 0) / 2**30)} GiB" if card else "none",
        "arithmetic": f"{record.get('dtype', '')}, compile={record.get('compile', '')}",
        "peak that MFU is against": f"{peak / 1e12:.4g} TFLOP/s ({record.get('peak_source', '')})" if peak else "",
        **{name: f"{value:,}" for name, value in sizes.items() if isinstance(value, int)},
        "sessions": _sessions(record),
        "command": " ".join(map(str, record.get("command", []))),
    }
    return Table(("what", "value"), tuple((name, str(value)) for name, value in facts.items() if value))


def _sessions(record: Mapping[str, Any]) -> str:
    told = record.get("sessions")
    out = []
    for one in told if isinstance(told, list) else ():
        if isinstance(one, dict):
            out.append(f"steps {one.get('start', 0)} to {one.get('step', 0)} in {duration(one.get('seconds', 0))}")
    return "; ".join(out)


def mesh(run: Run) -> str:
    """The mesh in words: the axes larger than 1."""
    axes = run.record.get("mesh")
    sizes = {axis: size for axis, size in axes.items() if size != 1} if isinstance(axes, dict) else {}
    if not sizes:
        return "One device." if axes else ""
    ranks = functools.reduce(lambda a, b: a * b, sizes.values())
    return f"{ranks} ranks: {' · '.join(f'{axis} {size}' for axis, size in sizes.items())}."


def placement(run: Run) -> Table | None:
    """Every parameter, and the part of it that a rank holds."""
    rows = []
    for one in run.record.get("placement") or ():
        if not isinstance(one, dict):
            continue
        cuts = one.get("cuts") or {}
        where = " ".join(f"{axis}:{dim}" for axis, dim in cuts.items()) or "whole"
        fsdp = f" (fsdp over {' '.join(one['fsdp'])})" if one.get("fsdp") and cuts else ""
        rows.append((str(one.get("path")), _shape(one.get("shape")), where + fsdp, _shape(one.get("local"))))
    return Table(("parameter", "shape", "axis:dimension", "a rank's shape"), tuple(rows)) if rows else None


def _shape(sizes: object) -> str:
    return " × ".join(map(str, sizes)) if isinstance(sizes, list) else ""


# -- experts -----------------------------------------------------------------------------------------------------------


def experts(run: Run) -> list[Chart]:
    """A chart of the load of each layer's experts, relative to an even share: fullest, middle, emptiest. [] if no load
    was recorded."""
    told = run.record.get("expert_load")
    shares = told.get("shares") if isinstance(told, dict) else None
    if not (isinstance(shares, list) and shares and all(isinstance(layer, list) and layer for layer in shares)):
        return []
    if not all(0 <= share <= 1 for layer in shares for share in layer):
        raise ValueError("an expert's share of the tokens is not from 0 to 1")
    loads = [[share * len(layer) for share in layer] for layer in shares]
    busiest = max(range(len(loads)), key=lambda i: max(loads[i]))
    place = loads[busiest].index(max(loads[busiest]))
    idle = sum(load < 0.1 for layer in loads for load in layer)
    count = sum(map(len, loads))
    caption = (
        f"At step {told.get('step', 0):,} the busiest expert, number {place} of sparse layer {busiest}, gets "
        f"{max(loads[busiest]):.2f} times an even share; {idle:,} of {count:,} experts get less than a tenth of one. "
        "Curves are, layer by layer, the fullest, the middle and the emptiest expert's load; 1 is even."
    )
    layers = tuple(float(i) for i in range(len(loads)))
    ranked = [sorted(layer, reverse=True) for layer in loads]
    lines = (
        Line("fullest", layers, tuple(layer[0] for layer in ranked), dots=True),
        Line("middle", layers, tuple(layer[len(layer) // 2] for layer in ranked), dots=True),
        Line("emptiest", layers, tuple(layer[-1] for layer in ranked), dots=True),
    )
    return [Chart("Experts: load by layer", caption, lines, axis="layer")]
