"""Everything that can go wrong with a file or a run, tried: the counts of both campaigns, one command.

    python tests/faults/campaign.py            # all
    python tests/faults/campaign.py --quick    # fewer of each

Exit code 1 where anything was lost, or let in.
"""
import sys
from pathlib import Path

import torch

if not __package__:  # run as a command
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]
from faults import fuzz, kill, report

CAMPAIGNS = [fuzz, kill]  # modules with add_arguments(parser) and run(args) -> rows of counts, what went wrong


def parse_args(argv=None):
    parser = report.make_parser(__doc__)
    for campaign in CAMPAIGNS:
        campaign.add_arguments(parser)
    return parser.parse_args(argv)


def main(argv=None) -> int:
    """The exit code: 1 where anything went wrong."""
    args = parse_args(argv)
    torch.set_num_threads(1)
    found, failed = [], False
    for campaign in CAMPAIGNS:
        rows, wrong = campaign.run(args)
        print(f"\n## {campaign.__doc__.splitlines()[0]}")
        report.write(rows, args, "\n".join(wrong), before=found)
        found += rows
        failed |= bool(wrong)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
