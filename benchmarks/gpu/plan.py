"""The steps of ``drive.py``, in their order: first what says whether anything is right, then how fast it is."""

from __future__ import annotations

import sys

from step import Facts, Step, failed, told_by

# Ways around a compiler that gets a kernel wrong; all that failed is tried with each of them.
VARIANTS = {
    "newer ptxas": {"TRITON_PTXAS_PATH": "{PACKC_GPU_PTXAS}"},
    "without wgmma": {"DISABLE_MMA_V3": "1"},
    "fewer warps": {"PACKC_GPU_WARPS": "4"},
}
# What a release may not ship because nobody knows whether it is right: products on Hopper's matrix units.
PROBES = {
    "wgmma": {"DISABLE_MMA_V3": "0"},
    "wgmma, newer ptxas": {"DISABLE_MMA_V3": "0", "TRITON_PTXAS_PATH": "{PACKC_GPU_PTXAS}"},
}
# What only a clock can decide, as both are right: of one op, another way to compute it.
CHOICES = {"back by 64 channels": ("selective_scan", {"PACKC_GPU_CHANNELS_BACK": "64"})}
SCANS = ("causal_conv1d", "selective_scan", "linear_scan")
PRODUCTS = ("linear_attention", "ssd", "gated_delta_rule", "gated_delta_rule_per_channel")


def steps(dry: bool) -> list[Step]:
    """With ``dry`` each has the limits that a test can wait for."""
    planned = [
        Step("card", ("card.py",), 40, least=20),
        Step("caches", ("prebuild.py", "--check"), 40, least=20),
        Step("compile", ("prebuild.py", "--here"), 120, least=60, quiet=120, ask=missing_kernels),
        Step("smoke", ("smoke.py",), 60, restarts=3),
        Step("cubins", ("cubins.py",), 30, ask=nothing_ran),
        Step("correct", ("correct.py",), 110, restarts=4, quiet=40),
        *(
            Step(name, ("correct.py",), 60, restarts=1, quiet=40, environment=tuple(way.items()), ask=what_failed)
            for name, way in VARIANTS.items()
        ),
        Step("sanitizer", ("compute-sanitizer", "--error-exitcode", "9", sys.executable, "tiny_backward.py"), 40),
        Step("times", ("times.py",), 60, least=20, restarts=2),
        Step("models", ("models.py",), 150, least=60, quiet=120, restarts=1),
        Step("peers", ("times.py", "--peers"), 100, least=40, quiet=100, restarts=2),
        Step("profile", ("profile_step.py",), 60, least=40),
        *(
            Step(name, ("correct.py",), 50, restarts=1, quiet=40, environment=tuple(way.items()), ask=products)
            for name, way in PROBES.items()
        ),
        *(
            Step(f"times, {name}", ("times.py", "--only", *PRODUCTS), 40, environment=tuple(way.items()))
            for name, way in PROBES.items()
        ),
        *(
            Step(f"times, {name}", ("times.py", "--only", op), 20, environment=tuple(way.items()))
            for name, (op, way) in CHOICES.items()
        ),
        Step("tests", ("gpu_tests.py",), 300, least=30),
    ]
    return [_dry(step) for step in planned] if dry else planned


def _dry(step: Step) -> Step:
    step = step._replace(limit=90, least=5, quiet=90)
    if step.name == "sanitizer":
        return step._replace(command=step.command[-1:])
    if step.name == "caches":
        return step._replace(command=(*step.command, "--only", "pack"))
    if step.name == "smoke":  # the kernels themselves
        return step._replace(environment=(("TRITON_INTERPRET", "1"),))
    return step


def missing_kernels(found: list[Facts]) -> list[str] | str:
    missed = [facts["case"] for facts in told_by("caches", found) if facts.get("missed") or failed(facts)]
    return ["--only", *missed] if missed else "all kernels travelled"


def nothing_ran(found: list[Facts]) -> list[str] | str:
    return "kernels run" if any(facts.get("ok") for facts in told_by("smoke", found)) else []


def what_failed(found: list[Facts]) -> list[str] | str:
    wrong = list(dict.fromkeys(facts["case"] for facts in told_by("correct", found) if failed(facts)))
    return ["--only", *wrong] if wrong else "nothing failed"


def products(found: list[Facts]) -> list[str] | str:
    return ["--only", *(f"{op} bf16 {form}" for op in PRODUCTS for form in ("packed", "rows", "packed long"))]


def mended(found: list[Facts], environment: dict[str, str]) -> dict[str, str]:
    """The environment of the first way in which everything is right that failed: the steps that follow run in it."""
    wrong = {facts["case"] for facts in told_by("correct", found) if failed(facts)}
    for name, way in VARIANTS.items():
        right = {facts["case"] for facts in told_by(name, found) if facts.get("ok")}
        if wrong and wrong <= right:
            return {key: text.format_map(environment) for key, text in way.items()}
    return {}
