"""Texts of a batch as arrays: every token in its place, little room lost, the same vectors."""

from __future__ import annotations

import numpy as np
import pytest
from embedding_models import make_model, some_texts
from hypothesis import given
from hypothesis import strategies as st

from hornbeam_ml import Embedder
from hornbeam_ml.embedder.checkpoint import Checkpoint
from hornbeam_ml.embedder.description import describe
from hornbeam_ml.embedder.layout import PACKED, PADDED, pack, pad
from hornbeam_ml.embedder.probe import probe_texts

token_lists = st.lists(
    st.lists(st.integers(1, 30_000), min_size=1, max_size=130), min_size=1, max_size=24
)


@given(token_lists)
def test_padded_rows_hold_their_texts(batch):
    ids, mask = pad(batch, 0)
    assert len(PADDED) == 2
    for tokens, row, standing in zip(batch, ids, mask, strict=True):
        assert row[standing == 1].tolist() == list(tokens)
        assert not row[len(tokens) :].any()


@given(token_lists, st.integers(0, 2))
def test_packed_rows_hold_each_text_once_in_order(batch, first_position):
    arrays = pack(batch, 0, first_position)
    ids, positions, segments, places, mask = arrays
    assert len(PACKED) == len(arrays)
    assert ids.shape == positions.shape == segments.shape
    for number, tokens in enumerate(batch):
        found = places[number][mask[number] == 1]
        assert ids.ravel()[found].tolist() == list(tokens)
        assert len({place // ids.shape[1] for place in found}) == 1  # in one row
        numbers = range(first_position, first_position + len(tokens))
        assert positions.ravel()[found].tolist() == list(numbers)
        assert set(segments.ravel()[found]) == {number}
    assert (segments >= 0).sum() == sum(map(len, batch))
    assert (ids[segments < 0] == 0).all()


def test_rows_are_filled():
    """Texts of 5 to 60 words, as in the benchmark, 16 at a time."""
    lengths = np.random.default_rng(0).integers(7, 63, (50, 16))
    packed = padded = 0
    for batch in lengths:
        packed += pack([[1] * length for length in batch], 0)[0].size
        padded += pad([[1] * length for length in batch], 0)[0].size
    assert lengths.sum() / packed > 0.9
    assert lengths.sum() / padded < 0.65


def make_other(path, kind):
    """Save a small model of another kind than BERT."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules
    from transformers import AutoConfig, AutoModel

    made = make_model(path)
    torch.manual_seed(1)
    config = AutoConfig.for_model(
        kind,
        vocab_size=len(made.tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=100,
        pad_token_id=made.tokenizer.pad_token_id,
    )
    AutoModel.from_config(config).save_pretrained(path / kind)
    made.tokenizer.save_pretrained(path / kind)
    first = modules.Transformer(str(path / kind), max_seq_length=64)
    other = SentenceTransformer(modules=[first, modules.Pooling(32)], device="cpu")
    other.save(str(path / "other"), create_model_card=False)
    return path / "other"


@pytest.mark.parametrize(
    ("kind", "packs"),
    [
        pytest.param("bert", True, id="BERT"),
        pytest.param("roberta", True, id="RoBERTa, whose positions begin after that of padding"),
        pytest.param("mpnet", False, id="MPNet, with relative positions"),
    ],
)
def test_a_kind_of_model_packs_or_not(tmp_path, kind, packs):
    """And its vectors are the same whatever they were packed with."""
    checkpoint = Checkpoint(make_other(tmp_path, kind), "cpu")
    settings = describe(checkpoint, "x", checkpoint.encode(probe_texts()))
    assert settings.packs == packs
    texts = [*some_texts(12), "", "a"]
    with Embedder(tmp_path / "other", backend="torch", precision="exact", cache=False) as embedder:
        vectors = embedder.encode(texts)
    assert np.allclose(vectors, checkpoint.encode(texts), atol=2e-6)


def test_a_model_that_only_says_that_it_packs_is_padded(tmp_path, monkeypatch):
    """The vectors of the probe decide."""
    make_model(tmp_path)
    checkpoint = Checkpoint(tmp_path / "model", "cpu")
    settings = Checkpoint.settings

    def wrong(self, fingerprint):
        import msgspec

        return msgspec.structs.replace(settings(self, fingerprint), first_position=3)

    monkeypatch.setattr(Checkpoint, "settings", wrong)
    assert not describe(checkpoint, "x", checkpoint.encode(probe_texts())).packs
