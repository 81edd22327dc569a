"""A Hugging Face Llama checkpoint directory becomes a ModelConfig and a Transformer with its weights.

Reads `config.json` and safetensors, one file or sharded; never unpickles. Every tensor of the checkpoint must
find its parameter and every parameter its tensor, else nothing is returned.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tinylm.config import CheckpointError, ConfigError, ModelConfig, RopeScaling, first_line
from tinylm.model import Transformer

# Their name -> ours. What is fused here comes from several: in this order, each the next rows of ours.
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WEIGHTS = {EMBEDDING: "embed.weight", "model.norm.weight": "norm.weight", HEAD: "head.weight"}
BLOCK_WEIGHTS = {
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.qkv",
    "self_attn.k_proj": "attention.qkv",
    "self_attn.v_proj": "attention.qkv",
    "self_attn.o_proj": "attention.out",
    "post_attention_layernorm": "mlp_norm",
    "mlp.gate_proj": "mlp.gate_up",
    "mlp.up_proj": "mlp.gate_up",
    "mlp.down_proj": "mlp.down",
}
BIASES = {"attention_bias": "self_attn.", "mlp_bias": "mlp."}  # key of config.json -> whose linears have one

# Rotary frequencies that older checkpoints carry: they follow from config.json and are computed anew.
DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


class Target(NamedTuple):
    """Where a tensor of the checkpoint goes: rows start..stop of one of our parameters."""

    parameter: str
    start: int
    stop: int


class Stored(NamedTuple):
    """Where a tensor of the checkpoint is, and its shape."""

    path: Path
    shape: tuple[int, ...]


def load_hf_llama(
    directory: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> tuple[ModelConfig, Transformer]:
    """The config and the loaded model, in eval mode, of a checkpoint directory in Hugging Face's Llama form.

    directory: holds config.json and model.safetensors, or model.safetensors.index.json and its shards.
    dtype: of the parameters; None keeps that of the checkpoint's embedding.
    Biases in attention alone or in the MLP alone are loaded as biases in both, the absent ones being zero.
    Raises ConfigError for what config.json asks and this model cannot do, CheckpointError for missing,
    unknown or ill-shaped tensors and for files that cannot be read.
    """
    directory = Path(directory)
    path = directory / "config.json"
    raw = _read_json(path)
    try:
        config = config_from_hf(raw)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    biased = [prefix for key, prefix in BIASES.items() if raw.get(key)]
    with torch.device("meta"):
        model = Transformer(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}

    stored = _stored(directory)
    targets = targets_of(config, biased)
    _check(directory, stored, targets, shapes, config.tied)
    embedding = _read(stored, EMBEDDING)
    if config.tied and HEAD in stored and not torch.equal(embedding, _read(stored, HEAD)):
        raise CheckpointError(
            f"{directory}: {HEAD} differs from {EMBEDDING} although config.json has tie_word_embeddings; "
            "set that to false to load both"
        )

    model.to(dtype or embedding.dtype).to_empty(device=device)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in parameters.keys() - {target.parameter for target in targets.values()}:
            parameters[name].zero_()  # a bias that the checkpoint does not have
        for name, target in targets.items():
            parameters[target.parameter][target.start : target.stop].copy_(_read(stored, name))
    return config, model.eval()


def special_ids(directory: str | Path) -> tuple[list[int], int | None]:
    """The ids that end a text, and the one that starts it (None: unknown), of a checkpoint directory.

    From config.json and generation_config.json, of which the latter has the last word. Raises CheckpointError
    for files that cannot be read, ConfigError for ids that are none.
    """
    found: dict[str, list[int]] = {"bos_token_id": [], "eos_token_id": []}
    for name in ("config.json", "generation_config.json"):
        path = Path(directory) / name
        raw = _read_json(path) if path.is_file() else {}
        for key in found.keys() & {key for key, value in raw.items() if value is not None}:
            ids = raw[key] if isinstance(raw[key], list) else [raw[key]]
            if not all(isinstance(id, int) and not isinstance(id, bool) for id in ids):
                raise ConfigError(f"{path}: {key} is {raw[key]!r}: expected the id of a token, or a list of them")
            found[key] = ids
    ends = found["eos_token_id"]
    return ends, next(iter(found["bos_token_id"] + ends), None)


# --- tensors ------------------------------------------------------------------------------------------------


def targets_of(config: ModelConfig, biased: Collection[str]) -> dict[str, Target]:
    """For each tensor that the checkpoint must have, where it goes."""
    rows = {
        EMBEDDING: config.vocab_size,
        HEAD: config.vocab_size,
        "self_attn.q_proj": config.heads * config.head_dim,
        "self_attn.k_proj": config.kv_heads * config.head_dim,
        "self_attn.v_proj": config.kv_heads * config.head_dim,
        "mlp.gate_proj": config.d_ff,
        "mlp.up_proj": config.d_ff,
    }
    targets = {theirs: Target(ours, 0, rows.get(theirs, config.dim)) for theirs, ours in WEIGHTS.items()}
    if config.tied:
        del targets[HEAD]
    for layer in range(config.layers):
        filled: dict[str, int] = {}
        for theirs, ours in BLOCK_WEIGHTS.items():
            start = filled.get(ours, 0)
            filled[ours] = stop = start + rows.get(theirs, config.dim)
            for kind in ("weight", "bias") if theirs.startswith(tuple(biased)) else ("weight",):
                name = f"model.layers.{layer}.{theirs}.{kind}"
                targets[name] = Target(f"blocks.{layer}.{ours}.{kind}", start, stop)
    return targets


def _check(
    directory: Path,
    stored: Mapping[str, Stored],
    targets: Mapping[str, Target],
    shapes: Mapping[str, tuple[int, ...]],
    tied: bool,
) -> None:
    """Raises CheckpointError unless the tensors are those that the config asks for, in its shapes."""
    if missing := targets.keys() - stored.keys():
        raise CheckpointError(f"{directory}: config.json asks for tensors that are missing: {_listed(missing)}")
    known = targets.keys() | ({HEAD} if tied else set())
    if extra := {name for name in stored.keys() - known if not DERIVED.fullmatch(name)}:
        raise CheckpointError(f"{directory}: a Llama of this config does not have the tensors {_listed(extra)}")
    for name, (parameter, start, stop) in targets.items():
        expected = (stop - start, *shapes[parameter][1:])
        path, shape = stored[name]
        if shape != expected:
            raise CheckpointError(f"{path}: {name} has shape {list(shape)}; config.json asks for {list(expected)}")


def _listed(names: Collection[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(sorted(names)[:most]) + more


# --- files --------------------------------------------------------------------------------------------------


def _stored(directory: Path) -> dict[str, Stored]:
    """What the checkpoint's files hold, read from their headers."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return _headers(single)
    if not index.is_file():
        pickled = sorted(path.name for path in directory.glob("*.bin"))
        hint = f" ({pickled[0]} is pickled and is not read: save it as safetensors)" if pickled else ""
        raise CheckpointError(f"{directory}: neither {single.name} nor {index.name} is there{hint}")
    shard_of = _read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(shard, str) for shard in shard_of.values()):
        raise CheckpointError(f"{index}: expected a weight_map from tensor to file")
    stored: dict[str, Stored] = {}
    for shard in sorted(set(shard_of.values())):
        if shard != Path(shard).name:
            raise CheckpointError(f"{index}: {shard!r} is not the name of a file beside it")
        found = _headers(directory / shard)
        if twice := stored.keys() & found.keys():
            raise CheckpointError(f"{directory / shard}: another shard has these tensors too: {_listed(twice)}")
        stored |= found
    if missing := shard_of.keys() - stored.keys():
        raise CheckpointError(f"{index}: tensors that are not in their shards: {_listed(missing)}")
    return stored


def _headers(path: Path) -> dict[str, Stored]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: Stored(path, tuple(file.get_slice(name).get_shape())) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors: {first_line(error)}") from None


def _read(stored: Mapping[str, Stored], name: str) -> Tensor:
    try:
        with safe_open(stored[name].path, framework="pt") as file:
            tensor = file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{stored[name].path}: {name} cannot be read: {first_line(error)}") from None
    if not tensor.is_floating_point():
        raise CheckpointError(f"{stored[name].path}: {name} is {tensor.dtype}; expected floating point")
    return tensor


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # ValueError: neither UTF-8 nor JSON
        raise CheckpointError(f"{path}: cannot be read: {first_line(error)}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return found


# --- config.json --------------------------------------------------------------------------------------------


def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """The ModelConfig of a Llama config.json, in the form of transformers 4 or 5. Raises ConfigError.

    Absent keys mean what they mean in transformers' LlamaConfig; the sizes must be there.
    """
    if raw.get("model_type") != "llama":
        raise ConfigError(f"model_type is {raw.get('model_type')!r}; expected 'llama'")
    if raw.get("architectures") not in (None, ["LlamaForCausalLM"]):
        raise ConfigError(f"architectures is {raw['architectures']!r}; expected ['LlamaForCausalLM']")
    if raw.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"hidden_act is {raw['hidden_act']!r}; expected 'silu'")
    if raw.get("quantization_config") is not None:
        raise ConfigError("quantization_config is set; expected a checkpoint that is not quantized")

    heads = _whole(raw, "num_attention_heads")
    context = _whole(raw, "max_position_embeddings", 2048)
    theta, scaling = _rope(raw, context)
    biases = [_flag(raw, key) for key in BIASES]
    return ModelConfig(
        vocab_size=_whole(raw, "vocab_size"),
        dim=_whole(raw, "hidden_size"),
        layers=_whole(raw, "num_hidden_layers"),
        heads=heads,
        kv_heads=_whole(raw, "num_key_value_heads", heads),
        head_dim=_whole(raw, "head_dim", 0),
        d_ff=_whole(raw, "intermediate_size"),
        context=context,
        norm="rmsnorm",
        norm_placement="pre",
        mlp="swiglu",
        positions="rope",
        attention="gqa",
        norm_eps=_real(raw, "rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        bias=any(biases),
        tied=_flag(raw, "tie_word_embeddings"),
    )


def _rope(raw: Mapping[str, Any], context: int) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from "rope_scaling" and "rope_theta" (transformers 4) or "rope_parameters" (5)."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise ConfigError(f"rope parameters are {rope!r}; expected an object")
    theta = _real(rope, "rope_theta", _real(raw, "rope_theta", 10_000.0))
    partial = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise ConfigError(f"partial_rotary_factor is {partial!r}; expected 1, the rotation of whole heads")
    kind = rope.get("rope_type", rope.get("type", "default"))
    match kind:
        case "default":
            return theta, None
        case "linear":
            return theta, RopeScaling(kind="linear", factor=_real(rope, "factor"))
        case "llama3":
            return theta, RopeScaling(
                kind="llama3",
                factor=_real(rope, "factor"),
                low_freq_factor=_real(rope, "low_freq_factor"),
                high_freq_factor=_real(rope, "high_freq_factor"),
                original_context=_whole(rope, "original_max_position_embeddings", context),
            )
    raise ConfigError(f"rope type is {kind!r}; expected 'default', 'linear' or 'llama3'")


def _whole(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = default if raw.get(key) is None else raw[key]
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{key} is {raw.get(key)!r}: expected a whole number")
    return value


def _real(raw: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = default if raw.get(key) is None else raw[key]
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ConfigError(f"{key} is {raw.get(key)!r}: expected a number")
    return float(value)


def _flag(raw: Mapping[str, Any], key: str) -> bool:
    value = raw.get(key, False)
    if not isinstance(value, bool):
        raise ConfigError(f"{key} is {value!r}: expected true or false")
    return value
