# shellcheck shell=bash
# What the scripts of this folder have in common. They are submitted from the repository's folder, with megarl in PATH and, where
# they start servers, VLLM_PYTHON set to the Python of an environment with vLLM (make engine-vllm).
set -euo pipefail

mapfile -t NODES < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
LAST_NODE=${NODES[-1]}

# Of this job's servers: requests must carry it. It is in the environment of the job's processes alone.
MEGARL_API_KEY=$(head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n')
export MEGARL_API_KEY

# serve NAME GPUS PORT MODEL [FLAG...]: a vLLM server on some GPUs of the last node; returns when it is healthy
serve() {
    local name=$1 gpus=$2 port=$3 model=$4 log="$SLURM_JOB_NAME-$SLURM_JOB_ID-$1.log"
    : "${VLLM_PYTHON:?is not set: give the Python of an environment with vLLM}"
    srun --nodes=1 --ntasks=1 --ntasks-per-node=1 --nodelist="$LAST_NODE" --exact --mem=0 --gpus-per-node="$gpus" \
        --cpus-per-task="$((gpus * SLURM_CPUS_PER_TASK))" --output="$log" --open-mode=append \
        "$VLLM_PYTHON" -m vllm.entrypoints.openai.api_server --host "$LAST_NODE" --port "$port" --model "$model" "${@:5}" &
    until curl --silent --fail --output /dev/null "http://$LAST_NODE:$port/health"; do
        kill -0 $! 2>/dev/null || { echo "the $name server ended before it was healthy, see $log" >&2; exit 1; }
        sleep 5
    done
}

# serve_policy MODEL MAX_MODEL_LEN [FLAG...]: the engine of a run, at port 8000, with the flags by which MegaRL itself starts one
serve_policy() {
    VLLM_SERVER_DEV_MODE=1 PYTHONPATH="$PWD/megarl/engines/plugin" \
        serve policy 4 8000 "$1" --max-model-len "$2" --tensor-parallel-size 4 --dtype bfloat16 --load-format dummy \
        --skip-tokenizer-init --generation-config vllm --logprobs-mode processed_logprobs --enable-scale-out \
        --worker-extension-cls megarl_vllm_worker.MegaRLWorkerExtension --middleware megarl_guard.RequireKey "${@:3}"
}

# serve_judge MODEL: at port 8001
serve_judge() {
    VLLM_API_KEY=$MEGARL_API_KEY serve judge 1 8001 "$1"
}

# train CONFIG NUM_NODES [--set KEY=VALUE...]: on the job's first nodes, one rank for each GPU. MegaRL finds rank 0 in SLURM's
# variables. Where the run folder has a checkpoint the run goes on from it; one that ended before its first is put aside.
train() {
    local config=$1 nodes=$2 run resume=()
    run=runs/$(basename "$config" .yaml)
    if compgen -G "$run/checkpoints/step_*/manifest.json" >/dev/null; then
        resume=(--resume)
    elif [[ -e $run/metrics.jsonl ]]; then
        mv "$run" "$run-before-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
    fi
    srun --nodes="$nodes" --ntasks="$((nodes * SLURM_NTASKS_PER_NODE))" --ntasks-per-node="$SLURM_NTASKS_PER_NODE" \
        --nodelist="$(IFS=,; echo "${NODES[*]:0:nodes}")" --gpus-per-node="$SLURM_NTASKS_PER_NODE" \
        --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 \
        megarl train "$config" --run-dir "$run" "${resume[@]}" "${@:3}" &
    local step=$!
    trap 'stop_and_requeue "$step"' USR1  # before the time limit, see --signal; bash runs it while it waits
    wait "$step"
}

# stop_and_requeue PID: srun passes the signal on, and MegaRL saves a checkpoint at the end of its step and ends (status 75); a step
# that takes longer is lost, and the job goes on from the checkpoint before
stop_and_requeue() {
    kill -USR1 "$1" 2>/dev/null || true
    for ((second = 0; second < 540; second++)); do
        kill -0 "$1" 2>/dev/null || break
        sleep 1
    done
    scontrol requeue "$SLURM_JOB_ID"
}
