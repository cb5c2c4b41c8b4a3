#!/bin/bash
# Train on machines of a Slurm cluster that ends jobs after some hours. Start it in the folder of
# this repository, with torchrun on the PATH. It must know --signals-to-handle: that of PyTorch 2.14
# does, that of 2.5.1 does not.
#
#     sbatch --nodes 2 --gpus-per-node 8 --time 24:00:00 docs/slurm.sh train.py FLAGS OF train.py
#
# Five minutes before the end of its time Slurm sends USR1 to all processes that srun has started.
# The training finishes its step, saves and exits, and this script puts the job into the queue
# again. The output of each attempt is in a file train.JOB.ATTEMPT.out.
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --requeue
#SBATCH --signal=USR1@300

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000))       # jobs on the same machine need different ports
output=train.$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}.out

# --max-restarts: after a failure of a process all start again, from the last checkpoint.
# --shutdown-timeout: seconds until torchrun kills processes that are still running after USR1.
srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" \
    --rdzv-backend c10d --rdzv-endpoint "$first:$port" --rdzv-id "$SLURM_JOB_ID" \
    --max-restarts 3 --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGUSR1 --shutdown-timeout 240 \
    -- "$@" > "$output" 2>&1
status=$?

if grep -q 'stopped by a signal and saved' "$output"; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
