"""Text from checkpoints: what is loaded, and tokens that become text while they come."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st
from spoken import BPE, CHARACTERS, SAMPLE, copy, edit, llama_directory, own
from strategies import splits

from tinylm import checkpoint
from tinylm.config import ConfigError
from tinylm.generate import complete
from tinylm.generate.text import TextStream, load
from tinylm.tokenizer import EOT, train_char


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.manual_seed(0)


# --- streaming ----------------------------------------------------------------------------------------------


def pushed(decode: Any, ids: Sequence[int], sizes: Sequence[int]) -> list[str]:
    """What a stream gives for ids that come in parts of these sizes, and at the end."""
    stream, start, parts = TextStream(decode), 0, []
    for size in sizes:
        parts.append(stream.push(ids[start : start + size]))
        start += size
    return [*parts, stream.finish()]


@given(st.data(), st.text(max_size=20))
def test_any_text_in_any_parts_streams_whole_characters(data: st.DataObject, text: str) -> None:
    ids = BPE.encode(text)
    parts = pushed(BPE.decode, ids, data.draw(splits(len(ids))) if ids else [])
    assert "".join(parts) == text
    assert all("\ufffd" not in part or "\ufffd" in text for part in parts), "no half of a character"


@given(st.data(), st.lists(st.integers(0, BPE.vocab_size - 1), min_size=1, max_size=30))
def test_any_tokens_stream_to_what_decoding_all_gives(data: st.DataObject, ids: list[int]) -> None:
    """Bytes that are no UTF-8 too, and special tokens."""
    parts = pushed(BPE.decode, ids, data.draw(splits(len(ids))))
    assert "".join(parts) == BPE.decode(ids)


@given(st.lists(st.integers(0, CHARACTERS.vocab_size - 1), min_size=1, max_size=30))
def test_each_character_of_a_table_comes_at_once(ids: list[int]) -> None:
    parts = pushed(CHARACTERS.decode, ids, [1] * len(ids))
    assert parts == [*(CHARACTERS.decode([id]) for id in ids), ""]


def metaspace() -> tokenizers.Tokenizer:
    """As Llama 2's: words begin with a mark, unknown characters are bytes, and the first space is dropped."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefgh", "▁a", "ab"]
    model = tokenizers.models.BPE(
        {token: id for id, token in enumerate(tokens)},
        [("▁", "a"), ("a", "b")],
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    made = tokenizers.Tokenizer(model)
    steps = tokenizers.normalizers
    made.normalizer = steps.Sequence([steps.Prepend("▁"), steps.Replace(" ", "▁")])
    back = tokenizers.decoders
    made.decoder = back.Sequence([back.Replace("▁", " "), back.ByteFallback(), back.Fuse(), back.Strip(" ", 1, 0)])
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    return made


@given(st.data(), st.text("abh é今🙂 ", min_size=1, max_size=12))
def test_a_tokenizer_with_marks_of_words_keeps_its_spaces(data: st.DataObject, text: str) -> None:
    made = metaspace()
    ids = made.encode(text).ids
    parts = pushed(made.decode, ids, data.draw(splits(len(ids))))
    assert "".join(parts) == made.decode(ids) == text
    assert all("\ufffd" not in part for part in parts)


def test_text_comes_as_soon_as_it_is_whole() -> None:
    ids = BPE.encode_bytes("a🙂b".encode())
    assert len(ids) >= 3, "the character is several tokens"
    assert pushed(BPE.decode, ids, [1] * len(ids)) == ["a", *[""] * (len(ids) - 3), "🙂", "b", ""]


def test_a_character_that_is_never_whole_comes_at_the_end() -> None:
    ids = BPE.encode_bytes("a🙂".encode()[:-1])
    assert pushed(BPE.decode, ids, [1] * len(ids))[-1] == "\ufffd" == BPE.decode(ids)[1:]


# --- checkpoints --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    return llama_directory(tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_runs_folder_and_one_of_its_checkpoints_load(tmp_path: Path, dtype: torch.dtype | None) -> None:
    first, second = own(tmp_path, step=1, loss=1.0), own(tmp_path, step=2, loss=2.0)
    for folder, which, model in (
        (tmp_path, "newest", second),
        (tmp_path, "best", first),
        (tmp_path / "step-00000001", "newest", first),
    ):
        found = load(folder, which=which, dtype=dtype)
        expected = {name: tensor.to(dtype or torch.float32) for name, tensor in model.state_dict().items()}
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.model.state_dict().items())
        assert found.tokenizer.digest == BPE.digest and not found.model.training
        assert (found.ends, found.start) == ({BPE.eot}, BPE.eot)


@pytest.mark.parametrize("name", ["", "step-00000001"])
def test_a_checkpoint_is_verified_once(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own(tmp_path)
    read: list[Path] = []
    real = checkpoint._fingerprint

    def spy(path: Path) -> Any:
        read.append(path)
        return real(path)

    monkeypatch.setattr(checkpoint, "_fingerprint", spy)
    load(tmp_path / name)
    assert len(read) == len(set(read)) > 0


def test_prompts_and_the_empty_one(tmp_path: Path, llama: Path) -> None:
    own(tmp_path)
    found = load(tmp_path)
    assert found.encode("a time") == BPE.encode("a time")
    assert found.encode("") == [BPE.eot]
    assert found.encode(f"{EOT}a") == [BPE.eot, *BPE.encode("a")]
    theirs = load(llama)
    start = theirs.start
    assert theirs.encode("a") == [start, *BPE.encode("a")] and theirs.encode("") == [start]
    own(tmp_path / "bare", train_char([SAMPLE]))
    with pytest.raises(ConfigError, match="prompt is empty"):
        load(tmp_path / "bare").encode("")
    with pytest.raises(ConfigError, match="no UTF-8 at character 1"):
        found.encode("a\udcff")


def test_ends_of_text_of_a_hugging_face_directory(llama: Path, tmp_path: Path) -> None:
    folder = copy(llama, tmp_path)
    generation = folder / "generation_config.json"
    assert load(folder).ends == {BPE.eot}
    edit(generation, eos_token_id=[3, 5])
    assert load(folder).ends == {3, 5}
    edit(generation, eos_token_id=None)
    edit(folder / "config.json", eos_token_id=7)
    assert load(folder).ends == {7}, "config.json's, where generation_config.json has none"
    generation.unlink()
    edit(folder / "config.json", eos_token_id=None, bos_token_id=None)
    found = load(folder)
    assert (found.ends, found.start) == ({BPE.eot}, BPE.eot), "the tokenizer's, where neither has one"
    edit(folder / "config.json", eos_token_id="</s>")
    with pytest.raises(ConfigError, match=r"config\.json: eos_token_id is '</s>'"):
        load(folder)


@pytest.mark.parametrize("prompts", [["Once upon"], ["Once upon a time", "", "there was a café"]])
def test_greedy_text_is_that_of_transformers(llama: Path, prompts: list[str]) -> None:
    transformers = pytest.importorskip("transformers")
    reference = transformers.LlamaForCausalLM.from_pretrained(llama)
    tokenizer = tokenizers.Tokenizer.from_file(str(llama / "tokenizer.json"))
    found = load(llama)
    rows = complete(found.model, [found.encode(prompt) for prompt in prompts], 20, stop=found.ends)
    for prompt, row in zip(prompts, rows, strict=True):
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        with torch.no_grad():
            out = reference.generate(ids, max_new_tokens=20, do_sample=False, attention_mask=torch.ones_like(ids))
        expected = tokenizer.decode(out[0].tolist(), skip_special_tokens=True)
        assert found.tokenizer.decode(found.encode(prompt) + row) == expected
