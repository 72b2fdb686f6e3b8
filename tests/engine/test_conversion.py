"""Conversion between Hugging Face and Megatron: the tensors that Megatron wants, made from transformers' modules by
other means, and every bit of them back.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ppomax.engine.checkpoint_state import read_state
from ppomax.engine.compare_models import compare_models, largest_difference
from ppomax.engine.conversion import hf_to_megatron, megatron_to_hf, reshard
from ppomax.engine.errors import CheckpointError, ConfigError
from ppomax.engine.models import distributed_checkpoint
from ppomax.engine.models.atomic_folder import NOTHING, AtomicFolder
from ppomax.engine.models.hf_config import read_shape
from ppomax.engine.models.megatron_names import Split
from ppomax.engine.models.stored_model import open_model

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

SMALL: dict[str, Any] = {
    "vocab_size": 250,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
TIED = {"tie_word_embeddings": True}
CASES: dict[str, transformers.PretrainedConfig] = {
    "llama": transformers.LlamaConfig(**SMALL),
    "llama-tied-llama3-rope": transformers.LlamaConfig(**SMALL | TIED | {"rope_parameters": LLAMA3_ROPE}),
    "llama-one-head-for-each": transformers.LlamaConfig(**SMALL | {"num_key_value_heads": 4}),
    "llama-one-key-head": transformers.LlamaConfig(**SMALL | {"num_key_value_heads": 1}),
    "mistral-head-dim-32": transformers.MistralConfig(**SMALL | {"sliding_window": None, "head_dim": 32}),
    "qwen2": transformers.Qwen2Config(**SMALL),
    "qwen2-tied": transformers.Qwen2Config(**SMALL | TIED),
    "qwen3-head-dim-32": transformers.Qwen3Config(**SMALL | {"head_dim": 32}),
    "qwen3-tied": transformers.Qwen3Config(**SMALL | TIED | {"head_dim": 16}),
}
SPLITS = [Split(), Split(tp=2, pp=2), Split(tp=4, pp=4), Split(tp=2, pp=2, vpp=2)]
ALL_SPLITS = [Split(tp, pp, vpp) for tp in (1, 2, 4) for pp in (1, 2, 4) for vpp in (1, 2) if pp * vpp <= 4]
SPLIT_PARAMETERS = [*SPLITS, *(pytest.param(s, marks=pytest.mark.slow) for s in ALL_SPLITS if s not in SPLITS)]
IDS = [
    f"tp{split.tp}pp{split.pp}vpp{split.vpp}"
    for split in [*SPLITS, *(split for split in ALL_SPLITS if split not in SPLITS)]
]


def randomise(model: torch.nn.Module) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = torch.empty(parameter.shape).normal_(std=0.1, generator=generator)
            parameter.copy_(draw + 1 if "norm" in name else draw)
    return model.eval()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Folder and transformers' module of every case, with a vocabulary head and (name-scalar) with a scalar head."""
    root = tmp_path_factory.mktemp("models")
    made: dict[str, tuple[Path, Any]] = {}
    for name, config in CASES.items():
        made[name] = root / name, randomise(transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32))
        config.num_labels = 1
        scalar = randomise(transformers.AutoModelForSequenceClassification.from_config(config, dtype=torch.float32))
        made[f"{name}-scalar"] = root / f"{name}-scalar", scalar
    for folder, model in made.values():
        model.save_pretrained(folder, max_shard_size="100KB")
    return made


EVERY = [*CASES, *(f"{name}-scalar" for name in CASES)]


def contents(folder: Path) -> dict[str, Tensor]:
    return {name: x for file in sorted(folder.glob("*.safetensors")) for name, x in load_file(file).items()}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert found[name].dtype == weight.dtype, name
        assert torch.equal(found[name], weight), name


def stored_by_torch(folder: Path) -> dict[str, Tensor]:
    """The whole tensors of a distributed checkpoint as torch's own reader finds them."""
    reader = dcp.FileSystemReader(str(folder))
    entries = reader.read_metadata().state_dict_metadata
    assert all(isinstance(entry, TensorStorageMetadata) for entry in entries.values())
    state = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in entries.items()}
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def megatrons(model: Any) -> dict[str, Tensor]:
    """What Megatron calls the parameters of a transformers module, layers stacked, made head by head."""
    body, config = model.model, model.config
    num_groups = config.num_key_value_heads
    per_group = config.num_attention_heads // num_groups

    def by_group(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        queries, keys, values = (
            x.chunk(n) for x, n in ((q, config.num_attention_heads), (k, num_groups), (v, num_groups))
        )
        rows = []
        for group in range(num_groups):
            rows += [*queries[group * per_group : (group + 1) * per_group], keys[group], values[group]]
        return torch.cat(rows)

    layers: dict[str, list[Tensor]] = {}

    def put(name: str, weight: Tensor) -> None:
        layers.setdefault(f"decoder.layers.{name}", []).append(weight)

    for layer in body.layers:
        attention, mlp = layer.self_attn, layer.mlp
        put("self_attention.linear_qkv.layer_norm_weight", layer.input_layernorm.weight)
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        put("self_attention.linear_qkv.weight", by_group(*(x.weight for x in projections)))
        if projections[0].bias is not None:
            put("self_attention.linear_qkv.bias", by_group(*(x.bias for x in projections)))
        if hasattr(attention, "q_norm"):
            put("self_attention.q_layernorm.weight", attention.q_norm.weight)
            put("self_attention.k_layernorm.weight", attention.k_norm.weight)
        put("self_attention.linear_proj.weight", attention.o_proj.weight)
        put("mlp.linear_fc1.layer_norm_weight", layer.post_attention_layernorm.weight)
        put("mlp.linear_fc1.weight", torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
        put("mlp.linear_fc2.weight", mlp.down_proj.weight)
    tensors = {name: torch.stack(parts) for name, parts in layers.items()}
    tensors["embedding.word_embeddings.weight"] = body.embed_tokens.weight
    tensors["decoder.final_layernorm.weight"] = body.norm.weight
    if hasattr(model, "score"):
        tensors["output_layer.weight"] = model.score.weight
    elif not config.tie_word_embeddings:
        tensors["output_layer.weight"] = model.lm_head.weight
    return {name: tensor.detach() for name, tensor in tensors.items()}


@pytest.mark.parametrize("case", EVERY)
def test_megatrons_tensors_are_those_of_transformers_modules(
    case: str, models: dict[str, tuple[Path, Any]], tmp_path: Path
) -> None:
    folder, model = models[case]
    hf_to_megatron(str(folder), str(tmp_path / "megatron"), split=Split())
    assert_same(stored_by_torch(tmp_path / "megatron"), megatrons(model))


@pytest.mark.parametrize("split", SPLIT_PARAMETERS, ids=IDS)
@pytest.mark.parametrize("case", EVERY)
def test_there_and_back_every_bit_is_the_same(
    case: str, split: Split, models: dict[str, tuple[Path, Any]], tmp_path: Path
) -> None:
    folder, _ = models[case]
    hf_to_megatron(str(folder), str(tmp_path / "megatron"), split=split)
    megatron_to_hf(str(tmp_path / "megatron"), str(tmp_path / "back"), max_file_bytes=100_000)
    assert len(list((tmp_path / "back").glob("model-*-of-*.safetensors"))) > 1
    assert_same(contents(tmp_path / "back"), contents(folder))
    assert read_shape(str(tmp_path / "back")) == read_shape(str(folder))


@pytest.mark.parametrize("case", ["llama-tied-llama3-rope", "qwen2", "qwen3-head-dim-32-scalar"])
def test_transformers_computes_the_same_from_what_came_back(
    case: str, models: dict[str, tuple[Path, Any]], tmp_path: Path
) -> None:
    folder, model = models[case]
    hf_to_megatron(str(folder), str(tmp_path / "megatron"), split=Split(tp=2, pp=2))
    megatron_to_hf(str(tmp_path / "megatron"), str(tmp_path / "back"))
    kind = transformers.AutoModelForSequenceClassification if "scalar" in case else transformers.AutoModelForCausalLM
    tokens = torch.randint(4, 250, (1, 40), generator=torch.Generator().manual_seed(2))
    assert torch.equal(kind.from_pretrained(tmp_path / "back")(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("vocab_size", [256, 258, 253], ids=["no-padding", "one-left-over", "odd"])
@pytest.mark.parametrize("tp", [1, 4])
def test_padding_of_the_vocabulary_is_zero_in_megatron_and_gone_after_it(
    vocab_size: int, tp: int, tmp_path: Path
) -> None:
    """As 32000 and 151936 (multiples of every tp), 32002 (a multiple of 2), and none."""
    model = randomise(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL | {"vocab_size": vocab_size})))
    model.save_pretrained(tmp_path / "hf")
    hf_to_megatron(str(tmp_path / "hf"), str(tmp_path / "megatron"), split=Split(tp=tp))
    for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
        stored = stored_by_torch(tmp_path / "megatron")[key]
        assert len(stored) == -(-vocab_size // tp) * tp
        assert not stored[vocab_size:].any()
    megatron_to_hf(str(tmp_path / "megatron"), str(tmp_path / "back"))
    assert_same(contents(tmp_path / "back"), contents(tmp_path / "hf"))


def test_each_rank_of_a_layout_has_a_file_with_its_own_chunks(
    models: dict[str, tuple[Path, Any]], tmp_path: Path
) -> None:
    folder, _ = models["llama"]
    hf_to_megatron(str(folder), str(tmp_path / "megatron"), split=Split(tp=2, pp=2, vpp=2))
    tensors = distributed_checkpoint.DistributedCheckpoint(tmp_path / "megatron").tensors
    down = tensors["decoder.layers.mlp.linear_fc2.weight"].chunks
    # Two layers a stage, dealt in turn; columns over tp.
    assert {(chunk.file, chunk.first[0], chunk.first[2]) for chunk in down} == {
        ("__0_0.distcp", 0, 0),
        ("__1_0.distcp", 0, 48),
        ("__2_0.distcp", 1, 0),
        ("__3_0.distcp", 1, 48),
        ("__0_0.distcp", 2, 0),
        ("__1_0.distcp", 2, 48),
        ("__2_0.distcp", 3, 0),
        ("__3_0.distcp", 3, 48),
    }
    gate_and_up = [chunk for chunk in tensors["decoder.layers.mlp.linear_fc1.weight"].chunks if chunk.first[0] == 0]
    assert {(chunk.file, chunk.first[1], chunk.count[1]) for chunk in gate_and_up} == {
        ("__0_0.distcp", 0, 48),
        ("__1_0.distcp", 48, 48),
        ("__0_0.distcp", 96, 48),
        ("__1_0.distcp", 144, 48),
    }


def test_bf16_stays_and_another_type_is_rounded_once(models: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    wanted = {name: weight.bfloat16() for name, weight in contents(models["qwen2"][0]).items()}
    shutil.copytree(models["qwen2"][0], tmp_path / "bf16", ignore=shutil.ignore_patterns("*.safetensors", "*.index.*"))
    save_file(wanted, tmp_path / "bf16/model.safetensors")
    for source, dtype in (("bf16", None), ("fp32", torch.bfloat16)):
        folder = tmp_path / "bf16" if source == "bf16" else models["qwen2"][0]
        hf_to_megatron(str(folder), str(tmp_path / f"{source}-megatron"), split=Split(), dtype=dtype)
        megatron_to_hf(str(tmp_path / f"{source}-megatron"), str(tmp_path / f"{source}-back"))
        assert_same(contents(tmp_path / f"{source}-back"), wanted)
        assert json.loads((tmp_path / f"{source}-back/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_types_that_differ_between_layers_need_a_choice(models: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    weights = contents(models["llama"][0])
    weights["model.layers.3.self_attn.k_proj.weight"] = weights["model.layers.3.self_attn.k_proj.weight"].bfloat16()
    shutil.copytree(models["llama"][0], tmp_path / "hf", ignore=shutil.ignore_patterns("*.safetensors", "*.index.*"))
    save_file(weights, tmp_path / "hf/model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.3\.self_attn\.k_proj\.weight is torch.bfloat16.*--dtype"):
        hf_to_megatron(str(tmp_path / "hf"), str(tmp_path / "megatron"), split=Split())
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_tokenizer_template_and_special_ids_come_along(
    models: dict[str, tuple[Path, Any]], tiny: Any, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(models["llama"][0], tmp_path / "hf"))
    files = {
        "tokenizer_config.json": json.dumps({"eos_token": "</s>", "chat_template": "{{ messages }}"}),
        "chat_template.jinja": "{{ messages }}",
        "generation_config.json": json.dumps({"eos_token_id": [2, 3], "temperature": 0.6}),
        "special_tokens_map.json": json.dumps({"eos_token": "</s>"}),
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    weights = contents(folder)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.cat([weights[name], torch.ones(50, 64)])
    save_file(weights, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": 300}
    (folder / "config.json").write_text(json.dumps(config))
    tiny.tokenizer.save(str(folder / "tokenizer.json"))
    hf_to_megatron(str(folder), str(tmp_path / "megatron"), split=Split())
    megatron_to_hf(str(tmp_path / "megatron"), str(tmp_path / "back"))
    for name in [*files, "tokenizer.json"]:
        assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes(), name
    back = json.loads((tmp_path / "back/config.json").read_text())
    assert (back["bos_token_id"], back["eos_token_id"], back["pad_token_id"]) == (1, [2, 3], 0)
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "back")) == 277


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(
    models: dict[str, tuple[Path, Any]], tiny: Any, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(models["llama"][0], tmp_path / "hf"))
    tiny.tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    with pytest.raises(CheckpointError, match="277 tokens, but the model has embeddings for 250"):
        hf_to_megatron(str(folder), str(tmp_path / "megatron"), split=Split())
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_the_released_reward_layout_becomes_a_sequence_classifier(
    models: dict[str, tuple[Path, Any]], tmp_path: Path
) -> None:
    folder, model = models["llama-scalar"]
    weights = contents(folder)
    head = weights.pop("score.weight")
    buffers = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(8) for layer in range(4)}
    released = Path(shutil.copytree(folder, tmp_path / "hf", ignore=shutil.ignore_patterns("*.safetensors*")))
    save_file({**weights, **buffers, "reward_head.weight": head}, released / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["LlamaRewardModel"]}
    (released / "config.json").write_text(json.dumps(config))
    hf_to_megatron(str(released), str(tmp_path / "megatron"), split=Split())
    assert_same(stored_by_torch(tmp_path / "megatron"), megatrons(model))
    megatron_to_hf(str(tmp_path / "megatron"), str(tmp_path / "back"))
    assert_same(contents(tmp_path / "back"), contents(folder))
    assert transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "back").config.num_labels == 1


def test_a_layout_that_cannot_split_the_model_is_refused(models: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    for split, message in ((Split(tp=3), "num_heads 4"), (Split(pp=2, vpp=3), "pp 2 [*] vpp 3")):
        with pytest.raises(ConfigError, match=message):
            hf_to_megatron(str(models["llama"][0]), str(tmp_path / "megatron"), split=split)
    assert list(tmp_path.iterdir()) == []


def test_the_two_directions_refuse_each_others_folders(models: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    folder = str(models["llama"][0])
    hf_to_megatron(folder, str(tmp_path / "megatron"), split=Split())
    with pytest.raises(CheckpointError, match="is a Hugging Face folder already"):
        megatron_to_hf(folder, str(tmp_path / "out"))
    with pytest.raises(CheckpointError, match="is a Megatron checkpoint already"):
        hf_to_megatron(str(tmp_path / "megatron"), str(tmp_path / "out"), split=Split())
    with pytest.raises(CheckpointError, match="has no role 'policy'"):
        megatron_to_hf(str(tmp_path / "megatron"), str(tmp_path / "out"), role="policy")
    with pytest.raises(CheckpointError, match=r"state\.json cannot be read"):
        reshard(str(tmp_path / "megatron"), str(tmp_path / "out"), split=Split())


def test_what_appears_while_a_folder_is_written_is_not_replaced(tmp_path: Path) -> None:
    folder = AtomicFolder(tmp_path / "out", NOTHING)
    folder.begin()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/theirs").touch()
    with pytest.raises(CheckpointError, match="exists and is not an empty folder"):
        folder.commit()
    folder.discard()
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["out", "out/theirs"]


def test_a_folder_that_another_process_fills_is_not_discarded(tmp_path: Path) -> None:
    folder = AtomicFolder(tmp_path / "out", NOTHING)
    folder.partial.mkdir()  # of a process with the same number in another container
    with pytest.raises(FileExistsError):
        folder.begin()
    folder.discard()
    assert folder.partial.is_dir()


def test_a_link_to_an_empty_folder_is_filled_where_it_leads(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    folder = AtomicFolder(tmp_path / "link", NOTHING)
    folder.begin()
    (folder.partial / "file").touch()
    folder.commit()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]
    assert (tmp_path / "disk/file").is_file()


def test_the_root_is_no_target() -> None:
    with pytest.raises(CheckpointError, match="/ exists"):
        AtomicFolder("/", NOTHING).begin()


@pytest.mark.parametrize("role", ["../evil", "", "..", "/evil"])
def test_a_role_is_the_name_of_a_folder(role: str, tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(json.dumps({"format": 1, "state": {}, "roles": {role: {}}}))
    with pytest.raises(CheckpointError, match="expected the name of a folder"):
        read_state(tmp_path)


def test_nothing_that_exists_is_replaced(models: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    folder = str(models["llama"][0])
    hf_to_megatron(folder, str(tmp_path / "megatron"), split=Split())
    megatron_to_hf(str(tmp_path / "megatron"), str(tmp_path / "back"))
    before = sorted(path.stat().st_mtime_ns for path in tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match="exists and is not an empty folder"):
        hf_to_megatron(folder, str(tmp_path / "megatron"), split=Split())
    with pytest.raises(CheckpointError, match="exists and is not an empty folder"):
        megatron_to_hf(str(tmp_path / "megatron"), str(tmp_path / "back"))
    assert sorted(path.stat().st_mtime_ns for path in tmp_path.rglob("*")) == before


def test_models_are_compared_layer_by_layer(models: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    folder = models["llama"][0]
    other = Path(shutil.copytree(folder, tmp_path / "hf", ignore=shutil.ignore_patterns("*.safetensors*")))
    weights = contents(folder)
    weights["model.layers.2.mlp.up_proj.weight"][95, 63] += 0.5
    weights["model.layers.2.mlp.gate_proj.weight"][0, 0] += 0.25
    save_file(weights, other / "model.safetensors")
    hf_to_megatron(str(other), str(tmp_path / "megatron"), split=Split(tp=2))
    found = compare_models(open_model(folder), open_model(tmp_path / "megatron"))
    assert [entry.layer for entry in found] == ["embedding", *(f"layer {i}" for i in range(4)), "final norm", "head"]
    assert {entry.layer: (entry.tensor, round(entry.largest, 6)) for entry in found if entry.largest} == {
        "layer 2": ("model.layers.2.mlp.up_proj.weight", 0.5)
    }


def test_models_of_different_shape_are_not_compared(models: dict[str, tuple[Path, Any]]) -> None:
    with pytest.raises(CheckpointError, match="tie_embeddings is False and True, rope_"):
        compare_models(open_model(models["llama"][0]), open_model(models["llama-tied-llama3-rope"][0]))


@pytest.mark.parametrize(
    ("x", "y", "difference"),
    [
        ([1.0, 2.0], [1.0, 2.5], 0.5),
        ([float("nan"), 1.0], [float("nan"), 1.0], 0.0),
        ([float("nan"), 1.0], [0.0, 1.0], float("inf")),
        ([float("inf")], [float("inf")], 0.0),
        ([float("inf")], [1.0], float("inf")),
        ([float("inf")], [-float("inf")], float("inf")),
    ],
)
def test_the_largest_difference_sees_what_is_not_a_number(x: list[float], y: list[float], difference: float) -> None:
    assert largest_difference(torch.tensor(x), torch.tensor(y).bfloat16()) == difference
