# Processes on hosts, each with a log here, ended by pid and start time. Sourced by launch_cluster.sh.

names=() hosts_of=() jobs_of=()

# start_process NAME HOST COMMAND: its output goes to $logs/NAME.log, whose first line is its pid there.
start_process() {
  local told='echo "pid $$ $(sed "s/.*) //" /proc/$$/stat | cut -d" " -f20)";'
  on_host "$2" "$told $3" >"$logs/$1.log" 2>&1 &
  names+=("$1") hosts_of+=("$2") jobs_of+=("$!")
}

# Whether process number I of this script runs, as far as can be seen from here.
is_running() { kill -0 "${jobs_of[$1]}" 2>/dev/null; }

# pid_of I: its pid and start time on its host, which its log begins with; fails where it told none.
pid_of() {
  local word="" pid started
  for _ in $(seq 50); do # it may just have been started
    read -r word pid started <"$logs/${names[$1]}.log" || true
    if [ "$word" = pid ]; then
      echo "$pid $started"
      return 0 # said aloud: in a trap, a bare return is of what went before
    fi
    is_running "$1" || return 1
    sleep 0.1
  done
  return 1
}

# signal_process I SIGNAL: nothing where it has ended, or where its pid is another process by now. Asks its
# host even where the connection to it has ended.
signal_process() {
  local pid started told
  told=$(pid_of "$1") || return 0
  read -r pid started <<<"$told"
  on_host "${hosts_of[$1]}" \
    "[ \"\$(sed 's/.*) //' /proc/$pid/stat 2>/dev/null | cut -d' ' -f20)\" != $started ] || kill -$2 $pid" ||
    echo "launch_cluster: cannot end ${names[$1]}, process $pid on ${hosts_of[$1]}" >&2
}

# stop_processes SECONDS I...: SIGTERM to all at once, and SIGKILL to what is left.
stop_processes() {
  local patience=$1 i end signals=()
  shift
  for i in "$@"; do
    signal_process "$i" TERM &
    signals+=("$!")
  done
  [ "${#signals[@]}" = 0 ] || wait "${signals[@]}" || true
  end=$((SECONDS + patience))
  for i in "$@"; do
    while is_running "$i" && [ "$SECONDS" -lt "$end" ]; do sleep 0.1; done
    ! is_running "$i" || signal_process "$i" KILL
  done
}
