"""Programs in the simulator: latency against load, throughput at equal latency, and scale.

    python recipes/bench/simulate_programs.py --rates 0.5,1,1.5,2 --num 300
    python recipes/bench/simulate_programs.py --scale 17000

The first prints the table of docs/benchmarks/serving-programs-simulated.md; the second opens so
many programs at once under `plas` and says what simulating them took. Everything is simulated.
"""

from __future__ import annotations

import argparse
import math
import resource
import time

import torch

from toolkit import ir, models
from toolkit.hardware import find_device
from toolkit.serve.simulate import agents, program_systems
from toolkit.serve.simulate.program_report import simulate, sustained
from toolkit.serve.simulate.systems import Setup
from toolkit.serve.split.cost_model import CostModel
from toolkit.serve.split.traced import model_work


def setup_of(model: str, device: str) -> Setup:
    """Return the model's costs on the device, with vLLM's default limits."""
    graph = ir.trace_model(models.load(model), dtype=torch.bfloat16, training=False, targets=False)
    cost = CostModel(model_work(graph), find_device(device))
    return Setup(cost, max_context=65_536, max_batch=256, step_tokens=2048)


def table(setup: Setup, workload: str, rates: list[float], num: int, limit_s: float) -> None:
    """Print every system at every rate, and the rate each sustains at the latency limit."""
    print("| system | programs/s | a token, mean | p95 | waiting | cached | preempted | promoted |")
    print("|---|---|---|---|---|---|---|---|")
    held: dict[str, float | None] = {}
    for name in program_systems.PROGRAM_SYSTEMS:
        points = []
        for rate in rates:
            made = list(agents.programs(workload, rate, num, seed=0))
            found, _ = simulate(program_systems.find(name), setup, made)
            spread = found["per_token_s"]
            points.append((rate, spread["mean"]))
            print(
                f"| `{name}` | {rate:g} | {1e3 * spread['mean']:.1f} ms | "
                f"{1e3 * spread['p95']:.1f} ms | {100 * found['waiting_part']:.0f} % | "
                f"{100 * found['prefix_hit']:.0f} % | {found['num_preemptions']} | "
                f"{found['num_promotions']} |",
                flush=True,
            )
        held[name] = sustained(points, limit_s)
    print(f"\nPrograms a second at a mean of {1e3 * limit_s:g} ms a token:")
    for name, rate in held.items():
        print(f"- `{name}`: {'below ' + format(rates[0], 'g') if rate is None else f'{rate:.2f}'}")


def scale(setup: Setup, num: int) -> None:
    """Open `num` programs at once and say what simulating them took."""
    began_s = time.process_time()
    made = agents.programs("agents", math.inf, num, seed=0)
    found, _ = simulate(program_systems.find("plas"), setup, made)
    took_s = time.process_time() - began_s
    most_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        f"{found['num_programs']} programs, {found['most_open']} open at once, "
        f"{found['num_calls']} calls, {found['num_tokens']} tokens of prompts and answers: "
        f"{took_s:.0f} s of one core, {most_bytes / 2**30:.2f} GiB at most"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llama3-8b")
    parser.add_argument("--device", default="a100-80g")
    parser.add_argument("--workload", default="agents", choices=agents.WORKLOADS)
    parser.add_argument("--rates", default="0.5,1,1.5,2")
    parser.add_argument("--num", type=int, default=300)
    parser.add_argument("--limit", type=float, default=0.05, help="seconds a token")
    parser.add_argument("--scale", type=int, help="open so many programs at once instead")
    options = parser.parse_args()
    setup = setup_of(options.model, options.device)
    if options.scale:
        scale(setup, options.scale)
    else:
        rates = [float(rate) for rate in options.rates.split(",")]
        table(setup, options.workload, rates, options.num, options.limit)


if __name__ == "__main__":
    main()
