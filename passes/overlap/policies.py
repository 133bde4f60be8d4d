"""Orders of a step's tasks that hide its communication. Each is a function of the tasks alone: one on all ranks."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from packc.passes.overlap.tasks import Order, Task, is_valid, longest_ways, started_by, total, users_of
from packc.passes.overlap.timeline import peak, simulate

EXACT_UP_TO = 12
"""Tasks: beyond, there are too many orders."""


def seconds(tasks: Sequence[Task], order: Order) -> float:
    """Where all ranks are alike."""
    return simulate([tasks], [order]).seconds


def program_order(tasks: Sequence[Task]) -> list[int]:
    return list(range(len(tasks)))


def early_and_late(tasks: Sequence[Task]) -> list[int]:
    """Collectives start where their operands are there, and are waited for before the first task that wants them."""
    placed: list[int] = []
    done: set[int] = set()
    starts = [number for number, task in enumerate(tasks) if task.kind == "start"]

    def place(number: int) -> None:
        for before in tasks[number].after:
            if before not in done:  # a wait that was put off
                place(before)
        placed.append(number)
        done.add(number)

    def ready_starts() -> list[int]:
        return [number for number in starts if number not in done and done.issuperset(tasks[number].after)]

    for number, task in enumerate(tasks):
        if task.kind == "compute" and number not in done:
            place(number)
        for start in ready_starts():
            place(start)
    for number in range(len(tasks)):
        if number not in done:
            place(number)
    return placed


def list_schedule(tasks: Sequence[Task], memory: int | None = None) -> list[int]:
    """Greedy: a collective as soon as it can start; while one is under way, work that is ready, the most urgent first;
    a wait once it has ended, or when nothing else is left to do.

    Urgent is what has the longest way to the end of the step (Graham, "Bounds on Multiprocessing Timing Anomalies",
    1969). Never slower than program order, which is what comes out where nothing is gained.

    Args:
        tasks: in program order.
        memory: bytes that may be alive at once; by default, what program order has at most. Where nothing that is ready
            fits, program order goes on.
    """
    usual = program_order(tasks)
    limit = peak(tasks, usual) if memory is None else memory
    found = [early_and_late(tasks), *(_greedy(tasks, limit, patient) for patient in (False, True))]
    candidates = [*found, *(filled(tasks, order, limit) for order in (usual, *found))]
    fitting = [order for order in candidates if peak(tasks, order) <= max(limit, peak(tasks, usual))]
    return min([usual, *fitting], key=lambda order: seconds(tasks, order))


def filled(tasks: Sequence[Task], order: Order, memory: int) -> list[int]:
    """``order``, in which work from before each collective is put off until it has started, as long as it lasts.

    The nearest first, whose operands need live the least longer: the gradients of weights, in a backward. Where that
    takes more than ``memory``, half as much is put off, and half of that.
    """
    users, found = users_of(tasks), list(order)
    starts = {started_by(tasks, number): number for number in order if tasks[number].kind == "wait"}
    for start, wait in reversed(starts.items()):  # what is moved is not another one's
        place = {number: at for at, number in enumerate(found)}
        here = place[start]
        between = [tasks[each] for each in found[here + 1 : place[wait]]]
        missing = tasks[start].seconds - total(between, "compute")
        moved: list[int] = []
        behind = set(found[here + 1 :])
        for number in reversed(found[:here]):
            if missing <= 0:
                break
            if tasks[number].kind == "compute" and behind.issuperset(users[number]):
                moved.append(number)
                behind.add(number)
                missing -= tasks[number].seconds
        while moved:
            off = set(moved)
            tried = [number for number in found[: here + 1] if number not in off] + moved[::-1] + found[here + 1 :]
            if peak(tasks, tried) <= memory:
                found = tried
                break
            moved = moved[: len(moved) // 2]
    return found


def _greedy(tasks: Sequence[Task], limit: int, patient: bool) -> list[int]:
    """``patient``: rather stand still than run what would end after a collective that more urgent tasks wait for."""
    users, ways = users_of(tasks), longest_ways(tasks)
    missing = [len(set(task.after)) for task in tasks]
    ready = {number for number, count in enumerate(missing) if not count}
    uses = [len(set(each)) for each in users]
    placed: list[int] = []
    ends: dict[int, float] = {}  # of collectives
    now = free = 0.0
    live = 0

    def grows(number: int) -> int:
        """Bytes more alive after a task, what it is the last to take being released."""
        released = sum(tasks[before].makes for before in set(tasks[number].after) if uses[before] == 1)
        return tasks[number].makes - released

    def worth(number: int) -> tuple[float, ...]:
        task = tasks[number]
        fits = live + task.makes <= limit
        if task.kind == "start":
            return (2, ways[number], -number)
        if task.kind == "wait":
            late = ends[started_by(tasks, number)] > now
        else:
            late = patient and any(now + task.seconds > end and ways[wait] > ways[number] for wait, end in pending())
        return (1 if fits and not late else 0, ways[number] if fits else -grows(number), -number)

    def pending() -> list[tuple[int, float]]:
        """Waits that are ready for collectives under way, and when these end."""
        waits = [(number, ends[started_by(tasks, number)]) for number in ready if tasks[number].kind == "wait"]
        return [(number, end) for number, end in waits if end > now]

    while ready:
        starts = [number for number in ready if tasks[number].kind == "start"]
        number = max(starts or ready, key=worth)
        ready.remove(number)
        task = tasks[number]
        live += grows(number)
        for before in set(task.after):
            uses[before] -= 1
        if task.kind == "start":
            free = ends[number] = max(now, free) + task.seconds
        elif task.kind == "wait":
            now = max(now, ends[started_by(tasks, number)])
        else:
            now += task.seconds
        placed.append(number)
        for user in set(users[number]):
            missing[user] -= 1
            if not missing[user]:
                ready.add(user)
    return placed


def coarse(tasks: Sequence[Task], branch: Collection[int]) -> list[int]:
    """Optimus's coarse move (arXiv 2408.03505): a branch as one piece, where it hides most.

    Args:
        tasks: in program order.
        branch: tasks of the branch; what it takes of others, and others of it, is kept to.
    """
    rest = [number for number in range(len(tasks)) if number not in branch]
    return _best_insertion(tasks, rest, sorted(branch), range(len(rest) + 1))


def fine(tasks: Sequence[Task], branch: Collection[int]) -> list[int]:
    """Optimus's fine moves: after the coarse one, kernel by kernel into the bubbles that are left, the last first."""
    order = coarse(tasks, branch)
    for number in sorted(branch, reverse=True):
        rest = [each for each in order if each != number]
        moved = _best_insertion(tasks, rest, [number], reversed(range(len(tasks))))
        if seconds(tasks, moved) <= seconds(tasks, order):
            order = moved
    return order


def _best_insertion(tasks: Sequence[Task], rest: list[int], piece: list[int], places: Iterable[int]) -> list[int]:
    """The first fastest order of ``rest`` with ``piece`` at one of ``places``; program order if it can be at none."""
    orders = [rest[:at] + piece + rest[at:] for at in places]
    valid = [order for order in orders if is_valid(tasks, order)]
    return min(valid or [program_order(tasks)], key=lambda order: seconds(tasks, order))


def exact(tasks: Sequence[Task]) -> list[int]:
    """The fastest order there is, by branch and bound.

    Raises:
        ValueError: more than :data:`EXACT_UP_TO` tasks.
    """
    if len(tasks) > EXACT_UP_TO:
        raise ValueError(f"{len(tasks)} tasks have too many orders: at most {EXACT_UP_TO}")
    ways = longest_ways(tasks)
    best = list_schedule(tasks)
    least = seconds(tasks, best)

    def extend(placed: tuple[int, ...], now: float, free: float, ends: dict[int, float]) -> None:
        nonlocal best, least
        left = [number for number in range(len(tasks)) if number not in placed]
        if not left:
            time = max([now, *ends.values()])
            if time < least:
                best, least = list(placed), time
            return
        # No order ends before all compute is done, nor before the longest way of what is left.
        bound = now + max(sum(tasks[n].seconds for n in left if tasks[n].kind == "compute"), max(ways[n] for n in left))
        if bound >= least:
            return
        for number in left:
            task = tasks[number]
            if not set(task.after) <= set(placed):
                continue
            if task.kind == "start":
                end = max(now, free) + task.seconds
                extend((*placed, number), now, end, {**ends, number: end})
            elif task.kind == "wait":
                extend((*placed, number), max(now, ends[started_by(tasks, number)]), free, ends)
            else:
                extend((*placed, number), now + task.seconds, free, ends)

    extend((), 0.0, 0.0, {})
    return best
