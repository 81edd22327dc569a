"""Checkpoints saved by transformers, loaded by us: the same logits, or one line that says why not."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tinylm.config import ConfigError
from tinylm.hf import CheckpointError, config_from_hf, load_hf_llama

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "mqa": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "wide-heads": {"head_dim": 20},
    "llama3": {"rope_parameters": LLAMA3},
    "linear": {"rope_parameters": LINEAR},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "attention-bias": {"attention_bias": True},
    "mlp-bias": {"mlp_bias": True, "tie_word_embeddings": True},
}


def save(directory: Path, *, max_shard_size: str = "1GB", dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """A random checkpoint in `directory`; returns the transformers model that wrote it.

    Weights are larger than transformers would draw them, so that attention is far from uniform and norms and
    biases are far from neutral: a wrong rotation or a lost tensor moves the logits far past the tolerance.
    """
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(SIZES | overrides))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=1.5 / parameter.shape[1] ** 0.5)
            else:
                parameter.uniform_(0.5, 1.5)
    model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    return model


def edit_config(directory: Path, remove: tuple[str, ...] = (), **changes: Any) -> dict[str, Any]:
    path = directory / "config.json"
    raw = {key: value for key, value in json.loads(path.read_text()).items() if key not in remove} | changes
    path.write_text(json.dumps(raw))
    return raw


def remove_tensors(path: Path, *names: str) -> None:
    save_file({name: tensor for name, tensor in load_file(path).items() if name not in names}, path)


def put_tensor(path: Path, name: str, tensor: torch.Tensor) -> None:
    save_file(load_file(path) | {name: tensor}, path)


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def logits_of_both(reference: Any, directory: Path, length: int = 100) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(SIZES["vocab_size"], (2, length), generator=torch.Generator().manual_seed(1))
    _, model = load_hf_llama(directory)
    with torch.no_grad():
        return reference(tokens).logits, model(tokens)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_those_of_transformers(variant: str, tmp_path: Path) -> None:
    reference = save(tmp_path, **VARIANTS[variant])
    expected, actual = logits_of_both(reference, tmp_path)
    assert expected.std() > 0.5  # else a tolerance of 1e-4 says nothing
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def test_shards_make_the_same_model(tmp_path: Path) -> None:
    reference = save(tmp_path, max_shard_size="20KB", **VARIANTS["llama3"])
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    expected, actual = logits_of_both(reference, tmp_path)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("variant", ["llama3", "linear", "theta"])
def test_rope_parameters_matter(variant: str, tmp_path: Path) -> None:
    reference = save(tmp_path, **VARIANTS[variant])
    edit_config(tmp_path, remove=("rope_parameters",))
    expected, actual = logits_of_both(reference, tmp_path)
    assert (actual - expected).abs().max() > 1e-2


@pytest.mark.parametrize("rope", [LLAMA3, LINEAR], ids=["llama3", "linear"])
@pytest.mark.parametrize("type_key", ["rope_type", "type"])
def test_old_and_new_forms_of_rope_are_one_config(rope: dict[str, Any], type_key: str) -> None:
    base = SIZES | {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu"}
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "rope_type")}
    scaling[type_key] = rope["rope_type"]
    old = base | {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}
    assert config_from_hf(old) == config_from_hf(base | {"rope_parameters": rope})


def test_old_form_without_scaling() -> None:
    raw = SIZES | {"model_type": "llama", "rope_theta": 77.0, "rope_scaling": None}
    config = config_from_hf(raw)
    assert (config.rope_theta, config.rope_scaling) == (77.0, None)


def test_tied_weights_share_storage(tmp_path: Path) -> None:
    save(tmp_path, tie_word_embeddings=True)
    config, model = load_hf_llama(tmp_path)
    assert config.tied
    assert model.head_weight.data_ptr() == model.embed.weight.data_ptr()
    save(tmp_path / "untied", tie_word_embeddings=False)
    _, untied = load_hf_llama(tmp_path / "untied")
    assert untied.weight_bytes() - model.weight_bytes() == config.vocab_size * config.dim * 4


@pytest.mark.parametrize(
    ("saved", "asked", "expected"),
    [
        (torch.bfloat16, None, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.float16, torch.float16),
    ],
)
def test_dtype(saved: torch.dtype, asked: torch.dtype | None, expected: torch.dtype, tmp_path: Path) -> None:
    save(tmp_path, dtype=saved)
    _, model = load_hf_llama(tmp_path, dtype=asked)
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert model(torch.tensor([[1, 2, 3]])).isfinite().all()


# --- what is refused ----------------------------------------------------------------------------------------

FILE, NORM, DOWN = "model.safetensors", "model.norm.weight", "model.layers.1.mlp.down_proj.weight"


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    save(tmp_path)
    remove_tensors(tmp_path / FILE, NORM, DOWN)
    with pytest.raises(CheckpointError) as error:
        load_hf_llama(tmp_path)
    assert NORM in one_line(error) and DOWN in one_line(error)


def test_extra_tensors_are_named(tmp_path: Path) -> None:
    save(tmp_path)
    put_tensor(tmp_path / FILE, "model.layers.2.mlp.down_proj.weight", torch.ones(2))
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.mlp\.down_proj\.weight") as error:
        load_hf_llama(tmp_path)
    one_line(error)


def test_a_missing_head_is_no_tied_head(tmp_path: Path) -> None:
    save(tmp_path, tie_word_embeddings=True)
    edit_config(tmp_path, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        load_hf_llama(tmp_path)


def test_a_tied_head_may_be_stored_if_it_is_the_embedding(tmp_path: Path) -> None:
    model = save(tmp_path, tie_word_embeddings=True)
    embedding = model.model.embed_tokens.weight.detach().clone()
    put_tensor(tmp_path / FILE, "lm_head.weight", embedding)
    load_hf_llama(tmp_path)
    put_tensor(tmp_path / FILE, "lm_head.weight", embedding + 1)
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        load_hf_llama(tmp_path)


def test_stored_rotary_frequencies_are_derived_and_not_read(tmp_path: Path) -> None:
    save(tmp_path)
    put_tensor(tmp_path / FILE, "model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(6))
    load_hf_llama(tmp_path)


def test_shapes_are_compared(tmp_path: Path) -> None:
    save(tmp_path)
    put_tensor(tmp_path / FILE, DOWN, torch.ones(48, 81))
    with pytest.raises(CheckpointError, match=r"down_proj.*48, 81.*48, 80") as error:
        load_hf_llama(tmp_path)
    one_line(error)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "mistral"}, "mistral"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": [1]}, "rope"),
        ({"hidden_size": "48"}, "hidden_size"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"num_attention_heads": 0}, "heads"),
        ({"num_key_value_heads": 3}, "heads"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ],
)
def test_unsupported_configs_are_named(change: dict[str, Any], named: str) -> None:
    raw = SIZES | {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu"}
    assert dataclasses.is_dataclass(config_from_hf(raw))
    with pytest.raises(ConfigError, match=named) as error:
        config_from_hf(raw | change)
    one_line(error)


def test_config_errors_name_the_file(tmp_path: Path) -> None:
    save(tmp_path)
    edit_config(tmp_path, hidden_act="gelu")
    with pytest.raises(ConfigError, match=r"config\.json") as error:
        load_hf_llama(tmp_path)
    one_line(error)


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin") as error:
        load_hf_llama(tmp_path)
    one_line(error)


def test_files_that_are_not_there_or_broken(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_hf_llama(tmp_path / "nowhere")
    save(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors") as error:
        load_hf_llama(tmp_path)
    one_line(error)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json") as error:
        load_hf_llama(tmp_path)
    one_line(error)


def test_a_missing_or_short_shard_is_named(tmp_path: Path) -> None:
    save(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    names = list(load_file(shards[1]))
    remove_tensors(shards[1], names[0])
    with pytest.raises(CheckpointError, match=names[0].replace(".", r"\.")) as error:
        load_hf_llama(tmp_path)
    one_line(error)
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=shards[1].name) as error:
        load_hf_llama(tmp_path)
    one_line(error)


def test_an_index_cannot_lead_out_of_the_directory(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside.safetensors"
    save(inside, max_shard_size="20KB")
    save_file({NORM: torch.ones(48)}, outside)
    path = inside / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][NORM] = "../outside.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside"):
        load_hf_llama(inside)
