"""`mmtrain launch` with another rank program: `launch_program MODULE <launch arguments>`."""

from __future__ import annotations

import argparse
import sys

from launcher import command
from mmtrain.errors import MmtrainError


def main() -> int:
    """Launch MODULE as the command line would launch a training."""
    parser = argparse.ArgumentParser()
    command.configure(parser)
    try:
        return command.launch(parser.parse_intermixed_args(sys.argv[2:]), (sys.argv[1],))
    except MmtrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
