"""The `mmtrain` command: finds the subcommand, reads its arguments, words its errors.

Subcommands are modules with HELP, configure(parser) and run(args). Ours lie in mmtrain/commands;
other packages register theirs as entry points in the group `mmtrain.commands`. Only the chosen
module is imported: help lines are read from the sources, so that `mmtrain --help` is instant.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from mmtrain.commands.listing import find_commands, help_line
from mmtrain.commands.wording import explain
from mmtrain.errors import MmtrainError, Terminated, nearest
from mmtrain.safe_text import presentable

EXAMPLES = """examples:
  mmtrain init --family llava --task scienceqa --out run.yaml
  mmtrain check run.yaml
  mmtrain train run.yaml optim.lr=1e-4
  mmtrain launch run.yaml --hostfile hosts
  mmtrain tune study.yaml
  mmtrain compare my-experiment --by components.llm.r --metric val/accuracy

`mmtrain COMMAND --help` explains one command."""
INTERRUPTED, BROKEN_PIPE, TERMINATED, FAULT = 130, 141, 143, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = without_local_rank(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        return _unless_pipe_breaks(arguments)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Terminated:
        return TERMINATED
    except Exception as error:
        message = str(error) if isinstance(error, MmtrainError) else explain(error)
        if message is None:  # a bug of ours: its traceback is the best message
            raise
        if debug:
            traceback.print_exc()
        if not isinstance(error, MmtrainError):
            message = presentable(" ".join(message.split()))
        print(f"error: {message}", file=sys.stderr)
        return error.exit_code if isinstance(error, MmtrainError) else FAULT


def _unless_pipe_breaks(arguments: Sequence[str]) -> int:
    try:
        code = _dispatch(arguments)
        sys.stdout.flush()  # a closed pipe must show here, not when Python exits
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


def entry() -> None:
    """The console command. Threads of a process group can abort Python as it ends: it is left out.

    By then everything is written; after an error of ours Python ends as usual.
    """
    code = main()
    distributed = sys.modules.get("mmtrain.distributed")
    if distributed is None or not distributed.was_initialised():
        sys.exit(code)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def without_local_rank(argv: Sequence[str]) -> list[str]:
    """The arguments less `--local_rank N`: DeepSpeed's launcher adds it, the environment counts."""
    kept: list[str] = []
    skip_value = False
    for argument in argv:
        name, equals, _ = argument.partition("=")
        if skip_value:
            skip_value = False
        elif name in ("--local_rank", "--local-rank"):
            skip_value = not equals
        else:
            kept.append(argument)
    return kept


def _dispatch(arguments: Sequence[str]) -> int:
    # Where it is installed peft imports it, and it tells everyone of a package that it lacks.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    commands = find_commands()
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview(commands))
        return 0 if arguments else FAULT
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(f"mmtrain {version('mmtrain')}")
        return 0
    name = arguments[0]
    if name not in commands:
        raise MmtrainError(f"unknown command '{name}';", nearest(name, commands))
    command = importlib.import_module(commands[name])
    parser = _Parser(
        prog=f"mmtrain {name}",
        description=command.HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.configure(parser)
    return command.run(_parse(parser, arguments[1:]))


class _Parser(argparse.ArgumentParser):
    """argparse repeats a wrong argument as it is."""

    def error(self, message: str) -> NoReturn:
        super().error(presentable(message))


def _parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """Options may stand between `a.b=c` overrides, except where argparse cannot do that."""
    swallowing = (argparse.PARSER, argparse.REMAINDER)
    if any(action.nargs in swallowing for action in parser._actions):
        return parser.parse_args(arguments)
    return parser.parse_intermixed_args(arguments)


def _overview(commands: dict[str, str]) -> str:
    width = max(map(len, commands))
    lines = [f"  {name:<{width}}  {help_line(commands[name])}" for name in sorted(commands)]
    return "\n".join(
        [
            "usage: mmtrain COMMAND [arguments] [--debug]",
            "",
            "Fine-tunes multimodal LLMs with parameter-efficient methods, on many machines.",
            "",
            "commands:",
            *lines,
            "",
            EXAMPLES,
        ]
    )


if __name__ == "__main__":
    entry()
