"""What a user gives for a run wins, or is refused by name; help and errors are for people."""

import dataclasses
import json
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import FullyShardedDataParallelPlugin
from datasets import Dataset, DatasetDict
from sentence_transformers.base.sampler import BatchSamplers
from tiny_runs import positive, tiny_run, write_tuples
from torch.utils.data import BatchSampler, ConcatDataset
from transformers import TrainingArguments

from lion_st.data import save_beir
from lion_st.errors import UsageError
from lion_st.losses import FlopsRegularizer, IdfFlopsRegularizer, L1Regularizer
from lion_st.training.mixing import WeightedBatchSampler
from lion_st.training.options.arguments import (
    MntpArguments,
    MntpTrainingArguments,
    RetrieverTrainingArguments,
    retriever_arguments,
)
from lion_st.training.options.command_line import parse_mntp_arguments, parse_retriever_arguments
from lion_st.training.options.reader import read_config
from lion_st.training.progress.checkpoints import checkpoint_to_resume
from lion_st.training.recipes import get_recipe
from lion_st.training.retriever import build_loss, build_model, build_trainer, load_training_tuples, train_retriever
from lion_st.training.sharding import sharding_of
from lion_st.training.validation import recomputes_activations, rename_checkpointing, warn_of_slow_training

SCRIPTS = Path(__file__).parents[2] / "training_scripts"
MICRO = ["--backbone", "micro"]
MNTP = ["--backbone", "llama-3-8b"]
ZERO3 = '{"zero_optimization": {"stage": 3}}'


def test_epochs_take_the_place_of_the_recipes_steps():
    for _, training in (parse_retriever_arguments([*MICRO, "--num_train_epochs", "2"]),
                        parse_mntp_arguments([*MNTP, "--num_train_epochs", "2"])):  # fmt: skip
        assert (training.max_steps, training.num_train_epochs) == (-1, 2)
    assert MntpTrainingArguments(num_train_epochs=1).max_steps == -1
    assert MntpTrainingArguments().max_steps == 10_000
    assert dataclasses.replace(MntpTrainingArguments(max_steps=7)).max_steps == 7


def test_a_warmup_ratio_takes_the_place_of_the_recipes_warmup_steps():
    _, training = parse_retriever_arguments([*MICRO, "--warmup_ratio", "0.5"])
    assert training.get_warmup_steps(100) == 50
    _, training = retriever_arguments(get_recipe("micro", "sparse", "cl"), warmup_ratio=0.25)
    assert training.get_warmup_steps(100) == 25


def test_half_precision_takes_the_place_of_bfloat16():
    for _, training in (parse_retriever_arguments([*MICRO, "--fp16"]), parse_mntp_arguments([*MNTP, "--fp16"])):
        assert (training.fp16, training.bf16) == (True, False)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("bf16", [True, False])
def test_bfloat16_on_a_cpu_without_instructions_for_it_is_warned_of(bf16, fast, monkeypatch, caplog):
    monkeypatch.setattr("lion_st.kernels.bfloat16.multiplies_bfloat16", lambda: fast)
    for _, training in (parse_retriever_arguments([*MICRO, "--bf16", str(bf16), "--use_cpu"]),
                        parse_mntp_arguments([*MNTP, "--bf16", str(bf16), "--use_cpu"])):  # fmt: skip
        caplog.clear()
        warn_of_slow_training(training)
        assert ("faster in float32: --bf16 false." in caplog.text) == (bf16 and not fast)


def test_the_command_line_takes_the_place_of_a_rival_in_the_yaml_file(tmp_path):
    (tmp_path / "my.yaml").write_text("backbone: micro\nmax_steps: 9\nlearning_rate: 1e-4\ntrain_data: [a, b]\n")
    config = ["--config", str(tmp_path / "my.yaml")]
    arguments, training = parse_retriever_arguments([*config, "--num-train-epochs", "1"])
    assert (training.max_steps, training.num_train_epochs) == (-1, 1)
    assert training.learning_rate == 1e-4  # which YAML reads as text
    assert arguments.train_data == ["a", "b"]
    assert parse_retriever_arguments(config)[1].max_steps == 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max_steps", "3", "--num_train_epochs", "1"], "--max_steps and --num_train_epochs"),
        (["--warmup_steps", "3", "--warmup_ratio", "0.1"], "--warmup_steps and --warmup_ratio"),
        (["--bf16", "--fp16"], "--bf16 and --fp16"),
        (["--prompts", "query: "], "--prompts is .query: .: give a mapping of sources"),
        (
            ["--eval_strategy", "steps"],
            "--eval_strategy needs something to evaluate on: give --eval_data or --eval_share",
        ),
        (["--load_best_model_at_end"], "--load_best_model_at_end needs something to evaluate on"),
        (["--early_stopping_patience", "2"], "--early_stopping_patience needs something to evaluate on"),
        (["--eval_share", "1"], "--eval_share must be above 0 and below 1, got 1"),
        (["--auto_find_batch_size"], "--auto_find_batch_size is not read here: .* --mini_batch_size"),
        (["--data_seed", "7"], "--data_seed is not read here: --seed is that of batches and negatives too"),
        (["--train_sampling_strategy", "sequential"], "--train_sampling_strategy is not read here: .* --batch_sampler"),
        (["--label_smoothing_factor", "0.1"], "--label_smoothing_factor is not read here: the losses are of scores"),
        (["--neftune_noise_alpha", "5"], "--neftune_noise_alpha is not read here"),
        (["--dataloader_multiprocessing_context", "spawn"], "--dataloader_multiprocessing_context is not read here"),
        (["--pooling", "last_token"], "--pooling is read with --paradigm dense or hybrid alone"),
        (["--paradigm", "dense", "--scale", "2"], "--scale is read with --paradigm sparse or hybrid alone"),
        (
            ["--objective", "cl", "--teacher_temperature", "2"],
            "--teacher_temperature is read with --objective kd, kl, margin_mse_kl or cl_kd",
        ),
        (["--lora_r", "4"], "--lora_r is read with --use_peft alone"),  # micro trains all weights
        (["--train_data", "a", "b", "--train_weights", "1"], "--train_weights are"),
        (["--train_data", "a", "a"], "--train_data names a source twice"),
        (["--fsdp", "--fsdp_config", '{"version": 1}'], "--fsdp_config has version: 1, .* FSDP1 is deprecated: say 2"),
        (["--fsdp", "full_shard offload"], "--fsdp full_shard offload: weights and optimizer stay on the GPUs"),
        (["--fsdp", "--fsdp_config", '{"cpu_offload": true}'], "--fsdp_config has cpu_offload: True"),
        (["--fsdp", "--fsdp_config", "none.json"], "--fsdp_config is neither a JSON file nor JSON: .*none.json"),
        (["--fsdp_config", "{}"], "--fsdp_config is read with --fsdp alone"),
        (["--deepspeed", "none.json"], "--deepspeed is neither a JSON file nor JSON: .*none.json"),
        (["--deepspeed", "{}"], r"--deepspeed has zero_optimization.stage: None: 2 and 3 are supported"),
        (["--deepspeed", '{"zero_optimization": {"stage": 1}}'], r"zero_optimization.stage: 1: 2 and 3 are supported"),
        (["--deepspeed", '{"optimizer": {"type": "Adam"}}'], r"has optimizer: .*the optimizer is that of --optim"),
        (["--deepspeed", '{"train_batch_size": 8}'], "has train_batch_size: 8: leave it out, .*it is --batch_size"),
        (["--deepspeed", '{"zero_optimization": {"offload_param": {"device": "cpu"}}}'], "has offload_param: .* GPUs"),
        (["--deepspeed", ZERO3[:-1] + ', "compression_training": {}}'], "has compression_training, which is not supp"),
        (
            ["--bf16", "false", "--deepspeed", ZERO3[:-1] + ', "bf16": {"enabled": true}}'],
            "has bf16.enabled: True, and the run has False",
        ),
        (["--deepspeed", ZERO3, "--fp16"], "--fp16 is not supported with --deepspeed: say --bf16"),
        (["--deepspeed", ZERO3, "--fsdp"], "--fsdp and --deepspeed both divide the weights"),
        (["--deepspeed", ZERO3, "--optim", "adafactor"], "--optim adafactor .*say --optim adamw_torch_fused"),
        (["--deepspeed", ZERO3, "--torch_compile"], "--torch_compile is not built for --deepspeed"),
        (["--torch_compile_mode", "reduce-overhead"], "--torch_compile_mode reduce-overhead records CUDA graphs"),
        (["--torch_compile_backend", "cudagraphs"], "--torch_compile_backend cudagraphs records CUDA graphs"),
        (
            ["--torch_compile_backend", "eager", "--torch_compile_mode", "default"],
            "--torch_compile_mode is of the backend inductor, not of eager",
        ),
        (["--use_liger_kernel", "--torch_compile"], "--torch_compile fuses what Liger's kernels do"),
        (["--use_liger_kernel", "--use_cpu", "true"], "--use_liger_kernel runs on GPUs alone"),
        (["--save_only_model"], "--save_only_model is not read here: a run could not go on"),
        (["--max_steps", "0"], "--max_steps must be positive, got 0"),
        (["--max_steps", "-3"], "--max_steps must be positive, got -3"),
        (["--num_train_epochs", "0"], "--num_train_epochs must be positive, got 0"),
        (["--learning_rate", "0"], "--learning_rate must be positive, got 0"),
        (["--learning_rate", "nan"], "--learning_rate must be positive, got nan"),
        (["--warmup_ratio", "5"], "--warmup_ratio must be at least 0 and below 1, got 5"),
        (["--regularizer_warmup_ratio", "5"], "--regularizer_warmup_ratio must be at least 0 and below 1, got 5"),
        (["--query_regularizer_weight", "-1"], "--query_regularizer_weight must be at least 0, got -1"),
        (["--document_regularizer_weight", "-.1"], "--document_regularizer_weight must be at least 0, got -0.1"),
        (["--adam_beta2", "1"], "--adam_beta2 must be at least 0 and below 1, got 1"),
        (["--lora_dropout", "1.5", "--use_peft", "true"], "--lora_dropout must be at least 0 and below 1, got 1.5"),
    ],
)
def test_what_cannot_be_heeded_is_refused_by_name(options, message):
    with pytest.raises(UsageError, match=message):
        parse_retriever_arguments([*MICRO, *options])


def test_kernels_of_a_language_models_loss_are_refused():
    with pytest.raises(UsageError, match="names cross_entropy: rope, rms_norm, swiglu, geglu are read"):
        RetrieverTrainingArguments(use_liger_kernel=True, liger_kernel_config={"cross_entropy": True})
    with pytest.raises(UsageError, match="liger_kernel_config is read with --use_liger_kernel alone"):
        MntpTrainingArguments(liger_kernel_config={"rope": True})


def test_compiling_leaves_the_precision_of_float32_as_it_is(monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # as `accelerate launch` sets it
    for _, training in (
        parse_retriever_arguments([*MICRO, "--torch_compile"]),
        parse_mntp_arguments([*MNTP, "--torch_compile_mode", "max-autotune-no-cudagraphs"]),
    ):
        assert training.torch_compile and training.torch_compile_backend == "inductor" and training.tf32 is False
    assert parse_retriever_arguments(MICRO)[1].tf32 is None


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"},
            "offload_param: .*stay on the GPUs",
        ),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, "stage: 1: 2 and 3"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_GRADIENT_CLIPPING": "0.5"}, "0.5: .*it is --max_grad_norm"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, r"Megatron-LM \(ACCELERATE_USE_MEGATRON_LM=true\).*torchrun"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, r"compiles the whole model \(ACCELERATE_DYNAMO_BACKEND=INDUCTOR\)"),
        ({"ACCELERATE_USE_FSDP": "true"}, r"version: 1, which is not supported: FSDP1"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "offload_params: true"),
    ],
)
def test_sharding_that_accelerate_is_configured_for_and_is_not_built_is_refused(monkeypatch, variables, message):
    for parse, options in ((parse_retriever_arguments, MICRO), (parse_mntp_arguments, MNTP)):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UsageError, match=rf"accelerate's configuration .*{message}"):
            parse(options)


def test_a_precision_that_deepspeed_would_not_have_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    for parse, options in ((parse_retriever_arguments, MICRO), (parse_mntp_arguments, MNTP)):
        options = [*options, "--deepspeed", ZERO3]
        with pytest.raises(UsageError, match="has mixed_precision: bf16, and the run is without --bf16: say --bf16"):
            parse([*options, "--bf16", "false"])
        assert parse([*options, "--bf16", "true"])[-1].bf16


@pytest.mark.parametrize("file", sorted((SCRIPTS / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_configurations_of_accelerate_are_heeded(file, monkeypatch):
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    arguments = launch_command_parser().parse_args(["train.py"])
    given = yaml.safe_load(file.read_text())
    kind = given.pop("distributed_type")
    of_kind = given.pop("fsdp_config", {}) | given.pop("deepspeed_config", {})
    options = given | of_kind | {"use_fsdp": kind == "FSDP"}
    assert options.keys() - {"compute_environment"} <= vars(arguments).keys()
    vars(arguments).update(options, dynamo_backend="no", deepspeed_fields_from_accelerate_config="")
    by_deepspeed = kind == "DEEPSPEED"
    variables = prepare_deepspeed_cmd_env(arguments)[1] if by_deepspeed else prepare_multi_gpu_env(arguments)
    for name, value in variables.items():
        if name.startswith(("ACCELERATE_USE", "ACCELERATE_DEEPSPEED", "ACCELERATE_GRADIENT", "FSDP_")):
            monkeypatch.setenv(name, value)
    _, training = parse_retriever_arguments(MICRO)
    assert sharding_of(training) == {"FSDP": "FSDP2", "DEEPSPEED": "ZeRO-3"}.get(kind, "none")
    if by_deepspeed:
        (_, same) = parse_retriever_arguments([*MICRO, "--deepspeed", str(file.with_suffix(".json"))])
        assert same.deepspeed["zero_optimization"].items() >= training.deepspeed["zero_optimization"].items()
    elif kind == "FSDP":
        plugin = FullyShardedDataParallelPlugin()
        assert (plugin.fsdp_version, plugin.cpu_ram_efficient_loading) == (2, True)
        assert plugin.activation_checkpointing == ("activation" in file.stem)


def test_one_process_does_not_shard(tiny_backbone, data, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(UsageError, match=r"sharded over several processes: run `torchrun --nproc_per_node N"):
        train_retriever(*tiny_run(tiny_backbone(), data, tmp_path))


def test_mntp_refuses_what_is_out_of_range():
    for options in (["--max_steps", "0"], ["--learning_rate", "-1"], ["--block_size", "0"], ["--lora_r", "0"]):
        with pytest.raises(UsageError, match=f"{options[0]} must be positive, got {options[1]}"):
            parse_mntp_arguments([*MNTP, *options])


def test_a_regularizer_without_warmup_has_its_full_weight_from_the_second_step_on(tiny_backbone, data, tmp_path):
    arguments, training = tiny_run(tiny_backbone(), data, tmp_path, regularizer_warmup_ratio=0.0, max_steps=2)
    trainer = build_trainer(build_model(arguments, "cpu"), arguments, training, load_training_tuples(arguments, 0))
    trainer.train()
    _, logs = [log for log in trainer.state.log_history if "loss" in log]
    assert logs["document_regularizer_loss"] == pytest.approx(0.04 * logs["document_flops"], rel=1e-3)


def test_mntp_reads_what_the_fine_tuning_does_not(tmp_path):
    _, training = parse_mntp_arguments([*MNTP, "--data_seed", "7", "--train_sampling_strategy", "sequential"])
    assert training.settings().items() >= {"data_seed": 7, "train_sampling_strategy": "sequential"}.items()
    with pytest.raises(UsageError, match=r"--label_smoothing_factor is not read here: .* masked tokens"):
        parse_mntp_arguments([*MNTP, "--label_smoothing_factor", "0.1"])


def test_mntp_refuses_to_push_what_is_not_its_result():
    with pytest.raises(UsageError, match="--push_to_hub is not read here: `lion-st publish --folder`"):
        parse_mntp_arguments([*MNTP, "--push_to_hub"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lerning_rate", "1"], "--lerning_rate is not an option of this command: did you mean --learning_rate"),
        (["--mini-batchsize", "1"], "did you mean --mini_batch_size"),
        (["--xyzzy"], "--xyzzy is not an option of this command; see --help"),
        (["lions"], "'lions' is not an option"),
        (["--max_steps", "many"], "--max_steps: invalid int value: 'many'"),
        (["--config"], "--config takes a YAML file"),
        (["--config", "a", "--config=b"], "--config is given twice"),
    ],
)
def test_a_wrong_option_is_named_with_the_nearest_right_one(options, message):
    with pytest.raises(UsageError, match=message):
        parse_retriever_arguments([*MICRO, *options])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_step: 3", "--max_step is not an option of .*my.yaml: did you mean --max_steps"),
        ("max_steps: many", "my.yaml gives --max_steps the value 'many', which is not a whole number"),
        ("max_steps: 2.5", "which is not a whole number"),
        ("max_steps: true", "which is not a whole number"),
        ("bf16: maybe", "which is not true or false"),
        ("max_steps: [1, 2]", "where one value belongs"),
        ("paradigm: lexical", "choose from sparse, dense"),
        ("a: [", "my.yaml is not YAML"),
        ("- a\n- b", "my.yaml is not a list of `option: value` lines"),
        ("", "my.yaml is not a list of"),
    ],
)
def test_a_wrong_yaml_file_is_named_with_its_option(tmp_path, text, message):
    (tmp_path / "my.yaml").write_text(text)
    with pytest.raises(UsageError, match=message):
        parse_retriever_arguments([*MICRO, "--config", str(tmp_path / "my.yaml")])


def test_a_plateau_is_one_of_a_score_that_no_longer_rises():
    plateau = ["--eval_share", "0.1", "--lr_scheduler_type", "reduce_lr_on_plateau"]
    _, training = parse_retriever_arguments([*MICRO, *plateau, "--lr_scheduler_kwargs", '{"patience": 3}'])
    assert training.lr_scheduler_kwargs == {"mode": "max", "patience": 3}
    _, training = parse_retriever_arguments([*MICRO, *plateau, "--greater_is_better", "false"])
    assert training.lr_scheduler_kwargs == {"mode": "min"}


def test_a_bare_no_in_yaml_is_the_value_no(tmp_path):
    (tmp_path / "my.yaml").write_text("save_strategy: no\nlogging_strategy: off\n")
    _, training = parse_retriever_arguments([*MICRO, "--config", str(tmp_path / "my.yaml")])
    assert (training.save_strategy, training.logging_strategy) == ("no", "no")


def test_configurations_come_with_the_package(tmp_path):
    assert read_config("lion_sp_8b")["backbone"] == "llama-3-8b"
    with pytest.raises(FileNotFoundError, match=r"'nope\.yaml' of --config is not there\. lion_st brings .*lion_sp_8b"):
        read_config("nope.yaml")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        read_config(str(tmp_path))


@pytest.mark.parametrize("parse", [parse_retriever_arguments, parse_mntp_arguments])
def test_help_needs_no_recipe(parse, capsys):
    for options in (["--help"], ["--help_all"], ["-h", "--backbone", "llama-3-8b"]):
        with pytest.raises(SystemExit) as end:
            parse(options)
        assert end.value.code == 0
    short, whole, recipe = capsys.readouterr().out.split("usage: ")[1:]
    assert "--adam_beta1" in whole and "--adam_beta1" not in short
    assert "--learning_rate" in short and "LION_ST_TRACEBACK" in short
    steps = recipe[recipe.index("\n  --max_steps") :]
    assert ("(default: 10000)" if parse is parse_mntp_arguments else "(default: 4200)") in steps[:600]
    # Every option that is shown is explained; one that is refused is not shown, and a --no_ does not say the opposite.
    assert not re.search(r"^  --\S+(?: \S+)*\n  (?=--)", short, re.M)
    assert "--auto_find_batch_size" not in whole
    assert re.search(r"--no_use_peft, --no-use-peft\s+Not --use_peft\.\n", short)


@pytest.mark.parametrize(
    "missing",
    [
        {"train_data": "data/own.jsonl"},
        {"train_data": "data/own"},
        {"train_queries": "q.tsv"},
        {"eval_data": ["runs/a"]},
    ],
)
def test_data_that_are_not_there_are_named_before_a_model_is_read(data, tmp_path, monkeypatch, missing):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # where no network is, it is asked for long
    (name,) = [value if isinstance(value, str) else value[0] for value in missing.values()]
    with pytest.raises(FileNotFoundError, match=f"^{name} is not a file or folder here"):
        train_retriever(*tiny_run("org/of-no-one", data, tmp_path / "run", "sparse", "cl", **missing))
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"'file/run' cannot be made: '.*file' is a file"):
        train_retriever(*tiny_run("org/of-no-one", data, "file/run", "sparse", "cl"))


def trainer_of(backbone, data, output, **settings):
    arguments, training = tiny_run(backbone, data, output, "dense", "cl", **settings)
    return build_trainer(build_model(arguments, "cpu"), arguments, training, load_training_tuples(arguments, 0))


def test_batch_sampler_and_column_tasks_are_the_given_ones(tiny_backbone, data, tmp_path):
    assert trainer_of(tiny_backbone(), data, tmp_path).args.batch_sampler == BatchSamplers.NO_DUPLICATES
    given = trainer_of(
        tiny_backbone(), data, tmp_path, batch_sampler="batch_sampler", router_mapping={"negative_1": "query"}
    )
    assert given.args.batch_sampler == BatchSamplers.BATCH_SAMPLER
    tasks = {"query": "query", "positive": "document", "negative_1": "query", "negative_2": "document"}
    assert given.args.router_mapping == tasks
    with pytest.raises(ValueError, match="--router_mapping says 'answer' is 'query': it maps columns, query, positive"):
        trainer_of(tiny_backbone(), data, tmp_path, router_mapping={"answer": "query"})


def test_the_first_column_is_the_query_whatever_its_name(tiny_backbone, data, tmp_path):
    texts = {"anchor": [f"q{n}" for n in range(24)], "positive": [f"p{n}" for n in range(24)]}
    arguments, training = tiny_run(tiny_backbone(), data, tmp_path, objective="cl", negatives=0, save_steps=4)

    def build(columns, several=False):
        rows = Dataset.from_dict(columns)
        rows = DatasetDict(a=rows, b=rows.select(range(12))) if several else rows
        return build_trainer(build_model(arguments, "cpu"), arguments, training, rows)

    trainer = build(texts, several=True)
    assert trainer.args.router_mapping == {"anchor": "query", "positive": "document"}
    trainer.train()
    assert trainer.state.global_step == 4
    with pytest.raises(ValueError, match="begin with 'positive', which the losses would take for the query: put 'que"):
        build({"positive": texts["positive"], "query": texts["anchor"]})


def test_arguments_are_left_as_they_were(tiny_backbone, data, tmp_path):
    arguments, training = tiny_run(tiny_backbone(), data, tmp_path, query_prompt="q: ")
    before = vars(training).copy()
    build_trainer(build_model(arguments, "cpu"), arguments, training, load_training_tuples(arguments, 0))
    assert {name: value for name, value in vars(training).items() if name in before} == before


def test_rare_settings_that_change_the_result_belong_to_the_run():
    plain = RetrieverTrainingArguments(per_device_train_batch_size=1, gradient_accumulation_steps=1)
    other = dataclasses.replace(
        plain,
        adam_beta2=0.9,
        learning_rate_mapping={"head": 1.0},
        batch_sampler="no_duplicates",
        multi_dataset_batch_sampler="round_robin",
    )
    changed = {"adam_beta2", "learning_rate_mapping", "batch_sampler", "multi_dataset_batch_sampler"}
    assert other.settings().keys() - plain.settings().keys() == changed


def test_a_run_goes_on_from_the_checkpoint_that_is_named(tiny_backbone, data, tmp_path):
    output = tmp_path / "out"
    train_retriever(*tiny_run(tiny_backbone(), data, output))
    first = str(output / "checkpoint-2") if (output / "checkpoint-2").exists() else str(output / "checkpoint-4")
    assert checkpoint_to_resume(output, first) == first
    assert checkpoint_to_resume(output) == checkpoint_to_resume(output, "true") == str(output / "checkpoint-4")
    with pytest.raises(ValueError, match=r"holds checkpoints, which --resume_from_checkpoint false would write over"):
        checkpoint_to_resume(output, "false")
    with pytest.raises(FileNotFoundError, match=r"--resume_from_checkpoint .*nowhere is not a checkpoint"):
        train_retriever(
            *tiny_run(tiny_backbone(), data, tmp_path / "new", resume_from_checkpoint=str(tmp_path / "nowhere"))
        )
    assert not (tmp_path / "new").exists()


def test_several_sources_have_their_shares_of_the_batches(tiny_backbone, data, tmp_path):
    sources = [str(data), str(write_tuples(tmp_path / "more.jsonl", rows=40))]
    trainer = trainer_of(tiny_backbone(), data, tmp_path, train_data=sources, train_weights=[3, 1])
    assert isinstance(trainer.train_dataset, DatasetDict)
    batches = list(trainer.get_train_dataloader().batch_sampler)
    of_first = [max(batch) < 24 for batch in batches]
    assert len(batches) == 16 and sum(of_first) == 12  # 6 and 10 batches in all, three quarters of them the first's
    assert all((min(batch) < 24) == first for batch, first in zip(batches, of_first, strict=True))
    rows = [row for batch, first in zip(batches, of_first, strict=True) if first for row in batch]
    assert sorted(rows[:24]) == sorted(rows[24:]) == list(range(24))  # every row once before any comes again
    assert rows[:24] != rows[24:]
    assert next(iter(trainer.get_train_dataloader()))["query_input_ids"].shape[0] == 4
    with pytest.raises(ValueError, match="2 sources need as many positive weights"):
        pieces = ConcatDataset(list(trainer.train_dataset.values()))
        WeightedBatchSampler(pieces, [1.0], batch_samplers=[BatchSampler([], 1, True), BatchSampler([], 1, True)])


def test_a_mixture_trains_and_is_recorded(tiny_backbone, data, tmp_path):
    sources = [str(data), str(write_tuples(tmp_path / "more.jsonl", rows=40))]
    folder = train_retriever(
        *tiny_run(tiny_backbone(), data, tmp_path / "out", train_data=sources, train_weights=[2.0, 1.0])
    )
    settings = json.loads((folder / "training.json").read_text())["settings"]
    assert (settings["train_data"], settings["train_weights"]) == (sources, [2.0, 1.0])


def test_a_regularizer_is_chosen_by_name_and_its_settings_belong_to_it(data, tmp_path):
    def loss(**options):
        return build_loss(None, tiny_run("m", data, tmp_path, "sparse", "cl", **options)[0])

    kinds = {"l1": L1Regularizer, "idf_flops": IdfFlopsRegularizer, "flops": FlopsRegularizer}
    for name, kind in kinds.items():
        made = loss(regularizer=name)
        assert type(made.query_regularizer) is type(made.document_regularizer) is kind
    made = loss(regularizer="df_flops", df_alpha=0.2)
    assert made.document_regularizer.alpha == 0.2 and type(made.query_regularizer) is FlopsRegularizer
    made = loss(regularizer="target", query_target_terms=20, document_target_terms=200)
    assert (made.query_regularizer.target, made.document_regularizer.target) == (20, 200)
    for options, message in (
        (dict(regularizer="target", query_target_terms=20), "give --document_target_terms"),
        (dict(regularizer="l1", df_alpha=0.2), "--df_alpha is read with --regularizer df_flops alone"),
        (dict(regularizer="df_flops", df_alpha=1.0), "--df_alpha is a share of documents, below 1"),
        (
            dict(regularizer="target", query_target_terms=0, document_target_terms=1),
            "query_target_terms must be positive",
        ),
    ):
        with pytest.raises(UsageError, match=message):
            loss(**options)


def test_target_regularizers_go_on_where_they_were_and_say_what_was_not_reached(tiny_backbone, data, tmp_path, caplog):
    options = dict(regularizer="target", query_target_terms=5, document_target_terms=9, max_steps=4, save_steps=2)
    whole = tiny_run(tiny_backbone(), data, tmp_path / "whole", "sparse", "cl", **options)
    train_retriever(*whole)
    assert "active terms a document in place of --document_target_terms 9" in caplog.text
    states = []
    for checkpoint in (2, 4):
        state = json.loads((tmp_path / "whole" / f"checkpoint-{checkpoint}" / "trainer_state.json").read_text())
        states.append(state["stateful_callbacks"]["TargetCallback"]["attributes"])
    assert states[0]["document"]["multiplier"] < states[1]["document"]["multiplier"]
    assert states[0]["document"]["start"] == states[1]["document"]["start"] > 9
    arguments, training = tiny_run(tiny_backbone(), data, tmp_path / "again", "sparse", "cl", **options)
    training.restore_callback_states_from_checkpoint = True  # as with --eval_data
    tuples = load_training_tuples(arguments, training.seed)
    trainer = build_trainer(build_model(arguments, "cpu"), arguments, training, tuples)
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    found = {task: getattr(trainer.loss, f"{task}_regularizer").get_state() for task in ("query", "document")}
    assert found == states[1]


def test_the_terms_of_the_texts_are_counted_for_idf_flops(tiny_backbone, data, tmp_path):
    arguments, training = tiny_run(tiny_backbone(), data, tmp_path, "sparse", "cl", regularizer="idf_flops")
    model = build_model(arguments, "cpu")
    loss = build_trainer(model, arguments, training, load_training_tuples(arguments, 0)).loss
    idf = loss.document_regularizer.idf
    assert len(idf) == 320 and torch.equal(idf, loss.query_regularizer.idf)
    assert idf[model.tokenizer("a", add_special_tokens=False)["input_ids"][0]] < idf.max()
    others = Dataset.from_list([{"question": f"what {row}", "answer": positive(row)} for row in range(24)])
    loss = build_trainer(model, arguments, training, others).loss
    assert torch.equal(idf, loss.document_regularizer.idf)  # of the same texts, in a column of another name


def test_sources_may_be_paths_or_one_alone(tiny_backbone, data, tmp_path):
    save_beir(tmp_path / "test", {"d": {"text": "lions"}}, {"q": "lions"}, {"q": {"d": 1}})
    arguments, training = tiny_run(Path(tiny_backbone()), data, tmp_path / "out", eval_data=tmp_path / "test")
    options = dataclasses.asdict(arguments) | {"train_data": Path(data)}
    arguments = type(arguments)(**options)
    assert (arguments.model, arguments.train_data) == (str(tiny_backbone()), [str(data)])
    assert training.eval_data == [str(tmp_path / "test")]
    train_retriever(arguments, training)
    mntp = MntpArguments(backbone=Path("a"), texts="b.txt")
    assert (mntp.backbone, mntp.texts) == ("a", ["b.txt"])
    assert MntpArguments(backbone="a", texts=[Path("b.txt"), "c"]).texts == ["b.txt", "c"]


def test_all_linear_layers_may_have_an_adapter():
    for given, expected in (("all-linear", "all-linear"), ("q_proj", {"q_proj"})):
        arguments, _ = parse_retriever_arguments([*MICRO, "--use_peft", "true", "--lora_target_modules", given])
        assert arguments.lora_config().target_modules == expected


def test_a_mini_batch_of_0_turns_gradient_caching_off():
    cached, _ = parse_retriever_arguments(["--backbone", "smollm2-135m"])
    whole, _ = parse_retriever_arguments(["--backbone", "smollm2-135m", "--mini_batch_size", "0"])
    assert cached.mini_batch_size == 128 and whole.mini_batch_size is None


@pytest.mark.parametrize(
    ("given", "expected"),
    [([], True), (["--gradient_checkpointing", "false"], False), (["--activation_checkpointing", "false"], False)],
)
def test_activations_are_recomputed_by_either_name_of_the_option_without_a_warning(given, expected):
    if given[:1] == ["--activation_checkpointing"] and not hasattr(TrainingArguments, "activation_checkpointing"):
        pytest.skip("transformers does not call it so yet")
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        _, training = parse_retriever_arguments(["--backbone", "llama-3-8b", *given])
        _, adapting = parse_mntp_arguments(["--backbone", "llama-3-8b", *given])
    assert recomputes_activations(training) == recomputes_activations(adapting) == expected
    older = SimpleNamespace(gradient_checkpointing=expected)  # of a version that has the one name alone
    rename_checkpointing(older)
    assert vars(older) == {"gradient_checkpointing": expected} and recomputes_activations(older) == expected
