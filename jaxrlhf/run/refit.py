"""When a refit is due."""


def refit_due(setting, number, track, pairs):
    raise NotImplementedError
