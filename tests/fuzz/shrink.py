"""A smaller program with the same fault."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from fuzz.check import Wrong, check
from fuzz.program import Program


def shrunk(program: Program, *, batches: int) -> tuple[Program, str]:
    """Without the lines and outputs that the fault does not need; and the fault."""
    fault = _fault(program, batches)
    assert fault is not None, "nothing to shrink: the program is right"
    smaller = True
    while smaller:
        smaller = False
        for step in (_fewer_outputs, _fewer_lines, _shorter_ways, _fewer_names, _without_symbols):
            tried = 0
            while (candidate := next(_from(step(program), tried), None)) is not None:
                found = _fault(candidate, batches)
                if found is None:
                    tried += 1
                else:
                    program, fault, smaller = candidate, found, True
    return program, fault


def _from(candidates: Iterator[Program], start: int) -> Iterator[Program]:
    for number, candidate in enumerate(candidates):
        if number >= start:
            yield candidate


def _fewer_outputs(program: Program) -> Iterator[Program]:
    if len(program.outputs) > 1:
        for n in range(len(program.outputs)):
            yield _living(program.with_parts(program.lines, program.outputs[:n] + program.outputs[n + 1 :]))


def _fewer_lines(program: Program) -> Iterator[Program]:
    """Without what nothing reads; and without the last of several things a line writes."""
    living = _living(program)
    if len(living.lines) < len(program.lines):
        yield living


def _shorter_ways(program: Program) -> Iterator[Program]:
    """What a line makes is one of the values that it reads."""
    for n, line in enumerate(program.lines):
        name, _, made = line.partition(" = ")
        if name.isidentifier():
            for operand in dict.fromkeys(re.findall(r"\b(?:v\d+[ab]?|x|y|z)\b", made)):
                if made != operand and program.axes[name] == program.axes.get(operand):
                    short = f"{name} = {operand}"
                    yield _living(
                        program.with_parts((*program.lines[:n], short, *program.lines[n + 1 :]), program.outputs)
                    )


def _fewer_names(program: Program) -> Iterator[Program]:
    """Without lines that give a value another name."""
    for n, line in enumerate(program.lines):
        name, _, other = line.partition(" = ")
        if other.isidentifier() and name not in {each.name for each in program.outputs}:
            renamed = [re.sub(rf"\b{name}\b", other, each) for each in program.lines[n + 1 :]]
            yield program.with_parts((*program.lines[:n], *renamed), program.outputs)


def _without_symbols(program: Program) -> Iterator[Program]:
    if program.symbolic:
        yield replace(program, symbolic="")


def _living(program: Program) -> Program:
    read, kept = {each.name for each in program.outputs}, list[str]()
    for line in reversed(program.lines):
        names = set(re.findall(r"\b[a-z]\w*\b", line))
        made = set(re.findall(r"\b(\w+)(?:, (\w+))? = ", line)[0]) if " = " in line else names
        if made & read:
            kept.insert(0, line)
            read |= names
    return program.with_parts(kept, program.outputs)


def _fault(program: Program, batches: int) -> str | None:
    try:
        check(program, batches=batches)
    except Wrong as fault:
        return str(fault)
    except Exception:
        return None  # it is no program any more
    return None
