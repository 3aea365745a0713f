#!/bin/bash
# One sweep on the nodes of one Slurm job: sbatch ray_on_slurm.sh +sweeps=nano/bit_level results=/shared/results
# The arguments are those of `kbit run`. docs/slurm.md says what to change.
#SBATCH --job-name=kbit
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=12:00:00
# For GPUs: #SBATCH --gpus-per-node=4, and device=cuda among the arguments.
set -euo pipefail

# source /shared/kbit/.venv/bin/activate

export RAY_worker_niceness=0 RAY_USAGE_STATS_ENABLED=0
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN   # only this job's processes may join
RAY_AUTH_TOKEN=$(head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n')
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
on_one=(srun --nodes=1 --ntasks=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" --nodelist)
ip=$("${on_one[@]}" "${nodes[0]}" hostname --ip-address | tr ' ' '\n' | awk '/[.]/ && !/^127[.]/ && !n++; END {exit !n}') || {
  echo "${nodes[0]} knows no address of itself that other nodes reach: set ip= in this script" >&2
  exit 1
}
address=$ip:$((20000 + SLURM_JOB_ID % 10000))   # jobs may share a node
log=ray-$SLURM_JOB_ID.log
# Each node has the CPUs and GPUs that Slurm gave, not all that it has. kbit keeps nothing in Ray's object store.
ray_node=(ray start --block --num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="${SLURM_GPUS_ON_NODE:-0}"
  --object-store-memory=200000000 --disable-usage-stats)

trap 'kill $(jobs -p) 2>/dev/null; wait' EXIT
"${on_one[@]}" "${nodes[0]}" "${ray_node[@]}" --head --node-ip-address="$ip" --port="${address#*:}" \
  --include-dashboard=false &>>"$log" &
for node in "${nodes[@]:1}"; do
  "${on_one[@]}" "$node" "${ray_node[@]}" --address="$address" &>>"$log" &
done

python - "$address" "${#nodes[@]}" <<'WAIT'
import sys, time, ray
address, nodes = sys.argv[1], int(sys.argv[2])
end, there = time.monotonic() + 600, []
while len(there) < nodes:
    if time.monotonic() > end:
        sys.exit(f"after 600 s only these of {nodes} nodes have joined Ray at {address}: {there}")
    time.sleep(1)
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", ignore_reinit_error=True)
        there = [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]]
    except ConnectionError:
        continue
WAIT

kbit run -m ray.address="$address" "$@"
