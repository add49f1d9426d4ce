"""What the example for Slurm starts on each machine."""

import os
import subprocess
from pathlib import Path

from torch.distributed.run import get_args_parser

from lion_st.training.options.command_line import parse_retriever_arguments

SCRIPT = Path(__file__).parents[2] / "training_scripts" / "accelerate" / "slurm.sh"


def test_the_example_for_slurm_gives_torchrun_and_training_options_that_they_have(tmp_path):
    # In place of Slurm's own commands, of which the first says what it was to start.
    for name, text in (("srun", 'printf "%s\\n" "$@"'), ("scontrol", "echo gpu-7; sleep 0.2; seq 99999")):
        command = tmp_path / name
        command.write_text(f"#!/bin/bash\n{text}\n")
        command.chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "gpu-[7-8]"}
    variables |= {"SLURM_NNODES": "2", "SLURM_JOB_ID": "42"}
    given = ["--config", "lion_sp_8b", "--output_dir", "runs/lion sp 8b"]
    done = subprocess.run(["bash", str(SCRIPT), *given], env=variables, text=True, capture_output=True, check=True)
    of_srun, torchrun, *options = done.stdout.splitlines()
    assert (of_srun, torchrun) == ("--kill-on-bad-exit=1", "torchrun")
    started = get_args_parser().parse_args(options)
    assert (started.nnodes, started.nproc_per_node, started.rdzv_endpoint) == ("2", "8", "gpu-7:29500")
    assert (started.rdzv_id, started.rdzv_backend) == ("42", "c10d")
    assert started.module and started.training_script == "lion_st"
    stage, *training = started.training_script_args
    assert stage == "train"
    arguments, training_arguments = parse_retriever_arguments(training)
    assert training_arguments.fsdp and arguments.backbone == "llama-3-8b"
    assert training_arguments.output_dir == "runs/lion sp 8b"
