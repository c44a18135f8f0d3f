"""Everything that can go wrong with a file or a run, tried: the counts of every campaign, one command.

    python bench/faults.py            # all
    python bench/faults.py --quick    # fewer of each

Exit code 1 where anything was lost, or let in.
"""
import sys

import common
import fuzz
import kill
import torch

CAMPAIGNS = [fuzz, kill]  # modules with add_arguments(parser) and run(args) -> rows of counts, what went wrong

if __name__ == "__main__":
    parser = common.parser(__doc__)
    for campaign in CAMPAIGNS:
        campaign.add_arguments(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    failed = False
    for campaign in CAMPAIGNS:
        rows, wrong = campaign.run(args)
        print(f"\n## {campaign.__doc__.splitlines()[0]}")
        common.report(rows, args, "\n".join(wrong))
        failed |= bool(wrong)
    sys.exit(failed)
