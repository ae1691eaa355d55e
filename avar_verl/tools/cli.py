# SPDX-License-Identifier: Apache-2.0
"""The console script `avar`."""

import argparse
import json
import os
import sys
from pathlib import Path


def _demo(args: argparse.Namespace) -> None:
    from avar_verl.tools.demo.run import run_demo

    run_demo(Path(args.out), fresh=args.fresh, **json.loads(args.settings))


def _vas(args: argparse.Namespace) -> None:
    from rich.console import Console

    if args.vas_command == "compare":
        from avar_verl.tools.vas.compare import run_compare

        run_compare(args.files, args.scores, Path(args.out) if args.out else None, Console())
        return
    from avar_verl.tools.vas.run import VasSettings, default_device, run_vas
    from avar_verl.tools.vas.score import QUERIES
    from avar_verl.tools.vas.show import print_summary

    missing = [name for name in ("--model", "--data") if getattr(args, name[2:]) is None]
    if missing:
        raise ValueError(f"a measurement needs a model and data; got no {' and no '.join(missing)}. Add it.")
    settings = VasSettings(
        model=args.model,
        data=args.data,
        split=args.split,
        columns=dict(pair.partition("=")[::2] for pair in args.columns),
        n=args.n,
        queries=tuple(QUERIES) if args.query == "both" else (args.query,),
        layers=None if args.layers is None else tuple(args.layers),
        max_new_tokens=args.max_new_tokens if args.generate else None,
        system=args.system,
        device=args.device or default_device(),
        dtype=args.dtype,
        batch_size=args.batch_size,
        ray_workers=args.ray,
        show=args.show,
        words=None if args.words is None else tuple(args.words),
    )
    out = Path(args.out) if args.out else None
    print_summary(run_vas(settings, out), out, Console())


def _rewards_score(args: argparse.Namespace) -> None:
    from rich.console import Console

    from avar_verl.tools.rewards.offline import score_file

    settings = json.loads(args.settings)
    out = Path(args.out) if args.out else None
    score_file(Path(args.data), args.reward, settings, args.n, args.show, out, Console())


def _doctor(args: argparse.Namespace) -> None:
    if args.env:
        from avar_verl.tools.doctor.env import run_env

        sys.exit(run_env())
    from rich.console import Console

    from avar_verl.tools.doctor.run import run_doctor

    ok = run_doctor(
        args.model,
        Path(args.out) if args.out else None,
        Console(),
        only=args.only,
        device=args.device,
        data=Path(args.data) if args.data else None,
        rollout=args.rollout,
        gpus=args.gpus,
        gpu_memory=args.gpu_memory,
    )
    if not ok:
        sys.exit(1)


def parser() -> argparse.ArgumentParser:
    """The command line: `avar demo`, `avar vas`, `avar rewards score`, `avar data check`, `avar doctor`, ...."""
    top = argparse.ArgumentParser(prog="avar", description="AVAR on verl.")
    commands = top.add_subparsers(dest="command", required=True)

    demo = commands.add_parser("demo", help="the whole recipe on a tiny model, on this machine, with a report")
    demo.add_argument("--out", default="outputs/demo", help="folder of the run (default: %(default)s)")
    demo.add_argument("--fresh", action="store_true", help="delete the folder and start over")
    demo.add_argument("--settings", default="{}", metavar="JSON", help="fields of DemoSettings to replace")
    demo.set_defaults(run=_demo)

    vas = commands.add_parser(
        "vas", help="Visual Attention Score of a checkpoint, with a report (docs/vas.md); `avar vas compare` of several"
    )
    vas.add_argument("--model", help="Hugging Face folder or name")
    vas.add_argument("--data", help="parquet or jsonl file as for SFT or RL, or a folder of them, or a hub data set")
    vas.add_argument("--split", help="of a hub data set")
    vas.add_argument(
        "--columns", nargs="+", default=[], metavar="NAME=COLUMN", help="of data with other columns: question=query"
    )
    vas.add_argument("--n", type=int, default=0, help="only the first N rows (default: all)")
    vas.add_argument("--query", choices=("user", "response", "both"), default="both", help="(default: %(default)s)")
    vas.add_argument("--layers", type=int, nargs="+", help="(default: all)")
    vas.add_argument("--generate", action="store_true", help="measure responses that the model generates, greedily")
    vas.add_argument("--max-new-tokens", type=int, default=1024, help="with --generate (default: %(default)s)")
    vas.add_argument("--system", metavar="TEXT", help="system turn of conversations that have none")
    vas.add_argument("--batch-size", type=int, default=8)
    vas.add_argument("--device", help="torch device (default: cuda where this process sees a GPU, else cpu)")
    vas.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    vas.add_argument("--ray", type=int, default=0, metavar="N", help="N workers on a Ray cluster (default: none)")
    vas.add_argument("--show", type=int, default=4, metavar="N", help="samples whose words are shown in the report")
    vas.add_argument("--words", nargs="+", help="words to show (default: those that look most at the image)")
    vas.add_argument("--out", metavar="DIR", help="folder for vas.json, report.html and the records; resumes in it")
    vas.set_defaults(run=_vas)
    compare = vas.add_subparsers(dest="vas_command", metavar="compare").add_parser(
        "compare", help="checkpoints beside each other, and VAS against benchmark scores"
    )
    compare.add_argument("files", nargs="+", metavar="[NAME=]VAS.JSON", help="the first one is what others differ from")
    compare.add_argument("--scores", metavar="CSV", help="a column `name`, and one for every benchmark")
    compare.add_argument("--out", metavar="DIR", help="folder for compare.json and compare.html")

    rewards = commands.add_parser("rewards", help="try a reward function on recorded rollouts")
    score = rewards.add_subparsers(dest="rewards_command", required=True).add_parser(
        "score", help="score a file of rollouts: table, histogram, anchors highlighted in the text"
    )
    score.add_argument("data", help="jsonl (as verl's trainer.rollout_data_dir writes it) or parquet")
    score.add_argument(
        "--reward", default="visual_anchor", help="shipped name, file or pkg://module (default: %(default)s)"
    )
    score.add_argument("--settings", default="{}", metavar="JSON", help="keyword arguments of compute_score")
    score.add_argument("--n", type=int, default=0, help="only the first N rows (default: all)")
    score.add_argument("--show", type=int, default=3, help="print this many responses (default: %(default)s)")
    score.add_argument("--out", help="write every rollout's parts to this jsonl file")
    score.set_defaults(run=_rewards_score)

    from avar_verl.tools.check.command import add_parser

    add_parser(commands)

    doctor = commands.add_parser(
        "doctor", help="examine a model before GPU time is spent on it; exit code 1 if a check fails (docs/doctor.md)"
    )
    subject = doctor.add_mutually_exclusive_group(required=True)
    subject.add_argument("--model", help="Hugging Face folder")
    subject.add_argument("--env", action="store_true", help="no model: the installed packages beside the tested ones")
    doctor.add_argument("--data", metavar="FILE", help="training rows, rendered by this model (as avar data check)")
    doctor.add_argument("--rollout", action="store_true", help="really start vLLM and compare it with transformers")
    doctor.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    doctor.add_argument("--gpus", type=int, default=1, help="GPUs that share the training (default: %(default)s)")
    doctor.add_argument("--gpu-memory", type=float, metavar="GIB", help="of each: warn if the training needs more")
    doctor.add_argument("--only", nargs="+", metavar="CHECK", help="these checks, and those that they need")
    doctor.add_argument("--out", help="write the results to this JSON file")
    doctor.set_defaults(run=_doctor)

    from avar_verl.tools.evaluate.command import add_parser

    add_parser(commands)

    from avar_verl.tools.generate.command import add_parser

    add_parser(commands)

    from avar_verl.tools.synth.commands import add_parser

    add_parser(commands)
    return top


def main() -> None:
    """Entry point. Exit code 0 only on success; a rule that was broken is one line, not a traceback."""
    args = parser().parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1" if args.command == "demo" else "0")
    try:
        args.run(args)
    except (ValueError, RuntimeError, FileNotFoundError) as error:
        sys.exit(f"avar {args.command}: {error}")


if __name__ == "__main__":
    main()
