"""The command line. Nothing heavy is imported before it is known to be needed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import tyro
from tyro.conf import Positional

from contrastive_mm.domain import DOMAIN_REGISTRY, domain_commands
from contrastive_mm.errors import UserError, unknown_name

USAGE = """usage: contrastive-mm COMMAND ...

Contrastive representation learning for vision, text and reinforcement learning.

  contrastive-mm demo                          pretrain in all three domains, print a table, draw a report
  contrastive-mm vision --data DATA [...]      pretrain an image encoder
  contrastive-mm nlp --data DATA [...]         pretrain a sentence encoder
  contrastive-mm rl --data ENVIRONMENT [...]   pretrain an observation encoder
  contrastive-mm evaluate RUN                  score a run beside the untrained encoder and the raw input
  contrastive-mm embed RUN DATA --out FILE     write a data set's features to a Parquet file

`contrastive-mm COMMAND --help` lists a command's options."""


def _usage() -> str:
    """How to call the command line; domains of other packages are named, not imported."""
    lines = [
        f"  {f'contrastive-mm {name} --data DATA [...]':<44} pretrain an encoder; from package {package}"
        for name, package in DOMAIN_REGISTRY.packages().items()
    ]
    return USAGE if not lines else "\n".join([USAGE, "", "From other packages:", "", *lines])


def demo(output: Path = Path("runs/demo"), seeds: int = 3) -> None:
    """Pretrain encoders for digits, sentences and CartPole frames, and show that they learned.

    Args:
        output: folder for the runs and report.html.
        seeds: how many seeds to train each with.
    """
    from contrastive_mm.demo import run_demo

    run_demo(output, seeds)


def evaluate(run: Positional[Path], data: str | None = None) -> None:
    """Score a run's frozen encoder beside the untrained encoder and the raw input.

    Args:
        run: folder of the run.
        data: evaluate on other data than it was trained on.
    """
    from contrastive_mm.report import score_table, text_table
    from contrastive_mm.runs import evaluate_run, evaluation_files

    print(text_table(*score_table(evaluate_run(run, data))))
    print(f"\nPictures: {evaluation_files(run, data)[1]}")


def embed(run: Positional[Path], data: Positional[str], out: Path = Path("features.parquet")) -> None:
    """Write the features of a data set to a Parquet file with the columns id, label (where known), embedding.

    Args:
        run: folder of the run.
        data: what to embed: anything that the domain's --data takes.
        out: file to write.
    """
    from contrastive_mm.runs import embed_run

    embedded = embed_run(run, data, out)
    rows, dimensions = embedded.features.shape
    print(f"{out}: {rows} rows of {dimensions} dimensions")


COMMANDS: dict[str, Callable[..., None]] = {"demo": demo, "evaluate": evaluate, "embed": embed}
RUN_COMMANDS = ("evaluate", "embed")
"""Of these, what is done to a run, and may stand behind its domain's name too."""


def _train(domain: str, arguments: list[str]) -> None:
    from contrastive_mm.configuration import parse_run
    from contrastive_mm.runs import pretrain

    config, flags = parse_run(domain, arguments)
    output = flags.output or Path("runs") / f"{domain}-{config.method}"
    result = pretrain(config, output, flags.resume, flags.overwrite)
    print(
        f"{output}: {result['steps']} steps in {result['seconds']:.0f} s, loss {result['loss']:.4f}, "
        f"{result['samples_per_second']:.0f} samples/s.\nNext: contrastive-mm evaluate {output}"
    )


def _run_domain_command(domain: str, word: str, arguments: list[str]) -> None:
    """A command of the domain's own, or one that every domain's runs have."""
    own = domain_commands(domain)
    if word not in own and word not in RUN_COMMANDS:
        raise unknown_name(f"command of {domain}", word, sorted({*own, *RUN_COMMANDS}))
    command = own[word]() if word in own else COMMANDS[word]
    tyro.cli(command, prog=f"contrastive-mm {domain} {word}", args=arguments)


def _dispatch(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return
    name, rest = arguments[0], arguments[1:]
    domains = DOMAIN_REGISTRY.names()
    if name in domains and rest and not rest[0].startswith("-"):
        _run_domain_command(name, rest[0], rest[1:])
    elif name in COMMANDS:
        tyro.cli(COMMANDS[name], prog=f"contrastive-mm {name}", args=rest)
    elif name in domains:
        _train(name, rest)
    else:
        raise unknown_name("command", name, [*COMMANDS, *domains])


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what stands behind ``contrastive-mm``; by default the process's own.

    Returns:
        Exit status: 0, 2 for bad input (said in one line on standard error), 130 when interrupted.
    """
    try:
        _dispatch(sys.argv[1:] if arguments is None else arguments)
    except (UserError, OSError) as error:
        print(f"contrastive-mm: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "contrastive-mm: interrupted. Continue a training with --resume and its --output; repeat a command of "
            "several stages as it was.",
            file=sys.stderr,
        )
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
