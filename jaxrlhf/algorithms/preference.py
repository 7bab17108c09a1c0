"""DPO and WPO."""


def preference_loss(config, policy_update, plugin):
    raise NotImplementedError
