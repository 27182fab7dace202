# Sourced by the scripts beside it, never run: start, watch and stop daemons on a machine without an init system.
# A sourcing script sets DIR (all its state) and runs as root. Messages go to stderr: stdout is for `eval`.
export PATH=/usr/local/sbin:/usr/sbin:/sbin:$PATH DEBIAN_FRONTEND=noninteractive
exec 3>&2

say() { echo "[${0##*/}] $*" >&3; }
die() { say "ERROR: $*"; exit 1; }

# dead PID: gone, or a zombie, because the init process of a container may take seconds to reap
dead() {
  local state; state=$(sed 's/.*) //' "/proc/$1/stat" 2>/dev/null) || return 0
  [ -z "$state" ] || [ "${state%% *}" = Z ]
}

# alive PIDFILE NAME: its pid is a live process of that name; a stale file may name another process
alive() {
  local pid; pid=$(cat "$1" 2>/dev/null) || return 1
  [ -n "$pid" ] && [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$2" ] && ! dead "$pid"
}

# stop PIDFILE NAME [SIGNAL]: SIGKILL follows after 20 s
stop() {
  alive "$1" "$2" || { rm -f "$1"; return 0; }
  local pid i; pid=$(cat "$1"); kill -"${3:-TERM}" "$pid" 2>/dev/null || true
  for ((i = 0; i < 200; i++)); do dead "$pid" && break; sleep 0.1; done
  dead "$pid" || kill -KILL "$pid" 2>/dev/null || true
  rm -f "$1"
}

# wait_for SECONDS WHAT COMMAND...
wait_for() {
  local seconds=$1 what=$2 i; shift 2
  for ((i = 0; i < seconds * 5; i++)); do "$@" >/dev/null 2>&1 && return 0; sleep 0.2; done
  die "$what did not come up in ${seconds} s; logs are in $DIR/log"
}

# install PACKAGE:COMMAND...: the packages whose command is missing; dpkg starts no service meanwhile
install() {
  local missing=() pair policy=/usr/sbin/policy-rc.d made='' log=/var/tmp/ifvit-apt.log
  for pair; do command -v "${pair#*:}" >/dev/null || missing+=("${pair%%:*}"); done
  [ ${#missing[@]} -gt 0 ] || return 0
  say "installing ${missing[*]}"
  exec 8>/run/ifvit-apt.lock; flock 8 # apt-get refuses to wait for another `apt-get update`
  if [ ! -e $policy ]; then printf '#!/bin/sh\nexit 101\n' >$policy; chmod 755 $policy; made=1; fi
  { apt-get update -qq && apt-get install -y -qq --no-install-recommends "${missing[@]}"; } \
    >$log 2>&1 8>&- 9>&- || die "apt-get failed, see $log: $(tail -3 $log)"
  if [ -n "$made" ]; then rm -f $policy; fi
  exec 8>&-
}

# launch DAEMON...: without the lock and the caller's stderr, which it would hold open for ever
launch() { "$@" 3>&- 9>&- </dev/null; }

# only_one: wait for another run of the same script
only_one() {
  [ "$(id -u)" = 0 ] || die "needs root"
  exec 9>"/run/${0##*/}.lock"; flock -w 300 9 || die "another ${0##*/} holds the lock"
}
