"""Adapters: what they are, what of a model they train, and that a merged model is a plain one."""

from dataclasses import replace

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch.nn import functional as F

from gpt.base.errors import InputError
from gpt.batches.data import Batch
from gpt.batches.metrics import class_loss_sum, lm_loss_sum
from gpt.model.config import GPT2_SIZES
from gpt.model.model import GPT, GPTClassifier
from gpt.model.weights import load_model, save_model
from gpt.tokens.tokenizer import byte_tokenizer
from gpt.train.loop import fit
from gpt.train.recipe import TrainParams, make_optimizers
from gpt.tune.lora import LoraLinear, LoraParams, adapters, merge, wrap

TOGETHER = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", "head")
BLOCKS = ("query", "key", "value", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


def classifier(make_model, **changes):
    torch.manual_seed(1)
    base = make_model(**changes)
    model = GPTClassifier(base.config, ["ham", "spam"])
    model.load_state_dict(base.state_dict(), strict=False)
    return model


def batch():
    torch.manual_seed(2)
    lengths = torch.tensor([20, 7, 13, 1])
    return Batch(torch.randint(0, 256, (4, 20)), torch.tensor([0, 1, 1, 0]), lengths)


def shake(model):
    """Adapters as if something had been learnt."""
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in adapters(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.1)


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("layers", "expected"), [(LoraParams().layers, 2_666_528), (TOGETHER, 2_371_616)]
)
def test_at_rank_16_on_124m_the_trainable_count_is_what_the_formula_gives(layers, expected):
    with torch.device("meta"):
        model = GPTClassifier(GPT2_SIZES["124M"], ["ham", "spam"])
        assert wrap(model, LoraParams(rank=16, layers=layers)) == 0
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
    # the formula: rank x (inputs + outputs) of every matrix
    C, apart = 768, 3 * (768 + 768) if layers != TOGETHER else 768 + 3 * 768
    assert expected == 16 * (12 * (apart + 2 * C + 5 * C + 5 * C) + C + 2)


def test_before_the_first_step_nothing_has_changed(make_model):
    model, seen = classifier(make_model), batch()
    before = model(seen.inputs, seen.lengths)
    wrap(model, LoraParams())
    assert torch.equal(model(seen.inputs, seen.lengths), before)


@pytest.mark.parametrize("layers", [LoraParams().layers, TOGETHER, ("query", "value"), ("key",)])
def test_only_adapters_receive_gradients(make_model, layers):
    model, seen = classifier(make_model), batch()
    frozen = set(dict(model.named_parameters()))
    wrap(model, LoraParams(rank=4, layers=layers))
    shake(model)
    class_loss_sum(model, seen)[0].backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    assert reached == trained(model) == set(adapters(model))
    # a key's bias is all that has no say, and it has no adapter
    assert all(p.grad.abs().sum() > 0 for p in adapters(model).values())
    assert len(reached) == 2 * sum(isinstance(m, LoraLinear) for m in model.modules())
    assert not reached & frozen


def test_a_layer_with_adapters_is_frozen_of_itself():
    """Whoever wraps it, and whatever else of the model is trained."""
    layer = LoraLinear(torch.nn.Linear(4, 6), LoraParams())
    assert trained(layer) == {"lora_a", "lora_b"}
    assert trained(layer.merge()) == set()


def test_only_adapters_change_in_a_training(make_model):
    model, seen = classifier(make_model), batch()
    wrap(model, LoraParams(rank=2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizers = make_optimizers(model, TrainParams(steps=1, weight_decay=0.1))
    for _ in range(3):
        class_loss_sum(model, seen)[0].backward()
        for optimizer in optimizers:
            optimizer.step()
    changed = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    assert changed == set(adapters(model))


@pytest.mark.parametrize("layers", [LoraParams().layers, TOGETHER, ("query", "value"), ("key",)])
@pytest.mark.parametrize("changes", [{}, {"qkv_bias": False}])
def test_merged_and_unmerged_logits_are_equal(make_model, layers, changes):
    model, seen = classifier(make_model, **changes), batch()
    plain = model(seen.inputs, seen.lengths)
    names = list(model.state_dict())
    wrap(model, LoraParams(rank=4, alpha=8, layers=layers))
    shake(model)
    unmerged = model(seen.inputs, seen.lengths)
    merge(model)
    assert (model(seen.inputs, seen.lengths) - unmerged).abs().max() < 1e-5
    assert (unmerged - plain).abs().max() > 1e-2, "nothing was adapted: nothing is compared"
    assert list(model.state_dict()) == names
    assert not adapters(model)


def test_a_third_is_adapted_by_itself(make_model):
    """Against one product a third, written out."""
    model = classifier(make_model)
    C = model.config.n_embd
    before = model.h[0].attn.c_attn.weight.clone()
    wrap(model, LoraParams(rank=2, alpha=6, layers=("query", "value")))
    shake(model)
    layer = model.h[0].attn.c_attn
    (aq, av), (bq, bv) = layer.lora_a.split(2), layer.lora_b.split(C)
    expected = torch.cat([3 * bq @ aq, torch.zeros(C, C), 3 * bv @ av])
    x = torch.randn(5, C)
    assert torch.allclose(layer(x) - layer.base(x), x @ expected.t(), atol=1e-5)
    for some in (slice(0, C), slice(C, 3 * C)):
        assert torch.allclose(layer.some(x, some), layer(x)[:, some], atol=1e-5)
    merge(model)
    assert torch.allclose(model.h[0].attn.c_attn.weight - before, expected, atol=1e-6)


def test_a_merged_classifier_is_a_plain_directory_that_transformers_loads(make_model, tmp_path):
    from transformers import AutoModelForSequenceClassification

    model, seen = classifier(make_model).eval(), batch()
    wrap(model, LoraParams(rank=4))
    shake(model)
    with torch.no_grad():
        unmerged = model(seen.inputs, seen.lengths)
    merge(model)
    save_model(model, tmp_path / "model", tokenizer=byte_tokenizer())
    assert torch.allclose(
        load_model(tmp_path / "model")(seen.inputs, seen.lengths), unmerged, atol=1e-5
    )
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    for row, n in zip(seen.inputs, seen.lengths, strict=True):
        row[n:] = 256  # the end of text, by which transformers knows the padding
    with torch.no_grad():
        assert torch.allclose(theirs(seen.inputs).logits, unmerged, atol=1e-4)


def test_a_language_model_is_adapted_and_merged_too(make_model):
    model = make_model()
    ids = torch.randint(0, 256, (2, 12))
    wrap(model, LoraParams(rank=4, layers=BLOCKS))
    shake(model)
    lm_loss_sum(model, Batch(ids, ids))[0].backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == set(adapters(model))
    unmerged = model(ids)
    merge(model)
    assert (model(ids) - unmerged).abs().max() < 1e-4 * unmerged.abs().max()
    untied = make_model(tie_weights=False)
    wrap(untied, LoraParams(rank=4))
    assert "lm_head.lora_a" in adapters(untied)
    with pytest.raises(InputError, match=r"lora\.layers: the head of this model is its embedding"):
        wrap(make_model(), LoraParams())


def test_only_the_last_blocks_are_adapted_where_that_is_asked(make_model):
    model = classifier(make_model, n_layer=4)
    assert wrap(model, LoraParams(blocks=1)) == 3
    assert {name.split(".")[1] for name in adapters(model)} == {"3", "lora_a", "lora_b"}
    assert wrap(classifier(make_model, n_layer=4), LoraParams(layers=("head",))) == 4
    with pytest.raises(InputError, match=r"lora\.blocks: 5 blocks .* the model has 4"):
        wrap(classifier(make_model, n_layer=4), LoraParams(blocks=5))


def test_dropout_is_of_what_goes_into_the_adapters_and_only_in_training(make_model):
    model, seen = classifier(make_model), batch()
    wrap(model, LoraParams(rank=4, dropout=0.5))
    shake(model)
    model.train()
    one, other = (model(seen.inputs, seen.lengths) for _ in range(2))
    assert not torch.equal(one, other)
    model.eval()
    assert torch.equal(model(seen.inputs, seen.lengths), model(seen.inputs, seen.lengths))
    # without the adapters nothing is dropped
    for name, parameter in adapters(model).items():
        if name.endswith("lora_b"):
            torch.nn.init.zeros_(parameter)
    model.train()
    assert torch.equal(model(seen.inputs, seen.lengths), model(seen.inputs, seen.lengths))


def test_in_bf16_what_is_computed_stays_in_bf16(make_model):
    model = classifier(make_model)
    wrap(model, LoraParams(layers=("key",)))
    with torch.autocast("cpu", torch.bfloat16):
        assert model.h[0].attn.c_attn(torch.randn(3, 32)).dtype == torch.bfloat16


def test_muon_takes_the_adapters_of_the_blocks_and_learns(make_model):
    model, seen = classifier(make_model), batch()
    wrap(model, LoraParams(rank=4))

    class Rows:
        lengths = None

        def __len__(self):
            return 4

        def __getitem__(self, index):
            return index

        def collate(self, items):
            return seen

    def validate(model):
        with torch.no_grad():
            loss = F.cross_entropy(model(seen.inputs, seen.lengths), seen.targets)
        return {"validation_loss": loss.item()}

    before = validate(model)["validation_loss"]
    params = TrainParams(steps=20, optimizer="muon", learning_rate=1e-2, batch_size=4)
    result = fit(
        model, params=replace(params), train=Rows(), loss=class_loss_sum, validate=validate
    )
    assert min(row["validation_loss"] for row in result.history) < before / 2


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"rank": 0}, "rank"),
        ({"alpha": 0}, "alpha"),
        ({"dropout": 1}, "dropout"),
        ({"layers": []}, "name at least one layer"),
        ({"layers": ["wte"]}, "layers"),
        ({"layers": ["head", "head"]}, "head is named twice"),
        ({"layers": ["attn.c_attn", "key"]}, "attn.c_attn holds key already"),
        ({"r": 1}, "r"),
    ],
)
def test_impossible_parameters_are_refused(wrong, complaint):
    with pytest.raises(ValidationError, match=complaint):
        TypeAdapter(LoraParams).validate_python(wrong)


def test_a_gpt_is_a_gpt_again(make_model):
    model = make_model()
    wrap(model, LoraParams(layers=BLOCKS))
    merge(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in GPT(model.config).modules()]
