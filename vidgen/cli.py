# SPDX-License-Identifier: Apache-2.0
"""The command line: verbs only; each is a function elsewhere, imported when its verb is used."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vidgen import __version__, config
from vidgen.io import LockError

UNEXPECTED, USER_ERROR, STOPPED, INTERRUPTED = 1, 2, 3, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code.

    0: done, also where SIGTERM ended training after a checkpoint. 1: anything unexpected, also another process of a
    run being gone. 2: something that the user gave does not fit, in one line. 3: training stopped itself, the last
    checkpoint is intact. 4: a step took longer than it may, see vidgen.parallel.watchdog. 130: ctrl-C.
    """
    # Threads that wait by spinning take the cores from those that work when anything else runs beside them; read by
    # the OpenMP library when torch, which is not imported yet, loads it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and options.verb not in ("train", "plan"):
        parser.error(f"unknown arguments: {' '.join(rest)} (see vidgen {options.verb} --help)")
    options.overrides, options.arguments = rest, list(sys.argv[1:] if arguments is None else arguments)
    is_first = os.environ.get("RANK", "0") == "0"  # of the processes of a run, which would all say the same
    logging.basicConfig(level=logging.WARNING if is_first else logging.ERROR, format="%(message)s")
    if not sys.stderr.isatty():  # transformers then leaves its progress bars out of the log
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from vidgen.train.errors import TrainingStopped

    try:
        return int(options.run(options) or 0)
    except KeyboardInterrupt:
        _say("vidgen: interrupted")
        return INTERRUPTED
    except (TrainingStopped, ValueError, OSError, ImportError, LockError) as error:
        if options.traceback:
            raise
        _say(f"vidgen {options.verb}: {error}")
        return STOPPED if isinstance(error, TrainingStopped) else USER_ERROR
    except FloatingPointError as error:  # of sampling: not what was asked for, but no error of a program either
        if options.traceback:
            raise
        _say(f"vidgen {options.verb}: {error}")
        return UNEXPECTED
    except Exception as error:
        if not _is_one_of_many():
            raise
        from vidgen.parallel.launch import say_once
        from vidgen.parallel.watchdog import lost_others

        if options.traceback or not lost_others(error):
            traceback.print_exc()
        else:
            text = f"rank {os.environ['RANK']}: another process is gone or does not answer: {error}"
            say_once(f"vidgen {options.verb}: {text}", unless_others_spoke=True)
        return UNEXPECTED


def _is_one_of_many() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _say(text: str) -> None:
    """Print a line on stderr; of the processes of a run, one does."""
    if not _is_one_of_many():
        print(text, file=sys.stderr)
        return
    from vidgen.parallel.launch import say_once

    say_once(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("vidgen", description="Train and sample video diffusion transformers.")
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    _add_train(_verb(verbs, "train", _train, "train a VAE or a DiT from a recipe"))
    _add_plan(_verb(verbs, "plan", _plan, "which parallelism a recipe can use on so many processes, and what it costs"))
    _add_sample(_verb(verbs, "sample", _sample, "prompts to videos"))
    _add_reconstruct(_verb(verbs, "reconstruct", _reconstruct, "send a clip through a VAE and back"))
    _add_convert(_verb(verbs, "convert", _convert, "weights from one system's files to another's"))
    env = _verb(verbs, "env", _env, "versions, devices, and which kernels can run")
    env.add_argument("--json", action="store_true", help="as JSON")
    env.add_argument("--variables", action="store_true", help="variables of the environment: values, meaning, advice")
    env.add_argument("--exports", metavar="KIND", help="lines for a shell that set what is suggested for such devices")
    return parser


def _verb(verbs: Any, name: str, run: Any, summary: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=summary, description=summary, allow_abbrev=False)
    parser.set_defaults(run=run)
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="one that vidgen env lists, or auto, the best (default)")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help="default fp32")
    parser.add_argument("--dry-run", action="store_true", help="print the settings and shapes, do nothing")


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.usage = "vidgen train CONFIG [--section.field VALUE ...] [--resume auto|none|PATH] [options]"
    parser.add_argument("config", type=Path, metavar="CONFIG", help="recipe (YAML or JSON), for example under configs/")
    parser.add_argument("--resume", default="auto", help="auto (default): from the newest checkpoint, if any")
    parser.add_argument("--replay", type=Path, metavar="FOLDER", help="repeat a skipped step and say what went wrong")
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="trace N steps into OUTPUT/profile")
    parser.add_argument("--nproc", type=int, metavar="N", help="start N processes on this node; several: use torchrun")
    again = "with --nproc: start all again this often if one is killed (default 0)"
    parser.add_argument("--max-restarts", type=int, default=0, metavar="K", help=again)
    parser.add_argument("--dry-run", action="store_true", help="print the resolved recipe and the shapes, do nothing")
    parser.epilog = "Any field of the recipe can be set: --training.steps 500 --optimizer.lr 3e-4 --output runs/a"


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.usage = "vidgen plan CONFIG --world N [--section.field VALUE ...] [options]"
    parser.add_argument("config", type=Path, metavar="CONFIG", help="recipe (YAML or JSON), for example under configs/")
    parser.add_argument("--world", type=int, required=True, metavar="N", help="processes, one for each device")
    parser.add_argument("--samples", type=int, metavar="N", help="keep this many samples a step; accumulation follows")
    parser.add_argument("--rows", type=int, default=12, metavar="N", help="combinations to print (default 12)")
    parser.add_argument("--json", action="store_true", help="all combinations and figures, as JSON")
    figures = {
        "device-memory": "GB of a device (default 80)",
        "tflops": "TFLOP/s that a device reaches (default: measured on an H100)",
        "node": "devices in a node (default 8)",
        "link": "GB/s that a device sends inside its node (default 360)",
        "network": "GB/s that a device sends to other nodes (default 40)",
    }
    for name, what in figures.items():
        parser.add_argument(f"--{name}", type=int if name == "node" else float, metavar="X", help=what)


def _add_sample(parser: argparse.ArgumentParser) -> None:
    parser.usage = "vidgen sample --model FOLDER --prompt TEXT [--prompt TEXT ...] [options]"
    flag = argparse.BooleanOptionalAction
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="run, checkpoint, or model folder")
    parser.add_argument("--prompt", action="append", default=[], help="may be given several times")
    parser.add_argument("--prompt-file", type=Path, metavar="FILE", help="a prompt or prompt@@image per line, or a csv")
    parser.add_argument(
        "--image", type=Path, action="append", default=[], metavar="FILE", help="given, for all prompts"
    )
    parser.add_argument("--video", type=Path, action="append", default=[], metavar="FILE", help="the same")
    parser.add_argument("--image-file", type=Path, metavar="FILE", help="on each line what is given for one prompt")
    parser.add_argument("--condition", metavar="TYPE", help="which frames are given: i2v, transition, i2v_tail, ...")
    parser.add_argument("--negative-prompt", metavar="TEXT")
    parser.add_argument("--output", type=Path, default=Path("outputs"), metavar="FOLDER", help="default outputs")
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt; the next have the next ones")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="prompts at once (default 1)")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float, help="1 is none")
    for name in ("guidance-rescale", "image-guidance", "shift", "noise-strength"):
        parser.add_argument(f"--{name}", type=float, metavar="X")
    parser.add_argument("--sampler", help="ddim or dpm")
    parser.add_argument("--dynamic-guidance", action=flag, help="guidance that follows the timestep")
    parser.add_argument("--zero-negative", action=flag, help="zeros in the place of the negative prompt")
    parser.add_argument("--oscillation", metavar="NAMES", help="of the guidance: some of text,image,temporal, or none")
    size = "also --height, --width; default: what the model was trained on"
    for name, what in (("frames", size), ("height", argparse.SUPPRESS), ("width", argparse.SUPPRESS)):
        parser.add_argument(f"--{name}", type=int, metavar="N", help=what)
    parser.add_argument("--fps", type=float, help="default: what the model was trained on")
    parser.add_argument("--tile-size", type=int, metavar="N", help="decode in tiles of this many pixels")
    parser.add_argument("--tile-frames", type=int, metavar="N", help="and of this many frames (Open-Sora 2.0)")
    others = "also --t5, --clip, --lora; default: the model's own"
    for name, what in (("vae", others), *((part, argparse.SUPPRESS) for part in ("t5", "clip", "lora"))):
        parser.add_argument(f"--{name}", type=Path, metavar="FOLDER", help=what)
    parser.add_argument(
        "--refine-prompts", type=Path, dest="refiner", metavar="FOLDER", help="language model that rewrites the prompts"
    )
    parser.add_argument("--image-model", type=Path, metavar="FOLDER", help="text-to-image model that makes the image")
    _add_spread(parser)
    _add_common(parser)


def _add_spread(parser: argparse.ArgumentParser) -> None:
    """Options of several processes: one line of help for all, docs/sampling.md has the rest."""
    names = ("ulysses", "ring", "tensor", "guidance-parallel")
    listed = " ".join(f"--{name} N" for name in names)
    parser.add_argument("--nproc", type=int, metavar="N", help=argparse.SUPPRESS)
    for name in names:
        parser.add_argument(f"--{name}", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--skiparse", default="heads", choices=("heads", "groups"), help=argparse.SUPPRESS)
    for name in ("shard", "offload"):
        parser.add_argument(f"--{name}", action="store_true", help=argparse.SUPPRESS)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter  # lines as they are: no option broken at its hyphen
    parser.epilog = (
        f"Several processes: --nproc N {listed}\n--skiparse heads|groups --shard --offload (docs/sampling.md)"
    )


def _add_reconstruct(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("clip", type=Path, metavar="CLIP", help="a video file")
    parser.add_argument("--vae", type=Path, required=True, metavar="FOLDER", help="VAE, or the run that trained it")
    parser.add_argument("--output", type=Path, default=Path("outputs"), metavar="FOLDER", help="default outputs")
    parser.add_argument(
        "--frames", type=int, default=17, metavar="N", help="4n+1 or 8n+1, as the VAE wants (default 17)"
    )
    parser.add_argument("--start", type=int, default=0, metavar="N", help="first frame (default 0)")
    parser.add_argument("--height", type=int, metavar="N", help="default: the clip's, cut to a multiple of 8")
    parser.add_argument("--width", type=int, metavar="N", help="default: the clip's, cut to a multiple of 8")
    parser.add_argument("--fps", type=float, help="default: the clip's")
    _add_common(parser)


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.usage = "vidgen convert SOURCE TARGET --to FORMAT [options]"
    parser.add_argument("source", type=Path, metavar="SOURCE", help="model folder, weights file, or training tree")
    parser.add_argument("target", type=Path, metavar="TARGET", help="what to write; must not exist")
    parser.add_argument("--to", required=True, metavar="FORMAT", help="hf, safetensors, pt, sat, mindspeed-mm, ...")
    parser.add_argument("--model", metavar="NAME", help="default: found from the names of tensors")
    parser.add_argument("--config", type=Path, metavar="FILE", help="config.json; default: the one in SOURCE")
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="tensor-parallel ranks of a tree (default 1)")
    parser.add_argument("--pp", metavar="10,11,11,10", help="layers of each pipeline stage")
    parser.add_argument("--vpp", metavar="4,4/4,4", help="the same with virtual stages: a row for each chunk")
    average = "the running average instead of the weights (default: only of a VAE's training checkpoint)"
    parser.add_argument("--ema", action=argparse.BooleanOptionalAction, help=average)
    parser.add_argument("--iteration", type=int, metavar="N", help="of a training tree (default: its newest)")
    parser.add_argument("--lora", type=Path, metavar="PATH", help="add these adapters to the weights")
    parser.add_argument("--lora-alpha", type=float, metavar="A", help="default: what their adapter_config.json says")
    parser.add_argument("--max-shard-bytes", type=int, default=5_000_000_000, metavar="N", help="default 5000000000")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the files, write nothing")
    parser.epilog = "Formats, models and the same in other systems' commands: docs/conversion.md"


def _train(options: argparse.Namespace) -> int:
    from vidgen.parallel import launch
    from vidgen.train.checkpoint import resume_after
    from vidgen.train.loop import train
    from vidgen.train.recipe import load_recipe
    from vidgen.train.skipped import replay
    from vidgen.train.tasks import describe

    recipe = load_recipe(options.config, options.overrides)
    if options.nproc is not None:
        launch.check(recipe.parallel, options.nproc, options.max_restarts)
    if options.dry_run:
        _print({"recipe": config.to_dict(recipe), **describe(recipe)})
        return 0
    if options.replay is not None:
        _print(replay(recipe, options.replay))
        return 0
    if options.nproc is not None:
        rest = launch.without(options.arguments, "--nproc", "--max-restarts")
        return launch.launch([sys.executable, "-m", "vidgen", *rest], options.nproc, max_restarts=options.max_restarts)
    resume = resume_after(recipe.output, options.resume, launch.restarts())
    report = train(recipe, resume=resume, profile_steps=options.profile)
    if launch.rank() == 0:
        _print({name: value for name, value in report.items() if not isinstance(value, list)})
    return 0


def _plan(options: argparse.Namespace) -> int:
    from vidgen.parallel import plan as planning
    from vidgen.parallel.timing import machine_with
    from vidgen.train.facts import plan
    from vidgen.train.recipe import load_recipe

    machine = machine_with(
        **{name: getattr(options, name) for name in ("device_memory", "tflops", "node", "link", "network")}
    )
    found = plan(load_recipe(options.config, options.overrides), options.world, machine, options.samples)
    if options.json:
        _print(planning.as_json(found))
    else:
        print(planning.text(found, options.rows))
    return 0


def _sample(options: argparse.Namespace) -> int:
    from vidgen.parallel import launch
    from vidgen.pipelines.prompts import read_references, read_requests, with_references
    from vidgen.pipelines.text_to_video import Request, SampleSettings, Spread, describe_sample, sample_videos

    requests = [Request(prompt) for prompt in options.prompt]
    requests += read_requests(options.prompt_file) if options.prompt_file else []
    listed = read_references(options.image_file) if options.image_file else None
    requests = with_references(requests, [*options.image, *options.video], listed)
    names = SampleSettings.__dataclass_fields__
    values = {name: value for name, value in vars(options).items() if name in names}
    values |= _oscillations(options.oscillation)
    settings = SampleSettings(**values)
    sizes = {name: getattr(options, name) for name in ("ulysses", "ring", "tensor", "skiparse", "shard", "offload")}
    spread = Spread(**sizes, guidance=options.guidance_parallel)
    if options.nproc is not None:
        launch.check(spread.parallel(options.nproc), options.nproc, 0)
    if options.dry_run:
        _print(describe_sample(options.model, settings, requests))
        return 0
    if options.nproc is not None:
        rest = launch.without(options.arguments, "--nproc")
        return launch.launch([sys.executable, "-m", "vidgen", *rest], options.nproc)
    is_spread = launch.is_one_of_many() or spread != Spread()
    results = sample_videos(options.model, requests, options.output, settings, spread if is_spread else None)
    if launch.rank() == 0:
        for result in results:
            print(result["video"])
    return 0


def _oscillations(names: str | None) -> dict[str, bool]:
    """The settings that ``--oscillation text,image`` stands for."""
    if names is None:
        return {}
    wanted, known = set() if names == "none" else set(names.split(",")), ("text", "image", "temporal")
    if unknown := wanted - set(known):
        raise ValueError(f"--oscillation: wanted some of {', '.join(known)}, or none, got {', '.join(sorted(unknown))}")
    return {f"{name}_oscillation": name in wanted for name in known}


def _reconstruct(options: argparse.Namespace) -> int:
    from vidgen.pipelines.reconstruct import ReconstructSettings, reconstruct

    names = ReconstructSettings.__dataclass_fields__
    settings = ReconstructSettings(**{name: value for name, value in vars(options).items() if name in names})
    _print(reconstruct(options.clip, options.vae, options.output, settings, dry_run=options.dry_run))
    return 0


def _convert(options: argparse.Namespace) -> int:
    from vidgen.checkpoints.convert import convert, read_stages

    names = ("to", "model", "config", "tp", "ema", "iteration", "lora", "lora_alpha", "max_shard_bytes", "dry_run")
    stages = read_stages(options.pp, options.vpp)
    given = {name: getattr(options, name) for name in names}
    _print(convert(options.source, options.target, stages=stages, **given))
    return 0


def _env(options: argparse.Namespace) -> int:
    from vidgen import environment

    if options.variables:
        print(environment.variables(os.environ))
    elif options.exports is not None:
        print("\n".join(environment.exports(options.exports, os.environ)))
    else:
        facts = environment.report()
        print(json.dumps(environment.as_json(facts), indent=2) if options.json else environment.text(facts))
    return 0


def _print(value: dict[str, Any]) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))
