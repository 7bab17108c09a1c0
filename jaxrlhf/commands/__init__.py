"""Names and help texts that the commands share."""

import argparse

USAGE = """\
jaxrlhf run CONFIG.yaml [--section.key value …]     all stages of a run, and its table
jaxrlhf sweep CONFIG.yaml --seeds 5 [--…]           every arm at the seeds 0 to 4 (3,5,9: at these), and one table of all
jaxrlhf sft | reward | ppo CONFIG.yaml [--…]        the stages up to that one (of round 1)
  … --dry_run | --replace                           of all these: print the stages and build none; replace another recipe's results
jaxrlhf preflight CONFIG.yaml [--…]                 what it would run into, on its own model and data, in a minute
jaxrlhf plan CONFIG.yaml [--devices 8] [--device h100] [--…]   memory and time of every phase, nothing run or fetched
jaxrlhf verify-resume CONFIG.yaml [--steps 4] [--…] whether a training that is killed half-way goes on to the same bits
jaxrlhf embed | nearest DATA --output FOLDER        vectors of preference pairs; the pairs nearest to a policy's text
jaxrlhf generate FOLDER [PROMPT …] [--file F]       sample from a policy
jaxrlhf evaluate A [B] --gold … | --judge MODEL     policies, stored responses or references against each other
jaxrlhf report RUN [RUN …] [--serve]                one page: table, figures, samples; --serve keeps it fresh
jaxrlhf verify RUN [RUN …]                          read every file of runs or stores, and name what is damaged
jaxrlhf launch --processes 2 run CONFIG.yaml [--…]  several processes on this machine, one run
jaxrlhf run CONFIG.yaml --help                      every key of the config
"""
RUN_COMMANDS = ("run", "sft", "reward", "ppo")  # a run, or its first stages; in several processes too
HELP = ("-h", "--help")
EPILOG = "Any other --section.key VALUE changes the recipe, as in `jaxrlhf run`"  # of commands with options of their own


def add_changing_arguments(parser: argparse.ArgumentParser) -> None:
    """What a run may do to the results that are in its folder."""
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help="print which stages are there and which would be built")
    parser.add_argument("--replace", action="store_true", help="put the results in the place of those that another recipe made")
