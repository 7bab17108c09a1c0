"""The tokenizer and π_SFT."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from jaxrlhf import rng, sharding
from jaxrlhf.algorithms.training import held_out, num_steps, own_copy, sft_trainer, train
from jaxrlhf.config import Config
from jaxrlhf.data import toy
from jaxrlhf.data.chat import template_of
from jaxrlhf.data.tokenizer import train_tokenizer
from jaxrlhf.data.tokens import eos_ids_of, tokenize_demonstrations
from jaxrlhf.models.families import config_from_shape
from jaxrlhf.models.hub import Loaded, initialise, load, read_tokenizer, save_tokenizer, tokenizer_named, with_tokenizer
from jaxrlhf.pipeline import inputs
from jaxrlhf.pipeline.stages.context import RunContext, add_model, epochs, placed
from jaxrlhf.steps.sft import make_sft_evaluation
from jaxrlhf.steps.state import init_state
from jaxrlhf.storage.stage import Done, Stage
from jaxrlhf.types import TextBatch, TrainState


def tokenizer_stage(run: RunContext) -> Done:
    """The run's tokenizer: the one named, the model's own, the toy task's words, or a byte-level BPE of the run's own text."""
    config = run.config
    trained = is_trained(config)
    template = None if config.tokenizer.chat_template is None else template_of(config.tokenizer.chat_template)

    def build(folder: Path) -> dict[str, Any]:
        tokenizer = tokenizer_of(config)
        save_tokenizer(tokenizer, folder)
        return {"vocabulary": len(tokenizer)}

    slice_ = {
        "tokenizer": {"source": inputs.tokenizer_identity(config.tokenizer.source), "vocab_size": config.tokenizer.vocab_size}
        | ({} if template is None else {"chat_template": template}),
        "model": None if config.tokenizer.source else inputs.tokenizer_identity(config.model.source),
        "data": inputs.data_identity(config) if trained else config.data.train,
    }
    return run.build(Stage("tokenizer", "data", "tokenizer", slice_, version=2), build)


def is_trained(config: Config) -> bool:
    """Whether the run learns its tokenizer from its own text."""
    return config.tokenizer.source is None and config.model.source is None and config.data.train != inputs.TOY


def tokenizer_of(config: Config) -> Any:
    """The run's tokenizer, trained where none is given."""
    given = given_tokenizer(config)
    if not is_trained(config):
        return given
    rows, _ = inputs.demonstrations_of(config, given)
    tokenizer = train_tokenizer((row.prompt + row.response for row in rows), config.tokenizer.vocab_size)
    tokenizer.chat_template = getattr(given, "chat_template", None)
    return tokenizer


def given_tokenizer(config: Config) -> Any:
    """The tokenizer that `tokenizer.source` or `model.source` names, or the toy task's, with the chat template of the config.

    Where one is to be trained: nothing, or with a template the bytes alone, which render the conversations that it is trained on.
    """
    source, template = config.tokenizer.source or config.model.source, config.tokenizer.chat_template
    if source is not None:
        tokenizer = tokenizer_named(source)
        if tokenizer is None:
            raise ValueError(f"{source} has no tokenizer files; name a folder that has in tokenizer.source.")
    elif config.data.train == inputs.TOY:
        tokenizer = toy.toy_tokenizer()
    elif template is not None:
        tokenizer = train_tokenizer((), 300)
    else:
        return None
    if template is not None:
        tokenizer.chat_template = template_of(template)
    return tokenizer


def base_model(run: RunContext, tokenizer: Any) -> Loaded:
    """The model SFT starts from: read, or made from `model.shape` for this tokenizer."""
    config = run.config
    if config.model.source is not None:
        return with_tokenizer(load(config.model.source, head="lm", **run.model_options), tokenizer)
    longest = config.data.limits.max_prompt_length + inputs.longest_response(config)
    shape = {name: value for name, value in asdict(config.model.shape).items() if value is not None}
    decoder, _ = config_from_shape(
        shape,
        len(tokenizer),
        max_positions=longest,
        pad_id=tokenizer.pad_token_id,
        bos_id=tokenizer.bos_token_id,
        eos_id=tokenizer.eos_token_id,
    )
    key = rng.stream(rng.root_key(config.text_seed), "model/init")
    return initialise(decoder, key=key, tokenizer=tokenizer, **run.model_options)


def sft_stage(run: RunContext, tokenizer_done: Done) -> Done:
    """π_SFT: the base model fitted to the demonstrations; with `sft.max_steps: 0` the base model itself."""
    config = run.config

    def build(folder: Path) -> dict[str, Any]:
        tokenizer = read_tokenizer(tokenizer_done.folder)
        rows, report = inputs.demonstrations_of(config, tokenizer)
        table, cut = tokenize_demonstrations(rows, tokenizer, inputs.limits_of(config), eos_ids=eos_ids_of(tokenizer))
        run.report_rows(folder, "demonstrations", report, cut)
        base = base_model(run, tokenizer)
        steps = num_steps(len(table.index_B), config.sft)
        optimizer, step = sft_trainer(base.model, config.sft, max(steps, 1), run.mesh)
        state = sharding.place(init_state(own_copy(base.params), optimizer), run.mesh)
        base = base._replace(params=None)  # the memory is wanted for the training

        ids = [rows[i].id for i in cut.rows]
        fed = epochs(run, table, ids, config.sft.batch_size, steps, seed=config.text_seed, name="sft")

        def loop(state: TrainState, rows: Iterator[TextBatch]) -> Iterator:
            return train(step, state, placed(run, rows))

        tokens = config.sft.batch_size * (table.prompt_BL.shape[1] + table.response_BT.shape[1])

        def valid() -> TextBatch:
            rows = inputs.held_out_demonstrations_of(config, tokenizer)
            return tokenize_demonstrations(rows, tokenizer, inputs.limits_of(config), eos_ids=eos_ids_of(tokenizer))[0]

        watched = held_out(make_sft_evaluation, base.model, config.sft.loss_on, valid, config.sft, run.mesh)
        state = run.train(folder, "sft", state, loop, fed, steps=steps, tokens=tokens, held_out=watched)
        add_model(base._replace(params=state.params), folder)
        tokens = int(np.asarray(table.prompt_mask_BL).sum() + np.asarray(table.response_mask_BT).sum())
        return {"steps": steps, "kept_step": int(state.step), "rows": len(table.index_B), "tokens": tokens}

    slice_ = {
        "sft": asdict(config.sft),
        "model": inputs.model_identity(config),
        "data": inputs.data_identity(config),
        "limits": asdict(config.data.limits),
        "positions": inputs.longest_response(config),
        "bucket": config.data.bucket,
        "held_out": config.pairs.num_valid if config.sft.eval_steps else None,  # of the toy task; a file's rows are named by data
    }
    return run.build(Stage("sft", "model", "sft", slice_, {"tokenizer": tokenizer_done}, version=2), build)
