# What the scripts share. Sourced from the project's root folder, under `set -euo pipefail`.

fail() { # CODE HEADLINE FOUND FIX: an error a person can act on, then the end
  printf '%s  %s\n  found  %s\n  fix    %s\n  help   docs/troubleshooting.md#%s\n' "$1" "$2" "$3" "$4" "${1,,}" >&2
  exit 1
}

step() { # NAME COMMAND...: run one named step and note its seconds in $BOUQUET_TIMES
  local name=$1 start=$EPOCHREALTIME; shift
  printf '%s: %s\n' "${0##*/}" "$name"
  "$@"
  [ -z "${BOUQUET_TIMES:-}" ] || awk -v n="$name" -v a="$start" -v b="$EPOCHREALTIME" \
    'BEGIN { printf "%s\t%.1f\n", n, b - a }' >>"$BOUQUET_TIMES"
}

setting() { # KEY [DEFAULT]: the environment's value, else .env's, else the default
  local value=${!1:-}
  [ -n "$value" ] || value=$(sed -n "s/^$1=//p" .env 2>/dev/null | tail -1)
  printf '%s\n' "${value:-${2:-}}"
}

keep() { # KEY VALUE: write KEY to .env unless it is there already (what a person wrote stays)
  touch .env
  grep -q "^$1=" .env || printf '%s=%s\n' "$1" "$2" >>.env
}

container_user() { # uid:gid of the containers: this user, or 10001 when this user is root
  [ "$(id -u)" = 0 ] && echo 10001:10001 || echo "$(id -u):$(id -g)"
}
