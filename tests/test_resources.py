"""Kernels as machine code: no spilling, within what a GPU has, and no worse than they were.

Compiled here without a GPU, and held against limits and against ``resources.json``. After a change
that is meant to alter the numbers: ``python tests/make_resources.py``.
"""

import re
import sys
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

numba = pytest.importorskip("numba")
cuda = pytest.importorskip("numba.cuda", reason="compiling kernels needs numba-cuda")

from make_resources import CASES, UPDATE, Case, Measured, measured, row, table  # noqa: E402

from gpurnn import compiler, planning, resources  # noqa: E402
from gpurnn.cuda.specs import build, signature  # noqa: E402
from gpurnn.resources import ToolMissing, instruction_mix, recurrent_loop  # noqa: E402
from gpurnn.tile import TensorShare  # noqa: E402

REGENERATE = "If this is meant to be: python tests/make_resources.py"
MORE_REGISTERS = 4
LESS_USEFUL = 0.02

SHARED_PER_BLOCK = {
    (8, 0): planning.DEVICES["A100"].shared_per_block,
    (9, 0): planning.DEVICES["H100"].shared_per_block,
    (10, 0): planning.DEVICES["H100"].shared_per_block,  # a B200's is the same
}
GLOBAL_ACCESS = re.compile(r"\b(?:LDG|STG)\b[^;]*")


@pytest.fixture(scope="module")
def tools() -> str:
    """The versions of what compiles; a test that asks for them needs ptxas and nvdisasm."""
    try:
        versions = resources.toolchain()
        resources.sass_of(EMPTY_KERNEL, (9, 0))
    except ToolMissing as e:
        pytest.skip(str(e))
    return versions


EMPTY_KERNEL = ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k() { ret; }\n"

each_case = pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=str(c), marks=[] if c.core else [pytest.mark.slow]) for c in CASES],
)


# What must hold of every kernel, and what must not get worse


def faults(case: Case, found: Measured) -> list[str]:
    """What is wrong with a kernel, whatever the table says."""
    r, wrong = found.resources, []
    if r.stack or r.spill_stores or r.spill_loads:
        wrong.append(
            f"{r.stack} bytes of stack, {r.spill_stores} stored and {r.spill_loads} loaded: "
            "expected every local array and number in registers"
        )
    per_block = -(-r.registers // 8) * 8 * case.spec.threads  # given out by eights
    if r.registers > 255 or per_block > 65_536:
        wrong.append(
            f"{r.registers} registers × {case.spec.threads} threads: "
            "expected at most 255, and 65,536 in all"
        )
    if r.shared > planning.STATIC_SHARED:
        wrong.append(f"{r.shared} bytes of static shared memory: expected at most 48 KiB")
    most = SHARED_PER_BLOCK[case.target]
    if r.shared + case.dynamic_shared > most:
        wrong.append(
            f"{r.shared} + {case.dynamic_shared} bytes of shared memory: expected at most {most}"
        )
    adds_in_double = case.spec.kind in ("loss_mean", *UPDATE)
    single = case.spec.dtype != "float64" and not adds_in_double
    if single and ".f64" in found.ptx:
        wrong.append(f".f64 in the PTX of a {case.spec.dtype} kernel: expected none")
    if ".address_size 64" not in found.ptx:
        wrong.append("no .address_size 64 in its PTX")
    narrow = [a for a in GLOBAL_ACCESS.findall(found.sass) if ".64" not in a.partition("[")[2]]
    if narrow:
        wrong.append(f"expected 64-bit addresses of global memory, not {narrow[0]}")
    if case.share:
        return wrong + group_faults(case, found)
    if case.generator:
        return wrong + generator_faults(found)
    return wrong + (resident_faults(case, found) if case.tile else [])


def resident_faults(case: Case, found: Measured) -> list[str]:
    assert case.tile is not None
    r, wrong = found.resources, []
    declared = case.tile.shared_values * case.itemsize
    if r.shared != declared:
        wrong.append(f"{r.shared} bytes of static shared memory: planning counts {declared}")
    if r.barriers != 1:
        wrong.append(f"{r.barriers} barriers in the recurrent loop: expected 1, a step's")
    if r.multiply_adds < case.product:
        wrong.append(
            f"{r.multiply_adds} multiply-adds in the recurrent loop: expected the product's "
            f"{case.product} at least"
        )
    if not instruction_mix(recurrent_loop(found.sass))["LDS.128"]:
        wrong.append("no LDS.128 in the recurrent loop: expected 128-bit loads of shared memory")
    return wrong


def group_faults(case: Case, found: Measured) -> list[str]:
    r, wrong = found.resources, []
    if r.shared:
        wrong.append(f"{r.shared} bytes of static shared memory: expected all of it dynamic")
    if r.multiply_adds < case.product:
        wrong.append(
            f"{r.multiply_adds} multiply-adds in the recurrent loop: expected the product's "
            f"{case.product} at least"
        )
    mix = instruction_mix(recurrent_loop(found.sass))
    if not mix["LDS.128"]:
        wrong.append("no LDS.128 in the recurrent loop: expected 128-bit loads of shared memory")
    if isinstance(case.share, TensorShare) and mix["HMMA"] % case.product_instructions:
        wrong.append(
            f"{mix['HMMA']} products on tensor cores in the recurrent loop: expected "
            f"{case.product_instructions}, or a multiple"
        )
    return wrong


def generator_faults(found: Measured) -> list[str]:
    wrong = []
    if found.resources.shared > planning.generation_parts.STATIC:
        wrong.append(
            f"{found.resources.shared} bytes of static shared memory: planning leaves "
            f"{planning.generation_parts.STATIC}"
        )
    if not instruction_mix(recurrent_loop(found.sass))["LDS.128"]:
        wrong.append("no LDS.128 in the recurrent loop: expected 128-bit loads of shared memory")
    return wrong


def worse(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """In what a kernel is worse than the table says."""
    found = []
    if now["registers"] > was["registers"] + MORE_REGISTERS:
        found.append(
            f"registers: were {was['registers']}, are {now['registers']} "
            f"(at most {MORE_REGISTERS} more)"
        )
    found += [
        f"{name}: was {was[name]} bytes, is {now[name]} (expected the same)"
        for name in ("shared", "dynamic_shared")
        if now[name] != was[name]
    ]
    if now["useful"] < was["useful"] - LESS_USEFUL:
        found.append(
            f"useful: {was['useful']:.1%} of the recurrent loop's {was['loop']} instructions were "
            f"the product's multiply-adds, {now['useful']:.1%} of {now['loop']} are "
            f"(at most {LESS_USEFUL * 100:.0f} points less)"
        )
    return found


@each_case
def test_kernel_keeps_within_limits_and_is_no_worse_than_it_was(case: Case, tools: str) -> None:
    found = faults(case, measured(case))
    assert not found, "\n".join([f"{case}:", *found])
    expected = table()
    if tools != expected["toolchain"]:
        pytest.skip(
            f"within limits, but not compared with resources.json: that was made with "
            f"{expected['toolchain']}; here is {tools}"
        )
    assert str(case) in expected["kernels"], f"{case} is not in resources.json. {REGENERATE}"
    found = worse(expected["kernels"][str(case)], row(case))
    assert not found, "\n".join([f"{case}:", *found, REGENERATE])


def test_table_and_cases_are_the_same_kernels() -> None:
    assert list(table()["kernels"]) == [str(case) for case in CASES], REGENERATE


RUN_AS_MEASURED = (
    "resident_forward float32 h=128 rows=1 tanh sm_90",
    "resident_backward float32 h=64 rows=8 tanh sm_80",
    "resident_backward float64 h=64 rows=1 tanh sm_90",
)


def named(name: str) -> Case:
    return next(case for case in CASES if str(case) == name)


@pytest.mark.parametrize("name", RUN_AS_MEASURED)
def test_machine_code_that_runs_is_what_was_measured(name: str, tools: str) -> None:
    pytest.importorskip("cuda.core", reason="linking kernels needs cuda-core")
    case = named(name)
    compiled = compiler.compile_kernel(
        build(case.spec), signature(case.spec), case.target, case.spec.threads
    )
    assert resources.of_kernel(compiled, product=case.product) == measured(case).resources


# A change for the worse is seen


def spilling(W: Any, out: Any, n: Any) -> None:
    """Index a local array by a number that only the GPU knows."""
    w = cuda.local.array(32, numba.float32)
    for k in range(n):
        w[k & 31] = W[k]
    out[0] = w[n & 31]


def test_local_array_that_cannot_stay_in_registers_is_refused(tools: str) -> None:
    one = compiler.ArraySpec("float32", 1)
    _, ptx = compiler.ptx_of(spilling, (one, one, None), (9, 0), 128)
    listing = resources.listing_of(ptx, (9, 0))
    found = resources.of_listing(listing)
    assert found.stack == 128
    assert found.spill_stores > 0 and found.spill_loads > 0
    case = next(c for c in CASES if c.tile is None)
    (fault,) = faults(case, Measured(found, ptx, resources.sass_of_listing(listing)))
    assert fault.startswith("128 bytes of stack, ")
    assert fault.endswith("expected every local array and number in registers")


WAS = {"registers": 168, "shared": 1152, "dynamic_shared": 0, "loop": 200, "useful": 0.64}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"registers": 172, "useful": 0.6201, "loop": 206}, None),
        ({"registers": 100, "useful": 0.9}, None),
        ({"registers": 173}, "registers: were 168, are 173 (at most 4 more)"),
        ({"shared": 1156}, "shared: was 1152 bytes, is 1156 (expected the same)"),
        ({"dynamic_shared": 16}, "dynamic_shared: was 0 bytes, is 16 (expected the same)"),
        (
            {"useful": 0.61, "loop": 210},
            "useful: 64.0% of the recurrent loop's 200 instructions were the product's "
            "multiply-adds, 61.0% of 210 are (at most 2 points less)",
        ),
    ],
)
def test_what_counts_as_worse(change: dict[str, Any], message: str | None) -> None:
    assert worse(WAS, {**WAS, **change}) == ([message] if message else [])


def altered(case: Case, sass: str = "", ptx: str = "", **numbers: Any) -> list[str]:
    """The faults of a kernel after an alteration of what was measured."""
    found = measured(case)
    changed = replace(found.resources, **numbers)
    return faults(case, Measured(changed, ptx or found.ptx, sass or found.sass))


def test_each_limit_is_looked_at(tools: str) -> None:
    case = named(RUN_AS_MEASURED[0])
    ok = measured(case)
    assert altered(case) == []
    for numbers, expected in (
        ({"stack": 8}, "8 bytes of stack"),
        ({"spill_loads": 4}, "4 loaded"),
        ({"registers": 256}, "256 registers × 128 threads"),
        ({"shared": 50_000}, "expected at most 48 KiB"),
        ({"shared": 1156}, "1156 bytes of static shared memory: planning counts 1152"),
        ({"barriers": 2}, "2 barriers"),
        ({"multiply_adds": 127}, "127 multiply-adds in the recurrent loop: expected the product's"),
        ({"ptx": ok.ptx + "add.f64"}, ".f64 in the PTX of a float32 kernel"),
        ({"ptx": ok.ptx.replace("_size 64", "_size 32")}, "no .address_size 64"),
        ({"sass": ok.sass.replace("LDS.128", "LDS")}, "no LDS.128 in the recurrent loop"),
        ({"sass": re.sub(r"(LDG.*?)\.64", r"\1", ok.sass)}, "64-bit addresses"),
    ):
        assert expected in "\n".join(altered(case, **numbers)), numbers


def test_each_limit_of_a_group_kernel_is_looked_at(tools: str) -> None:
    case = named("group_forward float16 h=512 blocks=8 rows=8 cluster tanh sm_90")
    ok = measured(case)
    assert altered(case) == []
    for numbers, expected in (
        ({"shared": 16}, "16 bytes of static shared memory: expected all of it dynamic"),
        ({"multiply_adds": 511}, "511 multiply-adds in the recurrent loop: expected the product's"),
        ({"sass": ok.sass.replace("LDS.128", "LDS")}, "no LDS.128 in the recurrent loop"),
        (
            {"sass": ok.sass.replace("HMMA", "NOP", 1)},
            "7 products on tensor cores in the recurrent loop: expected 8, or a multiple",
        ),
    ):
        assert expected in "\n".join(altered(case, **numbers)), numbers


# Reading a listing


def listing(*lines: str) -> str:
    """Return labels and instructions as nvdisasm writes them."""
    written = []
    for number, line in enumerate(lines):
        if line.endswith(":"):
            written.append(line)
        else:
            written.append(f"        /*{16 * number:04x}*/                   {line} ;")
    return "\n".join(written) + "\n"


def names(sass: str) -> str:
    return " ".join(re.findall(r"\*/\s+(?:@\S+ )?\s*([A-Z]\w+)", sass))


FMA = "FFMA R0, R1.reuse, R2, R0"


def test_instructions_are_counted_by_name_and_width() -> None:
    sass = listing(
        "LDS.128 R4, [R8+0x10]",
        "LDS.U.128 R4, [R8]",
        "LDS R4, [R8]",
        "@!P1 LDG.E.64 R2, desc[UR4][R2.64+0x8]",
        ".L_x_0:",
        "FFMA R0, R4.reuse, R5, R0",
        "@UP0 UIADD3 UR4, UR4, 0x1, URZ",
        "IMAD.MOV.U32 R1, RZ, RZ, R2",
        "BAR.SYNC.DEFER_BLOCKING 0x0",
    )
    assert instruction_mix(sass) == Counter(
        {"LDS.128": 2, "LDS": 1, "LDG.64": 1, "FFMA": 1, "UIADD3": 1, "IMAD": 1, "BAR": 1}
    )
    assert instruction_mix("") == Counter()


def test_multiply_adds_are_told_from_moves() -> None:
    sass = listing(
        FMA,
        "FFMA R0, R1, R2, RZ",
        "DFMA R0, -R2, R4, R6",
        "FFMA2 R0, R2.F32x2.HI_LO, R4.F32x2.HI_LO, R6.F32x2.HI_LO",
        "HFMA2 R0, R1, R2, R3",
        "HFMA2.MMA R5, -RZ, RZ, 0, 0",  # puts a constant into R5
        "IMAD R0, R1, R2, R3",
        "FADD R0, R1, R2",
    )
    assert resources.multiply_adds(sass) == 7


def test_a_warp_s_product_of_matrices_counts_with_a_thread_s_part() -> None:
    for opcode, part in (
        ("HMMA.16816.F32", 16 * 8 * 16 // 32),
        ("HMMA.16816.F32.BF16", 16 * 8 * 16 // 32),
        ("HMMA.1688.F32.TF32", 16 * 8 * 8 // 32),
    ):
        assert resources.multiply_adds(listing(f"{opcode} R4, R8, R12, RZ", FMA)) == part + 1


def test_no_loop() -> None:
    # every kernel is padded by a branch to itself, which nothing leads to
    assert recurrent_loop(listing(FMA, "EXIT", ".L_x_0:", "BRA `(.L_x_0)", "NOP")) == ""
    assert recurrent_loop(listing("@P0 BRA `(.L_x_0)", FMA, ".L_x_0:", "EXIT")) == ""


def test_of_several_loops_the_one_with_the_most_multiply_adds() -> None:
    sass = listing(
        *(".L_x_0:", "STS [R1], RZ", "STS [R1], RZ", "STS [R1], RZ", "@P0 BRA `(.L_x_0)"),
        *(".L_x_1:", FMA, FMA, "BAR.SYNC 0x0", "@P0 BRA `(.L_x_1)"),
        *(".L_x_2:", FMA, "BAR.SYNC 0x0", "BRA.U UP0, `(.L_x_2)"),
        "EXIT",
    )
    assert names(recurrent_loop(sass)) == "FFMA FFMA BAR BRA"


def test_of_nested_loops_the_outer_unless_it_adds_nothing() -> None:
    head, inner = (".L_x_0:", "LDS R1, [R2]"), (".L_x_1:", FMA, "@P1 BRA `(.L_x_1)")
    end = ("@P0 BRA `(.L_x_0)", "EXIT")
    assert names(recurrent_loop(listing(*head, *inner, FMA, *end))) == "LDS FFMA BRA FFMA BRA"
    assert names(recurrent_loop(listing(*head, *inner, *end))) == "FFMA BRA"


def test_both_sides_of_an_if_and_blocks_out_of_line_belong_to_the_loop() -> None:
    sass = listing(
        ".L_x_0:",
        FMA,
        "@!P1 EXIT",
        "BSSY B0, `(.L_x_3)",
        "@P2 BRA `(.L_x_4)",
        "MUFU.EX2 R3, R3",
        "BSYNC B0",
        ".L_x_3:",
        "BAR.SYNC 0x0",
        "@P0 BRA `(.L_x_0)",
        "STG.E desc[UR4][R2.64], R0",
        "EXIT",
        ".L_x_4:",  # far from the loop, and back into it
        "MUFU.RCP R3, R3",
        "BSYNC B0",
        "NOP",
    )
    loop = names(recurrent_loop(sass))
    assert loop == "FFMA EXIT BSSY BRA MUFU BSYNC BAR BRA MUFU BSYNC"


def test_two_branches_back_make_one_loop() -> None:
    sass = listing(
        *(".L_x_0:", FMA, "@P1 BRA `(.L_x_0)", FMA, "BAR.SYNC 0x0", "BRA P2, `(.L_x_0)", "EXIT")
    )
    assert names(recurrent_loop(sass)) == "FFMA BRA FFMA BAR BRA"


def test_what_is_not_run_is_no_part_of_the_loop() -> None:
    sass = listing(
        *(".L_x_0:", "BRA.DIV ~URZ, `(.L_x_2)", "SHFL.BFLY PT, R4, R4, 0x1, 0x1f", ".L_x_1:"),
        *(FMA, "CALL.REL.NOINC `($slow)", "@P0 BRA `(.L_x_0)", "EXIT"),
        *(".L_x_2:", "WARPSYNC R7", "SHFL.BFLY PT, R4, R4, 0x1, 0x1f", "BRA `(.L_x_1)"),
        *("$slow:", FMA, "RET.REL.NODEC R2 `(k)"),
    )
    assert names(recurrent_loop(sass)) == "BRA SHFL FFMA CALL BRA"


def test_loop_that_is_left_by_a_call_is_found() -> None:
    sass = listing(
        *(".L_x_0:", FMA, "@!P0 CALL.REL.NOINC `(.L_x_1)", "BRA `(.L_x_0)", ".L_x_1:", "EXIT")
    )
    assert names(recurrent_loop(sass)) == "FFMA CALL BRA"


@pytest.mark.parametrize("text", ["", "ptxas fatal: nothing to list"])
def test_no_listing_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"no instructions in a listing of {len(text)} characters"):
        recurrent_loop(text)


def test_branch_to_nowhere_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\.L_x_9, which the listing lacks"):
        recurrent_loop(listing("BRA `(.L_x_9)"))


def whole(code: str, *, name: str = "k", target: int = 90, shared: int | None = 1152) -> str:
    """All that nvdisasm prints of a kernel, abridged, beside a function that it calls."""

    def info(kind: str, of: str, value: int) -> str:
        return (
            f"\t//----- nvinfo : EIATTR_{kind}\n\t.align\t\t4\n"
            "        /*0000*/ \t.byte\t0x04, 0x11\n.L_40:\n"
            f"        /*0004*/ \t.word\tindex@({of})\n        /*0008*/ \t.word\t{value:#010x}\n"
        )

    laid_out = f"//----- .nv.shared.{name} ----\n.nv.shared.{name}:\n\t.zero\t\t{shared}\n"
    return (
        f"\t.target\tsm_{target}\n"
        + "".join(info("REGCOUNT", of, n) for of, n in (("slow", 24), (name, 168)))
        + "".join(info("FRAME_SIZE", of, n) for of, n in (("slow", 64), (name, 8)))
        + info("MIN_STACK_SIZE", name, 16)
        + f"//----- .text.slow ----\n.text.slow:\n{listing('STL [R1], R0', 'RET R2')}\n"
        + f"//----- .text.{name} ----\n"
        + f'        .other          {name},@"STO_CUDA_ENTRY STV_DEFAULT"\n'
        + f".text.{name}:\n{code}\n"
        + ("" if shared is None else laid_out)
    )


def test_numbers_of_a_listing() -> None:
    code = listing(
        "STL.128 [R1], R4",
        "STL [R1+0x10], R8",
        ".L_x_0:",
        FMA,
        FMA,
        "LDL.64 R4, [R1+0x8]",
        "BAR.SYNC 0x0",
        "@P0 BRA `(.L_x_0)",
        "EXIT",
    )
    expected = resources.Resources(168, 16, 20, 8, 128, 5, 2, 1, None)
    assert resources.of_listing(whole(code)) == expected
    assert resources.of_listing(whole(code), product=2).useful == pytest.approx(2 / 5)
    # sm_80 keeps nothing of a block's shared memory; a kernel may declare none
    assert resources.of_listing(whole(code, target=80)).shared == 1152
    assert resources.of_listing(whole(code, shared=None)).shared == 0
    assert resources.sass_of_listing(whole(code)) == f".text.k:\n{code}"


def test_unrolled_loop_is_as_useful() -> None:
    once = (FMA, FMA, "BAR.SYNC 0x0")
    code = listing(".L_x_0:", *once, *once, "@P0 BRA `(.L_x_0)", "EXIT")
    assert resources.of_listing(whole(code), product=2).useful == pytest.approx(4 / 7)


def test_listing_of_no_kernel_is_refused() -> None:
    code = listing("EXIT")
    with pytest.raises(ValueError, match="0 kernels in the listing"):
        resources.of_listing(code)
    with pytest.raises(ValueError, match=r"2 kernels in the listing \(k, j\), not one"):
        resources.of_listing(whole(code) + whole(code, name="j"))
    with pytest.raises(ValueError, match="says not how many registers and how much stack k has"):
        resources.of_listing(whole(code).replace("REGCOUNT", "OTHER"))
    with pytest.raises(ValueError, match="says not for which architecture"):
        resources.of_listing(whole(code).replace(".target", ".other"))


# Asking for the tools


def test_missing_tool_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    pathfinder = pytest.importorskip("cuda.pathfinder")
    monkeypatch.setattr(pathfinder, "find_nvidia_binary_utility", lambda name: None)
    with pytest.raises(
        ToolMissing, match=r"^ptxas is not installed: pip install nvidia-cuda-nvcc$"
    ):
        resources.of_kernel(EMPTY_KERNEL, (9, 0))
    compiled = compiler.Compiled("k", (9, 0), b"")
    with pytest.raises(ToolMissing, match=r"^nvdisasm is .*: pip install nvidia-cuda-nvdisasm$"):
        resources.sass_of(compiled)


def test_missing_pathfinder_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.pathfinder", None)
    with pytest.raises(ToolMissing, match="pip install cuda-pathfinder nvidia-cuda-nvcc"):
        resources.of_kernel(EMPTY_KERNEL, (9, 0))


def test_ptx_needs_an_architecture() -> None:
    with pytest.raises(
        TypeError, match=r"compute_capability is None: expected one such as \(9, 0\)"
    ):
        resources.of_kernel(EMPTY_KERNEL)


def test_what_the_tools_refuse_is_said(tools: str) -> None:
    with pytest.raises(ValueError, match=r"(?s)^ptxas ends with \d+: .*\.version"):
        resources.of_kernel("not PTX", (9, 0))
    with pytest.raises(ValueError, match=r"^nvdisasm ends with \d+: "):
        resources.of_kernel(compiler.Compiled("k", (9, 0), b"not a cubin"))


def test_smallest_kernel(tools: str) -> None:
    found = resources.of_kernel(EMPTY_KERNEL, (9, 0))
    assert (found.stack, found.shared, found.loop, found.useful) == (0, 0, 0, None)
    assert "EXIT" in instruction_mix(resources.sass_of(EMPTY_KERNEL, (9, 0)))
