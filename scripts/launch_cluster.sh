#!/usr/bin/env bash
# Serves a model on several hosts: a coordinator on the first one, and an engine for each GPU of all.
#
#   scripts/launch_cluster.sh HOST[,HOST...] MODEL [options] [-- engine options...]
#   scripts/launch_cluster.sh slurm MODEL ...        inside a Slurm allocation: on all of its hosts
#
#   --port N               of the coordinator, for clients too (50051)
#   --engines-per-host N   on the CPU, N on each host; without it one for each GPU
#   --address HOST         where engines and clients reach the coordinator (the first host's name)
#   --bind ADDRESS         what the coordinator listens on (0.0.0.0; localhost alone: 127.0.0.1)
#   --python PATH          on every host (.venv/bin/python of this checkout)
#   --logs FOLDER          for the logs of all of them (cluster-logs/DATE)
#   --timeout SECONDS      for all engines to be ready (900)
#   --coordinator WORDS    more options of `chiron coordinator`, as one argument
#
# Hosts are reached by ssh without a password, and have this checkout and MODEL at the same paths.
# Everything is checked before anything starts. Ctrl-C, or a failure, ends all that was started.
set -euo pipefail
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$checkout/scripts/cluster/hosts.sh"
source "$checkout/scripts/cluster/processes.sh"

usage() {
  sed -n '2,/^set -e/{/^set -e/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" >&2
  exit 2
}
fail() {
  echo "launch_cluster: $*" >&2
  exit 1
}

port=50051 engines_per_host="" address="" bind="" python=$checkout/.venv/bin/python timeout=900 more=""
logs=cluster-logs/$(date +%Y%m%d-%H%M%S)

[ $# -ge 2 ] || usage
wanted_hosts=$1 model=$2
shift 2
while [ $# -gt 0 ]; do
  case $1 in
    --) shift && break ;;
    --port | --engines-per-host | --address | --bind | --python | --logs | --timeout | --coordinator)
      [ $# -ge 2 ] || usage
      case $1 in
        --port) port=$2 ;;
        --engines-per-host) engines_per_host=$2 ;;
        --address) address=$2 ;;
        --bind) bind=$2 ;;
        --python) python=$2 ;;
        --logs) logs=$2 ;;
        --timeout) timeout=$2 ;;
        --coordinator) more=$2 ;;
      esac
      shift 2
      ;;
    *) usage ;;
  esac
done
options=("$@")
for number in "$port" "$timeout" "${engines_per_host:-1}"; do
  [[ $number =~ ^[1-9][0-9]*$ ]] || fail "$number is no number over 0"
done

if [ "$wanted_hosts" = slurm ]; then
  in_allocation || fail "there is no Slurm allocation here; use salloc or sbatch, or name the hosts"
  mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
else
  IFS=, read -ra hosts <<<"$wanted_hosts"
fi
duplicate=$(printf '%s\n' "${hosts[@]}" | sort | uniq -d)
[ -z "$duplicate" ] || fail "host $duplicate is named twice; see --engines-per-host"
first=${hosts[0]}
address=${address:-$(name_of "$first")}
if [ -z "$bind" ]; then
  bind=0.0.0.0
  [ "${hosts[*]}" != localhost ] || bind=127.0.0.1
fi
mkdir -p "$logs"
logs=$(cd "$logs" && pwd)

# Checks, on all hosts at once.
kind=GPU
[ -z "$engines_per_host" ] || kind=CPU
probes=()
for host in "${hosts[@]}"; do
  its_port=()
  [ "$host" != "$first" ] || its_port=("$port")
  command=$(in_checkout "$python" -P scripts/cluster/probe.py "$kind" "${its_port[@]}")
  on_host "$host" "$command" >"$logs/$host.probe" 2>"$logs/$host.probe-errors" &
  probes+=("$!")
done
troubles=0 version="" devices=() cores=()
trouble() {
  echo "launch_cluster: $1: $2" >&2
  troubles=$((troubles + 1))
}
for i in "${!hosts[@]}"; do
  host=${hosts[i]}
  devices[i]="" cores[i]=1
  if ! wait "${probes[i]}"; then
    trouble "$host" "the check failed: $(tail -n 1 "$logs/$host.probe-errors")"
    continue
  fi
  while IFS="=" read -r name value; do
    case $name in
      version)
        version=${version:-$value}
        [ "$value" = "$version" ] || trouble "$host" "has version $value; $first has $version"
        ;;
      cores) cores[i]=$value ;;
      gpus) devices[i]=$value ;;
      trouble) trouble "$host" "$value" ;;
    esac
  done <"$logs/$host.probe"
  [ "$kind" = CPU ] || [ -n "${devices[i]}" ] || trouble "$host" "has no usable GPU; --engines-per-host N takes CPUs"
  [ "$model" = "${model#/}" ] || on_host "$host" "[ -d $(quoted "$model")]" || trouble "$host" "has no directory $model"
done
[ "$troubles" = 0 ] || fail "nothing was started; logs are in $logs"

# From here on whatever happens, all is stopped.
stop_all() {
  trap '' INT TERM HUP
  trap - EXIT
  echo "launch_cluster: stopping" >&2
  [ "${#names[@]}" = 0 ] || stop_processes 60 0 # the coordinator drains, the engines serve meanwhile
  [ "${#names[@]}" -le 1 ] || stop_processes 45 $(seq 1 $((${#names[@]} - 1)))
  echo "launch_cluster: stopped; logs are in $logs" >&2
  exit "$1"
}
trap 'stop_all 1' EXIT
trap 'stop_all 130' INT
trap 'stop_all 0' TERM HUP
set -m # a group for each job: Ctrl-C reaches only this script, which then stops them in order

read -ra more_words <<<"$more"
start_process coordinator "$first" "exec $(in_checkout "$python" -P -m chiron_engine coordinator "$model" \
  --host "$bind" --grpc-port "$port" "${options[@]}" "${more_words[@]}")"

# start_engine NAME HOST WORD...: the words go before and after what all engines have in common.
start_engine() {
  local name=$1 host=$2 before=$3
  shift 3
  start_process "$name" "$host" "exec $(in_checkout $before "$python" -P -m chiron_engine engine "$model" \
    --headless --grpc-port 0 --join "$address:$port" "${options[@]}" "$@")"
}
for i in "${!hosts[@]}"; do
  label=$(name_of "${hosts[i]}")
  for device in ${devices[i]}; do
    start_engine "engine-$label-gpu$device" "${hosts[i]}" "CUDA_VISIBLE_DEVICES=$device"
  done
  threads=()
  if [[ " ${options[*]} " != *" simulated "* && " ${options[*]} " != *" --threads "* ]]; then
    threads=(--threads $((cores[i] > ${engines_per_host:-1} ? cores[i] / ${engines_per_host:-1} : 1)))
  fi
  for n in $(seq "${engines_per_host:-0}"); do
    start_engine "engine-$label-$n" "${hosts[i]}" "" "${threads[@]}"
  done
done
num_engines=$((${#names[@]} - 1))
echo "launch_cluster: 1 coordinator and $num_engines engines on ${#hosts[@]} hosts; logs are in $logs" >&2

# The cause that process number I gave, or whatever it said last.
last_words() {
  local log=$logs/${names[$1]}.log
  grep -m 1 -e '^chiron: ' -e '^{"report": "failed"' "$log" || tail -n 1 "$log"
}

# Until all are ready.
is_ready() {
  grep -q "; try:$" "$logs/coordinator.log" || return 1
  for name in "${names[@]:1}"; do
    grep -q '^{"report": "ready"' "$logs/$name.log" || return 1
  done
}
end=$((SECONDS + timeout))
until is_ready; do
  for i in "${!names[@]}"; do
    is_running "$i" || fail "${names[i]} on ${hosts_of[i]} has ended: $(last_words "$i")"
  done
  [ "$SECONDS" -lt "$end" ] || fail "not ready within $timeout s; logs are in $logs"
  sleep 0.2
done
echo "launch_cluster: ready; try:" >&2
sed -n '/; try:$/{n;p;q}' "$logs/coordinator.log" | sed "s/127\.0\.0\.1:$port/$address:$port/"

# Until Ctrl-C. The fleet goes on without an engine that ends, as long as there is one.
gone=()
while [ "${#gone[@]}" -lt "$num_engines" ]; do
  is_running 0 || fail "the coordinator has ended: $(last_words 0)"
  for i in $(seq "$num_engines"); do
    if [[ " ${gone[*]} " != *" $i "* ]] && ! is_running "$i"; then
      echo "launch_cluster: ${names[i]} has ended: $(last_words "$i")" >&2
      gone+=("$i")
    fi
  done
  sleep 1 &
  wait $! || true # a signal ends the wait at once
done
fail "no engine is left"
