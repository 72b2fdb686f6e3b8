"""Hugging Face folders: the engine computes what transformers does, and writes bitwise what it read."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from ppomax.engine.config_models import ModelConfig
from ppomax.engine.data.batches import Rows, make_packs
from ppomax.engine.errors import CheckpointError
from ppomax.engine.models.hf_checkpoint import fill_share, load_weights, save_hf
from ppomax.engine.models.hf_config import config_json, read_shape
from ppomax.engine.models.hf_match import match_names
from ppomax.engine.models.hf_names import (
    PADDING,
    local_rows,
    merge_shares,
    parameter_names,
    recipe_of,
    weight_sizes,
)
from ppomax.engine.models.hf_reader import RandomReader, SafetensorsReader
from ppomax.engine.models.hf_writer import plan_files
from ppomax.engine.models.shape import ModelShape
from ppomax.engine.models.transformer import PackedModel, build_chunks
from ppomax.engine.parallel.device import start
from ppomax.engine.parallel.groups import RoleGroups, make_groups
from ppomax.engine.parallel.layout import ParallelLayout

SMALL: dict[str, Any] = {
    "vocab_size": 250,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CASES: dict[str, transformers.PretrainedConfig] = {
    "llama": transformers.LlamaConfig(**SMALL),
    "llama-tied-llama3-rope": transformers.LlamaConfig(
        **{**SMALL, "tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE}
    ),
    "llama-linear-rope": transformers.LlamaConfig(
        **{**SMALL, "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}
    ),
    "llama-mha-head-dim-32": transformers.LlamaConfig(**{**SMALL, "num_key_value_heads": 4, "head_dim": 32}),
    "mistral": transformers.MistralConfig(**{**SMALL, "sliding_window": None}),
    "qwen2": transformers.Qwen2Config(**SMALL),
    "qwen2-tied": transformers.Qwen2Config(**{**SMALL, "tie_word_embeddings": True}),
    "qwen3-head-dim-32": transformers.Qwen3Config(**{**SMALL, "head_dim": 32}),
}
LENGTHS = (7, 1, 33)


@pytest.fixture(scope="module")
def groups() -> RoleGroups:
    start(60)
    return make_groups({"policy": ParallelLayout(tp=1, pp=1, dp=1)})["policy"]


def randomise(model: torch.nn.Module) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = torch.empty(parameter.shape).normal_(std=0.1, generator=generator)
            parameter.copy_(draw + 1 if "norm" in name else draw)
    return model.eval()


@pytest.fixture(scope="module")
def hf_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder per case with a random causal LM, in several files."""
    root = tmp_path_factory.mktemp("hf")
    for name, config in CASES.items():
        model = randomise(transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32))
        model.save_pretrained(root / name, max_shard_size="100KB")
    return root


@pytest.fixture(scope="module")
def scalar_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scalar")
    config = transformers.LlamaConfig(**{**SMALL, "num_labels": 1, "pad_token_id": 0})
    randomise(transformers.LlamaForSequenceClassification(config)).save_pretrained(folder)
    return folder


@pytest.fixture
def llama(hf_folders: Path, tmp_path: Path) -> Path:
    """A copy of the llama folder, in one file, that a test may damage."""
    folder = tmp_path / "llama"
    transformers.AutoModelForCausalLM.from_pretrained(hf_folders / "llama").save_pretrained(folder)
    return folder


def build(shape: ModelShape, groups: RoleGroups, **kwargs: Any) -> PackedModel:
    (model,) = build_chunks(ModelConfig(), shape, groups, sequence_parallel=False, **kwargs)
    return model


def load(folder: Path, groups: RoleGroups) -> PackedModel:
    model = build(read_shape(str(folder)), groups)
    load_weights(model, SafetensorsReader(str(folder)), str(folder))
    return model


def ragged_sequences() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(SMALL["vocab_size"], (length,), generator=generator) for length in LENGTHS]


@torch.no_grad()
def hidden_states(model: PackedModel) -> list[torch.Tensor]:
    """Of every token of the ragged sequences, run as one pack; per sequence [length, H]."""
    sequences = ragged_sequences()
    every = [torch.arange(length) for length in LENGTHS]
    pack = make_packs(sequences, Rows(every, [-torch.ones_like(x) for x in every], every), [[0, 1, 2]])[0]
    return list(model.eval()(pack).split(LENGTHS))


def contents(folder: Path) -> dict[str, torch.Tensor]:
    return {name: x for file in sorted(folder.glob("*.safetensors")) for name, x in load_file(file).items()}


def assert_same_weights(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert torch.equal(found[name], weight), name


def edit_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


@pytest.mark.parametrize("case", CASES)
def test_logits_of_packed_ragged_sequences_equal_transformers(case: str, hf_folders: Path, groups: RoleGroups) -> None:
    reference = transformers.AutoModelForCausalLM.from_pretrained(hf_folders / case, attn_implementation="eager")
    model = load(hf_folders / case, groups)
    for tokens, hidden in zip(ragged_sequences(), hidden_states(model), strict=True):
        logits = hidden @ model.vocabulary_weight().T
        torch.testing.assert_close(logits, reference(tokens[None]).logits[0], atol=2e-5, rtol=2e-5)


def test_values_of_a_sequence_classifier_equal_transformers(scalar_folder: Path, groups: RoleGroups) -> None:
    reference = transformers.AutoModelForSequenceClassification.from_pretrained(scalar_folder)
    model = load(scalar_folder, groups)
    for tokens, hidden in zip(ragged_sequences(), hidden_states(model), strict=True):
        scores = reference.score(reference.model(tokens[None]).last_hidden_state)[0, :, 0]
        torch.testing.assert_close(model.scalars(hidden), scores, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("case", CASES)
def test_an_export_is_bitwise_what_was_loaded(case: str, hf_folders: Path, groups: RoleGroups, tmp_path: Path) -> None:
    model = load(hf_folders / case, groups)
    save_hf([model], model.shape, groups, str(tmp_path / "out"), dtype=torch.float32, max_file_bytes=100_000)
    assert_same_weights(contents(tmp_path / "out"), contents(hf_folders / case))
    assert read_shape(str(tmp_path / "out")) == model.shape


@pytest.mark.parametrize("case", CASES)
def test_transformers_computes_the_same_from_an_export(
    case: str, hf_folders: Path, groups: RoleGroups, tmp_path: Path
) -> None:
    model = load(hf_folders / case, groups)
    save_hf([model], model.shape, groups, str(tmp_path / "out"), dtype=torch.float32, max_file_bytes=100_000)
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 1
    tokens = ragged_sequences()[2][None]
    before = transformers.AutoModelForCausalLM.from_pretrained(hf_folders / case)(tokens).logits
    after = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")(tokens).logits
    assert torch.equal(after, before)


def test_a_scalar_export_loads_as_a_sequence_classifier(
    scalar_folder: Path, groups: RoleGroups, tmp_path: Path
) -> None:
    model = load(scalar_folder, groups)
    save_hf([model], model.shape, groups, str(tmp_path / "out"), dtype=torch.float32)
    assert_same_weights(contents(tmp_path / "out"), contents(scalar_folder))
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert loaded.config.num_labels == 1


def test_an_export_in_bf16_rounds_once(hf_folders: Path, groups: RoleGroups, tmp_path: Path) -> None:
    model = load(hf_folders / "llama", groups)
    save_hf([model], model.shape, groups, str(tmp_path / "out"), dtype=torch.bfloat16)
    wanted = {name: weight.bfloat16() for name, weight in contents(hf_folders / "llama").items()}
    assert_same_weights(contents(tmp_path / "out"), wanted)
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_both_heads_load_from_a_language_model_and_export_apart(
    hf_folders: Path, groups: RoleGroups, tmp_path: Path
) -> None:
    folder = str(hf_folders / "qwen2-tied")
    shape = read_shape(folder)
    model = build(shape, groups, extra_scalar_head=True)
    load_weights(model, SafetensorsReader(folder), folder, head="fresh", seed=3)
    save_hf([model], shape, groups, str(tmp_path / "lm"), dtype=torch.float32)
    save_hf([model], replace(shape, scalar=True), groups, str(tmp_path / "rm"), dtype=torch.float32)
    trunk = contents(hf_folders / "qwen2-tied")
    assert_same_weights(contents(tmp_path / "lm"), trunk)
    assert_same_weights(contents(tmp_path / "rm"), {**trunk, "score.weight": model.scalar_head.weight.detach()})
    assert read_shape(str(tmp_path / "rm")) == replace(shape, scalar=True, tie_embeddings=False)


def test_a_fresh_head_depends_on_the_seed_alone(hf_folders: Path, groups: RoleGroups) -> None:
    folder = str(hf_folders / "llama")
    weights = []
    for seed in (3, 3, 4):
        model = build(replace(read_shape(folder), scalar=True), groups)
        load_weights(model, SafetensorsReader(folder), folder, head="fresh", seed=seed)
        weights.append(model.output_layer.weight.detach().clone())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert 0.5 < weights[0].std() * (SMALL["hidden_size"] + 1) ** 0.5 < 1.5


def test_the_released_reward_layout_loads(llama: Path, groups: RoleGroups) -> None:
    weights = contents(llama)
    head = torch.arange(64.0)[None]
    buffers = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(8) for layer in range(2)}
    save_file(
        {**weights, **buffers, "reward_head.weight": head}, llama / "model.safetensors", metadata={"format": "pt"}
    )
    edit_config(llama, architectures=["LlamaRewardModel"])
    assert torch.equal(load(llama, groups).output_layer.weight, head)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("scalar", [False, True], ids=["policy", "scalar"])
@pytest.mark.parametrize("vocab_size", [250, 5])
def test_shares_of_every_tensor_parallel_size_merge_to_the_same_model(tp: int, scalar: bool, vocab_size: int) -> None:
    # Two key / value heads: at tp 4 one spans two ranks. 5 tokens at tp 4: the last rank has padding only.
    shape = replace(tiny_shape(), vocab_size=vocab_size, qkv_bias=True, qk_norm=True, scalar=scalar)
    reader = RandomReader(shape, seed=5, std=0.02)
    merged: dict[str, torch.Tensor] = {}
    for name in parameter_names(shape):
        recipe = recipe_of(name, shape, tp)
        shares = []
        for rank in range(tp if recipe.split != "none" else 1):
            size = reader.sizes[recipe.sources[0]]
            rows = sum(part.stop - part.start for part in local_rows(recipe, tp, rank))
            columns = [size[1] // (tp if recipe.split == "columns" else 1)] if len(size) == 2 else []
            share = torch.full((rows, *columns), float("nan"))
            fill_share(share, recipe, reader, list(recipe.sources), tp=tp, tp_rank=rank)
            shares.append(share)
        assert len({share.shape for share in shares}) == 1, "Megatron gives every rank a share of one shape"
        merged |= merge_shares(recipe, shares)
    assert_same_weights(merged, {name: reader.read(name) for name in reader.sizes})


def test_query_key_value_rows_follow_megatrons_order() -> None:
    # 4 query heads in 2 groups, head_dim 3; rank 1 of 2 has group 1: query heads 2 and 3, key head 1, value head 1.
    shape = replace(tiny_shape(), head_dim=3)
    ranges = local_rows(recipe_of("decoder.layers.0.self_attention.linear_qkv.weight", shape, 2), 2, 1)
    assert [(part.source, part.start, part.stop) for part in ranges] == [(0, 6, 12), (1, 3, 6), (2, 3, 6)]


def test_padding_rows_of_the_vocabulary_are_zero_and_last() -> None:
    ranges = local_rows(recipe_of("embedding.word_embeddings.weight", replace(tiny_shape(), vocab_size=5), 4), 4, 2)
    assert [(part.source, part.stop - part.start) for part in ranges] == [(0, 1), (PADDING, 1)]


def tiny_shape() -> ModelShape:
    return ModelShape(
        vocab_size=250,
        hidden_size=8,
        num_layers=2,
        num_heads=4,
        num_query_groups=2,
        head_dim=2,
        ffn_hidden_size=12,
        max_position_embeddings=64,
        rope_theta=10000.0,
        norm_eps=1e-6,
        tie_embeddings=False,
    )


def test_random_weights_depend_on_seed_and_name_alone() -> None:
    shape = tiny_shape()
    deeper = replace(shape, num_layers=3, vocab_size=300)
    name = "model.layers.1.mlp.down_proj.weight"
    one = RandomReader(shape, seed=5, std=0.02).read(name)
    assert torch.equal(one, RandomReader(deeper, seed=5, std=0.02).read(name))
    assert not torch.equal(one, RandomReader(shape, seed=6, std=0.02).read(name))
    assert not torch.equal(one, RandomReader(shape, seed=5, std=0.02).read(name.replace("1", "0")))


def test_the_sizes_add_up_to_the_number_of_parameters() -> None:
    for shape in (tiny_shape(), replace(tiny_shape(), qkv_bias=True, qk_norm=True, tie_embeddings=True)):
        for made in (shape, replace(shape, scalar=True)):
            assert sum(torch.Size(size).numel() for size in weight_sizes(made).values()) == made.num_parameters()


def test_no_file_exceeds_its_limit_but_for_one_large_tensor() -> None:
    sizes = {"a": (3,), "b": (3,), "c": (9,), "d": (1,)}
    files = plan_files(list(sizes), sizes, dict.fromkeys(sizes, torch.float32), 24)
    assert list(files.values()) == [["a", "b"], ["c"], ["d"]]
    assert list(files) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


def test_rope_fields_of_transformers_4_are_read(llama: Path) -> None:
    scaling = {"type": "linear", "factor": 2.0}
    edit_config(llama, rope_parameters=None, rope_theta=500.0, rope_scaling=scaling)
    shape = read_shape(str(llama))
    assert (shape.rope_theta, shape.rope_scaling.kind, shape.rope_scaling.factor) == (500.0, "linear", 2.0)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("scalar", [False, True])
def test_absent_fields_have_the_defaults_of_transformers(family: str, scalar: bool, tmp_path: Path) -> None:
    fields = {"model_type": family, "sliding_window": None}
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
        fields[name] = 64  # type: ignore[assignment]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    shape, config = read_shape(str(tmp_path)), transformers.AutoConfig.from_pretrained(tmp_path)
    assert shape.max_position_embeddings == config.max_position_embeddings
    assert shape.num_query_groups == config.num_key_value_heads
    assert shape.head_dim == getattr(config, "head_dim", 1)
    assert shape.norm_eps == config.rms_norm_eps
    assert shape.rope_theta == config.rope_parameters["rope_theta"]
    assert shape.tie_embeddings == config.tie_word_embeddings


def test_a_written_config_reads_back_as_the_same_shape(tmp_path: Path) -> None:
    for family, flags in (("llama", {}), ("qwen2", {"qkv_bias": True}), ("qwen3", {"qk_norm": True}), ("mistral", {})):
        shape = replace(tiny_shape(), family=family, scalar=True, **flags)
        config = config_json(shape, dtype="float32", bos_id=1, eos_id=2, pad_id=0)
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert read_shape(str(tmp_path)) == shape


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
        ({"architectures": ["LlamaForTokenClassification"]}, "LlamaForTokenClassification is not supported"),
        ({"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "a", "1": "b"}}, "has 2 labels"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"num_local_experts": 8}, "num_local_experts is 8"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"model_type": "mistral", "sliding_window": 16}, "sliding_window = 16 of 64"),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 16}, "sliding_window = 16 of 64"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "kind 'yarn' is not supported"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope parameter factor is None"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"vocab_size": "250"}, "vocab_size is '250'"),
        ({"model_type": ["llama"]}, "is not supported"),
        ({"architectures": {"a": 1}}, "architectures is {'a': 1}"),
        ({"architectures": ["LlamaForSequenceClassification"], "id2label": 3}, "id2label is 3"),
        ({"model_type": "mistral", "sliding_window": "16"}, "sliding_window is '16'"),
        ({"rope_parameters": {"rope_type": ["linear"]}}, "is not supported"),
        ({"rope_parameters": {"rope_theta": float("nan")}}, "rope_theta is nan"),
        ({"rope_parameters": {"rope_theta": 10**400}}, "expected a positive number"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "expected a multiple of num_key_value_heads, 3"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_what_the_engine_cannot_run_is_refused(fields: dict[str, Any], message: str, llama: Path) -> None:
    edit_config(llama, **fields)
    with pytest.raises(CheckpointError, match=message) as error:
        read_shape(str(llama))
    assert str(llama / "config.json") in str(error.value)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot read .*config.json: No such file"):
        read_shape(str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match="is not a folder"):
        SafetensorsReader(str(tmp_path / "nowhere"))


def test_a_folder_without_weights_is_refused(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"expected model.safetensors, or model.safetensors.index.json"):
        SafetensorsReader(str(llama))


def test_a_pickle_is_refused_and_not_loaded(llama: Path) -> None:
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"only pickled weights \(pytorch_model.bin\)"):
        SafetensorsReader(str(llama))


@pytest.mark.parametrize("size", [0, 4, 1000, -1])
def test_a_file_cut_short_is_refused(size: int, llama: Path) -> None:
    whole = (llama / "model.safetensors").read_bytes()
    (llama / "model.safetensors").write_bytes(whole[:size])
    with pytest.raises(CheckpointError, match="is not a whole safetensors file"):
        SafetensorsReader(str(llama))


@pytest.fixture
def sharded(hf_folders: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(hf_folders / "llama", tmp_path / "sharded"))


def test_a_missing_file_of_the_index_is_named(sharded: Path) -> None:
    file = sorted(sharded.glob("model-*.safetensors"))[1]
    file.unlink()
    with pytest.raises(CheckpointError, match=rf"{re.escape(file.name)} is missing"):
        SafetensorsReader(str(sharded))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "is not an index"),
        ('{"metadata": {}}', "is not an index"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "expected the name of a file in the same folder"),
    ],
)
def test_a_bad_index_is_refused(index: str, message: str, sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=message):
        SafetensorsReader(str(sharded))


def test_a_weight_of_a_file_that_the_index_leaves_out_or_puts_elsewhere_is_not_lost(sharded: Path) -> None:
    first, second, *_ = sorted(sharded.glob("model-*.safetensors"))
    weights, others = load_file(first), load_file(second)
    save_file(weights | {"model.extra.weight": torch.ones(3)}, first)
    assert "model.extra.weight" in SafetensorsReader(str(sharded)).sizes
    name = next(iter(weights))
    save_file(others | {name: weights[name] + 1}, second)
    with pytest.raises(CheckpointError, match=rf"has {re.escape(name)} in {first.name} and in {second.name}"):
        SafetensorsReader(str(sharded))


def test_an_index_too_deep_or_with_a_name_too_long_is_refused(sharded: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    for content, message in (
        ("[" * 100_000, "is not an index"),
        (json.dumps({"weight_map": {"a": "x" * 300}}), "missing"),
    ):
        path.write_text(content)
        with pytest.raises(CheckpointError, match=message):
            SafetensorsReader(str(sharded))


def test_a_head_beside_a_tied_embedding_must_equal_it(llama: Path) -> None:
    weights = load_file(llama / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    shape = replace(read_shape(str(llama)), tie_embeddings=True)
    for head, message in (
        (embedding.clone(), None),
        (embedding + 1, "differs from"),
        (embedding[:1].clone(), "differs"),
    ):
        save_file(weights | {"lm_head.weight": head}, llama / "model.safetensors")
        reader = SafetensorsReader(str(llama))
        if message is None:
            assert "lm_head.weight" not in match_names(shape, reader, str(llama), has_scalar_head=False)
        else:
            with pytest.raises(CheckpointError, match=message):
                match_names(shape, reader, str(llama), has_scalar_head=False)


def test_absurd_numbers_of_layers_are_refused_at_once(llama: Path) -> None:
    edit_config(llama, num_hidden_layers=10**12)
    with pytest.raises(CheckpointError, match="too few for 1000000000000 layers"):
        match_names(read_shape(str(llama)), SafetensorsReader(str(llama)), str(llama), has_scalar_head=False)


def test_a_weight_that_is_not_in_its_file_is_named(sharded: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.extra.weight"] = index["weight_map"]["model.norm.weight"]
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"lacks model.extra.weight"):
        SafetensorsReader(str(sharded))


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    weights = {**contents(folder), **changes}
    kept = {name: weight for name, weight in weights.items() if weight is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.norm.weight": torch.ones(32)}, r"model.norm.weight has shape \[32\], not \[64\]"),
        (
            {"model.norm.weight": None, "lm_head.weight": None},
            "lacks 2 of the 21 weights .*: model.norm.weight, lm_head",
        ),
        (
            {"model.layers.0.self_attn.o_proj.bias": torch.ones(64)},
            "no place for: model.layers.0.self_attn.o_proj.bias",
        ),
    ],
    ids=["wrong-shape", "missing", "extra"],
)
def test_weights_that_do_not_fit_are_named(
    changes: dict[str, Any], message: str, llama: Path, groups: RoleGroups
) -> None:
    rewrite(llama, **changes)
    with pytest.raises(CheckpointError, match=message) as error:
        load(llama, groups)
    assert str(llama) in str(error.value)


def test_a_language_model_is_no_reward_model(hf_folders: Path, groups: RoleGroups) -> None:
    folder = str(hf_folders / "llama")
    model = build(replace(read_shape(folder), scalar=True), groups)
    with pytest.raises(CheckpointError, match="is not a reward model or critic"):
        load_weights(model, SafetensorsReader(folder), folder)


def test_an_export_replaces_an_earlier_one_only(llama: Path, groups: RoleGroups, tmp_path: Path) -> None:
    model = load(llama, groups)
    target = tmp_path / "out"
    for dtype in (torch.float32, torch.bfloat16):
        save_hf([model], model.shape, groups, str(target), dtype=dtype)
    assert contents(target)["model.norm.weight"].dtype == torch.bfloat16
    with pytest.raises(CheckpointError, match="is not the work of an earlier export"):
        save_hf([model], model.shape, groups, str(llama), dtype=torch.float32)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama", "out"]


def test_exported_weights_are_readable_by_whom_the_umask_allows(
    llama: Path, groups: RoleGroups, tmp_path: Path
) -> None:
    model = load(llama, groups)
    save_hf([model], model.shape, groups, str(tmp_path / "out"), dtype=torch.float32)
    modes = {path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert len(modes) == 1


def test_a_failed_export_leaves_the_earlier_one(
    llama: Path, groups: RoleGroups, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(llama, groups)
    target = tmp_path / "out"
    save_hf([model], model.shape, groups, str(target), dtype=torch.float32)

    def full_disk(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ppomax.engine.models.hf_writer.SafetensorsWriter", full_disk)
    with pytest.raises(CheckpointError, match=rf"could not write {target}.*No space left on device"):
        save_hf([model], model.shape, groups, str(target), dtype=torch.bfloat16)
    assert_same_weights(contents(target), contents(llama))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama", "out"]
