"""Names and help texts that the commands share."""

USAGE = """\
jaxrlhf run CONFIG.yaml [--section.key value …]     all stages of a run, and its table
jaxrlhf sweep CONFIG.yaml --seeds 5 [--…]           every arm at the seeds 0 to 4 (3,5,9: at these), and one table of all
jaxrlhf sft | reward | ppo CONFIG.yaml [--…]        the stages up to that one (of round 1)
jaxrlhf preflight CONFIG.yaml [--…]                 what it would run into, on its own model and data, in a minute
jaxrlhf plan CONFIG.yaml [--devices 8] [--device h100] [--…]   memory and time of every phase, nothing run or fetched
jaxrlhf embed | nearest DATA --output FOLDER        vectors of preference pairs; the pairs nearest to a policy's text
jaxrlhf generate FOLDER [PROMPT …] [--file F]       sample from a policy
jaxrlhf evaluate A [B] --gold … | --judge MODEL     policies, stored responses or references against each other
jaxrlhf report RUN [RUN …] [--serve]                one page: table, figures, samples; --serve keeps it fresh
jaxrlhf launch --processes 2 run CONFIG.yaml [--…]  several processes on this machine, one run
jaxrlhf run CONFIG.yaml --help                      every key of the config
"""
RUN_COMMANDS = ("run", "sft", "reward", "ppo")  # a run, or its first stages; in several processes too
HELP = ("-h", "--help")
EPILOG = "Any other --section.key VALUE changes the recipe, as in `jaxrlhf run`"  # of commands with options of their own
