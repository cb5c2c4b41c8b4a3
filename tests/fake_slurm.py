"""In place of three commands of Slurm: a cluster of two nodes that are both this machine.

    sbatch OPTIONS SCRIPT ARGUMENTS  run a job, and run it again if it was requeued
    srun COMMAND                     run the command once for each node
    scontrol show hostnames NODES    print the nodes, one per line
    scontrol requeue JOB             request that sbatch runs the job again

The time limit of a job is near when the file $FAKE_SLURM/time-is-up exists. sbatch then sends the
signal of the option --signal to all processes that srun has started, and to no others, as Slurm
does. $FAKE_SLURM also holds a file with the process ids of the tasks of srun.
"""
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

NODES = ["127.0.0.1", "127.0.0.2"]
FOLDER = Path(os.environ["FAKE_SLURM"])
TASKS = FOLDER / "tasks"
TIME_IS_UP = FOLDER / "time-is-up"
REQUEUE = FOLDER / "requeue"


def sbatch(words):
    """-> exit status of the last attempt. The options of the script are read, too."""
    place = next(k for k, word in enumerate(words) if word.endswith(".sh"))
    script, arguments = words[place], words[place + 1:]
    in_script = re.findall(r"^#SBATCH (.*)$", Path(script).read_text(), re.M)
    options = parse_options([*" ".join(in_script).split(), *words[:place]])
    assert options["nodes"] == str(len(NODES)) and options["ntasks-per-node"] == "1", options
    copy = FOLDER / "slurm_script"                  # Slurm runs a copy from a folder of its own
    shutil.copy(script, copy)
    job = str(os.getpid())
    env = os.environ | {"SLURM_JOB_ID": job, "SLURM_JOB_NODELIST": "node[1-2]",
                        "SLURM_NNODES": options["nodes"], "SLURM_GPUS_ON_NODE": "1"}
    for attempt in count():
        if attempt:
            env["SLURM_RESTART_COUNT"] = str(attempt)
        script = subprocess.Popen(["bash", copy, *arguments], env=env)
        while script.poll() is None:
            if TIME_IS_UP.exists():
                TIME_IS_UP.unlink()
                send_signal(options["signal"])
            time.sleep(0.05)
        if not REQUEUE.exists():
            return script.returncode
        assert REQUEUE.read_text() == job and "requeue" in options
        REQUEUE.unlink()


def parse_options(words):
    """["--nodes", "2", "--mem=0", "--requeue"] -> {"nodes": "2", "mem": "0", "requeue": ""}"""
    options = {}
    for word in words:
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            options[name] = value
        else:
            options[name] = word
    return options


def send_signal(option):
    """option  such as USR1@300"""
    number = signal.Signals["SIG" + option.partition("@")[0]]
    listing = subprocess.run(["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True)
    parents = [tuple(map(int, line.split())) for line in listing.stdout.splitlines()]
    processes = [int(task) for task in TASKS.read_text().split()]
    for process in processes:                       # grows while it is read
        processes += [child for child, parent in parents if parent == process]
    for process in processes:
        os.kill(process, number)


def srun(command):
    """-> the largest exit status"""
    # torchrun asks the network for its own address unless it is given
    env = os.environ | {"PET_LOCAL_ADDR": "127.0.0.1"}
    tasks = [subprocess.Popen(command, env=env) for _ in NODES]
    TASKS.write_text(" ".join(str(task.pid) for task in tasks))
    return max(task.wait() % 256 for task in tasks)


def scontrol(words):
    if words[:2] == ["show", "hostnames"]:
        print(*NODES, sep="\n")
    else:
        assert words[0] == "requeue"
        REQUEUE.write_text(words[1])
    return 0


if __name__ == "__main__":
    commands = {"sbatch": sbatch, "srun": srun, "scontrol": scontrol}
    sys.exit(commands[sys.argv[1]](sys.argv[2:]))
