"""A trained model: every runner's greedy tokens are those of the fp32 reference, wherever rounding cannot decide."""

from __future__ import annotations

import pytest
import torch
from launched import ALL, DEVICE, ONE_ROW, decoded
from launched import rows as rows
from runs import text
from torch import Tensor

from tinylm import checkpoint, data
from tinylm.generate import Decoder
from tinylm.generate.runners import kernels
from tinylm.model import DTYPES, Transformer
from tinylm.train import TrainConfig, train

pytestmark = pytest.mark.usefixtures("rows")
CONTEXT = 64  # of the trained model


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Transformer, Tensor]:
    """A model that has learned a text of 40 words, over and over, and a piece of the text, (1, CONTEXT).

    A letter follows from the letters before it; the context's first few do not yet tell where in the text it is.
    """
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text(" ".join([text(40)] * 100))
    tokens = data.prepare(text=folder / "text.txt", folder=folder / "data", tokenizer="char")
    train(
        TrainConfig(
            data=str(tokens), out=str(folder / "run"), context=CONTEXT, batch=8, steps=200, lr=5e-3, device="cpu",
            eval_every=0, eval_tokens=64, peak_flops=1e9,
        )
    )  # fmt: skip
    model, _ = checkpoint.load_model(folder / "run", "cpu", torch.float32)
    start = torch.zeros(1, dtype=torch.int64).numpy()
    return model.eval(), torch.from_numpy(data.Tokens(tokens, "train").read(start, CONTEXT))


@torch.inference_mode()
def decided(reference: Transformer, ids: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The likeliest token after each of ids (1, T) by the reference, and where rounding cannot make it another.

    The gap of the two likeliest, a and b, is (w_a - w_b) h, with h the normed stream and w rows of the head. Each of
    2 x layers residual additions rounds the stream by up to eps of it, a walk of eps sqrt(2 layers), and two passes
    differ by twice that; so the gap moves by at most 2 eps sqrt(2 layers) |w_a - w_b| |h|. That h moves straight
    along w_a - w_b is the worst of its `dim` directions: a random one moves the gap by 1 / sqrt(dim) of that, an
    eighth here, and what is left over is for the roundings inside the branches. (In bf16 the gap of this model moves
    by half of the bound at most.)
    """
    logits, h = reference(ids)[0], reference.hidden(ids)[0]
    (first, second), (a, b) = (part.unbind(-1) for part in logits.topk(2))
    apart = (reference.head_weight[a] - reference.head_weight[b]).norm(dim=-1)
    bound = 2 * eps * (2 * reference.config.layers) ** 0.5 * apart * h.norm(dim=-1)
    return a, first - second > bound


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("kind", DTYPES if DEVICE == "cuda" else ["fp32", "bf16"])
def test_greedy_tokens_are_those_of_the_fp32_reference(
    name: str, kind: str, trained: tuple[Transformer, Tensor]
) -> None:
    """After prompts of 1 token to the whole context, wherever the reference's choice is beyond rounding."""
    (model, known), dtype = trained, DTYPES[kind]
    if name in ONE_ROW and dtype not in kernels.DTYPES:
        pytest.skip(f"{name} decodes bf16 and fp16 alone")
    model = Transformer.build(model.config, dtype=dtype)
    model.load_state_dict(trained[0].state_dict())
    reference = Transformer.build(model.config)
    reference.load_state_dict(model.state_dict())  # the same weights: those that dtype can hold
    model, reference = model.eval().to(DEVICE), reference.eval().to(DEVICE)
    sure = total = 0
    for length in range(1, CONTEXT + 1):
        decoder = Decoder(model, known[:, :length], min(7, CONTEXT - length), runner=name)
        assert decoder.runner == name
        chosen = decoded(decoder)
        ids = torch.cat((known[:, :length].to(DEVICE), chosen[:, :-1]), 1)
        likeliest, certain = decided(reference, ids, torch.finfo(dtype).eps)
        likeliest, certain = likeliest[length - 1 :], certain[length - 1 :]
        assert torch.equal(chosen[0][certain], likeliest[certain]), f"after {length} tokens"
        sure, total = sure + int(certain.sum()), total + len(certain)
    assert sure >= 0.9 * total, f"{sure} of {total} positions are decided: too few to prove anything"
