"""A MeshPlan as PNG pictures: the ranks' places on the mesh, and the pipeline's timeline."""

import io
import math

from PIL import Image, ImageDraw, ImageFont

from qwen3f.plan.make import MeshPlan
from qwen3f.plan.schedule import Slot
from sharding.mesh import AXES, DATA

_WIDTH, _MARGIN, _LEFT = 1600, 20, 90
_INK, _PAPER, _GRID = (30, 30, 30), (255, 255, 255), (225, 225, 225)
_KINDS = {
    "F": ("forward", (91, 143, 217)),
    "B": ("backward", (116, 178, 105)),
    "I": ("backward, inputs", (116, 178, 105)),
    "W": ("backward, weights", (235, 171, 92)),
}
# Colours of nodes, in turn. Every second device of a node has a lighter shade.
_NODES = [(91, 143, 217), (235, 171, 92), (116, 178, 105), (203, 110, 110), (148, 120, 190), (120, 180, 190)]
_MOST_DEVICES = 4096


def timeline_png(plan: MeshPlan) -> bytes:
    """One row per rank of pp, one box per action with its micro-batch; stages after a rank's first are darker."""
    row = 46
    ranks = plan.timeline.ranks
    image, draw = _page(_WIDTH, 2 * _MARGIN + 70 + row * len(ranks))
    s, scale = plan.setup, (_WIDTH - _LEFT - _MARGIN) / plan.timeline.seconds
    title = f"{s.pipeline.schedule}: {s.mesh.pp} ranks x {s.cut.per_rank} stages, {s.microbatches} micro-batches; "
    title += f"{plan.timeline.seconds:.3g} s, bubble {plan.timeline.bubble:.1%}"
    draw.text((_MARGIN, _MARGIN), title, _INK, _font(18))
    top = _MARGIN + 34
    for rank, slots in enumerate(ranks):
        y = top + rank * row
        draw.text((_MARGIN, y + 12), f"pp {rank}", _INK, _font(16))
        draw.rectangle((_LEFT, y, _WIDTH - _MARGIN, y + row - 8), _GRID)
        for slot in slots:
            _slot(draw, slot, s.mesh.pp, _LEFT + slot.start * scale, _LEFT + slot.end * scale, y, y + row - 8)
    x, y = _LEFT, top + row * len(ranks) + 6
    kinds = {slot.action.kind for slots in ranks for slot in slots}
    for kind, (name, colour) in _KINDS.items():
        if kind in kinds:
            draw.rectangle((x, y, x + 16, y + 16), colour)
            draw.text((x + 22, y), name, _INK, _font(14))
            x += 200
    return _png(image)


def _slot(draw: ImageDraw.ImageDraw, slot: Slot, ranks: int, x0: float, x1: float, y0: int, y1: int) -> None:
    colour = _shade(_KINDS[slot.action.kind][1], 0.82 ** (slot.action.stage // ranks))
    outline = _PAPER if x1 - x0 > 3 else None
    draw.rectangle((x0, y0, max(x0, x1 - 1), y1), colour, outline)
    label = str(slot.action.microbatch)
    if x1 - x0 > 9 * len(label) + 4:
        draw.text(((x0 + x1) / 2, (y0 + y1) / 2), label, _INK, _font(14), anchor="mm")


def mesh_png(plan: MeshPlan) -> bytes:
    """Every device is a square with its rank. A band is a rank of pp; adjacent squares are the ranks of tp.

    Devices of one node have one colour. Only the first 4,096 devices are drawn.
    """
    s, mesh = plan.setup, plan.setup.mesh
    drawn = min(mesh.size, _MOST_DEVICES)
    groups = math.prod(getattr(mesh, axis) for axis in DATA)  # groups of tp per rank of pp
    cell = max(5, min(44, 20_000 // drawn))
    gap = max(2, cell // 5)
    group = mesh.tp * cell + gap
    a_line = max(1, min(groups, (_WIDTH - _LEFT - _MARGIN) // group))
    nodes = s.hardware.node // math.gcd(s.hardware.node, mesh.tp)  # the fewest groups that fill whole nodes
    a_line -= a_line % nodes if a_line > nodes else 0
    band = math.ceil(groups / a_line) * (cell + gap) + 30
    bands = math.ceil(drawn / (groups * mesh.tp))
    image, draw = _page(_WIDTH, 2 * _MARGIN + 60 + bands * band)
    sizes = " · ".join(f"{axis} {getattr(mesh, axis)}" for axis in AXES if getattr(mesh, axis) > 1) or "one device"
    more = "" if drawn == mesh.size else f"; the first {drawn} of them"
    title = f"{mesh.size} x {s.hardware.name}: {sizes}{more}. One colour: a node of {s.hardware.node}"
    draw.text((_MARGIN, _MARGIN), title, _INK, _font(18))
    for rank in range(drawn):
        stage, rest = divmod(rank, groups * mesh.tp)
        place, tp = divmod(rest, mesh.tp)
        line, column = divmod(place, a_line)
        x = _LEFT + column * group + tp * cell
        y = _MARGIN + 40 + stage * band + 24 + line * (cell + gap)
        if rest == 0:
            draw.text((_MARGIN, y), f"pp {stage}", _INK, _font(16))
            draw.text((_LEFT, y - 20), _stage_text(plan, stage), _INK, _font(13))
        node = rank // s.hardware.node
        colour = _shade(_NODES[node % len(_NODES)], 1.0 if rank % 2 else 1.12)
        draw.rectangle((x, y, x + cell - 2, y + cell - 2), colour)
        if cell >= 9 * len(str(rank)) + 2:
            draw.text((x + cell / 2 - 1, y + cell / 2 - 1), str(rank), _INK, _font(13), anchor="mm")
    return _png(image)


def _stage_text(plan: MeshPlan, rank: int) -> str:
    s = plan.setup
    runs = (s.cut.layers_of(stage) for stage in s.cut.slices_of(rank))
    spans = [f"{layers[0]} to {layers[-1]}" for layers in runs]
    axes = " x ".join(f"{axis} {getattr(s.mesh, axis)}" for axis in DATA if getattr(s.mesh, axis) > 1)
    groups = f"; groups of tp {s.mesh.tp} along {axes or 'one place'}" if s.mesh.size > s.mesh.pp else ""
    return f"layers {', '.join(spans)}; peak {plan.memory[rank].peak / 2**30:.1f} GiB{groups}"


def _page(width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (width, height), _PAPER)
    return image, ImageDraw.Draw(image)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _shade(colour: tuple[int, int, int], factor: float) -> tuple[int, int, int]:
    red, green, blue = (min(255, round(c * factor)) for c in colour)
    return red, green, blue


def _png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return out.getvalue()
