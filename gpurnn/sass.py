"""Reading machine code as nvdisasm lists it: which instructions, and which of them are repeated.

A listing goes in and comes out as text, so that any part of it can be read, printed or counted::

    loop = recurrent_loop(sass)
    print(loop)
    print(instruction_mix(loop).most_common(5))
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["instruction_mix", "multiply_adds", "recurrent_loop"]

LINE = re.compile(
    r"/\*[0-9a-f]{4,}\*/\s+(?:@(?P<guard>!?U?P\w+)\s+)?(?P<opcode>[A-Z][\w.]*)(?P<rest>[^;]*);"
)
LABEL = re.compile(r"([\w$.]+):")
TARGET = re.compile(r"(?<=`\()[^)]+|\.L_\w+")
WIDTHS = ("64", "128", "256")
PACKED = {"FFMA": 1, "DFMA": 1, "FFMA2": 2, "HFMA2": 2}  # multiply-adds of one instruction
OF_WARP = {"16816": 64, "1688": 32}  # HMMA's, by its shape: m · n · k over the lanes of a warp
BRANCHES = ("BRA", "BRX", "JMP", "JMX")
ENDS = ("EXIT", "RET", "KILL")


@dataclass(frozen=True)
class Instruction:
    """One line of a listing."""

    text: str
    guard: str
    opcode: str
    operands: str

    @property
    def base(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def register(self) -> str:
        """The first operand."""
        return self.operands.split(",")[0].strip()

    @property
    def targets(self) -> list[str]:
        """The labels among its operands."""
        return TARGET.findall(self.operands)

    @property
    def name(self) -> str:
        """The opcode, with how many bits it moves where that is said: "LDS.128", "FFMA"."""
        base, *modifiers = self.opcode.split(".")
        return ".".join([base, *(m for m in modifiers if m in WIDTHS)])

    @property
    def multiply_adds(self) -> int:
        """How many a thread does by it; 0 where it only puts a constant into a register.

        A warp's product of matrices counts for each thread with its part.
        """
        if self.base == "HMMA":
            return sum(OF_WARP.get(modifier, 0) for modifier in self.opcode.split("."))
        factors = [o.strip().lstrip("-") for o in self.operands.split(",")][1:2]
        return 0 if factors == ["RZ"] else PACKED.get(self.base, 0)

    @property
    def parts(self) -> bool:
        """Whether the next instruction may not be the one that follows it."""
        local_call = self.base == "CALL" and any(t.startswith(".L") for t in self.targets)
        return self.base in (*BRANCHES, *ENDS, "BSYNC") or local_call

    @property
    def goes_on(self) -> bool:
        """Whether some thread goes on to the instruction that follows it."""
        if self.guard not in ("", "PT"):
            return True
        if self.base in ("BRA", "JMP"):  # a second condition may stand before the label
            return not self.operands.strip().startswith("`")
        return self.base not in (*BRANCHES, *ENDS)


Block = tuple[int, int]  # instructions, from and to
Edges = dict[int, set[int]]


def instruction_mix(sass: str) -> Counter[str]:
    """Count the instructions of a listing by name, the width of a memory access included.

    A move may go by the name of an arithmetic instruction ("IMAD" for IMAD.MOV, "HFMA2"): units
    that are free do what others would.
    """
    return Counter(i.name for i in _read(sass)[0])


def multiply_adds(sass: str) -> int:
    """Count a thread's floating-point multiply-adds; packed ones count as what they pack."""
    return sum(i.multiply_adds for i in _read(sass)[0])


def recurrent_loop(sass: str) -> str:
    """Return the loop with the most multiply-adds as a listing, "" where nothing is repeated.

    Instructions form blocks, and branches lead from block to block. A branch back to a block that
    every way to the branch has come through (that dominates it) closes a loop: that block, and
    all blocks from which the branch can be reached without passing it again. So a loop is found
    wherever its parts lie, both sides of an ``if`` are in it, and branches back to one block make
    one loop. Of loops within each other with the same multiply-adds the innermost
    is taken, of equal loops one after another the first.

    Each instruction is listed once: a loop that does two rounds in a turn has twice the
    multiply-adds of the source, and one around another shows the inner instructions once.

    Left out: what nothing leads to, such as padding after the end; where ``BRA.DIV`` leads, the way
    of warps whose lanes have parted; functions that are called, such as the slow way to divide.

    Raises:
        ValueError: ``sass`` has no instructions, or a branch to a label that is not there.
    """
    instructions, labels = _read(sass)
    if not instructions:
        raise ValueError(f"no instructions in a listing of {len(sass)} characters: {sass[:80]!r}")
    blocks = _blocks(instructions, labels)
    edges = _edges(instructions, labels, blocks)
    best: list[Instruction] = []
    for loop in _loops(edges):
        body = [i for n in sorted(loop) for i in instructions[slice(*blocks[n])]]
        if not best or _rank(body) > _rank(best):
            best = body
    return "\n".join(i.text for i in best)


def _rank(body: Sequence[Instruction]) -> tuple[int, int]:
    return sum(i.multiply_adds for i in body), -len(body)


def _read(sass: str) -> tuple[list[Instruction], dict[str, int]]:
    """Return the instructions, and for each label the number of the one that follows it."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if found := LABEL.match(line):
            labels[found[1]] = len(instructions)
        elif found := LINE.search(line):
            instructions.append(
                Instruction(line.strip(), found["guard"] or "", found["opcode"], found["rest"])
            )
    return instructions, labels


def _blocks(instructions: Sequence[Instruction], labels: dict[str, int]) -> list[Block]:
    """Cut the instructions at labels and after branches."""
    starts = {0, *labels.values()}
    starts |= {n + 1 for n, i in enumerate(instructions) if i.parts}
    cuts = sorted(start for start in starts if start < len(instructions))
    return list(zip(cuts, [*cuts[1:], len(instructions)], strict=True))


def _edges(
    instructions: Sequence[Instruction], labels: dict[str, int], blocks: Sequence[Block]
) -> Edges:
    """Follow the code from its first block; each block that is reached gets its successors.

    ``BSYNC B0`` leads to where the ``BSSY B0`` passed on the way said.
    """
    at = {start: n for n, (start, _) in enumerate(blocks)}

    def block_of(label: str) -> int:
        if label not in labels:
            raise ValueError(f"a branch leads to {label}, which the listing lacks")
        return at.get(labels[label], len(blocks))

    edges: Edges = {}
    waiting: list[tuple[int, dict[str, str]]] = [(0, {})]
    while waiting:
        n, meeting = waiting.pop()
        if n in edges:
            continue
        body = instructions[slice(*blocks[n])]
        meeting = meeting | {i.register: i.targets[0] for i in body if i.base == "BSSY"}
        last = body[-1]
        targets = last.targets if last.parts and last.opcode != "BRA.DIV" else []
        goes_on = last.goes_on
        if last.base == "BSYNC" and last.register in meeting:
            targets = [meeting[last.register]]
            goes_on = last.guard not in ("", "PT")
        edges[n] = {block_of(label) for label in targets} | ({n + 1} if goes_on else set())
        edges[n].discard(len(blocks))  # beyond the last instruction
        waiting += [(to, meeting) for to in edges[n]]
    return edges


def _reached(edges: Edges, starts: Iterable[int], without: int) -> set[int]:
    found: set[int] = set()
    waiting = [n for n in starts if n != without]
    while waiting:
        n = waiting.pop()
        if n not in found:
            found.add(n)
            waiting += [to for to in edges.get(n, ()) if to != without]
    return found


def _loops(edges: Edges) -> list[set[int]]:
    backwards: Edges = {}
    for n, successors in edges.items():
        for to in successors:
            backwards.setdefault(to, set()).add(n)
    loops = []
    for head in sorted(backwards):
        around_it = _reached(edges, [0], without=head)
        closing = [n for n in backwards[head] if n not in around_it]
        if closing:
            loops.append({head} | _reached(backwards, closing, without=head))
    return loops
