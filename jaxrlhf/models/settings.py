"""What the values of a config.json may be, whatever the family: checked before a size makes an array and a word a truth value."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxrlhf.files import DamagedFile

Hf = Mapping[str, Any]

LARGEST = 2**24  # of an axis: far beyond any model's, and products of two still are numbers that shapes may have
FEW = 2048  # layers, or labels
_AXES = (
    *("vocab_size", "hidden_size", "n_embd", "num_attention_heads", "n_head", "intermediate_size"),
    *("max_position_embeddings", "n_positions", "type_vocab_size", "original_max_position_embeddings"),
)
_AXES_OR_NULL = ("n_inner", "head_dim", "num_key_value_heads", "sliding_window")
_FEW = ("num_hidden_layers", "n_layer", "num_labels")
_POSITIVE = ("layer_norm_epsilon", "layer_norm_eps", "rms_norm_eps", "initializer_range", "rotary_emb_base", "rope_theta", "rotary_pct",
             "partial_rotary_factor", "factor", "low_freq_factor", "high_freq_factor", "model_max_length", "max_seq_length")  # fmt: skip
_FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_parallel_residual", "use_sliding_window", "do_lower_case")
_TEXTS = ("model_type", "hidden_act", "activation_function", "rope_type")
_IDS = ("eos_token_id", "bos_token_id", "pad_token_id")


def _is_whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_id(value: Any) -> bool:
    return value is None or _is_whole(value, -LARGEST, LARGEST)


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e38  # what float32 holds


def _of(kind: type) -> tuple[Any, str]:
    return lambda value: value is None or isinstance(value, kind), {str: "text", bool: "true or false", dict: "an object"}[kind]


def _texts(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(one, str) for one in value))


_RULES: dict[str, tuple[Any, str]] = {
    **dict.fromkeys(_AXES, (lambda value: _is_whole(value, 1, LARGEST), f"a whole number from 1 to {LARGEST}")),
    **dict.fromkeys(_AXES_OR_NULL, (lambda value: value is None or _is_whole(value, 0, LARGEST), f"a whole number up to {LARGEST}")),
    **dict.fromkeys(_FEW, (lambda value: _is_whole(value, 1, FEW), f"a whole number from 1 to {FEW}")),
    **dict.fromkeys(_POSITIVE, (lambda value: value is None or _is_positive(value), "a finite number above 0")),
    **dict.fromkeys(_FLAGS, _of(bool)),
    **dict.fromkeys(_TEXTS, _of(str)),
    **dict.fromkeys(("rope_scaling", "rope_parameters"), _of(dict)),
    **dict.fromkeys(("layer_types", "architectures"), (_texts, "a list of texts")),
    "id2label": (lambda value: value is None or (isinstance(value, dict) and _texts([*value.values()])), "an object of texts"),
    **dict.fromkeys(_IDS, (lambda value: all(map(_is_id, value if isinstance(value, list) else [value])), "an id, or a list of ids")),
    "reward_bias": (lambda value: _is_positive(value) or _is_positive(-value) or value == 0, "a finite number"),
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
