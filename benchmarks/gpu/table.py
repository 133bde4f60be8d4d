"""The table that is printed last: how the steps went, then what failed, then what was measured."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import plan
from step import Facts, Step, failed, told_by

LINES, WIDTH = 25, 150
BAD = 8  # lines of steps that went wrong
FAILURES = 6  # lines of what failed, while there is anything else to say


def lines(found: list[Facts], steps: Sequence[Step]) -> list[str]:
    of_steps = _steps(found, [step.name for step in steps])
    wrong = verdicts(found)
    last = {str(facts.get("about", n)): _line(facts) for n, facts in enumerate(found) if "line" in facts}
    measured = list(last.values())
    room = max(LINES - len(of_steps), 0)
    shown = wrong[: max(room - len(measured), min(FAILURES, room))]
    if len(shown) < len(wrong) and shown:
        shown[-1] = f"... and {len(wrong) - len(shown) + 1} more that failed: results.jsonl"
    everything = [*of_steps, *shown, *measured]
    return [" ".join(line.split("\n"))[:WIDTH] for line in everything[:LINES]]


def _line(facts: Facts) -> str:
    _, _, way = facts["step"].partition(", ")  # of "times, wgmma": as against plain "times"
    return f"{way}: {facts['line']}" if way else str(facts["line"])


def _steps(found: list[Facts], names: list[str]) -> list[str]:
    """Those that went well together, and a line for each of the others."""
    well, bad, skipped, needless = [], [], [], []
    for name in names:
        mine = [facts for facts in found if facts["step"] == name]
        told = told_by(name, found)
        right, wrong = sum(facts.get("ok") is True for facts in told), sum(map(failed, told))
        count = f"{right} right" if right or wrong else f"{len(told)} told"
        count += f", {wrong} WRONG" if wrong else ""
        words = f"{name} {sum(facts.get('seconds', 0) for facts in mine if 'ended' in facts):.0f} s, {count}"
        endings = [facts["ended"] for facts in mine if facts.get("ended", "done") != "done"]
        reasons = [facts["skipped"] for facts in mine if "skipped" in facts]
        if not mine:
            skipped.append(f"{name} (not reached)")
        elif any("needless" in facts for facts in mine):
            needless.append(name)
        elif wrong or endings:
            bad.append("; ".join([words, *endings, *(f"skipped: {reason}" for reason in reasons)]))
        elif reasons:
            skipped.append(f"{name} ({reasons[0]})")
        else:
            well.append(words)
    if len(bad) > BAD:
        bad = [*bad[: BAD - 1], f"... and {len(bad) - BAD + 1} more that went wrong: results.jsonl"]
    joined = {"done": "; ".join(well), "skipped": "; ".join(skipped), "not needed": ", ".join(needless)}
    return [*_wrapped("done", joined), *bad, *_wrapped("skipped", joined), *_wrapped("not needed", joined)]


def _wrapped(title: str, joined: dict[str, str]) -> list[str]:
    text = f"{title}: {joined[title]}"
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ") if joined[title] else []


def verdicts(found: list[Facts]) -> list[str]:
    """What failed, each once, with what mends it."""
    of_case: dict[str, str] = {}
    for facts in found:
        if failed(facts) and "case" in facts and facts["step"] not in plan.VARIANTS | plan.PROBES:
            what = facts["case"] if facts["step"] == "correct" else f"{facts['step']}: {facts['case']}"
            of_case.setdefault(what, str(facts.get("why", "wrong")))
    return [f"WRONG {case}: {why}{_mended(case, found)}" for case, why in of_case.items()]


def _mended(case: str, found: list[Facts]) -> str:
    tried = {name: facts.get("ok") for name in plan.VARIANTS for facts in told_by(name, found) if facts["case"] == case}
    if not tried:
        return ""
    right = [name for name, ok in tried.items() if ok]
    return f"; right with {', '.join(right)}" if right else f"; as wrong with {', '.join(tried)}"
