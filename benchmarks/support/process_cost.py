"""Measure the wall time and peak memory of whole commands, run in turns.

This is a small program on its own, because the peak memory of a child process starts at that of its parent: a parent
that has imported PyTorch could not measure it.

usage: python process_cost.py ROUNDS '["command", "argument"]' '["other command"]' ...
Prints a JSON list with one object per command: the medians `wall_s` and `peak_kb`, and the last `output`.
"""

import json
import os
import subprocess
import sys
import time


def run(command: list[str]) -> tuple[float, int, str]:
    """Return the seconds, the peak resident memory in kilobytes, and the standard output."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    elapsed = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command} exited with status {process.returncode}")
    return elapsed, usage.ru_maxrss, output


def main() -> None:
    rounds, commands = int(sys.argv[1]), [json.loads(argument) for argument in sys.argv[2:]]
    for command in commands:
        run(command)
    taken = [[run(command) for command in commands] for _ in range(rounds)]
    results = []
    for position in range(len(commands)):
        runs = [turn[position] for turn in taken]
        middle = len(runs) // 2
        results.append(
            {
                "wall_s": sorted(wall for wall, _, _ in runs)[middle],
                "peak_kb": sorted(peak for _, peak, _ in runs)[middle],
                "output": runs[-1][2],
            }
        )
    sys.stdout.write(json.dumps(results))


if __name__ == "__main__":
    main()
