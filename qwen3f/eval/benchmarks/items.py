"""A benchmark's questions, from a local copy, the Hub or a task, with the examples that stand before each."""

import dataclasses
from collections.abc import Iterator, Mapping
from itertools import islice
from random import Random

from qwen3f.data.sources.adapters.files import split_files
from qwen3f.data.sources.adapters.opening import raw_rows
from qwen3f.data.sources.adapters.registry import HubDataset
from qwen3f.data.sources.adapters.rows import BadRow, Row, RowFault
from qwen3f.errors import UserError
from qwen3f.eval.benchmarks.benchmark import Benchmark, Item
from qwen3f.eval.benchmarks.pictures import picture_of
from qwen3f.files import user_path
from qwen3f.processes.world import ALONE, World

SEED = 1234  # of the harness's draws
BLOCK = 5  # neighbouring questions of one rank: VQAv2 and DocVQA ask about as many of a picture in a row

Examples = tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question with what stands before it.

    Attributes:
        number: its place in the whole benchmark, group by group, from 0; the same however few questions are asked.
        description: the group's text before the examples. examples: (prompt, answer) pairs.
        place: its place in its group, from 0.
    """

    number: int
    item: Item
    description: str
    examples: Examples
    place: int = 0

    def of_rank(self, world: World) -> bool:
        """Whether a rank asks this question, if it has a picture: only that rank and rank 0 hold the picture."""
        return _of_rank(self.place, world)


def place_of(benchmark: Benchmark, directory: str, root: str, alone: bool, key: str = "data.root") -> str:
    """Where a benchmark's local copy is; "" for the Hub.

    directory: DIR of name@DIR, or "". root: directory with one subdirectory for each benchmark, of its name; if only
    one benchmark is asked (`alone`), it may be that benchmark's own directory. key: the key of the configuration that
    gives root. Raises UserError if root has no subdirectory for the benchmark.
    """
    if directory or not root or benchmark.task:
        return directory
    own = user_path(root, key) / benchmark.name
    if own.is_dir():
        return str(own)
    if alone:
        return root
    raise UserError(
        f"--config.{key}={root} has no directory {benchmark.name}: put the files of {benchmark.hub_id} into {own}, "
        f"or write {benchmark.name}@DIR"
    )


def load(benchmark: Benchmark, place: str, shots: int | None, most: int, world: World = ALONE) -> list[Asked]:
    """The questions, subject by subject in the order of the files.

    place: as place_of gives it. shots: examples before each; None: the benchmark's own number. most: at most this many
    questions of each subject, the first ones; 0: all. world: rank 0 holds every picture, which it compares with its
    records; others hold those of their own questions. Raises UserError for files that are missing or no copy of the
    data set, a row that cannot be used, too few examples to draw from, and no questions.
    """
    groups = grouped(items(benchmark, place, benchmark.split), most, world)
    if not groups:
        if benchmark.task:
            raise UserError(f"{benchmark.name} makes no held-out question; raise --config.data.problems")
        raise UserError(
            f"{benchmark.name} has no questions in {place or benchmark.hub_id}: put the whole data set there"
        )
    count = benchmark.shots.count if shots is None else shots
    if count and benchmark.shots.most is not None and count > benchmark.shots.most:
        raise UserError(
            f"--config.shots={count}: {benchmark.name} has {benchmark.shots.most} examples at most; write that or less"
        )
    pools = _pools(benchmark, place, count)
    out, first = [], 0
    for group, found in groups.items():
        pool = pools.get(group, pools.get("", ()))
        if count and count + benchmark.shots.spare > len(pool):
            name = f"{benchmark.name}, {group}," if group else benchmark.name
            raise UserError(
                f"{name} has {len(pool)} examples in the split {benchmark.shots.split!r}, and --config.shots={count} "
                f"needs {count + benchmark.shots.spare}; write fewer"
            )
        rand, said = Random(SEED), benchmark.description(group)
        for index, item in enumerate(found[: most or None]):
            out.append(Asked(first + index, item, said, _draw(benchmark, pool, item, count, rand), index))
        first += len(found)
    return out


def _draw(benchmark: Benchmark, pool: Examples, item: Item, count: int, rand: Random) -> Examples:
    """The examples before a question. It advances `rand`, on which the examples of later questions depend.

    Raises UserError if too few examples are left without the question itself.
    """
    shots = benchmark.shots
    if shots.order == "first" or not count:
        return pool[:count]
    drawn = rand.sample(pool, count + shots.spare)
    if shots.spare:
        drawn = [example for example in drawn if example != item.example][:count]
        if len(drawn) < count:
            others = [example for example in pool if example != item.example]
            if len(others) < count:
                raise UserError(
                    f"{benchmark.name} has {len(others)} examples in the split {shots.split!r} beside the question "
                    f"{item.name} itself, and --config.shots={count} needs {count}; write fewer"
                )
            drawn = rand.sample(others, count)
    return tuple(drawn)


def items(benchmark: Benchmark, place: str, split: str) -> Iterator[Item]:
    """The items of a split, in the files' order. Raises UserError for a row that cannot be used."""
    if benchmark.task:
        for number, one in enumerate(benchmark.task.questions(split)):
            values = {"prompt": one.prompt, "gold": one.gold, "group": one.group[0] if one.group else ""}
            yield benchmark.read(Row(values, f"{benchmark.name}/{split}:{number + 1}"))
        return
    for config in benchmark.configs[:1] if place else benchmark.configs:
        for row in raw_rows(_dataset(benchmark, config), place, split, True):
            if isinstance(row, BadRow):
                raise UserError(row.message)
            try:
                item = benchmark.read(row)
                if benchmark.vision:
                    item = dataclasses.replace(item, image=picture_of(item.image, row.name, place))
                yield item
            except RowFault as fault:
                raise UserError(fault.message) from None


def _dataset(benchmark: Benchmark, config: str) -> HubDataset:
    return HubDataset(
        name=benchmark.name,
        hub_id=benchmark.hub_id,
        use="eval",
        columns=benchmark.columns,
        split=benchmark.split,
        config=config,
        folder=benchmark.folder,
    )


def grouped(found: Iterator[Item], most: int = 0, world: World = ALONE) -> Mapping[str, list[Item]]:
    """Items by group. most: only the first `most` items of a group keep their images; 0: all do. world: as for `load`.

    Images take most of the memory, so an image that several questions are about is kept once.
    """
    out: dict[str, list[Item]] = {}
    known: dict[bytes, bytes] = {}
    for item in found:
        group = out.setdefault(item.group, [])
        held = (not most or len(group) < most) and (world.main or _of_rank(len(group), world))
        image = item.image.shared(known) if held and item.image is not None else None
        group.append(dataclasses.replace(item, image=image))
    return out


def _of_rank(place: int, world: World) -> bool:
    return place // BLOCK % world.size == world.rank


def _pools(benchmark: Benchmark, place: str, count: int) -> Mapping[str, Examples]:
    """Examples by group; under "" those for every group. Raises UserError if a local copy has no file of their
    split."""
    shots = benchmark.shots
    if shots.fixed or not count:
        return {"": shots.fixed}
    if place:
        try:
            split_files(_dataset(benchmark, benchmark.configs[0]), place, shots.split)
        except UserError as fault:
            raise UserError(
                f"{str(fault).rstrip('.')}: {benchmark.name}'s examples, {count} a question, are of that split; put it "
                "there, or write --config.shots=0"
            ) from fault
    found = items(benchmark, place, shots.split)
    if shots.order == "first" and not benchmark.description("x"):
        found = islice(found, count)
    return {group: tuple(item.example for item in some) for group, some in grouped(found).items()}
