"""Our modules against torchrec.models.dlrm, and the loss of uneven batches."""

import pytest
import torch
from torch import nn
from torchrec.models import dlrm as reference
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from dlrm.assembly.build import rows_at_once
from dlrm.config.config import Config, DataConfig, DenseExecution, ModelConfig, TrainingConfig
from dlrm.kernels.interaction import dot_interaction
from dlrm.loader.batch import Batch, build_batch
from dlrm.loader.partition import Partition, Span
from dlrm.loader.random_rows import RandomRows
from dlrm.model.dlrm import DLRM, DLRMTrain
from dlrm.schema.criteo import CATEGORICAL_NAMES, NUM_INTEGER_FEATURES, TABLE_NAMES

ROWS = tuple(range(3, 29))
CONFIGS = {
    kind: ModelConfig(
        num_embeddings_per_feature=ROWS,
        embedding_dim=8,
        dense_arch_layer_sizes=(16, 8),
        over_arch_layer_sizes=(32, 16, 1),
        interaction_type=kind,
        interaction_branch1_layer_sizes=(32, 24),
        interaction_branch2_layer_sizes=(32, 16),
        dcn_num_layers=3,
        dcn_low_rank_dim=7,
    )
    for kind in ("original", "dcn", "projection")
}
REFERENCES = {
    "original": (reference.DLRM, {}),
    "dcn": (reference.DLRM_DCN, {"dcn_num_layers": 3, "dcn_low_rank_dim": 7}),
    "projection": (
        reference.DLRM_Projection,
        {"interaction_branch1_layer_sizes": [32, 24], "interaction_branch2_layer_sizes": [32, 16]},
    ),
}
RENAMED = (
    ("sparse_arch.embedding_bag_collection.", "embedding_bag_collection."),
    ("dense_arch.model.", "dense_arch."),
    ("over_arch.model.", "over_arch."),
    ("inter_arch.interaction_branch1.model.", "interaction.interaction_branch1."),
    ("inter_arch.interaction_branch2.model.", "interaction.interaction_branch2."),
    ("inter_arch.", "interaction."),
)


def make_batch(num_rows: int, padded_rows: int | None = None, start: int = 0, global_rows: int | None = None) -> Batch:
    source = RandomRows(ROWS, (1,) * 26, 0.0, seed=7)
    span = Span(0, start, start + num_rows, padded_rows or num_rows, global_rows or num_rows)
    return build_batch(source.read(start, start + num_rows), span, (1,) * 26)


def make_pair(kind: str) -> tuple[DLRM, nn.Module]:
    torch.manual_seed(3)
    tables = [
        EmbeddingBagConfig(name=table, num_embeddings=rows, embedding_dim=8, feature_names=[feature])
        for table, feature, rows in zip(TABLE_NAMES, CATEGORICAL_NAMES, ROWS, strict=True)
    ]
    build, extra = REFERENCES[kind]
    theirs = build(EmbeddingBagCollection(tables=tables), NUM_INTEGER_FEATURES, [16, 8], [32, 16, 1], **extra)
    ours = DLRM(CONFIGS[kind], torch.device("cpu"))
    ours.load_state_dict({our_name(name): weight for name, weight in theirs.state_dict().items()})
    return ours, theirs


def our_name(name: str) -> str:
    for theirs, ours in RENAMED:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_and_gradients_agree_with_torchrec(kind: str) -> None:
    ours, theirs = make_pair(kind)
    batch = make_batch(64)
    our_logits_B = ours(batch.dense_BI, batch.sparse_features)
    their_logits_B = theirs(batch.dense_BI, batch.sparse_features).squeeze(1)
    torch.testing.assert_close(our_logits_B, their_logits_B, rtol=0, atol=1e-6)

    DLRMTrain(ours, world_size=1)(batch)[0].backward()
    nn.functional.binary_cross_entropy_with_logits(their_logits_B, batch.labels_B).backward()
    ours_by_name = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(ours_by_name[our_name(name)].grad, parameter.grad, rtol=0, atol=1e-6)


def test_tables_come_first_so_that_their_all_to_all_overlaps_with_the_dense_arch() -> None:
    model, _ = make_pair("original")
    called: list[str] = []
    for name in ("embedding_bag_collection", "dense_arch", "interaction", "over_arch"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    batch = make_batch(4)
    model(batch.dense_BI, batch.sparse_features)
    assert called == ["embedding_bag_collection", "dense_arch", "interaction", "over_arch"]


def test_padding_changes_neither_loss_nor_gradients() -> None:
    ours, _ = make_pair("original")
    train = DLRMTrain(ours, world_size=1)
    plain_loss, plain_output = train(make_batch(5))
    plain = torch.autograd.grad(plain_loss, list(ours.parameters()))
    padded_loss, padded_output = train(make_batch(5, padded_rows=6))
    padded = torch.autograd.grad(padded_loss, list(ours.parameters()))
    assert len(padded_output.labels_B) == 5
    torch.testing.assert_close(padded_output.logits_B, plain_output.logits_B, rtol=0, atol=1e-6)
    for one, other in zip(padded, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("autocast", [None, "cpu"])
@pytest.mark.parametrize(("rows", "padded_rows"), [(13, 14), (16, 16), (1, 13), (0, 13)])  # pieces of 3
def test_pieces_of_a_batch_have_its_loss_logits_and_gradients(
    kind: str, autocast: str | None, rows: int, padded_rows: int
) -> None:
    ours, _ = make_pair(kind)
    whole = pieces_of(ours, autocast, None, rows, padded_rows)
    for one, other in zip(whole, pieces_of(ours, autocast, 12, rows, padded_rows), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6 if autocast is None else 2e-3)
    assert all(map(torch.equal, whole, pieces_of(ours, autocast, padded_rows, rows, padded_rows)))  # one piece


def pieces_of(
    ours: DLRM, autocast: str | None, rows_at_once: int | None, rows: int, padded_rows: int
) -> list[torch.Tensor]:
    """Loss, logits, labels, gradients."""
    train = DLRMTrain(ours, world_size=2, autocast=autocast, rows_at_once=rows_at_once)
    loss, output = train(make_batch(rows, padded_rows, global_rows=20))
    with torch.no_grad():
        again = train(make_batch(rows, padded_rows, global_rows=20))[1]
    assert torch.equal(again.loss, output.loss)
    assert torch.equal(again.logits_B, output.logits_B)
    return [loss, output.logits_B, output.labels_B, *torch.autograd.grad(2 * loss, list(ours.parameters()))]


def test_the_dense_arch_computes_before_pieces_wait_for_pooled_rows() -> None:
    ours, _ = make_pair("original")
    called: list[str] = []
    for name in ("embedding_bag_collection", "dense_arch", "interaction"):
        ours.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    DLRMTrain(ours, world_size=1, rows_at_once=8)(make_batch(10))  # in pieces of 2
    assert called == ["embedding_bag_collection", *["dense_arch", "interaction"] * 5]


@pytest.mark.parametrize(
    ("batch", "test_batch", "device", "execution", "expected"),
    [
        (16384, 16384, "cpu", "eager", None),
        (16385, None, "cpu", "eager", 16384),
        (64, 16385, "cpu", "eager", 16384),
        (65536, None, "cuda", "eager", None),
        (65536, None, "cpu", "compile", None),
    ],
)
def test_large_batches_on_a_cpu_go_in_pieces(
    batch: int, test_batch: int | None, device: str, execution: DenseExecution, expected: int | None
) -> None:
    data = DataConfig(batch_size=batch, test_batch_size=test_batch)
    config = Config(data=data, training=TrainingConfig(dense_execution=execution))
    assert rows_at_once(config, torch.device(device)) == expected


@pytest.mark.parametrize("kind", CONFIGS)
def test_pieces_take_a_second_backward_pass_for_a_mistake(kind: str) -> None:
    ours, _ = make_pair(kind)
    loss = DLRMTrain(ours, world_size=1, rows_at_once=6)(make_batch(7))[0]
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="expected one backward pass, got a second one"):
        loss.backward()


def test_mean_over_uneven_ranks_is_the_mean_over_samples() -> None:
    ours, _ = make_pair("dcn")
    whole = DLRMTrain(ours, world_size=1)(make_batch(7))[0]
    partition = Partition(num_rows=7, batch_size=3, world_size=3)
    spans = [partition.span(0, rank) for rank in range(3)]
    losses = [
        DLRMTrain(ours, world_size=3)(make_batch(span.rows, span.padded_rows, span.start, 7))[0] for span in spans
    ]
    torch.testing.assert_close(torch.stack(losses).mean(), whole, rtol=1e-6, atol=1e-6)


def test_a_rank_without_rows_has_zero_loss_and_gradients() -> None:
    ours, _ = make_pair("original")
    loss, output = DLRMTrain(ours, world_size=2)(make_batch(0, padded_rows=1, global_rows=1))
    loss.backward()
    assert loss.item() == 0
    assert len(output.logits_B) == len(output.labels_B) == 0
    assert all(not p.grad.any() for p in ours.parameters() if p.grad is not None)


def test_gradients_of_pairwise_dots_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    dense = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    features = torch.randn(6, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *vectors: dot_interaction(vectors[0], vectors[1:], [[6, 0, 3, 9]]), (dense, features)
    )
