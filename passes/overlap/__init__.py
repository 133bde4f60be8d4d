"""Communication under compute: when collectives start and are waited for, and what runs in between.

A graph is a list of tasks on two streams (``tasks.py``); a schedule is an order of them (``policies.py``), whose time
and memory are simulated (``timeline.py``). :func:`hide_communication` gives a graph the order it is found best in.
"""

from packc.passes.overlap.hide_communication import hide_communication
from packc.passes.overlap.policies import early_and_late, exact, list_schedule, program_order
from packc.passes.overlap.tasks import Task
from packc.passes.overlap.timeline import Timeline, simulate
from packc.passes.overlap.waits import Schedule, Wait, schedule

__all__ = [
    "Schedule",
    "Task",
    "Timeline",
    "Wait",
    "early_and_late",
    "exact",
    "hide_communication",
    "list_schedule",
    "program_order",
    "schedule",
    "simulate",
]
