"""The stage of DPO and WPO."""


def preference_stage(setting, round, *, sft, start, reference, pairs, update):
    raise NotImplementedError
