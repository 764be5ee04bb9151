# Shared by the scripts of this folder, which source it; does nothing by itself.
# shellcheck shell=bash

EXIT_RETRY=75 # exit status of a run that saved where it is (quietstar_jax/errors.py)
STOPPED=130    # the same, stopped by a person with Ctrl-C
: "${MAX_RESTARTS:=50}" "${RESTART_SECONDS:=10}" "${MAX_RESTART_SECONDS:=300}"

DRY_RUN=false
ARGUMENTS=() # of the training command
TOLD_TO_LEAVE=false # `again` ended because of SIGTERM or SIGINT, not by itself

# The head of the script, and its variables as its lines NAME=${NAME:-DEFAULT} # MEANING declare them.
show_help() {
  local line name value meaning needed declaration='^([A-Z_]+)=\$\{[A-Z_]+:-(.*)\}( # (.*))?$'
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
  needed=" $(sed -n 's/^need //p' "$0") "
  printf '%s\n' "Variables, set before the command (NAME=... $0 ...) or at the top of the script, with their defaults:"
  while IFS= read -r line; do
    [[ $line =~ $declaration ]] || continue
    name=${BASH_REMATCH[1]} value=${BASH_REMATCH[2]} meaning=${BASH_REMATCH[4]:-}
    if [[ -z $value && $needed == *" $name "* ]]; then value="(required)"; fi
    printf '  %s=%s%s\n' "$name" "$value" "${meaning:+  # $meaning}"
  done <"$0"
  printf '  %s\n' "MAX_RESTARTS=$MAX_RESTARTS  # of a run that saved and left, or was killed" \
    "RESTART_SECONDS=$RESTART_SECONDS  # before the first restart; each further pause is twice as long" \
    "MAX_RESTART_SECONDS=$MAX_RESTART_SECONDS  # the longest of these pauses"
}

# Takes --dry-run and --help away; everything else is for the training command.
parse_arguments() {
  local argument
  for argument in "$@"; do
    case $argument in
      --dry-run) DRY_RUN=true ;;
      -h | --help) show_help && exit 0 ;;
      *) ARGUMENTS+=("$argument") ;;
    esac
  done
  if ((${#ARGUMENTS[@]} == 0)); then
    fail "nothing to run. Give the arguments of quietstar_jax.train, such as --config configs/quickstart.py"
  fi
}

fail() {
  echo "error: $*" >&2
  exit 2
}

# Each variable named must have a value.
need() {
  local name
  for name in "$@"; do
    [[ -n ${!name:-} ]] || fail "$name is empty. Set it at the top of $0 or before the command: $name=... $0 ..."
  done
}

# Refuses a --config.workdir that only one host has. FOLDER begins the paths that all hosts see; empty = relative ones too.
need_shared_workdir() { # FOLDER
  local argument workdir="" given=false
  for argument in "${ARGUMENTS[@]}"; do
    if $given || [[ $argument == --config.workdir=* ]]; then workdir=${argument#--config.workdir=}; fi
    if [[ $argument == --config.workdir ]]; then given=true; else given=false; fi
  done
  case $workdir in
    "" | *://*) ;; # the one of the configuration, which the run itself tries; an object store
    /tmp | /tmp/* | /var/tmp/* | /dev/shm/*) fail "config.workdir $workdir is another folder on each host. Choose one that all share" ;;
    "${1%/}"/* | "$1"*) ;;
    *) fail "config.workdir $workdir is another folder on each host. Choose one under $1, which all share, or gs://BUCKET/FOLDER" ;;
  esac
}

# The arguments as one line that a shell reads back as they were.
quote() {
  local word line=""
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then line+="$word "; else line+="${word@Q} "; fi
  done
  printf '%s' "${line% }"
}

# Runs a command, or with --dry-run prints it.
run() {
  if $DRY_RUN; then printf '%s\n' "$(quote "$@")"; else "$@"; fi
}

# run_with_input TEXT COMMAND...: the same for a command that reads TEXT.
run_with_input() {
  local text=$1
  shift
  if $DRY_RUN; then
    printf "%s <<'EOF'\n%s\nEOF\n" "$(quote "$@")" "$text"
  else
    "$@" <<<"$text"
  fi
}

# Whether a run that ended so is to be started again: it saved and left, or it was killed, but not by Ctrl-C.
goes_on() { (($1 == EXIT_RETRY || ($1 > 128 && $1 != STOPPED))); }

# Waits for a process to end, and has its exit status. A trapped signal interrupts `wait` with a status above 128, so
# that one is asked again until it is that of a process which is gone.
wait_for() {
  local status next
  wait "$1" && status=0 || status=$?
  while ((status > 128)); do
    wait "$1" 2>/dev/null && next=0 || next=$?
    if ((next == 127)) || { ((next == status)) && ! kill -0 "$1" 2>/dev/null; }; then break; fi
    status=$next
  done
  return "$status"
}

# Runs a command, and starts it again while `goes_on` says so, at most MAX_RESTARTS times, with pauses that double.
# SIGTERM and SIGINT are handed on, and end it; TOLD_TO_LEAVE is then true.
again() {
  local child status restarts=0 pause=$RESTART_SECONDS begun
  while true; do
    begun=$SECONDS
    "$@" &
    child=$!
    trap 'TOLD_TO_LEAVE=true; kill -TERM "$child" 2>/dev/null || true' TERM INT
    wait_for "$child" && status=0 || status=$?
    if $TOLD_TO_LEAVE || ! goes_on "$status"; then return "$status"; fi
    if ((restarts == MAX_RESTARTS)); then
      echo "launch: status $status after $restarts restarts; giving up" >&2
      return "$status"
    fi
    ((SECONDS - begun < 600)) || pause=$RESTART_SECONDS
    restarts=$((restarts + 1))
    echo "launch: status $status; restart $restarts of at most $MAX_RESTARTS in $pause s" >&2
    sleep "$pause" &
    child=$!
    wait_for "$child" || true
    if $TOLD_TO_LEAVE; then return "$status"; fi
    pause=$((pause * 2 < MAX_RESTART_SECONDS ? pause * 2 : MAX_RESTART_SECONDS))
  done
}
