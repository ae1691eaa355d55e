# SPDX-License-Identifier: Apache-2.0
"""Implementation of `avar generate` and `avar intervene sweep`."""

import hashlib
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from avar_verl.data.rows import batched, naming
from avar_verl.intervention.spec import InterventionSpec
from avar_verl.tools import rows
from avar_verl.tools.generate.answers import (
    Backend,
    Prompt,
    PromptReader,
    check_effect,
    default_dtype,
    open_backend,
)
from avar_verl.tools.generate.command import Generate, Sweep
from avar_verl.tools.generate.sweep import cell_results, grid, results_table, run_sweep, write_results
from avar_verl.tools.options import default_device
from avar_verl.tools.progress import progress
from avar_verl.tools.questions import Question, file_questions
from avar_verl.tools.records import Record, graded
from avar_verl.tools.runs import absolute, fingerprint

# ---- avar generate ------------------------------------------------------------------------------------------------


def _rows(options: Generate) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """(number, where, values) of what to answer."""
    if options.prompt is not None:
        yield 0, "--prompt", {"question": options.prompt, "images": list(options.image)}
        return
    for row in itertools.islice(rows.read(options.data, options.split), options.n or None):
        yield row.index, row.where, row.values


def generate(options: Generate) -> None:
    """Print the answers, or write them to a file.

    Raises:
        ValueError: a row or option that cannot be answered (named in the message), or an intervention without keys to
            scale.
    """
    spec = InterventionSpec.of(options.intervene)
    reader = PromptReader(options.model)

    def prompts() -> Iterator[tuple[int, Prompt]]:
        for number, where, values in _rows(options):
            with naming(where):
                found = rows.conversation(values, reader.patch_size, options.system)
                prompt = reader(found.prompt, found.template_kwargs)
            yield number, prompt

    pending = prompts()
    first = next(pending)  # Report invalid arguments before a model is loaded.
    backend = open_backend(options, reader)
    total = 1 if options.data is None else rows.count(options.data)
    total = min(options.n, total or options.n) if options.n else total
    bar = progress(desc="generate", total=total, unit="answer")
    keys, count, start = [0, 0], 0, time.monotonic()
    out = options.out.open("w") if options.out else None
    try:
        for batch in batched(itertools.chain([first], pending), options.batch_size):
            answers = backend.answers([prompt for _, prompt in batch], spec)
            for (number, prompt), answer in zip(batch, answers, strict=True):
                keys = [keys[0] + prompt.image_keys, keys[1] + prompt.system_keys]
                line = {
                    "row": number,
                    "response": answer.text,
                    "finish_reason": answer.finish_reason,
                    "prompt_tokens": answer.prompt_tokens,
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
        f"{count} answers in {time.monotonic() - start:.1f} s ({options.backend}, {spec}); a prompt has "
        f"{keys[0] / count:.1f} image keys and {keys[1] / count:.1f} system keys",
        file=sys.stderr,
    )


# ---- avar intervene sweep -----------------------------------------------------------------------------------------


def _asker(backend: Backend, prompts: dict[str, Prompt], batch_size: int) -> Any:
    """`ask(items, spec)` of `run_sweep`."""

    def ask(items: Sequence[Question], spec: InterventionSpec) -> Iterator[Record]:
        for batch in batched(items, batch_size):
            yield from map(graded, batch, backend.answers([prompts[item.id] for item in batch], spec))

    return ask


def sweep(options: Sweep) -> None:
    """Answer, compare, print, and write `sweep.json` and `sweep.png`.

    Raises:
        ValueError: an option, or a folder with answers of other settings.
    """
    lists = [f"{name}={value}" for name, value in (("layers", options.layers), ("heads", options.heads)) if value]
    chosen = InterventionSpec.parse(",".join(["alpha_img=0", *lists]))
    cells = grid(options.alpha_img, options.alpha_sys, chosen.layers, chosen.heads)
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    reader = PromptReader(options.model)
    items = list(itertools.islice(file_questions(options.data), options.n or None))
    prompts = {}
    for item in progress(items, "prompts", leave=False):
        images = [source if isinstance(source, dict) else {"bytes": source} for source in item.sources]
        found = rows.conversation({"prompt": list(item.messages), "images": images}, reader.patch_size)
        prompts[item.id] = reader(found.prompt)
    keys = [sum(getattr(prompt, name) for prompt in prompts.values()) for name in ("image_keys", "system_keys")]
    for spec in cells:
        check_effect(spec, *keys)
    settings = {
        "model": absolute(options.model),
        "model_files": fingerprint(Path(options.model)),
        "backend": options.backend,
        "dtype": options.dtype or default_dtype(reader, options.device or default_device()),
        "max_new_tokens": options.max_new_tokens,
        "data": hashlib.sha256(options.data.read_bytes()).hexdigest(),
    }
    backend = open_backend(options, reader)
    with progress(desc="sweep", total=len(cells) * len(items), unit="answer") as bar:

        def show(spec: InterventionSpec, done: int) -> None:
            bar.set_postfix_str(str(spec), refresh=False)
            bar.update(cells.index(spec) * len(items) + done - bar.n)

        correct = run_sweep(cells, items, _asker(backend, prompts, options.batch_size), out, settings, show)
    results = cell_results(correct)
    arguments = {name: value for name, value in asdict(options).items() if name not in ("model", "data", "out")}
    write_results(results, {**settings, "arguments": arguments}, out)
    Console(width=None if sys.stdout.isatty() else 120).print(results_table(results))
    best = max(results, key=lambda result: result.comparison.difference)
    print(
        f"{sum(result.is_significant for result in results)} of {len(results)} settings differ significantly; best: "
        f"{best.spec}, {100 * best.comparison.difference:+.1f} points. {out / 'sweep.json'}, {out / 'sweep.png'}"
    )
