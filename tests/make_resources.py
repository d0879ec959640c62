"""The kernels whose machine code is held against ``resources.json``, and what makes that file.

    python tests/make_resources.py

writes it anew, in some minutes and without a GPU: after a change that is meant to alter the
numbers, or with another version of the compiler.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from gpurnn import planning, resources
from gpurnn.activation import Activation
from gpurnn.compiler import ptx_of
from gpurnn.cuda.specs import REAL, KernelSpec, Kind, build, signature
from gpurnn.dense import GroupSizes, RowSizes
from gpurnn.planning import Group
from gpurnn.planning.tokens import SHARED
from gpurnn.resources import Resources
from gpurnn.slots import Updating
from gpurnn.tile import Columns, OneBlock, Scatter, Share, Softmax, TensorShare, Tile

__all__ = ["CASES", "TABLE", "Case", "Measured", "measured", "row", "table"]

TABLE = Path(__file__).with_name("resources.json")

SM_80, SM_90, SM_100 = (8, 0), (9, 0), (10, 0)


def _silu(z: float) -> float:
    return z / (1.0 + math.exp(-z))


def _silu_slope(z: float) -> float:
    s = 1.0 / (1.0 + math.exp(-z))
    return s * (1.0 + z * (1.0 - s))


SILU = Activation(_silu, _silu_slope, name="own_silu")  # its φ′ wants the pre-activation


@dataclass(frozen=True)
class Case:
    """A kernel for an architecture; ``core`` ones are few enough for every run of the tests."""

    spec: KernelSpec
    target: tuple[int, int]
    core: bool

    def __str__(self) -> str:
        spec = self.spec
        sizes = spec.sizes
        parts = [spec.kind, spec.dtype]
        if isinstance(sizes, TensorShare) and sizes.kind != spec.dtype:
            parts.append(sizes.kind)
        if isinstance(sizes, RowSizes):
            streams = any(m.kept + m.held < m.pieces for m in sizes.matrices)
            parts += [f"h={sizes.h}", f"q={sizes.q}", f"layers={sizes.layers}"]
            parts.append("streamed" if streams else "resident")
        if isinstance(sizes, GroupSizes):
            parts += [f"h={sizes.share.h}", f"q={sizes.q}", f"blocks={sizes.share.blocks}"]
            parts += ["split"] * sizes.split + [str(spec.exchange)]
        if isinstance(sizes, Share | TensorShare):
            parts += [f"h={sizes.h}", f"blocks={sizes.blocks}", f"rows={sizes.slice_rows}"]
            parts.append(str(spec.exchange))
        if isinstance(sizes, Tile):
            parts += [f"h={sizes.h}", f"rows={sizes.rows}"]
        if isinstance(sizes, Scatter):
            parts += [f"threads={sizes.threads}", f"columns={sizes.columns}"]
        if isinstance(sizes, Softmax):
            parts.append(f"columns={sizes.columns}" if sizes.columns else f"of {sizes.threads}")
            parts += [name for name in ("gradient", "smoothed", "biased") if getattr(sizes, name)]
            return " ".join([*parts, f"sm_{self.target[0]}{self.target[1]}"])
        if isinstance(sizes, Updating):
            parts.append(sizes.optimizer)
        if isinstance(sizes, Columns):
            parts.append(f"warps={sizes.warps}")
        if isinstance(sizes, Updating | Columns) or spec.kind in NO_ACTIVATION:
            return " ".join([*parts, f"sm_{self.target[0]}{self.target[1]}"])
        parts.append(spec.activation if isinstance(spec.activation, str) else "own_silu")
        if spec.scaled:
            parts.append("scaled")
        if spec.by_id:
            parts.append("by_id")
        return " ".join([*parts, f"sm_{self.target[0]}{self.target[1]}"])

    @property
    def tile(self) -> Tile | None:
        return self.spec.sizes if isinstance(self.spec.sizes, Tile) else None

    @property
    def share(self) -> Share | TensorShare | None:
        sizes = self.spec.sizes
        return sizes if isinstance(sizes, Share | TensorShare) else None

    @property
    def generator(self) -> RowSizes | GroupSizes | None:
        sizes = self.spec.sizes
        return sizes if isinstance(sizes, RowSizes | GroupSizes) else None

    @property
    def product(self) -> int:
        """Multiply-adds of a thread in one product with W_hh, of the rows it takes at a time."""
        sizes = self.spec.sizes
        if isinstance(sizes, TensorShare):  # 16 columns of a warp and all its k, over its lanes
            return sizes.rows * sizes.depth * 16 // 32
        return sizes.rows * sizes.depth * sizes.columns if isinstance(sizes, Tile | Share) else 0

    @property
    def product_instructions(self) -> int:
        """Instructions that it is made of."""
        if isinstance(self.share, TensorShare):
            return self.share.registers // 4 * self.share.tiles
        return self.product

    @property
    def itemsize(self) -> int:
        return 8 if REAL[self.spec.dtype] == "float64" else 4

    @property
    def dynamic_shared(self) -> int:
        """Bytes of dynamic shared memory that its launch asks for, at most."""
        if isinstance(self.spec.sizes, Scatter):
            return SHARED
        if self.share:
            return self.share.shared_bytes
        if self.generator:
            return self.generator.shared_numbers * self.itemsize
        return self.tile.shared_weights * self.itemsize if self.tile else 0


@dataclass(frozen=True)
class Measured:
    """A compiled kernel in numbers and in text."""

    resources: Resources
    ptx: str
    sass: str


@cache
def measured(case: Case) -> Measured:
    """Compile a kernel and look at it."""
    spec = case.spec
    _, ptx = ptx_of(build(spec), signature(spec), case.target, spec.threads)
    listing = resources.listing_of(ptx, case.target)
    found = resources.of_listing(listing, product=case.product if case.tile else 0)
    return Measured(found, ptx, resources.sass_of_listing(listing))


def row(case: Case) -> dict[str, Any]:
    """Return what the table says of a kernel.

    ``useful`` is the share of multiply-adds among the instructions of the recurrent loop: those of
    the product with W_hh, or all of them in the kernels that hold none of it. The loop of a group
    kernel is a step, or, where a step has several passes, one of those; other instructions of it,
    such as polling, are run more than once. On tensor cores one instruction is many multiply-adds.
    """
    found = measured(case).resources
    useful = found.useful
    if case.share:
        rounds = max(1, found.multiply_adds // case.product)  # of a loop that was unrolled
        useful = rounds * case.product_instructions / found.loop
    if useful is None:
        useful = found.multiply_adds / found.loop if found.loop else 0.0
    return {
        "registers": found.registers,
        "shared": found.shared,
        "dynamic_shared": case.dynamic_shared,
        "loop": found.loop,
        "useful": round(useful, 4),
    }


def table() -> dict[str, Any]:
    """Return the table as it was last written."""
    found: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return found


NO_ACTIVATION = (
    "target_count",
    "loss_mean",
    "dropout",
    "take_batch",
    "keep_state",
    "stop_unless_finite",
)
POINTWISE = ("layer_backward", "tail_forward", "tail_backward")

UPDATE: tuple[Kind, ...] = ("update_norm", "update_apply")
COLUMNS: tuple[Kind, ...] = ("column_sums", "column_parts")
STEP_BESIDE: tuple[Kind, ...] = ("take_batch", "keep_state")
FORWARD: Kind = "resident_forward"
BACKWARD: Kind = "resident_backward"


def _resident(
    kinds: tuple[Kind, ...],
    dtype: str,
    h: int,
    rows: tuple[int, ...] = (),
    targets: tuple[tuple[int, int], ...] = (SM_90,),
    activation: str | Activation = "tanh",
    *,
    scaled: bool = False,
    core: bool = False,
) -> Iterator[Case]:
    for tile in planning.resident_tiles(h, dtype):
        if not rows or tile.rows in rows:
            for kind in kinds:
                for target in targets:
                    spec = KernelSpec(kind, tile, activation, dtype, scaled)
                    yield Case(spec, target, core)


GROUP_FORWARD: Kind = "group_forward"
GROUP_BACKWARD: Kind = "group_backward"
STEP_FORWARD: Kind = "step_forward"
TAIL_FORWARD: Kind = "tail_forward"


def _group(
    kinds: tuple[Kind, ...],
    dtype: str,
    h: int,
    blocks: int,
    exchange: str,
    rows: int,
    targets: tuple[tuple[int, int], ...] = (SM_90,),
    activation: str | Activation = "tanh",
    *,
    scaled: bool = False,
    core: bool = False,
) -> Iterator[Case]:
    """Yield what ``plan`` makes of a group of so many blocks; "tf32" is a precision."""
    found = planning.plan(
        T=1,
        n=rows,
        d=1,
        h=h,
        dtype="float32" if dtype == "tf32" else dtype,
        device=planning.DEVICES["H100"],
        kernel=Group(blocks, exchange, rows),
        precision="tf32" if dtype == "tf32" else "ieee",
    )
    stored = "float32" if dtype == "tf32" else dtype
    for kind in kinds:
        for target in targets:
            spec = KernelSpec(kind, found.tile, activation, stored, scaled, exchange)
            yield Case(spec, target, core)


def _generation(
    h: int,
    q: int = 28,
    kernel: str | Group | None = None,
    layers: int = 1,
    dtype: str = "float32",
    target: tuple[int, int] = SM_90,
    activation: str = "tanh",
    *,
    core: bool = False,
) -> Iterator[Case]:
    """Yield what ``generation_plan`` makes of one text."""
    device = planning.DEVICES["A100" if target == SM_80 else "H100"]
    found = planning.generation_plan(
        rows=1, h=h, q=q, layers=layers, dtype=dtype, device=device, kernel=kernel
    )
    kind: Kind = "generate_group" if isinstance(found.tile, GroupSizes) else "generate_rows"
    spec = KernelSpec(kind, found.tile, activation, dtype, False, found.exchange)
    yield Case(spec, target, core)


def _generation_cases() -> Iterator[Case]:
    eight = Group(8, "cluster")
    yield from _generation(128, core=True)
    yield from _generation(512, kernel=eight, core=True)
    # A block a row: all in registers, some of it in shared memory, most of it read in each step.
    yield from _generation(128, target=SM_80)
    yield from _generation(200, activation="softplus")
    yield from _generation(128, 97)
    yield from _generation(64, 300)
    yield from _generation(64, layers=3)
    yield from _generation(64, dtype="float64")
    yield from _generation(512, kernel="streamed")
    yield from _generation(512, kernel="streamed", target=SM_80)
    yield from _generation(400, 97, layers=2, dtype="float64")
    # Groups.
    yield from _generation(512, kernel=Group(16, "cluster"))
    yield from _generation(512, kernel=Group(8, "flags"), target=SM_80)
    yield from _generation(512, kernel=Group(16, "counter"))
    yield from _generation(1024, 97, kernel=Group(exchange="flags"))
    yield from _generation(512, 3000, kernel=Group(exchange="flags"))


def _group_cases() -> Iterator[Case]:
    both, each = (GROUP_FORWARD, GROUP_BACKWARD), (SM_80, SM_90)
    # The few that most changes would show in.
    yield from _group((GROUP_BACKWARD,), "float32", 512, 8, "cluster", 1, core=True)
    yield from _group((GROUP_FORWARD,), "float32", 512, 8, "flags", 4, core=True)
    yield from _group((GROUP_FORWARD,), "float16", 512, 8, "cluster", 8, core=True)
    yield from _group((GROUP_BACKWARD,), "tf32", 512, 16, "flags", 8, (SM_80,), core=True)
    # float32 products.
    for rows in (1, 4):
        yield from _group(both, "float32", 512, 8, "cluster", rows)
    yield from _group(both, "float32", 512, 8, "flags", 1)
    yield from _group(both, "float32", 512, 8, "counter", 1)
    for rows in (1, 4):
        yield from _group((GROUP_BACKWARD,), "float32", 512, 8, "flags", rows, (SM_80,))
    yield from _group(both, "float32", 1024, 16, "cluster", 1)
    yield from _group((GROUP_BACKWARD,), "float32", 1024, 16, "flags", 4)
    yield from _group(both, "float32", 1024, 32, "flags", 2)
    yield from _group(both, "float32", 2048, 128, "flags", 1)
    yield from _group((GROUP_BACKWARD,), "float32", 512, 8, "cluster", 1, activation=SILU)
    yield from _group((GROUP_BACKWARD,), "float32", 512, 8, "flags", 1, scaled=True)
    # Tensor cores.
    yield from _group(both, "float16", 512, 8, "cluster", 8)
    yield from _group((GROUP_BACKWARD,), "float16", 512, 8, "flags", 8, each)
    yield from _group((GROUP_BACKWARD,), "bfloat16", 1024, 32, "counter", 16, each)
    yield from _group(both, "float16", 1024, 32, "counter", 32)
    yield from _group((GROUP_FORWARD,), "float16", 2048, 64, "counter", 8, each)
    yield from _group(both, "tf32", 512, 8, "cluster", 8)
    yield from _group(both, "tf32", 1024, 32, "counter", 16)
    yield from _group((GROUP_BACKWARD,), "tf32", 2048, 128, "counter", 8)
    # As many registers as planning lets a kernel have.
    yield from _group((GROUP_BACKWARD,), "float16", 655, 12, "flags", 16, activation="softplus")
    yield from _group((GROUP_BACKWARD,), "tf32", 720, 16, "cluster", 8, activation=SILU)
    yield from _group((GROUP_BACKWARD,), "tf32", 512, 8, "cluster", 16, scaled=True)


def _loss_cases() -> Iterator[Case]:
    def softmax(dtype: str, *sizes: Any, core: bool = False, target: Any = SM_90) -> Case:
        spec = KernelSpec("cross_entropy", Softmax(*sizes), "identity", dtype)
        return Case(spec, target, core)

    yield softmax("float32", 1, 256, core=True)
    yield softmax("float32", 8, 256, True, True, True, core=True)
    yield softmax("float32", 0, 256, True, True, True, core=True)
    yield softmax("float64", 8, 256, True, True, target=SM_80)
    yield softmax("float64", 0, 512, True, True, target=SM_80)
    yield softmax("bfloat16", 1, 256, True, False, True)
    yield softmax("bfloat16", 0, 128)
    yield softmax("float16", 0, 512, False)
    for target in (SM_80, SM_90):
        spec = KernelSpec("dropout", None, "identity", "float32")
        yield Case(spec, target, core=target == SM_90)
    for dtype in ("float64", "float16", "bfloat16"):
        yield Case(KernelSpec("dropout", None, "identity", dtype), SM_90, core=False)
    one = OneBlock(1024)
    yield Case(KernelSpec("target_count", one, "identity", "float32"), SM_90, core=False)
    yield Case(KernelSpec("loss_mean", one, "identity", "float32"), SM_90, core=False)
    yield Case(KernelSpec("loss_mean", one, "identity", "float64"), SM_80, core=False)


def _update_cases() -> Iterator[Case]:
    for optimizer, dtype, target in (
        ("sgd", "float32", SM_90),
        ("momentum", "float64", SM_90),
        ("adamw", "float32", SM_90),
        ("adamw", "float32", SM_80),
    ):
        for kind in UPDATE:
            spec = KernelSpec(kind, Updating(optimizer), "identity", dtype)
            yield Case(spec, target, core=False)
    for sizes, dtype in ((1, "float32"), (8, "float32"), (8, "float64"), (8, "bfloat16")):
        for kind in COLUMNS:
            yield Case(KernelSpec(kind, Columns(sizes), "identity", dtype), SM_90, core=False)
    for kind in STEP_BESIDE:
        yield Case(KernelSpec(kind, None, "identity", "float32"), SM_90, core=False)
    stop = KernelSpec("stop_unless_finite", None, "identity", "float64")
    yield Case(stop, SM_90, core=False)


def _token_cases() -> Iterator[Case]:
    def by_id(cases: Iterator[Case]) -> Iterator[Case]:
        for case in cases:
            yield replace(case, spec=replace(case.spec, by_id=True))

    both = (SM_80, SM_90)
    yield from by_id(_resident((FORWARD,), "float32", 128, (1, 8), core=True))
    yield from by_id(_resident((FORWARD,), "float32", 224, (4,), both))
    yield from by_id(_resident((FORWARD,), "float32", 128, (1,), activation=SILU))
    yield from by_id(_resident((FORWARD,), "float64", 64, (4,)))
    yield from by_id(_group((GROUP_FORWARD,), "float32", 512, 8, "cluster", 1))
    yield from by_id(_group((GROUP_FORWARD,), "float32", 512, 8, "flags", 4, both))
    yield from by_id(_group((GROUP_FORWARD,), "float16", 512, 8, "cluster", 8))
    for kind, side in ((STEP_FORWARD, planning.SIDE), (TAIL_FORWARD, None)):
        yield Case(KernelSpec(kind, side, "tanh", "float32", by_id=True), SM_90, core=False)
    for target in both:
        for columns in (32, 256):
            tile = Scatter(256, columns, 8)
            core = columns == 32 and target == SM_90
            yield Case(KernelSpec("scatter", tile, "identity", "float32"), target, core)
    tile = Scatter(256, 128, 8)
    yield Case(KernelSpec("scatter", tile, "identity", "float64"), SM_90, core=False)
    yield Case(KernelSpec("scatter_parts", tile, "identity", "bfloat16"), SM_90, core=False)
    for target in both:
        spec = KernelSpec("scatter_parts_added", None, "identity", "bfloat16")
        yield Case(spec, target, core=False)


def _cases() -> Iterator[Case]:
    both, each = (FORWARD, BACKWARD), (SM_80, SM_90)
    # The few that most changes to kernels would show in.
    yield from _resident(both, "float32", 32, (1, 2), core=True)
    yield from _resident(both, "float32", 128, (1, 8), core=True)
    yield from _resident(both, "float32", 224, (1, 4), core=True)
    yield from _resident(both, "float32", 128, (1,), (SM_80,), core=True)
    yield from _resident(both, "float64", 64, (1,), core=True)
    yield from _resident((BACKWARD,), "bfloat16", 128, (1,), core=True)
    yield from _resident(both, "float32", 128, (1,), activation=SILU, core=True)
    for kind in ("step_forward", "step_backward"):
        yield Case(KernelSpec(kind, planning.SIDE, "tanh", "float32"), SM_90, core=True)
    for kind in ("tail_forward", "tail_backward"):
        yield Case(KernelSpec(kind, None, "tanh", "float32"), SM_90, core=True)
    # Every way of sharing out W_hh. Backward kernels hold most; 144 and 200 are shared out like 129
    # and 224, but for the padding.
    for h in (32, 64, 128, 129, 144, 191, 200, 224, 256):
        most = planning.resident_tiles(h, "float32")[-1].rows
        yield from _resident((FORWARD,), "float32", h, (1, most))
        yield from _resident((BACKWARD,), "float32", h, (1, most) if h in (144, 200) else ())
        yield from _resident((BACKWARD,), "float32", h, (1, most), (SM_80,))
    for h in (32, 64, 96, 128, 192):
        most = planning.resident_tiles(h, "float64")[-1].rows
        yield from _resident((FORWARD,), "float64", h, (1, most))
        yield from _resident((BACKWARD,), "float64", h)
        if h < 192:  # one block of an A100 does not hold it
            yield from _resident((BACKWARD,), "float64", h, (most,), (SM_80,))
    for h, most in ((128, 8), (224, 4)):
        yield from _resident(both, "bfloat16", h, (1, most))
        yield from _resident((FORWARD,), "float16", h, (1,))
        yield from _resident((BACKWARD,), "float16", h, (1,), each)
    # φ and φ′ share the registers with W_hh.
    for activation in ("softplus", "sigmoid", "relu", "identity", "fast_tanh", SILU):
        yield from _resident(both, "float32", 128, (1,), activation=activation)
    for activation in ("softplus", SILU):
        yield from _resident((BACKWARD,), "float32", 144, (8,), each, activation)
        yield from _resident(both, "float32", 224, (1,), (SM_90,), activation)
        yield from _resident((BACKWARD,), "float64", 64, (4,), each, activation)
    for dtype, h, rows in (("float32", 128, 1), ("float32", 224, 4), ("float64", 64, 2)):
        yield from _resident((BACKWARD,), dtype, h, (rows,), each, scaled=True)
    kinds: tuple[Kind, ...] = (
        "step_forward",
        "step_concatenated",
        "step_backward",
        "layer_forward",
        "layer_backward",
        "tail_forward",
        "tail_backward",
    )
    for kind in kinds:
        for dtype in planning.DTYPES:
            side = None if kind in POINTWISE else planning.SIDE
            targets = each if dtype == "float32" else (SM_90,)
            for target in targets:
                yield Case(KernelSpec(kind, side, "tanh", dtype), target, core=False)
    yield Case(KernelSpec("step_backward", planning.SIDE, "tanh", "float32", True), SM_90, False)
    yield Case(KernelSpec("tail_backward", None, "tanh", "float32", True), SM_90, False)
    yield Case(KernelSpec("tail_forward", None, SILU, "float32"), SM_90, False)
    yield from _generation_cases()
    yield from _resident(both, "float32", 128, (1,), (SM_100,))
    yield from _resident(both, "float32", 224, (4,), (SM_100,))
    yield from _resident((BACKWARD,), "float64", 64, (1,), (SM_100,))
    yield from _group_cases()
    yield from _loss_cases()
    yield from _token_cases()
    yield from _update_cases()


def _once() -> tuple[Case, ...]:
    found: dict[str, Case] = {}
    for case in _cases():
        found.setdefault(str(case), case)
    return tuple(found.values())


CASES = _once()


def main() -> None:
    """Write the table."""
    kernels = {}
    for number, case in enumerate(CASES, 1):
        kernels[str(case)] = row(case)
        print(f"{number:3}/{len(CASES)}  {case}  {measured(case).resources}", flush=True)
    lines = [f"    {json.dumps(key)}: {json.dumps(value)}" for key, value in kernels.items()]
    text = ",\n".join(lines)
    toolchain = json.dumps(resources.toolchain())
    TABLE.write_text(
        f'{{\n  "toolchain": {toolchain},\n  "kernels": {{\n{text}\n  }}\n}}\n', encoding="utf-8"
    )


if __name__ == "__main__":
    main()
