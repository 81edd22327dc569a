"""The peers of the benchmarks: another library's model with our weights is the same model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import inputs, peers
from tinylm.config import preset
from tinylm.model import Transformer


def model_of(**more: Any) -> Transformer:
    torch.manual_seed(0)
    return Transformer(preset("nano", **{"context": 64, "init_std": 0.3, **more})).eval()


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_llama_has_the_models_own_weights_and_its_logits(tied: bool) -> None:
    net = model_of(tied=tied)
    theirs = peers.llama(net)
    tokens = inputs.tokens(net.config, 2, 40, "cpu")
    # Logits of size 10, each pass rounding by a walk of eps sqrt(2 layers): see inputs.decode_check.
    torch.testing.assert_close(theirs(tokens).logits, net(tokens), rtol=0, atol=40 * torch.finfo(net.dtype).eps * 2)
    places = {weight.untyped_storage().data_ptr() for weight in net.parameters()}
    assert {weight.untyped_storage().data_ptr() for weight in theirs.parameters()} <= places, "nothing was copied"


@pytest.mark.skipif(not peers.counts(), reason="needs transformers from version 5 on")
def test_its_decode_loop_chooses_the_likeliest_tokens_of_each_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda step, **options: step)
    net = model_of()
    peer = peers.HuggingFace(net, 2, 9, 6)
    found = []
    for _ in range(2):
        loop = peer.begin(inputs.tokens(net.config, 2, 9, "cpu"))
        found.append(inputs.decode(loop))
        inputs.decode_check(net)(found[-1], loop)
        assert torch.equal(inputs.decode(loop), found[-1]), "rewound, it does the same again"
    assert not torch.equal(*found)


def test_what_cannot_be_a_peer_is_told() -> None:
    assert "needs a GPU" in str(peers.refusal(model_of()))
