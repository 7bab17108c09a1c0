"""What a recipe is told when it cannot run: one line a fault, with the value, the rule and the way out."""

import pytest

from jaxrlhf.recipe import ConfigError, all_keys, arms, find_recipe, from_mapping, load_config, override, to_mapping

TOY = {"pairs": {"source": "sample"}, "gold": {"kind": "toy"}}


def fault(**changes) -> str:
    """The message for a toy recipe with these changes ("section__key")."""
    raw: dict = {name: dict(section) for name, section in TOY.items()}
    for key, value in changes.items():
        *sections, name = key.split("__")
        inner = raw
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = value
    with pytest.raises(ConfigError) as error:
        from_mapping(raw, where="recipe.yaml")
    return str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ppo__kl_coeff": 0.1}, "recipe.yaml: unknown key 'ppo.kl_coeff'; did you mean 'ppo.kl_coef'?"),
        ({"kl_coef": 0.1}, "recipe.yaml: unknown key 'kl_coef'; did you mean 'ppo.kl_coef'?"),
        ({"rewards": {}}, "recipe.yaml: unknown key 'rewards'; did you mean 'reward'?"),
        ({"data__toy__overlong": 1}, "did you mean 'data.toy.overlong_penalty'?"),
        ({"ppo__zzz": 1}, "recipe.yaml: unknown key 'ppo.zzz'; ppo has learning_rate"),
        ({"rounds": "many"}, "recipe.yaml: rounds is 'many': Input should be a valid integer"),
        ({"ppo": None}, "ppo is None"),
        ({"ppo__batch_size": 1.5}, "ppo.batch_size is 1.5"),
        ({"sft__lr_scheduler_type": "cosin"}, "sft.lr_scheduler_type is 'cosin': Input should be 'constant', 'linear' or 'cosine'"),
        ({"weights__eta": "es"}, "weights.eta is 'es'"),
        ({"data__toy__demo_drop": 2}, "demo_drop 2.0 is not a probability"),
    ],
)
def test_unknown_keys_and_wrong_types(changes, message):
    assert message in fault(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 0}, "rounds is 0; it must be at least 1."),
        ({"seed": -1}, "seed is -1; it must be at least 0."),
        ({"seed": 2**64}, "seed is 18446744073709551616; it must be below 2**64."),
        ({"ppo__num_mini_batches": 0}, "ppo.num_mini_batches is 0; it must be at least 1."),
        ({"sft__gradient_accumulation_steps": 0}, "sft.gradient_accumulation_steps is 0"),
        ({"ppo__forward_batch_size": 0}, "ppo.forward_batch_size is 0"),
        ({"ppo__generation_batch_size": 0}, "ppo.generation_batch_size is 0"),
        ({"sft__max_steps": -1}, "sft.max_steps is -1; it must be at least 0."),
        ({"checkpoint__every": 0}, "checkpoint.every is 0"),
        ({"ppo__temperature": 0}, "ppo.temperature is 0.0; greedy sampling does not explore"),
        ({"ppo__top_p": 0}, "ppo.top_p is 0.0"),
        ({"ppo__lam": 1.5}, "ppo.lam is 1.5; it must lie in [0, 1]"),
        ({"pairs__temperature": 0}, "pairs.temperature is 0.0"),
        ({"pairs__label_flip": 0.5}, "pairs.label_flip is 0.5"),
        ({"evaluation__temperature": -1}, "evaluation.temperature is -1.0"),
        ({"weights__alpha": 1}, "weights.alpha is 1.0; the relative ratio needs 0 ≤ alpha < 1."),
        ({"weights__temperature": 0}, "weights.temperature is 0.0"),
        ({"weights__eta": "ess", "weights__ess_target": 0}, "weights.ess_target is 0.0"),
        ({"ppo__missing_eos_penalty": 1, "ppo__missing_eos_score": -1}, "set at most one of them"),
        ({"ppo__total_episodes": 100}, "ppo.total_episodes 100 is less than one batch of 512"),
        ({"ppo__batch_size": 10, "ppo__num_mini_batches": 4}, "try 8."),
        ({"ppo__forward_batch_size": 100}, "ppo.batch_size 512 does not divide into passes of ppo.forward_batch_size 100"),
        ({"ppo__generation_batch_size": 96}, "ppo.batch_size 512 does not divide into passes of ppo.generation_batch_size 96"),
        ({"sft__batch_size": 9, "sft__gradient_accumulation_steps": 2}, "sft.batch_size 9 does not divide"),
        ({"reward__use_margin": True}, "reward.use_margin is set, but sampled pairs"),
        ({"gold__kind": "model"}, "gold.kind is 'model' but gold.source is empty; name the folder."),
        ({"gold__kind": "function"}, "name the module:attribute."),
        ({"data__train": "pairs.jsonl"}, "the toy gold reads toy posts only"),
        ({"gold__kind": "none"}, "sampled pairs need a gold scorer"),
        ({"pairs__source": "data"}, "data.train is 'toy', which has no ready-made pairs"),
        ({"data__valid_fraction": 1.0}, "data.valid_fraction is 1.0"),
        ({"sft__learning_rate": 0}, "sft.learning_rate is 0.0; it must be above 0."),
        ({"reward__learning_rate": -1}, "reward.learning_rate is -1.0"),
        ({"ppo__learning_rate": float("nan")}, "ppo.learning_rate is nan"),
        ({"ppo__critic_learning_rate": 0}, "ppo.critic_learning_rate is 0.0"),
        ({"ppo__max_grad_norm": 0}, "ppo.max_grad_norm is 0.0"),
        ({"ppo__adam_beta2": 1}, "ppo.adam_beta2 is 1.0; it must lie in [0, 1)."),
        ({"ppo__kl_coef": -0.1}, "ppo.kl_coef is -0.1; it must be at least 0."),
        ({"ppo__kl_coef_previous": -0.1}, "ppo.kl_coef_previous is -0.1"),
        ({"ppo__cliprange": 0}, "ppo.cliprange is 0.0; it must be above 0."),
        ({"ppo__cliprange_value": -1}, "ppo.cliprange_value is -1.0"),
        ({"ppo__dual_clip": 1}, "ppo.dual_clip is 1.0; it bounds a ratio"),
        ({"reward__center_rewards_coefficient": -1}, "reward.center_rewards_coefficient is -1.0"),
        ({"weights__eta": -0.5}, "weights.eta is -0.5"),
        ({"pairs__label_flip": -0.1}, "pairs.label_flip is -0.1"),
        ({"ppo__total_episodes": 1100, "ppo__critic_warmup_updates": 2}, "leaves the policy none of the 2 updates of a round"),
        ({"ppo__total_episodes": 1100, "ppo__warmup_steps": 8}, "ppo.warmup_steps 8 leaves nothing of the policy's 8 optimizer steps"),
        ({"ppo__total_episodes": 1100, "ppo__warmup_steps": 4, "ppo__critic_warmup_updates": 1}, "policy's 4 optimizer steps"),
        ({"sft__max_steps": 5, "sft__warmup_steps": 5}, "sft.warmup_steps 5 leaves nothing of sft.max_steps 5"),
        ({"reward__max_steps": 5, "reward__warmup_steps": 9}, "reward.warmup_steps 9 leaves nothing"),
        ({"reward__loss": "bradley_terry_margin"}, "reward.loss is 'bradley_terry_margin', but sampled pairs"),
        ({"weights__reference_compat": True, "weights__alpha": 0}, "with weights.alpha 0 there is none"),
        (
            {"data__train": "p.jsonl", "pairs__source": "data", "gold__kind": "none", "pairs__label_flip": 0.1},
            "label_flip is for sampled pairs",
        ),
    ],
)
def test_numbers_and_combinations_that_cannot_work(changes, message):
    assert message in fault(**changes)


def test_the_last_values_that_work():
    """One step beyond each is refused above."""
    for changes in (
        {"ppo": {"total_episodes": 1100, "critic_warmup_updates": 1, "warmup_steps": 3, "kl_coef": 0, "vf_coef": 0, "dual_clip": 1.01}},
        {"sft": {"max_steps": 5, "warmup_steps": 4, "weight_decay": 0}, "reward": {"max_steps": 0, "warmup_steps": 9}},
        {"weights": {"eta": 0, "alpha": 0}},
        {"weights": {"reference_compat": True, "alpha": 0.1}},
    ):
        from_mapping(TOY | changes)


def test_every_fault_is_told_at_once():
    lines = fault(ppo__kl_coeff=1, rounds="x", sft__nope=2).splitlines()
    assert len(lines) == 3 and all(line.startswith("recipe.yaml: ") for line in lines)


def test_arms_override_and_are_checked_as_wholes():
    config = from_mapping(
        TOY | {"name": "sweep", "ppo": {"kl_coef": 0.2}, "arms": {"a": {"method": "ppo"}, "b": {"ppo.kl_coef": 0.7}, "c": {}}}
    )
    found = arms(config)
    assert {name: (one.name, one.method, one.ppo.kl_coef) for name, one in found.items()} == {
        "a": ("sweep/a", "ppo", 0.2), "b": ("sweep/b", "ocrm", 0.7), "c": ("sweep/c", "ocrm", 0.2),
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"arms.a: unknown key 'ppo.klcoef'; did you mean 'ppo.kl_coef'"):
        arms(from_mapping(TOY | {"arms": {"a": {"ppo.klcoef": 1}}}))
    with pytest.raises(ConfigError, match=r"arms.a: weights.alpha is 2.0"):
        arms(from_mapping(TOY | {"arms": {"a": {"weights.alpha": 2}}}))
    single = from_mapping(TOY)
    assert arms(single) == {"run": single}


def test_override_leaves_the_original_alone():
    raw = {"ppo": {"kl_coef": 1}}
    assert override(raw, {"ppo.kl_coef": 2, "sft.batch_size": 3}, where="x") == {"ppo": {"kl_coef": 2}, "sft": {"batch_size": 3}}
    assert raw == {"ppo": {"kl_coef": 1}}


def test_files(tmp_path):
    (tmp_path / "bad.yaml").write_text("ppo: [unclosed")
    with pytest.raises(ConfigError, match=r"is not YAML"):
        load_config(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match=r"holds a list; a recipe is a mapping of sections"):
        load_config(tmp_path / "list.yaml")
    with pytest.raises(ConfigError, match=r"no recipe at .*quikstart.yaml. Did you mean quickstart.yaml\?"):
        load_config(tmp_path / "quikstart.yaml")
    assert find_recipe("quickstart.yaml").name == "quickstart.yaml"


def test_off_is_a_word_and_not_the_truth_value_that_yaml_makes_of_it(tmp_path):
    task = "pairs: {source: sample}\ngold: {kind: toy}\n"
    (tmp_path / "off.yaml").write_text(task + "log: {recompiles: off}\n")
    config = load_config(tmp_path / "off.yaml")
    assert config.log.recompiles == "off" and from_mapping(to_mapping(config)) == config
    (tmp_path / "on.yaml").write_text(task + "log: {recompiles: on}\n")
    with pytest.raises(ConfigError, match=r"log\.recompiles is True: Input should be 'warn', 'error' or 'off'"):
        load_config(tmp_path / "on.yaml")


def test_all_keys_reach_every_depth():
    keys = set(all_keys())
    assert {"seed", "ppo", "ppo.kl_coef", "data.limits.max_prompt_length", "data.toy.overlong_penalty", "model.shape.family"} <= keys


def test_an_empty_recipe_and_heads_that_do_not_divide_are_refused(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    with pytest.raises(ConfigError, match=r"empty\.yaml is empty"):
        load_config(tmp_path / "empty.yaml")
    with pytest.raises(ConfigError, match=r"hidden_size 48 does not divide over num_heads 5; try 45"):
        from_mapping({"data": {"train": "rows.jsonl"}, "model": {"shape": {"hidden_size": 48, "num_heads": 5}}})
