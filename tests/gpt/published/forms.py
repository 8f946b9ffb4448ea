"""Models of transformers, written in every form in which GPT-2's weights are published."""

import json

import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from gpt.tokens.tokenizer import byte_tokenizer


def hugging_face_model(n_layer=2, n_head=4, n_embd=32, **options):
    """A model with opinions: its weights, biases too, are larger than at initialization."""
    torch.manual_seed(7)
    config = GPT2Config(
        vocab_size=257, n_positions=32, n_embd=n_embd, n_layer=n_layer, n_head=n_head, **options
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def tensors_of(model):
    """As the files have them: the tied head absent, the causal masks of old files there."""
    tensors = {k: v.clone() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    if not model.config.tie_word_embeddings:
        tensors["lm_head.weight"] = model.lm_head.weight.detach().clone()
    return tensors


def with_masks(tensors, model):
    n = model.config.n_positions
    mask = torch.ones(n, n, dtype=torch.uint8).tril()[None, None]
    for layer in range(model.config.n_layer):
        tensors[f"transformer.h.{layer}.attn.bias"] = mask.clone()
        tensors[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    return tensors


def book_tensors(model):
    """The state dict of the book's GPTModel with these weights: its mask, an own copy as head."""
    theirs = model.transformer.state_dict()
    width, n = model.config.n_embd, model.config.n_positions
    book = {"tok_emb.weight": theirs["wte.weight"], "pos_emb.weight": theirs["wpe.weight"]}
    for i in range(model.config.n_layer):
        h, block = f"h.{i}", f"trf_blocks.{i}"
        book[f"{block}.att.mask"] = torch.ones(n, n).triu(1)
        for j, part in enumerate(("W_query", "W_key", "W_value")):
            columns = slice(j * width, (j + 1) * width)
            book[f"{block}.att.{part}.weight"] = theirs[f"{h}.attn.c_attn.weight"][:, columns].T
            book[f"{block}.att.{part}.bias"] = theirs[f"{h}.attn.c_attn.bias"][columns]
        for ours, hf in (
            ("att.out_proj", "attn.c_proj"),
            ("ff.layers.0", "mlp.c_fc"),
            ("ff.layers.2", "mlp.c_proj"),
        ):
            book[f"{block}.{ours}.weight"] = theirs[f"{h}.{hf}.weight"].T
            book[f"{block}.{ours}.bias"] = theirs[f"{h}.{hf}.bias"]
        for j in (1, 2):
            book[f"{block}.norm{j}.scale"] = theirs[f"{h}.ln_{j}.weight"]
            book[f"{block}.norm{j}.shift"] = theirs[f"{h}.ln_{j}.bias"]
    book["final_norm.scale"] = theirs["ln_f.weight"]
    book["final_norm.shift"] = theirs["ln_f.bias"]
    book["out_head.weight"] = theirs["wte.weight"]
    return {name: value.clone().contiguous() for name, value in book.items()}


def openai_tensors(model):
    """OpenAI's variables, as arrays; matrices have a leading dimension of 1."""
    variables = {}
    for name, value in model.transformer.state_dict().items():
        path = name.replace("h.", "h", 1).split(".") if name.startswith("h.") else name.split(".")
        *owner, leaf = path
        if owner[0] in ("wte", "wpe"):
            variables[f"model/{owner[0]}"] = value.numpy()
            continue
        matrix = value.dim() == 2
        short = {"weight": "w" if matrix else "g", "bias": "b"}[leaf]
        variables["/".join(["model", *owner, short])] = (value[None] if matrix else value).numpy()
    return variables


def write_config(model, folder):
    model.config.save_pretrained(folder)


def write_sharded(tensors, folder, name, save):
    """Two files and their index, as transformers lays them out."""
    stem, suffix = name.split(".")
    files = [f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    place = {each: files[i % 2] for i, each in enumerate(tensors)}
    for file in files:
        save({each: tensors[each] for each in tensors if place[each] == file}, folder / file)
    index = {"metadata": {"total_size": 0}, "weight_map": place}
    (folder / f"{name}.index.json").write_text(json.dumps(index))


def write_tensorflow(variables, folder, hparams):
    """A checkpoint by TensorFlow's own Saver, and the hparams.json that OpenAI laid beside it."""
    import tensorflow as tf

    v1 = tf.compat.v1
    with tf.Graph().as_default(), v1.Session() as session:
        kept = {name: v1.get_variable(name, initializer=v) for name, v in variables.items()}
        session.run(v1.global_variables_initializer())
        v1.train.Saver(kept).save(session, str(folder / "model.ckpt"))
    (folder / "hparams.json").write_text(json.dumps(hparams))


def hparams_of(model):
    c = model.config
    names = {"n_vocab": c.vocab_size, "n_ctx": c.n_positions, "n_embd": c.n_embd}
    return {**names, "n_head": c.n_head, "n_layer": c.n_layer}


def _safetensors(model, folder):
    model.save_pretrained(folder)


def _without_prefix(model, folder):
    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    bare = {k.removeprefix("transformer."): v for k, v in load_file(path).items()}
    save_file(bare, path)


def _sharded(model, folder):
    model.save_pretrained(folder, max_shard_size="30KB" if model.config.n_embd < 100 else "200MB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1


def _bin(model, folder):
    write_config(model, folder)
    torch.save(with_masks(model.state_dict(), model), folder / "pytorch_model.bin")


def _old_bin(model, folder):
    write_config(model, folder)
    tensors = with_masks(tensors_of(model), model)
    path = folder / "pytorch_model.bin"
    torch.save(tensors, path, _use_new_zipfile_serialization=False)


def _sharded_bin(model, folder):
    write_config(model, folder)
    write_sharded(with_masks(tensors_of(model), model), folder, "pytorch_model.bin", torch.save)


def _book_pth(model, folder):
    write_config(model, folder)
    torch.save(book_tensors(model), folder / "gpt2-small.pth")


def _book_with_optimizer(model, folder):
    write_config(model, folder)
    state = {"model_state_dict": book_tensors(model), "optimizer_state_dict": {"state": {}}}
    torch.save(state, folder / "model_and_optimizer.pth")


def _book_safetensors(model, folder):
    write_config(model, folder)
    save_file(book_tensors(model), folder / "gpt2-small.safetensors")


def _tensorflow(model, folder):
    write_tensorflow(openai_tensors(model), folder, hparams_of(model))


FORMS = {
    "safetensors": _safetensors,
    "without prefix": _without_prefix,
    "safetensors in several files": _sharded,
    "pytorch_model.bin": _bin,
    "pytorch_model.bin before 1.6": _old_bin,
    "pytorch_model.bin in several files": _sharded_bin,
    "book pth": _book_pth,
    "book pth with optimizer": _book_with_optimizer,
    "book safetensors": _book_safetensors,
    "TensorFlow": _tensorflow,
}


def write(form, model, folder):
    """Write `model` into `folder` in a form, its vocabulary beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    FORMS[form](model, folder)
    byte_tokenizer().save(folder)
    return folder
