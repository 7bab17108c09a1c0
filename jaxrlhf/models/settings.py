"""What the values of a config.json may be, whatever the family: checked before a size makes an array and a word a truth value."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxrlhf.files import DamagedFile

Hf = Mapping[str, Any]
Rule = tuple[Callable[[Any], bool], str]

LARGEST = 2**24  # of an axis: far beyond any model's, and products of two still are numbers that shapes may have
FEW = 2048  # layers, or labels


def _whole(low: int, high: int) -> Rule:
    return lambda x: isinstance(x, int) and not isinstance(x, bool) and low <= x <= high, f"a whole number from {low} to {high}"


def _or_null(rule: Rule) -> Rule:
    return lambda x: x is None or rule[0](x), rule[1]


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < 1e38  # what float32 holds; NaN is not


def _are_texts(x: Any) -> bool:
    return isinstance(x, list) and all(isinstance(one, str) for one in x)


_id = _or_null(_whole(-LARGEST, LARGEST))[0]
_RULES: dict[str, Rule] = {
    name: rule
    for names, rule in {
        "vocab_size hidden_size n_embd num_attention_heads n_head intermediate_size max_position_embeddings n_positions type_vocab_size "
        "original_max_position_embeddings": _whole(1, LARGEST),
        "n_inner head_dim num_key_value_heads sliding_window": _or_null(_whole(0, LARGEST)),
        "num_hidden_layers n_layer num_labels": _whole(1, FEW),
        "layer_norm_epsilon layer_norm_eps rms_norm_eps initializer_range rotary_emb_base rope_theta rotary_pct partial_rotary_factor "
        "factor low_freq_factor high_freq_factor model_max_length max_seq_length": _or_null(
            (lambda x: _is_number(x) and x > 0, "a finite number above 0")
        ),
        "reward_bias": (_is_number, "a finite number"),
        "tie_word_embeddings attention_bias mlp_bias use_parallel_residual use_sliding_window do_lower_case": _or_null(
            (lambda x: isinstance(x, bool), "true or false")
        ),
        "model_type hidden_act activation_function rope_type": _or_null((lambda x: isinstance(x, str), "text")),
        "rope_scaling rope_parameters": _or_null((lambda x: isinstance(x, dict), "an object")),
        "id2label": _or_null((lambda x: isinstance(x, dict) and _are_texts([*x.values()]), "an object of texts")),
        "layer_types": _or_null((_are_texts, "a list of texts")),
        "eos_token_id bos_token_id pad_token_id": (lambda x: all(map(_id, x if isinstance(x, list) else [x])), "an id, or a list of ids"),
    }.items()
    for name in names.split()
}


def check_values(hf: Hf) -> None:
    """ValueError for a value that its key cannot have; of rope_scaling and rope_parameters too."""
    for name, value in hf.items():
        fits, kind = _RULES.get(name, (lambda value: True, ""))
        if not fits(value):
            raise ValueError(f"{name} is {str(value)[:40]!r}; it must be {kind}.")
        if isinstance(value, dict) and name.startswith("rope_"):
            check_values(value)


def check_only(hf: Hf, only: Hf) -> None:
    """ValueError for a setting of config.json that is not computed."""
    for name, value in only.items():
        if hf.get(name) not in (None, value):
            raise ValueError(f"{hf.get('model_type')} with {name}={hf[name]!r} is not supported; it must be {value!r}.")


@contextmanager
def described_by(path: Path) -> Iterator[None]:
    """What the content of the file or folder at `path` makes the block raise, as one ValueError that names it."""
    try:
        yield
    except (DamagedFile, OSError):
        raise
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except KeyError as error:
        raise ValueError(f"{path} lacks {error}.") from error
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError) as error:
        raise ValueError(f"{path} is not of a model that can be read ({type(error).__name__}: {error}).") from error
