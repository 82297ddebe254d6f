#!/bin/bash
# Two machines of eight GPUs under SLURM. A run that reaches its time limit, or is preempted, goes on where it was.
#
#   launch   sbatch recipes/accelerate/slurm.sh --model resnet50 --data-dir /data/imagenet
#   was run  not run: there was no SLURM; tests/test_launch.py only reads it
#
#SBATCH --job-name=mixsize
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1         # one launcher on each machine; it starts the processes
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120         # to this script alone, 120 s before the limit
#SBATCH --requeue
#SBATCH --open-mode=append
# Preemption sends SIGTERM to this script too, where the cluster sets PreemptParameters=send_user_signal or a GraceTime.

MACHINES=${SLURM_NNODES:-2}
GPUS=${SLURM_GPUS_ON_NODE:-8}
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
PORT=$((20000 + SLURM_JOB_ID % 20000))

# The launcher passes SIGTERM on to its processes, but not SIGUSR1, so that here the one becomes the other.
# srun sends it to every task; each process ends its step and a checkpoint is written.
stop() {
    stopped=1
    scancel --signal=TERM "$SLURM_JOB_ID.0"
}
trap stop USR1 TERM

# $SLURM_PROCID is that of the task, so it is left to the shell that srun starts.
srun --kill-on-bad-exit=1 bash -c 'exec accelerate launch \
    --config_file recipes/accelerate/two_nodes.yaml --num_machines "$0" --num_processes "$1" \
    --main_process_ip "$2" --main_process_port "$3" --machine_rank "$SLURM_PROCID" \
    -m mixsize_timm.train --resume auto "${@:4}"' \
    "$MACHINES" "$((MACHINES * GPUS))" "$HEAD" "$PORT" --experiment "mixsize-$SLURM_JOB_ID" "$@" &
child=$!
wait "$child"
code=$?
while kill -0 "$child" 2>/dev/null; do  # a trapped signal ended the wait, not the run
    wait "$child"
    code=$?
done
# The launcher makes 1 of the 75 that the processes end with, so what is asked is whether this script was told to stop.
if [ -n "$stopped" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
