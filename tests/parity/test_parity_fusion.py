"""Encoders of labels against the embeddings of other packages."""

import torch

from condmod import Signal, create_encoder


def test_label_is_diffusers_label_embedding_and_its_null_the_extra_row(parity, peer):
    ours = create_encoder("label(classes=10, nullable=True)", 8).eval()
    theirs = peer("diffusers.models.embeddings").LabelEmbedding(10, 8, dropout_prob=0.1).eval()
    with torch.no_grad():
        theirs.embedding_table.weight.copy_(torch.cat([ours.table, ours.null[None]]))
    label, present = torch.tensor([3, 9, -1]), torch.tensor([True, True, False])
    got, want = ours(Signal(label, present=present)), theirs(torch.tensor([3, 9, 10]))
    parity("label", "diffusers", "LabelEmbedding", got, want, tolerance=0.0, y=label)
