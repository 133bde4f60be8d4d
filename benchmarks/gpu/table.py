"""The table that is printed last: a line a step, then what failed, then what was measured."""

from __future__ import annotations

from collections.abc import Sequence

import plan
from step import Facts, Step, failed, told_by

LINES, WIDTH = 25, 150
FAILURES = 6  # lines, while there is anything else to say


def lines(found: list[Facts], steps: Sequence[Step]) -> list[str]:
    needless = [facts["step"] for facts in found if "needless" in facts]
    of_steps = [_step(step.name, found) for step in steps if step.name not in needless]
    of_steps += [f"not needed     {', '.join(needless)}"] if needless else []
    wrong = verdicts(found)
    last = {str(facts.get("about", n)): str(facts["line"]) for n, facts in enumerate(found) if "line" in facts}
    measured = list(last.values())
    room = max(LINES - len(of_steps), 0)
    shown = wrong[: max(room - len(measured), min(FAILURES, room))]
    if len(shown) < len(wrong) and shown:
        shown[-1] = f"... and {len(wrong) - len(shown) + 1} more that failed: results.jsonl"
    everything = [*of_steps, *shown, *measured]
    return [" ".join(line.split("\n"))[:WIDTH] for line in everything[:LINES]]


def _step(name: str, found: list[Facts]) -> str:
    mine = [facts for facts in found if facts["step"] == name]
    told = told_by(name, found)
    words = [f"{name:14}", f"{sum(facts.get('seconds', 0) for facts in mine if 'ended' in facts):6.1f} s"]
    right, wrong = sum(facts.get("ok") is True for facts in told), sum(map(failed, told))
    if right or wrong:
        words.append(f"{right} right" + (f", {wrong} WRONG" if wrong else ""))
    elif told:
        words.append(f"{len(told)} told")
    words += [f"skipped: {facts['skipped']}" for facts in mine if "skipped" in facts and "case" not in facts]
    words += [facts["ended"] for facts in mine if facts.get("ended", "done") != "done"]
    if nonsense := sum(facts.get("nonsense", 0) for facts in mine):
        words.append(f"{nonsense} other lines: log.txt")
    return "  ".join(words) if mine else f"{name:14} not reached"


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
