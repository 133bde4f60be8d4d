"""The driver ends on time with all that was found, whatever a step does."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import child
import drive
import plan
import pytest
import table
from step import Step

SAY = "import json, sys, time, os; say = lambda **facts: print(json.dumps(facts), flush=True)\n"


def step(name, code, limit=20.0, **more):
    return Step(name, (sys.executable, "-c", SAY + code), limit, least=0.2, **more)


def run(steps, out, seconds=30.0):
    return drive.drive(steps, out, time.monotonic() + seconds, dict(os.environ))


def of(found, name):
    return [{k: v for k, v in facts.items() if k not in ("at", "step")} for facts in found if facts["step"] == name]


def gone(pid):
    """Soon; a zombie, which its new parent has not noticed yet, is gone."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


GOOD = "say(case='good', ok=True, line='good takes 1 ms')"


def test_steps_run_in_order_and_what_they_say_is_kept(tmp_path, capsys):
    found = run([step("one", GOOD), step("two", "say(case='bad', ok=False, why='nan')")], tmp_path)
    assert [facts["step"] for facts in found] == ["one", "one", "two", "two"]
    assert [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()] == found
    printed = capsys.readouterr().out.splitlines()
    assert printed == (tmp_path / "table.txt").read_text().splitlines()
    assert printed == [
        "done: one 0 s, 1 right",
        "two 0 s, 0 right, 1 WRONG",
        "WRONG two: bad: nan",
        "good takes 1 ms",
    ]


def test_a_line_is_in_the_file_as_soon_as_it_is_said(tmp_path):
    seen = "say(case='early'); time.sleep(0.5); say(case='seen', lines=len(open(sys.argv[1]).readlines()))"
    steps = [step("one", seen)]
    steps[0] = steps[0]._replace(command=(*steps[0].command, str(tmp_path / "results.jsonl")))
    assert of(run(steps, tmp_path), "one")[1]["lines"] == 1


def test_a_step_that_crashes_ends_only_itself(tmp_path):
    crash = "say(begin='a'); say(case='a', ok=True); say(begin='b'); os.abort()"
    found = run([step("one", crash), step("two", GOOD)], tmp_path)
    assert {"case": "b", "ok": False, "why": "crashed: SIGABRT"} in of(found, "one")
    assert of(found, "two")[0]["ok"]


@pytest.mark.parametrize("deaf", ["", "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"])
@pytest.mark.parametrize("session", [False, True])
def test_a_step_that_hangs_is_ended_with_all_that_it_started(tmp_path, monkeypatch, deaf, session):
    monkeypatch.setattr(child, "GRACE", 0.5)
    pid = tmp_path / "pid"
    hang = deaf + (
        "import subprocess; sleep = [sys.executable, '-c', 'import time; time.sleep(60)']\n"
        f"p = subprocess.Popen(sleep, start_new_session={session})\n"
        f"open({str(pid)!r}, 'w').write(str(p.pid)); say(begin='slow'); time.sleep(60)"
    )
    began = time.monotonic()
    found = run([step("one", hang, quiet=2.0), step("two", GOOD)], tmp_path)
    assert time.monotonic() - began < 30
    assert {"case": "slow", "ok": False, "why": "stopped: silent for 2 s"} in of(found, "one")
    assert of(found, "two")[0]["ok"]
    assert gone(int(pid.read_text()))


def test_a_step_goes_on_after_the_case_that_ended_it(tmp_path):
    cases = (
        "names = ['a', 'b', 'c']; after = sys.argv[2] if len(sys.argv) > 2 else None\n"
        "for name in names[names.index(after) + 1 if after else 0:]:\n"
        "    say(begin=name)\n"
        "    if name == 'b': os.abort()\n"
        "    say(case=name, ok=True)"
    )
    told = of(run([step("one", cases, restarts=2)], tmp_path), "one")
    assert [(facts["case"], facts["ok"]) for facts in told if "case" in facts] == [
        ("a", True),
        ("b", False),
        ("c", True),
    ]


def test_nonsense_goes_to_the_log(tmp_path):
    nonsense = (
        "sys.stdout.buffer.write(b'\\xff\\xfe{\\n[1, 2]\\nnull\\n' + b'[' * 100000 + b'\\n{\"case\": 3}\\nx' * 1000)\n"
        "sys.stdout.flush(); print(); print('at stderr', file=sys.stderr); say(case='fine', ok=True)"
    )
    told = of(run([step("one", nonsense)], tmp_path), "one")
    assert told[0] == {"case": "fine", "ok": True}
    assert told[1]["nonsense"] > 1000
    assert "at stderr" in (tmp_path / "log.txt").read_text()


def test_the_log_has_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr(drive, "LOG", 10_000)
    run([step("one", "for _ in range(5000): print('x' * 99)")], tmp_path)
    assert (tmp_path / "log.txt").stat().st_size < 11_000


def test_a_deadline_in_the_middle_ends_the_step_and_skips_the_rest(tmp_path):
    began = time.monotonic()
    hang = step("one", "say(case='early', ok=True); say(begin='late'); time.sleep(60)")
    found = run([hang, step("two", GOOD)._replace(least=10)], tmp_path, seconds=drive.RESERVE + 3)
    assert time.monotonic() - began < drive.RESERVE + 10
    assert {"case": "early", "ok": True} in of(found, "one")
    assert of(found, "two")[0]["skipped"].startswith("wants 10 s")


def test_told_to_end_it_prints_the_table_first(tmp_path):
    said = SAY + "say(case='a', ok=True); time.sleep(60)"
    code = (
        f"import sys, time, os; sys.path.insert(0, {str(Path(drive.__file__).parent)!r})\n"
        "import drive; from step import Step\n"
        f"steps = [Step('one', (sys.executable, '-c', {said!r}), 60)]\n"
        f"drive.drive(steps, drive.Path({str(tmp_path)!r}), time.monotonic() + 60, dict(os.environ))"
    )
    driver = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "results.jsonl").exists() or not (tmp_path / "results.jsonl").read_text():
        time.sleep(0.05)
    driver.send_signal(signal.SIGTERM)
    printed, _ = driver.communicate(timeout=10)
    assert "1 right" in printed
    assert "stopped: SIGTERM" in printed


def test_what_cannot_start_is_said(tmp_path):
    told = of(run([Step("one", ("/no/such/program",), 10, least=0)], tmp_path), "one")
    assert told[0]["ended"].startswith("did not start")


@pytest.mark.parametrize("bad", [0, 1, 99])
def test_the_table_has_no_more_lines_than_fit_and_some_of_everything(bad):
    steps = plan.steps(dry=False)
    found = [{"step": step.name, "ended": "crashed: SIGABRT" if n < bad else "done"} for n, step in enumerate(steps)]
    found += [{"step": "correct", "case": str(n), "ok": False, "why": "far off\nby a lot"} for n in range(50)]
    found += [{"step": "times", "case": str(n), "line": "x" * 999} for n in range(50)]
    lines = table.lines(found, steps)
    assert len(lines) == table.LINES
    assert all(len(line) <= table.WIDTH and "\n" not in line for line in lines)
    assert any("more that failed" in line for line in lines)
    assert sum("x" * 99 in line for line in lines) >= 8


def test_a_later_line_takes_the_place_of_one_about_the_same():
    found = [{"step": "models", "case": x, "about": "130m", "line": x} for x in ("packed", "packed and padded")]
    assert table.lines(found, [])[-1:] == ["packed and padded"]
    assert "packed" not in table.lines(found, [])


def test_what_failed_is_tried_in_other_ways_and_the_rest_runs_in_the_one_that_mends_it(tmp_path):
    found = [
        {"step": "correct", "case": "a", "ok": True},
        {"step": "correct", "case": "b", "ok": False, "why": "off"},
        {"step": "newer ptxas", "case": "b", "ok": False},
        {"step": "without wgmma", "case": "b", "ok": True},
    ]
    assert plan.what_failed(found) == ["--only", "b"]
    assert plan.what_failed(found[:1]) == "nothing failed"
    assert plan.mended(found[:3], {}) == {}
    assert plan.mended(found, {"PACKC_GPU_PTXAS": "/p"}) == {"DISABLE_MMA_V3": "1"}
    assert table.verdicts(found) == ["WRONG b: off; right with without wgmma"]
