# SPDX-License-Identifier: Apache-2.0
"""Time and peak memory of plain attention and of attention with role masses, side by side in one run.

    python benchmarks/attention_mass.py [--lengths 1024 4096 16384] [--device cpu] [--dtype float32] [--repeats 5]

One layer of a 7B model: 28 query and 4 key/value heads of size 128, one sample, half of the keys are image tokens.
Variants:

- attention: torch's scaled_dot_product_attention, forward and backward;
- agto/*: the same plus the loss log(image mass) + log(system mass) of 64 queries, and its gradient;
- vars/*: only the forward pass, plus the masses of the last quarter of the positions;
- */matrix: computed from the full attention matrix, as in a straightforward implementation (up to --matrix-limit
  positions).

Every variant runs in its own process, so that its peak memory can be measured. The repeats of all variants alternate,
so that changes in the machine's load affect all of them. Ratios are medians over repeats, relative to the baseline of
the same repeat. Peak memory on the CPU is the growth of the resident set over the inputs; on a GPU, allocated memory.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext

H, K, D = 28, 4, 128
AGTO_QUERIES = 64


def peak_reset() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def resident(field: str) -> float:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(field))


def serve(variant: str, length: int, device: str, dtype: str, threads: int) -> None:
    """Worker: for every line on stdin, one measurement as a line of JSON."""
    import torch

    from avar_verl.attention.lse_mass import KeysByRole, LseTap
    from avar_verl.attention.mass import selected_mass
    from avar_verl.attention.visibility import Visibility
    from avar_verl.roles import TokenRole

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    make = dict(device=device, dtype=getattr(torch, dtype))
    trains = not variant.startswith("vars")
    query = torch.randn(1, H, length, D, **make, requires_grad=trains)
    key = torch.randn(1, K, length, D, **make, requires_grad=trains)
    value = torch.randn(1, K, length, D, **make, requires_grad=trains)
    grad_output = torch.randn(1, H, length, D, **make) if trains else None
    roles = torch.full((1, length), int(TokenRole.USER), device=device)
    roles[:, :16] = TokenRole.SYSTEM
    roles[:, 16 : 16 + length // 2] = TokenRole.IMAGE
    roles[:, -(length // 4) :] = TokenRole.RESPONSE
    count = AGTO_QUERIES if trains else length // 4
    positions = torch.arange(length - count, length, device=device)
    kind, _, implementation = variant.partition("/")

    wanted = (TokenRole.SYSTEM, TokenRole.IMAGE)

    def masses(lse=None):
        if implementation == "matrix":
            scores = query @ key.repeat_interleave(H // K, 1).mT * D**-0.5
            hidden = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
            weights = scores.masked_fill(hidden, float("-inf")).softmax(-1, dtype=torch.float32)
            onehot = torch.nn.functional.one_hot(roles, len(TokenRole)).float()
            return (weights @ onehot[:, None])[:, :, positions]
        selected, visibility = query[:, :, positions], Visibility(positions[None])
        if lse is not None:  # A model sorts keys by role once for all layers; here there is only one layer.
            keys = KeysByRole(roles, wanted)
            return selected_mass(selected, key, roles, visibility, lse_BHQ=lse[:, :, positions], keys=keys)
        return selected_mass(selected, key, roles, visibility, implementation=implementation)

    def step():
        # Masses before attention if possible, as in `capture_mass`: their gradient is then added to that of attention.
        mass = masses() if implementation and implementation != "lse" else None
        with LseTap() if implementation == "lse" else nullcontext() as tap:
            # Repeat keys and values, as transformers does.
            keys, values = key.repeat_interleave(H // K, 1), value.repeat_interleave(H // K, 1)
            out = torch.nn.functional.scaled_dot_product_attention(query, keys, values, is_causal=True)
        if tap is not None:
            masses(tap.lse(1, H, length))
        if trains:
            losses = (
                [(out * grad_output).sum()]
                if mass is None
                else [
                    (out * grad_output).sum(),
                    mass[..., TokenRole.IMAGE].mean(2).log().sum() + mass[..., TokenRole.SYSTEM].mean(2).log().sum(),
                ]
            )
            sum(losses).backward()
            query.grad = key.grad = value.grad = None

    gpu = device != "cpu"
    with torch.set_grad_enabled(trains):
        step()
        for _ in sys.stdin:
            if gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated() / 2**20
            else:
                peak_reset()
                before = resident("VmRSS")
            start = time.perf_counter()
            step()
            if gpu:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            peak = torch.cuda.max_memory_allocated() / 2**20 if gpu else resident("VmHWM")
            print(json.dumps({"seconds": seconds, "mebibytes": peak - before}), flush=True)


class Worker:
    def __init__(self, variant: str, arguments, length: int):
        command = [sys.executable, __file__, "--serve", variant, "--lengths", str(length)]
        command += ["--device", arguments.device, "--dtype", arguments.dtype, "--threads", str(arguments.threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def measure(self) -> dict:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended with exit code {self.process.wait()}; see its message above")
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def compare(baseline: str, others: list[str], arguments, length: int) -> None:
    """Print one row per variant; the workers take turns, and each lives through all repeats."""
    workers = {variant: Worker(variant, arguments, length) for variant in (baseline, *others)}
    results: dict[str, list[dict]] = {variant: [] for variant in workers}
    try:
        for _ in range(arguments.repeats):
            for variant, worker in workers.items():
                results[variant].append(worker.measure())
    finally:
        for worker in workers.values():
            worker.close()
    base = results[baseline]
    for variant, rows in results.items():
        ratio = statistics.median(row["seconds"] / b["seconds"] for row, b in zip(rows, base, strict=True))
        seconds = statistics.median(row["seconds"] for row in rows)
        memory = statistics.median(row["mebibytes"] for row in rows)
        memory_ratio = memory / statistics.median(row["mebibytes"] for row in base)
        print(
            f"| {length} | {variant} | {seconds:.3f} | {ratio:.2f} x | {memory:.0f} | {memory_ratio:.2f} x |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    parser.add_argument("--matrix-limit", type=int, default=2048, help="longest length for the full matrix")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.lengths[0], arguments.device, arguments.dtype, arguments.threads)
        return
    implementations = ["chunked"] + (["triton"] if arguments.device != "cpu" else [])
    print(
        f"{arguments.device}, {arguments.dtype}, {arguments.threads} threads, {platform.processor() or 'unknown CPU'}"
    )
    print("| positions | variant | seconds | time / baseline | peak MiB | memory / baseline |")
    print("| --- | --- | --- | --- | --- | --- |")
    for length in arguments.lengths:
        names = implementations + (["matrix"] if length <= arguments.matrix_limit else [])
        compare("attention", [f"agto/{name}" for name in names], arguments, length)
        forward_names = (["lse"] if arguments.device == "cpu" else []) + names
        compare("vars", [f"vars/{name}" for name in forward_names], arguments, length)


if __name__ == "__main__":
    main()
