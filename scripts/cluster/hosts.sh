# Commands on hosts: by ssh, by srun inside a Slurm allocation, or in this shell for localhost.
# Sourced by launch_cluster.sh.

in_allocation() { [ -n "${SLURM_JOB_ID:-}" ] && command -v srun >/dev/null; }

# on_host HOST COMMAND: runs COMMAND in bash there, without input.
on_host() {
  if [ "$1" = localhost ]; then
    bash -c "$2" </dev/null
  elif in_allocation; then
    srun --overlap --jobid="$SLURM_JOB_ID" --nodes=1 --ntasks=1 --nodelist="$1" bash -c "$2" </dev/null
  else
    ssh -n -o BatchMode=yes -o ConnectTimeout=10 "$1" "$2"
  fi
}

# The name in USER@NAME.
name_of() { echo "${1#*@}"; }

# quoted WORD...: as one line that bash takes apart again.
quoted() { printf '%q ' "$@"; }

# in_checkout WORD...: a command that runs these words, which may begin with NAME=VALUE, in the checkout; it
# is at the same path on every host.
in_checkout() { quoted env -C "$checkout" "PYTHONPATH=$checkout:$checkout/kernels" "$@"; }
