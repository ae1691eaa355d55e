# SPDX-License-Identifier: Apache-2.0
"""The command lines of `avar generate` and `avar intervene`."""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from avar_verl.intervention.spec import InterventionSpec
    from avar_verl.tools.generate.answers import Backend, Prompt, PromptReader
    from avar_verl.tools.items import Item
    from avar_verl.tools.records import Record


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `avar generate` and `avar intervene sweep`."""
    generate = commands.add_parser(
        "generate", help="answers of a checkpoint, with or without a training-free intervention (docs/intervention.md)"
    )
    generate.add_argument("--data", help="rows in verl's layouts, or a data set of the hub (as for avar vas)")
    generate.add_argument("--split", help="of a data set of the hub")
    generate.add_argument("--prompt", help="a question, instead of --data; <image> where an image stands")
    generate.add_argument("--image", action="append", default=[], metavar="FILE", help="of --prompt, in order")
    generate.add_argument("--system", help="a system turn for conversations that have none")
    generate.add_argument("--intervene", metavar="SPEC", help="such as alpha_img=0.15,alpha_sys=0.4,layers=0-13")
    generate.add_argument("--n", type=int, default=0, help="only the first N rows (default: all)")
    generate.add_argument("--out", metavar="FILE.jsonl", help="one line an answer (default: print them)")
    _add_model(generate)
    generate.set_defaults(run=_generate)

    intervene = commands.add_parser("intervene", help="compare interventions (docs/intervention.md)")
    sweep = intervene.add_subparsers(dest="intervene_command", required=True).add_parser(
        "sweep", help="accuracy over a grid of alpha_img and alpha_sys, with significance and a plot; goes on if killed"
    )
    sweep.add_argument("--data", required=True, metavar="FILE", help="questions with answers, in verl's RL layout")
    sweep.add_argument("--alpha-img", required=True, type=_numbers, metavar="LIST", help="such as 0,0.15,0.3")
    sweep.add_argument("--alpha-sys", required=True, type=_numbers, metavar="LIST", help="such as 0,0.4")
    sweep.add_argument("--layers", metavar="LIST", help="such as 0-13 (default: all)")
    sweep.add_argument("--heads", metavar="LIST", help="query heads (default: all)")
    sweep.add_argument("--n", type=int, default=0, help="only the first N questions (default: all)")
    sweep.add_argument("--out", default="outputs/sweep", metavar="FOLDER", help="(default: %(default)s)")
    _add_model(sweep)
    sweep.set_defaults(run=_sweep)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="Hugging Face folder or name")
    parser.add_argument("--backend", choices=("transformers", "vllm"), default="transformers", help="(%(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="of an answer (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="prompts at a time (default: %(default)s)")
    parser.add_argument("--max-model-len", type=int, help="tokens that vLLM makes room for (default: the model's)")
    parser.add_argument("--device", help="torch device (default: cuda where there is one)")
    parser.add_argument("--dtype", help="(default: float32 on the CPU, else the checkpoint's)")


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _open(args: argparse.Namespace, reader: "PromptReader") -> "Backend":
    from avar_verl.tools.generate.answers import open_backend

    return open_backend(
        args.backend,
        args.model,
        reader,
        device=_device(args),
        dtype=args.dtype,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
        max_model_len=args.max_model_len,
    )


def _device(args: argparse.Namespace) -> str:
    import torch

    return args.device or ("cuda" if torch.cuda.is_available() else "cpu")


# ---- avar generate ------------------------------------------------------------------------------------------------


def _rows(args: argparse.Namespace) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """(number, where, values) of what to answer."""
    from avar_verl.tools import rows

    if (args.data is None) == (args.prompt is None):
        raise ValueError(f"avar generate needs --data or --prompt; got {'both' if args.data else 'neither'}. Give one.")
    if args.prompt is not None:
        yield 0, "--prompt", {"question": args.prompt, "images": args.image}
        return
    if args.image:
        raise ValueError(f"--image belongs to --prompt; got {args.image} with --data. Leave it out.")
    for row in rows.read(args.data, args.split):
        if args.n and row.index >= args.n:
            return
        yield row.index, row.where, row.values


def _generate(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from avar_verl.data.rows import batched, naming
    from avar_verl.intervention.spec import InterventionSpec
    from avar_verl.tools import rows
    from avar_verl.tools.generate.answers import PromptReader, check_effect

    spec = InterventionSpec.of(args.intervene)
    reader = PromptReader(args.model)

    def prompts() -> Iterator[tuple[int, "Prompt"]]:
        for number, where, values in _rows(args):
            with naming(where):
                found = rows.conversation(values, reader.patch_size, args.system)
                prompt = reader(found.prompt, found.template_kwargs)
            yield number, prompt

    pending = prompts()
    first = next(pending)  # What is wrong with the arguments is said before a model is loaded.
    backend = _open(args, reader)
    total = 1 if args.data is None else rows.count(args.data)
    bar = tqdm(total=min(args.n, total or args.n) if args.n else total, desc="generate", unit="answer")
    keys, count, start = [0, 0], 0, time.monotonic()
    out = Path(args.out).open("w") if args.out else None
    try:
        for batch in batched(_chain(first, pending), args.batch_size):
            answers = backend.answers([prompt for _, prompt in batch], spec)
            for (number, prompt), answer in zip(batch, answers, strict=True):
                keys = [keys[0] + prompt.image_keys, keys[1] + prompt.system_keys]
                line = {
                    "row": number,
                    "response": answer.text,
                    "finish_reason": answer.finish_reason,
                    "prompt_tokens": len(prompt.rendered.ids_S),
                    "response_tokens": answer.response_tokens,
                    "image_keys": prompt.image_keys,
                    "system_keys": prompt.system_keys,
                    "intervene": str(spec),
                }
                if out is None:
                    bar.write(answer.text)
                else:
                    out.write(json.dumps(line, ensure_ascii=False) + "\n")
                    out.flush()
                count += 1
                bar.update()
    finally:
        bar.close()
        if out is not None:
            out.close()
    check_effect(spec, *keys)
    print(
        f"{count} answers in {time.monotonic() - start:.1f} s ({args.backend}, {spec}); a prompt has "
        f"{keys[0] / count:.1f} image keys and {keys[1] / count:.1f} system keys",
        file=sys.stderr,
    )


def _chain(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


# ---- avar intervene sweep -----------------------------------------------------------------------------------------


def _asker(backend: "Backend", prompts: dict[str, "Prompt"], batch_size: int) -> Any:
    """`ask(items, spec)` of `run_sweep`."""
    from avar_verl.data.rows import batched
    from avar_verl.tools.records import graded

    def ask(items: Sequence["Item"], spec: "InterventionSpec") -> Iterator["Record"]:
        for batch in batched(items, batch_size):
            start = time.monotonic()
            answers = backend.answers([prompts[item.id] for item in batch], spec)
            seconds = time.monotonic() - start
            for item, answer in zip(batch, answers, strict=True):
                yield graded(
                    item,
                    answer.text,
                    prompt_tokens=len(prompts[item.id].rendered.ids_S),
                    response_tokens=answer.response_tokens,
                    finish_reason=answer.finish_reason,
                    seconds=seconds,
                )

    return ask


def _sweep(args: argparse.Namespace) -> None:
    import itertools

    from rich.console import Console
    from tqdm import tqdm

    from avar_verl.intervention.spec import InterventionSpec
    from avar_verl.tools.generate.answers import PromptReader, check_effect, default_dtype
    from avar_verl.tools.generate.sweep import cell_results, grid, results_table, run_sweep, write_results
    from avar_verl.tools.items import parquet_items
    from avar_verl.tools.rows import conversation
    from avar_verl.tools.runs import absolute, fingerprint

    lists = [f"{name}={value}" for name, value in (("layers", args.layers), ("heads", args.heads)) if value]
    chosen = InterventionSpec.parse(",".join(["alpha_img=0", *lists]))
    cells = grid(args.alpha_img, args.alpha_sys, chosen.layers, chosen.heads)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    reader = PromptReader(args.model)
    items = list(itertools.islice(parquet_items(Path(args.data)), args.n or None))
    prompts = {}
    for item in tqdm(items, desc="prompts", leave=False):
        images = [{"bytes": image} for image in item.images]
        found = conversation({"prompt": list(item.messages), "images": images}, reader.patch_size)
        prompts[item.id] = reader(found.prompt)
    keys = [sum(getattr(prompt, name) for prompt in prompts.values()) for name in ("image_keys", "system_keys")]
    for spec in cells:
        check_effect(spec, *keys)
    settings = {
        "model": absolute(args.model),
        "model_files": fingerprint(Path(args.model)),
        "backend": args.backend,
        "dtype": args.dtype or default_dtype(reader, _device(args)),
        "max_new_tokens": args.max_new_tokens,
        "data": hashlib.sha256(Path(args.data).read_bytes()).hexdigest(),
    }
    backend = _open(args, reader)
    with tqdm(total=len(cells) * len(items), desc="sweep", unit="answer") as bar:

        def progress(spec: "InterventionSpec", done: int) -> None:
            bar.set_postfix_str(str(spec), refresh=False)
            bar.update(cells.index(spec) * len(items) + done - bar.n)

        correct = run_sweep(cells, items, _asker(backend, prompts, args.batch_size), out, settings, progress)
    results = cell_results(correct)
    write_results(results, {**settings, "arguments": _plain(args)}, out)
    Console(width=None if sys.stdout.isatty() else 120).print(results_table(results))
    best = max(results, key=lambda result: result.comparison.difference)
    print(
        f"{sum(result.is_significant for result in results)} of {len(results)} settings differ significantly; best: "
        f"{best.spec}, {100 * best.comparison.difference:+.1f} points. {out / 'sweep.json'}, {out / 'sweep.png'}"
    )


def _plain(args: argparse.Namespace) -> dict[str, Any]:
    return {key: value for key, value in vars(args).items() if key not in ("run", "model", "data", "out")}
