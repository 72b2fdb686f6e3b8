"""What a TOML file and command-line values become, and what a person reads when they are wrong."""

import pytest

from ppomax.engine.config import RunConfig
from ppomax.engine.config_file import load_config, to_toml, write_config
from ppomax.engine.config_help import describe, fields
from ppomax.engine.config_models import ROLES
from ppomax.engine.errors import ConfigError
from ppomax.engine.presets import PRESETS

COMPLETE = [
    "data.train=rows.jsonl",
    "model.tokenizer=tokenizer.json",
    "model.policy=policy",
    "model.reward=reward",
    "train.steps=3",
]


@pytest.fixture
def toml(tmp_path):
    """Writes a configuration file and returns its path."""

    def write(text):
        path = tmp_path / "config.toml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def fault(path, overrides, command="ppo"):
    """The message of the ConfigError that this configuration gives."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides, command=command)
    return str(caught.value)


# ---- values and precedence


def test_overrides_win_over_the_file_over_the_preset_over_defaults(toml):
    path = toml('[ppo]\npreset = "moss_script_en"\nlam = 0.5\ngamma = 0.5\n')
    ppo = load_config(path, [*COMPLETE, "ppo.gamma=0.7"], command="ppo").ppo
    assert (ppo.gamma, ppo.lam, ppo.kl_coef, ppo.kl_horizon) == (0.7, 0.5, 0.01, 10000)


def test_presets_leave_sft_and_reward_alone():
    overrides = [*COMPLETE, "ppo.preset=moss_script_en"]
    assert load_config(None, overrides, command="sft").optim == RunConfig().optim
    assert load_config(None, overrides, command="critic").optim.critic_lr == 1.5e-6


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.output=runs/a=b", "runs/a=b"),
        ("train.output=2024", "2024"),
        ('train.output="runs/quoted"', "runs/quoted"),
        ("train.output=x\ny = 1", "x\ny = 1"),
        ("train.output=", ""),
        ("train.output=none", "none"),
    ],
)
def test_text_needs_no_quotes(override, value):
    assert load_config(None, [*COMPLETE, override], command="sft").train.output == value


def test_nested_fields_lists_and_none_can_be_overridden():
    values = [
        "model.init.hidden_size=64",
        "optim.betas=[0.8, 0.9]",
        "ppo.value_clip=none",
        "ppo.policy_clip=[0.2, 0.3]",
    ]
    config = load_config(None, [*COMPLETE, *values], command="ppo")
    assert config.model.init.hidden_size == 64
    assert config.optim.betas == (0.8, 0.9)
    assert config.ppo.value_clip is None
    assert config.ppo.policy_clip == (0.2, 0.3)


def test_none_is_an_ordinary_word_where_a_field_has_that_choice():
    assert load_config(None, [*COMPLETE, "ppo.reward_scaling=none"], command="ppo").ppo.reward_scaling == "none"


def test_parallel_tp_on_the_command_line_sets_roles_that_the_file_sets_too(toml):
    path = toml("[parallel.policy]\ntp = 4\n[parallel.critic]\ntp = 4\npp = 2\n")
    parallel = load_config(path, [*COMPLETE, "parallel.critic.tp=1", "parallel.tp=2"], command="ppo").parallel
    assert {role: getattr(parallel, role).tp for role in ROLES} == {
        "policy": 2,
        "critic": 1,
        "reference": 2,
        "reward": 2,
    }
    assert parallel.critic.pp == 2


def test_parallel_vpp_sets_all_roles_and_one_role_may_differ():
    settings = [*COMPLETE, "parallel.pp=2", "parallel.vpp=2", "parallel.critic.vpp=1"]
    parallel = load_config(None, settings, command="ppo").parallel
    assert [getattr(parallel, role).vpp for role in ("policy", "critic", "reference", "reward")] == [2, 1, 2, 2]


def test_uneven_stages_are_set_for_all_roles_or_one_and_unset_by_none(tmp_path):
    settings = [*COMPLETE, "parallel.pp=2", "parallel.first_stage_layers=3", "parallel.critic.first_stage_layers=none"]
    config = load_config(
        None, [*settings, "parallel.reward.pp=1", "parallel.reward.first_stage_layers=none"], command="ppo"
    )
    write_config(config, tmp_path / "config.toml")
    assert load_config(str(tmp_path / "config.toml"), [], command="ppo") == config
    layers = [getattr(config.parallel, role).first_stage_layers for role in ("policy", "critic", "reference", "reward")]
    assert layers == [3, None, 3, None]
    assert (
        load_config(
            None, [*settings, "parallel.first_stage_layers=none"], command="ppo"
        ).parallel.policy.first_stage_layers
        is None
    )


def test_uneven_stages_without_stages_are_refused_with_the_fix():
    settings = [*COMPLETE, "parallel.pp=2", "parallel.last_stage_layers=2", "parallel.reward.pp=1"]
    with pytest.raises(
        ConfigError, match=r"parallel.reward: first_stage_layers or last_stage_layers .* or them to none"
    ):
        load_config(None, settings, command="ppo")


@pytest.mark.parametrize("key", ["parallel.cp=2", "parallel.policy.cp=2", "parallel.cp=1"])
def test_context_parallelism_is_refused_with_the_reason_and_what_helps_instead(key):
    with pytest.raises(ConfigError, match=r"cp = [12]: there is no context parallelism: .*model.recompute = .full."):
        load_config(None, [*COMPLETE, key], command="ppo")


def test_offload_is_set_for_all_roles_or_one():
    settings = [*COMPLETE, "parallel.offload=optimizer", "parallel.reference.offload=all"]
    parallel = load_config(None, settings, command="ppo").parallel
    modes = [getattr(parallel, role).offload for role in ("policy", "critic", "reference", "reward")]
    assert modes == ["optimizer", "optimizer", "all", "optimizer"]
    # The reference may wait elsewhere than the policy where both have the same layout.
    load_config(None, [*settings, "ppo.kl_estimator=full"], command="ppo")


def test_vpp_without_pipeline_stages_is_refused_with_the_fix():
    settings = [*COMPLETE, "parallel.pp=2", "parallel.vpp=2", "parallel.critic.pp=1"]
    with pytest.raises(ConfigError, match=r"parallel.critic: vpp 2 with pp 1, .*; set parallel.critic.pp to 2 or more"):
        load_config(None, settings, command="ppo")


def test_sources_keep_their_weights_in_order(toml):
    path = toml('[data]\ntrain = ["a.jsonl", {path = "b.jsonl", weight = 3.0, format = "hh"}]\n')
    train = load_config(path, COMPLETE[1:], command="sft").data.train
    assert [(source.path, source.weight, source.format) for source in train] == [
        ("a.jsonl", 1.0, "auto"),
        ("b.jsonl", 3.0, "hh"),
    ]


# ---- presets


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_loads_and_sets_what_it_says(name):
    config = load_config(None, [*COMPLETE, f"ppo.preset={name}"], command="ppo").model_dump()
    for key, value in PRESETS[name].items():
        section, field = key.split(".")
        assert config[section][field] == (tuple(value) if isinstance(value, list) else value), key


def test_ppo_max_mixes_in_language_modelling_exactly_when_there_is_data():
    assert load_config(None, COMPLETE, command="ppo").ppo.ptx_coef == 0
    assert load_config(None, [*COMPLETE, "data.ptx=p.jsonl"], command="ppo").ppo.ptx_coef == 1
    assert load_config(None, [*COMPLETE, "data.ptx=p.jsonl", "ppo.ptx_coef=0"], command="ppo").ppo.ptx_coef == 0


def test_released_scripts_scale_rewards_without_mean_or_clip():
    english, chinese = (
        load_config(None, [*COMPLETE, f"ppo.preset=moss_script_{name}"], command="ppo").ppo for name in ("en", "zh")
    )
    assert (english.kl_coef, chinese.kl_coef) == (0.01, 0.1)
    assert english.model_copy(update={"kl_coef": 0.1, "preset": "moss_script_zh"}) == chinese
    assert (english.reward_scaling, english.reward_clip, english.lam) == ("scale", None, 0.95)


# ---- writing


@pytest.mark.parametrize("command", ["sft", "ppo"])
def test_a_written_config_loads_back_equal_for_every_command(tmp_path, command):
    values = [
        "ppo.value_clip=none",
        "parallel.critic.tp=2",
        'data.system_prompt=" \\"q\\"\\n\\u007f é\\\\"',
        "optim.lr=1e-7",
    ]
    config = load_config(None, [*COMPLETE, *values, "ppo.preset=moss_script_zh", "data.ptx=[]"], command="ppo")
    write_config(config, tmp_path / "resolved.toml")
    assert load_config(str(tmp_path / "resolved.toml"), [], command=command) == config


def test_the_written_file_names_every_field():
    config = load_config(None, COMPLETE, command="ppo")
    text = to_toml(config)
    for key, _ in fields():
        section, _, name = key.rpartition(".")
        table = text.partition(f"[{section}]\n")[2].partition("\n\n")[0]
        assert f"{name} = " in table, key


# ---- faults


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("ppo.lamm=1", "did you mean ppo.lam?"),
        ("ppo.critic_lr=1e-6", "did you mean optim.critic_lr?"),
        ("parallel.polcy.tp=2", "did you mean parallel.policy?"),
        ("parallel.critic.tpp=2", "did you mean parallel.critic.tp?"),
        ("modle.policy=x", "did you mean model?"),
        ("checkpoint.resume=auto", "did you mean train.resume?"),
        ("zzz=1", "`ppomax help` lists the sections"),
    ],
)
def test_an_unknown_key_names_the_nearest_one(override, suggestion):
    message = fault(None, [*COMPLETE, override])
    assert override.split("=")[0].split(".")[0] in message
    assert "unknown key" in message
    assert suggestion in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ('ppo.epochs="3"', 'ppo.epochs = "3" (command line): expected whole number > 0'),
        ("ppo.epochs=1.5", "expected whole number > 0"),
        ("ppo.lam=1.5", "expected number >= 0 and <= 1"),
        ("ppo.lam=nan", "expected number >= 0 and <= 1"),
        ("optim.lr=inf", "expected number >= 0"),
        ("ppo.advantage_norm=1", "expected true or false"),
        ("optim.schedule=linear", 'expected one of "inverse_sqrt", "cosine", "constant"'),
        ("ppo.policy_clip=[0.1]", 'expected number > 0 or [number, number] or "none"'),
        ("ppo.lam=2020-01-01", "expected number"),
        ("ppo=3", "ppo = 3 (command line): expected a section"),
        ("ppo.lam", "expected section.field=value"),
        ("data.train=[{weight = 1.0}]", "data.train[0].path is missing"),
        ('data.train=[{path = "a", weight = "x"}]', 'data.train[0].weight = "x"'),
        ('data.train=[{path = "a", wieght = 1}]', "did you mean data.train[0].weight?"),
        ("model.init=3", "model.init = 3 (command line): expected a section"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(override, expected):
    assert expected in fault(None, [*COMPLETE, override])


def test_a_temperature_too_cold_to_compute_is_refused_before_a_model_is_loaded():
    with pytest.raises(ConfigError, match=r"sampling\.temperature = 1e-05: expected at least 0\.0001, or 0"):
        load_config(None, ["sampling.temperature=1e-5"], command="sft")


def test_a_seed_that_no_generator_takes_is_refused():
    with pytest.raises(ConfigError, match=r"train\.seed = 4294967296 .*expected whole number >= 0 and <= 4294967295"):
        load_config(None, ["train.seed=4294967296"], command="sft")


def test_several_faults_are_listed_together_with_their_origin(toml):
    path = toml('train = 3\n[ppo]\nlamm = 1\npolicy_clip = "x"\n[optim]\nlr = -1.0\n')
    message = fault(path, ["sampling.top_p=2", "data.train=[]"])
    assert message.startswith("5 faults:\n")
    assert f"optim.lr = -1.0 ({path})" in message
    assert "sampling.top_p = 2 (command line)" in message
    assert "train = 3" in message


@pytest.mark.parametrize(
    ("command", "overrides", "expected"),
    [
        ("ppo", ["train.steps=0"], "train.steps is 0"),
        ("sft", ["sft.epochs=0", "train.steps=0"], "there is nothing to do"),
        ("sft", ["data.train=[]"], "data.train is empty"),
        ("evaluate", [], "data.eval is empty"),
        ("ppo", ["monitor.eval_every=5"], "data.eval is empty"),
        ("sft", ["model.tokenizer=", "model.policy=", "model.reward="], "model.tokenizer is empty"),
        ("ppo", ["model.policy="], "model.policy is empty"),
        ("critic", ["model.reward="], "model.reward is empty"),
        ("evaluate", ["model.policy=", "model.reward="], "model.reward is empty"),
        ("ppo", ["ppo.kl_estimator=full", "parallel.critic.tp=2", "parallel.reference.tp=2"], "parallel.reference"),
        ("sft", ["model.policy=", "model.init.max_position_embeddings=512"], "shorter than data.max_length 2048"),
        ("ppo", ["data.max_length=512"], "leaves no room for a prompt"),
        ("ppo", ["ppo.ptx_coef=0.5"], "data.ptx is empty"),
        ("ppo", ["ppo.kl_controller=adaptive", "ppo.kl_coef=0"], "positive ppo.kl_coef"),
        ("ppo", ["ppo.rollout_size=40"], "not a multiple of ppo.minibatch_size 32"),
        ("reward", ["reward.min_pairs=200"], "larger than reward.max_pairs 128"),
    ],
)
def test_an_impossible_combination_says_what_to_change(command, overrides, expected):
    assert expected in fault(None, [*COMPLETE, *overrides], command)


@pytest.mark.parametrize(
    ("command", "overrides"),
    [
        ("critic", ["monitor.eval_every=5"]),  # it evaluates nothing
        ("critic", ["ppo.kl_estimator=full", "parallel.reference.tp=2"]),  # the policy is its own reference
        ("ppo", ["model.init.max_position_embeddings=8"]),  # nothing starts from random weights
    ],
)
def test_what_a_stage_does_not_use_is_no_fault(command, overrides):
    load_config(None, [*COMPLETE, *overrides], command=command)


def test_a_missing_file_and_a_folder_and_malformed_toml_are_config_errors(toml, tmp_path):
    assert "no such configuration file" in fault(str(tmp_path / "absent.toml"), [])
    assert "cannot be read" in fault(str(tmp_path), [])
    assert "line 2" in fault(toml("[ppo]\nlam = \n"), [])
    (tmp_path / "latin.toml").write_bytes(b'[data]\nsystem_prompt = "\xe9"\n')
    assert "not UTF-8" in fault(str(tmp_path / "latin.toml"), [])


# ---- help


def test_every_field_has_a_type_a_default_and_a_description():
    for key, field in fields():
        text = describe(key)
        assert text.startswith(f"{key}: "), key
        assert field.description, key


def test_help_of_a_section_lists_its_fields_and_help_alone_lists_the_sections():
    assert "ppo.kl_coef: number >= 0; default 0.1" in describe("ppo")
    assert "model.init.hidden_size: whole number > 0" in describe("model.init")
    assert "sampling" in describe(None)


def test_help_of_an_unknown_topic_suggests_one():
    with pytest.raises(ConfigError, match=r"did you mean ppo\.lam"):
        describe("ppo.lamm")


@pytest.mark.parametrize(
    ("command", "overrides", "is_refused"),
    [
        ("ppo", ["checkpoint.keep_best=1"], True),
        ("ppo", ["checkpoint.keep_best=1", "monitor.eval_every=2", "data.eval=rows.jsonl"], False),
        ("critic", ["checkpoint.keep_best=1", "monitor.eval_every=2", "data.eval=rows.jsonl"], True),
        ("sft", [], False),
    ],
)
def test_keeping_the_best_needs_evaluations(command, overrides, is_refused):
    try:
        load_config(None, [*COMPLETE, *overrides], command=command)
        refused = False
    except ConfigError as error:
        refused = "checkpoint.keep_best" in str(error)
    assert refused == is_refused
